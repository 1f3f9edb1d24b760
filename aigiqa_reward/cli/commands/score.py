"""The commands `score` and `rank`."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import typer

from aigiqa_reward.cli._console import CommandError, Format, Row, emit, encoded, jsonl, progress, render, say
from aigiqa_reward.cli._io import Source, attach_prompts, check_output, find_images, write
from aigiqa_reward.cli._options import DEVICE, DType, ImageOptions, RewardOptions, option, options
from aigiqa_reward.cli._pipelines import library, load_rewards, meanings
from aigiqa_reward.cli.commands.bulk import BulkOptions, score_in_bulk
from aigiqa_reward.utils.io import MAX_BYTES, fit_name, parse_json, read_regular, write_atomically
from aigiqa_reward.utils.run_folder import digest, read_jsonl, reward_identity

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
    output: Path = option(Path("-"), "File for the result, replaced if it exists; - is stdout.", metavar="FILE|-")
    overwrite: bool = option(False, "Start anew: ignore FILE.partial, and replace an earlier ranking of --copy-to.")

    @property
    def file(self) -> Path | None:
        """The file; None for stdout."""
        return None if self.output == Path("-") else self.output

    @property
    def on_screen(self) -> bool:
        """Whether the result is a table in the terminal."""
        return self.file is None and self.format == "table" and sys.stdout.isatty()


@options("Output")
class CopyOptions:
    """Choice and copies of the best."""

    top_k: int | None = option(None, "Number of images to list; all by default.", min=1)
    report: Path | None = option(None, "File for an HTML page of the listed images, best first with their scores.")
    copy_to: Path | None = option(None, "Folder for copies of the listed images as 001_NAME, ... and ranking.jsonl.")


def score(
    images: ImageOptions, reward: RewardOptions, compute: ComputeOptions, output: OutputOptions, bulk: BulkOptions
) -> None:
    """Score images, in the order given; with --engine ray a data set of any size, into Parquet files."""
    if bulk.engine == "ray":
        score_in_bulk(images, reward, compute, output, bulk)
        return
    bulk.refuse()
    check_output(output.file)
    paths = find_images(images.images, recursive=images.recursive, sidecars=images.prompts_from is not None)
    result = score_images(paths, images, reward, compute, output)
    _print(result, result.rows, output)
    result.conclude(len(paths))


def rank(
    images: ImageOptions, reward: RewardOptions, compute: ComputeOptions, output: OutputOptions, copies: CopyOptions
) -> None:
    """Score images and list the best first; those that could not be scored come last."""
    from aigiqa_reward.rewards.ranking import rank as best_first

    check_output(output.file)
    if copies.report is not None:
        check_output(copies.report, "report")
    _check_copies(copies.copy_to, overwrite=output.overwrite)
    paths = find_images(images.images, recursive=images.recursive, sidecars=images.prompts_from is not None)
    result = score_images(paths, images, reward, compute, output)
    order = best_first(math.nan if row.total is None else row.total for row in result.rows)
    ranked = [result.rows[place] for place in order]
    best = [row for row in ranked if row.error is None][: copies.top_k]
    rows = best + [row for row in ranked if row.error is not None]
    _print(result, rows, output, copies)
    if copies.copy_to is not None and result.failure is None:  # not of an interrupted ranking
        copy_ranked(rows, copies.copy_to, originals=paths, overwrite=output.overwrite)
    if copies.report is not None and result.failure is None:
        write_report(rows, copies.report, notes=result.meanings)
    result.conclude(len(paths))


def _print(result: ScoringRun, rows: Sequence[Row], output: OutputOptions, copies: CopyOptions | None = None) -> None:
    """Write a whole result to its file, and one that has no file, or cannot be written there, to stdout."""
    if not rows or (result.failure is not None and result.kept.complete):
        return
    terminal = output.file is None and sys.stdout.isatty()
    text = render(rows, output.format, numbered=copies is not None, terminal=terminal)
    if output.file is None or result.failure is not None:
        emit(text, saved=copies is not None and copies.copy_to is not None)
    else:
        try:
            write(output.file, encoded(text))
        except CommandError as error:
            emit(text)
            raise CommandError(f"{error}; the result is on stdout", argument="output", status=1) from error
        result.kept.remove()
    if all(row.total is None for row in rows):
        return
    if all(row.prompt is None for row in rows):
        say("note", "no prompt: only quality is judged")
    elif output.file is None and output.format == "table":
        for meaning in result.meanings:
            say("note", meaning)
    if copies is not None and len({row.prompt for row in rows}) > 1:
        say("note", "scores of different prompts do not compare; rank the images of one prompt at a time")


# --------------------------------------------------------------------------------------------- finished rows


class KeptRows:
    """Finished rows in FILE.partial, from which the same command continues; those with errors are tried again.

    A row is found by a digest of what decides it: settings, path, prompt, and the file's size and time.
    """

    def __init__(self, file: Path | None, settings: Any, *, overwrite: bool = False) -> None:
        self.settings, self.complete = settings, file is not None  # complete: no finished row is missing
        self.path = Path() if file is None else file.with_name(fit_name(f"{file.name}.partial"))
        self._opened: BinaryIO | None = None
        self._rows: dict[str, dict[str, Any]] = {}
        if self.complete and self.path.exists() and not overwrite:
            try:
                self._rows = {line["image"]: line["row"] for line in read_jsonl(self.path.read_bytes())}
            except (OSError, ValueError, TypeError, KeyError) as error:
                text = f"{self.path} holds no rows of an earlier run ({error}); remove it"
                raise CommandError(text, argument="output") from error

    def _key(self, path: str, prompt: str | None) -> str:
        file = os.stat(path)  # noqa: PTH116
        return digest([self.settings, path, prompt, file.st_size, file.st_mtime_ns])

    def find(self, sources: Sequence[Source]) -> dict[int, Row]:
        """Return the kept rows by the places of their images."""
        found = {}
        for place, source in enumerate(sources if self._rows else ()):
            with suppress(OSError, KeyError):
                found[place] = Row(**self._rows[self._key(source.path, source.prompt)])
        return found

    def add(self, row: Row) -> None:
        """Keep a finished row; where that is impossible, warn once."""
        if row.error is not None or not self.complete:
            return
        try:
            if self._opened is None:
                earlier = ({"image": image, "row": known} for image, known in self._rows.items())
                write_atomically(self.path, jsonl(earlier).encode())
                self._opened = self.path.open("ab", buffering=0)
            line = {"image": self._key(str(row.key), row.prompt), "row": asdict(row)}
            self._opened.write(jsonl([line]).encode())
        except OSError as error:
            self.complete = False
            say("warning", f"cannot keep finished rows in {self.path}: {error.strerror}; an interruption loses them")

    def remove(self) -> None:
        """Remove the file, once the result is whole."""
        with suppress(OSError):
            if self._opened is not None:
                self._opened.close()
            self.path.unlink()


# --------------------------------------------------------------------------------------------- scoring


@dataclass(kw_only=True)
class ScoringRun:
    """Rows of the images that were reached, in order, where they are kept, how to read them, what ended it early."""

    rows: list[Row] = field(default_factory=list)
    kept: KeptRows
    meanings: Sequence[str] = ()
    failure: CommandError | KeyboardInterrupt | None = None

    def conclude(self, images: int) -> None:
        """End the command with the status that fits."""
        if isinstance(self.failure, KeyboardInterrupt):
            raise CommandError(f"interrupted: {self._reached(images)}", status=130) from self.failure
        if self.failure is not None:
            if self.kept.complete and self.rows:
                say("note", self._reached(images))
            raise self.failure
        if any(row.error is not None for row in self.rows):
            raise typer.Exit(1)

    def _reached(self, images: int) -> str:
        if not self.kept.complete:
            return f"the result holds {len(self.rows)} of {images} images"
        done = sum(row.error is None for row in self.rows)
        return f"{self.kept.path} holds {done} of {images} images; the same command continues from it"


def score_images(
    paths: Sequence[str], images: ImageOptions, reward: RewardOptions, compute: ComputeOptions, output: OutputOptions
) -> ScoringRun:
    """Score image files as the options say; what is scored is kept beside the file of the result."""
    from aigiqa_reward.images.loading import fault

    sources = attach_prompts(paths, images.prompt, images.prompts, images.prompt_column, images.prompts_from)
    errors = [source.error or fault(source.path) for source in sources]
    sources = [replace(source, error=error) for source, error in zip(sources, errors, strict=True)]
    rewards = {} if all(errors) else load_rewards(reward, compute.device, compute.dtype)
    settings = None
    if output.file is not None:
        named = {name: [reward_identity(each), weight] for name, (each, weight) in rewards.items()}
        settings = [named, list(map(str, astuple(reward))), compute.dtype]
    kept = KeptRows(output.file, settings, overwrite=output.overwrite)
    report = (lambda _: None) if output.on_screen else None  # the table has the errors as well
    return score_sources(rewards, sources, compute.batch_size, kept, report)


def score_sources(
    rewards: Mapping[str, tuple[Reward, float]],
    sources: Sequence[Source],
    batch_size: int,
    kept: KeptRows,
    report: Callable[[Row], None] | None = None,
) -> ScoringRun:
    """Score all sources that can be scored by rewards with their weights; when interrupted, return what was reached.

    Each row with an error is reported at once, on stderr if not by `report`.
    """
    from aigiqa_reward import Scorer

    rows = {i: Row(key=s.path, prompt=None, error=s.error) for i, s in enumerate(sources) if s.error is not None}
    report = report or _report
    for row in rows.values():
        report(row)
    rows = kept.find(sources) | rows
    places = [i for i in range(len(sources)) if i not in rows]
    prompts = [text for i in places if (text := sources[i].prompt) is not None] or None
    for name, (reward, _) in rewards.items():
        if prompts is None and reward.needs_prompts and places:
            raise CommandError(f"{name} needs prompts here: pass --prompt, --prompts or --prompts-from")
    weights = {name: weight for name, (_, weight) in rewards.items()}
    result = ScoringRun(kept=kept, meanings=meanings(reward for reward, _ in rewards.values()))
    try:
        with progress("scoring", len(places)) as show, library():
            files = [sources[i].path for i in places]
            streams = [Scorer(reward, batch_size).stream(files, prompts) for reward, _ in rewards.values() if files]
            for found in zip(*streams, strict=True):
                place = places[found[0].index]
                row = _row(sources[place], dict(zip(weights, found, strict=True)), weights)
                rows[place] = replace(row, raw_prompt=sources[place].raw_prompt)
                report(rows[place])
                kept.add(rows[place])
                show(found[0].index + 1)
    except (CommandError, KeyboardInterrupt) as error:
        result.failure = error
    result.rows = [rows[place] for place in sorted(rows)]
    return result


def score_table(
    reward: Reward, paths: Sequence[str], prompts: Sequence[str], batch_size: int, kept: KeptRows, *, argument: str
) -> list[Row]:
    """Return a row for each image of the data that an option names; those that cannot be read are reported."""
    sources = [Source(path=path, prompt=prompt) for path, prompt in zip(paths, prompts, strict=True)]
    result = score_sources({reward.name: (reward, 1.0)}, sources, batch_size, kept)
    if result.failure is not None:
        result.conclude(len(sources))
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


# --------------------------------------------------------------------------------------------- page and copies


class _Opened(Sequence[Any]):
    """Images of files, each read when it is drawn."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: Any) -> Any:
        from aigiqa_reward.images.loading import open_rgb

        path: Any = self.paths[place]
        return open_rgb(path)


