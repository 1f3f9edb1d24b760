"""The commands `score` and `rank`."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from aigiqa_reward.cli._console import CommandError, Format, Row, emit, encoded, progress, render, say
from aigiqa_reward.cli._io import Source, attach_prompts, check_output, find_images, write
from aigiqa_reward.cli._options import DEVICE, DType, ImageOptions, RewardOptions, option, options
from aigiqa_reward.cli._pipelines import library, load_rewards
from aigiqa_reward.utils.io import MAX_BYTES, parse_json, read_regular

if TYPE_CHECKING:
    from aigiqa_reward import Reward
    from aigiqa_reward.rewards.scorer import ScoredImage

RANKING = "ranking.jsonl"


@options("Reward")
class ComputeOptions:
    """Where and how a reward computes."""

    device: str | None = option(None, DEVICE)
    dtype: DType = option("float32", "Precision of the reward's towers; its heads stay in float32.")
    batch_size: int = option(32, "Number of images that are read and scored at a time.", min=1)


@options("Output")
class OutputOptions:
    """Form and place of the result."""

    format: Format = option("table", "Form of the result: a table to read, JSON Lines or CSV.")
    output: str = option("-", "File for the result, replaced if it exists; - is stdout.", metavar="FILE|-")

    @property
    def file(self) -> Path | None:
        """The file; None for stdout."""
        return None if self.output == "-" else Path(self.output)


@options("Output")
class CopyOptions:
    """Choice and copies of the best."""

    top_k: int | None = option(None, "Number of images to list; all by default.", min=1)
    copy_to: Path | None = option(None, "Folder for copies of the listed images as 001_NAME, ... and ranking.jsonl.")
    overwrite: bool = option(False, "Replace an earlier ranking in the folder of --copy-to.")


def score(images: ImageOptions, reward: RewardOptions, compute: ComputeOptions, output: OutputOptions) -> None:
    """Score images, in the order given."""
    check_output(output.file)
    paths = find_images(images.images, recursive=images.recursive)
    result = score_images(paths, images, reward, compute)
    _print(result.rows, output)
    result.conclude(len(paths))


def rank(
    images: ImageOptions, reward: RewardOptions, compute: ComputeOptions, output: OutputOptions, copies: CopyOptions
) -> None:
    """Score images and list the best first; those that could not be scored come last."""
    from aigiqa_reward.rewards.ranking import rank as best_first

    check_output(output.file)
    _check_copies(copies)
    paths = find_images(images.images, recursive=images.recursive)
    result = score_images(paths, images, reward, compute)
    order = best_first(math.nan if row.total is None else row.total for row in result.rows)
    ranked = [result.rows[place] for place in order]
    best = [row for row in ranked if row.error is None][: copies.top_k]
    rows = best + [row for row in ranked if row.error is not None]
    _print(rows, output, numbered=True)
    if copies.copy_to is not None and result.failure is None:  # not of an interrupted ranking
        copy_ranked(rows, copies.copy_to, originals=paths, overwrite=copies.overwrite)
    result.conclude(len(paths))


def _print(rows: Sequence[Row], output: OutputOptions, *, numbered: bool = False) -> None:
    if not rows:  # interrupted before the first one
        return
    terminal = output.file is None and sys.stdout.isatty()
    text = render(rows, output.format, numbered=numbered, terminal=terminal)
    if output.file is None:
        emit(text)
    else:
        write(output.file, encoded(text))


# --------------------------------------------------------------------------------------------- scoring


@dataclass(kw_only=True)
class ScoringRun:
    """Rows of the images that were reached, in their order, and what ended the scoring early."""

    rows: list[Row] = field(default_factory=list)
    failure: CommandError | KeyboardInterrupt | None = None

    def conclude(self, images: int) -> None:
        """End the command with the status that fits."""
        if isinstance(self.failure, KeyboardInterrupt):
            say("error", f"interrupted: the result holds {len(self.rows)} of {images} images")
            raise typer.Exit(130) from self.failure
        if self.failure is not None:
            raise self.failure
        if any(row.error is not None for row in self.rows):
            raise typer.Exit(1)


def score_images(
    paths: Sequence[str], images: ImageOptions, reward: RewardOptions, compute: ComputeOptions
) -> ScoringRun:
    """Score image files as the options say."""
    sources = attach_prompts(paths, images.prompt, images.prompts, images.prompt_column)
    return score_sources(load_rewards(reward, compute.device, compute.dtype), sources, compute.batch_size)


def score_sources(
    rewards: Mapping[str, tuple[Reward, float]], sources: Sequence[Source], batch_size: int
) -> ScoringRun:
    """Score all sources that can be scored by rewards with their weights; when interrupted, return what was reached."""
    from aigiqa_reward import Scorer

    rows = {i: Row(key=s.path, prompt=None, error=s.error) for i, s in enumerate(sources) if s.error is not None}
    for row in rows.values():
        _report(row)
    places = [i for i in range(len(sources)) if i not in rows]
    prompts = [text for i in places if (text := sources[i].prompt) is not None] or None
    for name, (reward, _) in rewards.items():
        if prompts is None and reward.needs_prompts and places:
            raise CommandError(f"{name} needs prompts here: pass --prompt or --prompts")
    weights = {name: weight for name, (_, weight) in rewards.items()}
    result = ScoringRun()
    try:
        with progress("scoring", len(places)) as show, library():
            files = [sources[i].path for i in places]
            streams = [Scorer(reward, batch_size).stream(files, prompts) for reward, _ in rewards.values() if files]
            for found in zip(*streams, strict=True):
                place = places[found[0].index]
                rows[place] = _row(sources[place], dict(zip(weights, found, strict=True)), weights)
                _report(rows[place])
                show(found[0].index + 1)
    except (CommandError, KeyboardInterrupt) as error:
        result.failure = error
    result.rows = [rows[place] for place in sorted(rows)]
    return result


def score_table(
    reward: Reward, paths: Sequence[str], prompts: Sequence[str], batch_size: int, *, argument: str
) -> list[Row]:
    """Return a row for each image of the data that an option names; those that cannot be read are reported."""
    sources = [Source(path=path, prompt=prompt) for path, prompt in zip(paths, prompts, strict=True)]
    result = score_sources({reward.name: (reward, 1.0)}, sources, batch_size)
    if isinstance(result.failure, KeyboardInterrupt):
        say("error", "interrupted: nothing is written")
        raise typer.Exit(130) from result.failure
    if result.failure is not None:
        raise result.failure
    if all(row.error is not None for row in result.rows):
        raise CommandError(f"none of the {len(sources)} images could be scored", argument=argument, status=1)
    return result.rows


def _row(source: Source, found: Mapping[str, ScoredImage], weights: Mapping[str, float]) -> Row:
    """The row of one image: the weighted mean over the rewards and, of several, each one's own scores."""
    error = next((each.error for each in found.values() if each.output is None), None)
    if error is not None:
        return Row(key=source.path, prompt=source.prompt, error=error)
    scores: dict[str, dict[str, float]] = {"total": {}, "quality": {}, "correspondence": {}}
    for name, each in found.items():
        for aspect, known in scores.items():
            value = getattr(each.output, aspect)
            if value is not None:
                known[name] = value.item()
    members = {f"{name}.{aspect}": known.get(name) for name in found for aspect, known in scores.items()}
    means = {aspect: _mean(known, weights) for aspect, known in scores.items()}
    return scored(source.path, source.prompt, **means, members=members if len(found) > 1 else {})