def write_report(rows: Sequence[Row], file: Path, *, notes: Sequence[str] = ()) -> None:
    """Write the page of a ranking, whose rows are best first and those with errors last."""
    from aigiqa_reward import BestOfNOutput
    from aigiqa_reward.report import write_page

    best, paths = [row for row in rows if row.error is None], [str(row.key) for row in rows]

    def column(aspect: str, of: Sequence[Row]) -> Any:
        values = [getattr(row, aspect) for row in of]
        return None if all(value is None for value in values) else [math.nan if v is None else v for v in values]

    names = ("quality", "correspondence")
    aspects = {name: column(name, best) for name in names} | {f"all_{name}": column(name, rows) for name in names}
    images: Any = _Opened(paths)
    output = BestOfNOutput(
        images=images,
        scores=column("total", best) or [],
        seeds=[None] * len(best),
        winners=list(range(len(best))),
        all_scores=column("total", rows) or [math.nan] * len(rows),
        all_seeds=list(range(len(rows))),
        dropped={place: row.error for place, row in enumerate(rows) if row.error is not None},
        **aspects,
    )
    prompts = dict.fromkeys(row.prompt for row in best)
    labels = {place: f"{row.key}\n{row.prompt}" if len(prompts) > 1 else str(row.key) for place, row in enumerate(rows)}
    heading = f"{len(prompts)} prompts" if len(prompts) > 1 else next(iter(prompts), None) or "Quality"
    with library():
        write_page([(heading, output)], file, title="Ranking", notes=notes, names=labels)
    say("note", f"{file} shows the images")