def _mean(values: Mapping[str, float], weights: Mapping[str, float]) -> float | None:
    if len(values) < 2:
        return next(iter(values.values()), None)
    return sum(weights[name] * value for name, value in values.items()) / sum(weights[name] for name in values)


def scored(
    key: str | int,
    prompt: str | None,
    total: float | None,
    quality: float | None,
    correspondence: float | None,
    members: Mapping[str, float | None] | None = None,
) -> Row:
    """Return a row of these scores, or one with an error if they are not numbers that can be ranked."""
    given = [value for value in (total, quality, correspondence, *(members or {}).values()) if value is not None]
    if not all(map(math.isfinite, given)):
        return Row(key=key, prompt=prompt, error=f"the reward gave {total}")
    return Row(
        key=key,
        prompt=prompt,
        total=total,
        quality=quality,
        correspondence=correspondence,
        members=members or {},
    )


def _report(row: Row) -> None:
    if row.error is not None:
        say("error", row.error if row.error.startswith(f"{row.key}: ") else f"{row.key}: {row.error}")


# --------------------------------------------------------------------------------------------- copies


def _check_copies(copies: CopyOptions) -> None:
    """Refuse a folder that holds an earlier ranking, before anything is computed."""
    folder = copies.copy_to
    if folder is not None and folder.exists() and not folder.is_dir():
        raise CommandError(f"expected a folder, got {folder}", argument="copy_to")
    if folder is not None and (folder / RANKING).exists() and not copies.overwrite:
        text = f"{folder} holds the {RANKING} of an earlier run; --overwrite replaces it"
        raise CommandError(text, argument="copy_to")


def copy_ranked(rows: Sequence[Row], folder: Path, *, originals: Sequence[str], overwrite: bool) -> None:
    """Copy the images of a ranking into a folder as 001_NAME, 002_NAME, ..., and write its ranking.jsonl.

    With `overwrite` the copies that an earlier ranking.jsonl in the folder lists are removed, so that the folder holds
    one ranking; all other files stay. None of the `originals`, which took part in the ranking, is ever overwritten.
    """
    sources = [Path(str(row.key)) for row in rows if row.error is None]
    copies = [folder / name for name in _names(sources)]
    kept = {os.path.realpath(path) for path in originals}
    for copy in copies:
        if os.path.realpath(copy) in kept:
            text = f"{copy} is itself one of the images ranked; choose another folder"
            raise CommandError(text, argument="copy_to")
        if os.path.lexists(copy) and not overwrite:
            raise CommandError(f"{copy} exists; --overwrite replaces files of the same names", argument="copy_to")
    with library():
        for source, copy in zip(sources, copies, strict=True):
            write(copy, source.read_bytes())
        for earlier in _copies_of(folder) - {copy.name for copy in copies}:
            if os.path.realpath(folder / earlier) not in kept:
                (folder / earlier).unlink(missing_ok=True)
    write(folder / RANKING, render(rows, "jsonl").encode())


def _names(sources: Sequence[Path]) -> list[str]:
    """Names of the copies of a ranking's images, best first."""
    return [f"{place:03d}_{source.name}" for place, source in enumerate(sources, start=1)]


def _copies_of(folder: Path) -> set[str]:
    """Names of the copies in a folder that its ranking.jsonl lists; none if it is not one of ours."""
    try:
        lines = read_regular(folder / RANKING, most=MAX_BYTES).decode("utf-8").splitlines()
        ranked = [Path(row["path"]) for row in map(parse_json, lines) if row["error"] is None]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return set(_names(ranked)) & {entry.name for entry in folder.iterdir()}