def _check_copies(folder: Path | None, *, overwrite: bool) -> None:
    """Refuse a folder that holds an earlier ranking, before anything is computed."""
    if folder is not None and folder.exists() and not folder.is_dir():
        raise CommandError(f"expected a folder, got {folder}", argument="copy_to")
    if folder is not None and (folder / RANKING).exists() and not overwrite:
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
            if copy.is_symlink():
                copy.unlink()  # what it leads to is not ours
            write(copy, source.read_bytes())
        for earlier in _copies_of(folder) - {copy.name for copy in copies}:
            if os.path.realpath(folder / earlier) not in kept:
                (folder / earlier).unlink(missing_ok=True)
    write(folder / RANKING, render(rows, "jsonl").encode())


def _names(sources: Sequence[Path]) -> list[str]:
    """Names of the copies of a ranking's images, best first, which sort as the ranking."""
    digits = max(3, len(str(len(sources))))
    return [fit_name(f"{place:0{digits}d}_{source.name}") for place, source in enumerate(sources, start=1)]


def _copies_of(folder: Path) -> set[str]:
    """Names of the copies in a folder that its ranking.jsonl lists; none if it is not one of ours."""
    try:
        lines = read_regular(folder / RANKING, most=MAX_BYTES).decode("utf-8").splitlines()
        ranked = [Path(row["path"]) for row in map(parse_json, lines) if row["error"] is None]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return set(_names(ranked)) & {entry.name for entry in folder.iterdir()}
