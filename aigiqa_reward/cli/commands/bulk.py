"""`--engine ray` of the commands `score`, `best-of-n` and `pairs`."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from aigiqa_reward.cli._console import CommandError, emit, progress_text, say
from aigiqa_reward.cli._io import check_writable, checked_prompt, png, write
from aigiqa_reward.cli._options import ImageOptions, RewardOptions, option, options
from aigiqa_reward.cli._pipelines import library, load_rewards
from aigiqa_reward.utils.run_folder import RunFolder, digest

if TYPE_CHECKING:
    from aigiqa_reward import Reward
    from aigiqa_reward.bulk.cluster import Workers
    from aigiqa_reward.bulk.inputs import Shard
    from aigiqa_reward.bulk.scoring import Probe
    from aigiqa_reward.cli.commands.score import ComputeOptions, OutputOptions

HISTOGRAMS, EXTREMES = "histograms.png", "best-and-worst.png"
_CONTENTS = ("part-*.parquet", "unfinished/*.jsonl", HISTOGRAMS, EXTREMES)

_SHOWN = 8  # best, and worst, images in the picture
_SAMPLED = 8  # shards that a dry run takes images from


@options("Ray")
class EngineOptions:
    """Where the work is done."""

    engine: Literal["local", "ray"] = option(
        "local", "Engine: this process, or a Ray cluster (that of RAY_ADDRESS, or one on this machine)."
    )
    cpus_per_worker: int = option(1, "CPUs of each Ray worker where there are no GPUs; else each has one GPU.", min=1)


@options("Ray")
class BulkOptions(EngineOptions):
    """Scoring of data sets."""

    output_dir: Path | None = option(None, "Folder for the Parquet files of --engine ray; the same command resumes.")
    image_column: str | None = option(
        None, "Column of image bytes or paths in .parquet and .jsonl files of --engine ray."
    )
    details: tuple[str, ...] = option((), "Detail of the reward to add as a column, with --engine ray; repeatable.")
    dry_run: bool = option(False, "Score a sample only, and estimate the time of the whole with --engine ray.")

    def refuse(self) -> None:
        """Refuse options that belong to --engine ray."""
        for name in ("output_dir", "image_column", "details", "dry_run"):
            if getattr(self, name):
                raise CommandError("needs --engine ray", argument=name)


# --------------------------------------------------------------------------------------------- score


def score_in_bulk(
    images: ImageOptions, reward: RewardOptions, compute: ComputeOptions, output: OutputOptions, bulk: BulkOptions
) -> None:
    """Score a data set into a folder of Parquet files."""
    prompt = _check(images, output, bulk)
    with library(), _cluster() as ray:
        from aigiqa_reward.bulk.cluster import share
        from aigiqa_reward.bulk.inputs import find_shards
        from aigiqa_reward.bulk.scoring import BulkScoring, Results, probe, table_schema

        columns = {"image_column": bulk.image_column, "prompt_column": images.prompt_column}
        place = images.prompts_from
        shards, identity = find_shards(images.images, recursive=images.recursive, prompts_from=place, **columns)
        workers = share(ray, compute.device, bulk.cpus_per_worker)
        build = partial(_rewards, reward, compute.device, compute.dtype)
        sample = [shard for shard in shards if shard.rows != 0] if bulk.dry_run else []
        sample = sample[:: math.ceil(len(sample) / _SAMPLED) or 1]
        task = ray.remote(probe).options(**workers.resources, max_retries=0)
        found = ray.get(task.remote(build, sample, prompt, place, compute.batch_size, workers))
        details = _details(bulk.details, found)
        if bulk.dry_run:
            _estimate(shards, workers, found, ray)
            return
        settings = {
            **{"input": f"{len(identity)} files {digest(identity)}", "rewards": found.identity, "prompt": prompt},
            **{**columns, "prompts_from": place, "dtype": compute.dtype, "details": sorted(details)},
            "reward_options": [str(value) for value in dataclasses.astuple(reward)],
        }
        folder = RunFolder(bulk.output_dir or Path(), contents=_CONTENTS)
        folder.begin(settings, overwrite=output.overwrite)
        with _progress() as show:
            schema = table_schema(list(found.identity), details, raw_prompt=place is not None)
            results = Results(folder.path, schema)
            run = BulkScoring(
                ray=ray,
                workers=workers,
                shards=shards,
                results=results,
                build=build,
                prompt=prompt,
                prompts_from=place,
                batch_size=compute.batch_size,
                details=bulk.details,
                progress=show,
            )
            _run(run, folder.path)
        errors = _summarize(folder.path, shards)
    emit(f"{folder.path}\n", saved=True)
    if errors:
        raise typer.Exit(1)


def _check(images: ImageOptions, output: OutputOptions, bulk: BulkOptions) -> str | None:
    """Refuse what does not go with --engine ray, before anything is loaded; return the prompt of all images."""
    if bulk.output_dir is None and not bulk.dry_run:
        raise CommandError("expected a folder, which --engine ray writes to", argument="output_dir")
    if bulk.output_dir is not None:
        check_writable(bulk.output_dir)
    if output.file is not None or output.format != "table":
        raise CommandError("--engine ray writes Parquet files into --output-dir; leave out --output and --format")
    if images.prompts is not None:
        text = (
            "expected prompts beside the images with --engine ray: in a column of .parquet or .jsonl files, in tars, "
            "or by --prompts-from"
        )
        raise CommandError(text, argument="prompts")
    if images.prompt and images.prompts_from is not None:
        raise CommandError("expected one source of prompts, got --prompt as well", argument="prompts_from")
    if len(images.prompt) > 1:
        raise CommandError(f"expected one prompt for all images, got {len(images.prompt)}", argument="prompt")
    return checked_prompt(images.prompt[0]) if images.prompt else None


def _rewards(options: RewardOptions, device: str | None, dtype: str) -> Mapping[str, Reward]:
    """Build the rewards in a worker."""
    return {name: reward for name, (reward, _) in load_rewards(options, device, dtype).items()}


@contextmanager
def _cluster() -> Iterator[Any]:
    """Join or start the cluster; make errors of the command of what its workers raise."""
    from aigiqa_reward.bulk.cluster import joined_cluster

    with joined_cluster() as ray:
        try:
            yield ray
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            reason = str(error).splitlines()[0]
            text = (
                f"a worker died, perhaps as memory ran out ({reason}); lower --batch-size, or raise --cpus-per-worker"
            )
            raise CommandError(f"{text}, which gives fewer workers. The same command continues", status=1) from error


def _details(wanted: Sequence[str], found: Probe) -> dict[str, int]:
    """Dimensions of the details wanted, by column."""
    columns = {name: depth for name, depth in found.details.items() if {name, name.partition(".")[2]} & set(wanted)}
    for name in wanted:
        if name not in columns and not any(column.endswith(f".{name}") for column in columns):
            there = ", ".join(found.details) or "none"
            raise CommandError(f"expected a detail of the reward ({there}), got {name!r}", argument="details")
    return columns


def _estimate(shards: Sequence[Shard], workers: Workers, found: Probe, ray: Any) -> None:
    """Print how long all would take, from a sample."""
    from aigiqa_reward.bulk.scoring import estimated_rows

    rows = estimated_rows(shards, found.size)
    if math.isnan(rows + found.scoring):
        raise CommandError("expected at least one image in the sample, got none", argument="images")
    slots = max(1.0, ray.cluster_resources().get("CPU", 1) - (0 if workers.threads is None else workers.count))
    seconds = rows * max(found.scoring / workers.count, found.decoding / slots)
    rate = f"{1 / found.scoring:.1f} images per second and worker, {1 / found.decoding:.0f} decoded per second and CPU"
    emit(f"about {rows:,.0f} images in {len(shards)} shards, {workers.count} workers: {_span(seconds)} ({rate})\n")


def _run(run: Any, folder: Path) -> None:
    from aigiqa_reward.bulk.scoring import BulkError

    try:
        run.run()
    except BulkError as error:
        raise CommandError(str(error), status=1) from error
    except KeyboardInterrupt as error:
        text = f"interrupted: {folder} keeps what is finished; the same command continues"
        raise CommandError(text, status=130) from error


@contextmanager
def _progress() -> Iterator[Callable[[int, int, float], None]]:
    """Show rows, rate, errors and the time left; yield the function that takes rows, errors and the share done."""
    begun = time.monotonic()
    with progress_text() as show:

        def update(rows: int, errors: int, share: float) -> None:
            seconds = time.monotonic() - begun
            left = _span(seconds * (1 - share) / share) if share else "?"
            show(f"{rows:,} images, {rows / seconds:.1f} per second, {errors:,} errors, {share:.0%}, {left} left")

        yield update


def _span(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _summarize(folder: Path, shards: Sequence[Shard]) -> int:
    """Draw the scores and the extreme images, say how many rows there are, and return the number of errors."""
    import numpy as np
    from pyarrow import dataset

    from aigiqa_reward.bulk.scoring import PARTS
    from aigiqa_reward.report.scores import histograms

    parts = sorted(folder.glob(PARTS))
    table = dataset.dataset(parts, format="parquet")
    names = [name for name in table.schema.names if name.rpartition(".")[2] in ("total", "quality", "correspondence")]
    scores = {name: table.to_table([name]).column(0).to_numpy().astype(float) for name in names}
    errors = table.count_rows(filter=dataset.field("error").is_valid())
    total = next(iter(scores.values()))
    if not len(total):
        raise CommandError("expected images, got none", argument="images", status=1)
    if not table.count_rows(filter=dataset.field("prompt").is_valid()):
        say("note", "no prompt: only quality is judged")
    if np.isfinite(total).any():
        drawn = {name: values for name, values in scores.items() if np.isfinite(values).any()}
        histograms(drawn, folder / HISTOGRAMS)
        counts = [dataset.dataset(part, format="parquet").count_rows() for part in parts]
        write(folder / EXTREMES, png(_extremes(total, counts, shards, f"{names[0]} of {folder.name}")))
    say("note", f"{len(total):,} rows, {errors:,} with an error, in {folder}: {PARTS}, {HISTOGRAMS}, {EXTREMES}")
    return errors


def _extremes(total: Any, counts: Sequence[int], shards: Sequence[Shard], title: str) -> Any:
    """Draw the best and the worst images."""
    import numpy as np

    from aigiqa_reward.report.scores import extremes_sheet

    order = np.argsort(-total, kind="stable")[: int(np.isfinite(total).sum())]
    best = order[:_SHOWN]
    worst = order[_SHOWN:][::-1][:_SHOWN]
    starts = np.cumsum([0, *counts])
    cards = {}
    for row in map(int, (*best, *worst)):
        shard = int(np.searchsorted(starts, row, side="right")) - 1
        cards[row] = _card(shards[shard], row - int(starts[shard]), float(total[row]), framed=row == best[0])
    facts = [f"{len(order):,} images", f"the best {len(best)}, then the worst {len(worst)}"]
    return extremes_sheet([cards[row] for row in best], [cards[row] for row in worst], title=title, facts=facts)


def _card(shard: Shard, row: int, score: float, *, framed: bool) -> Any:
    from aigiqa_reward import images
    from aigiqa_reward.report.sheet import Card

    image, note = None, "cannot be read again"
    with suppress(Exception):  # the place may be gone; the scores stay
        item = next(item for place, item in enumerate(shard.read()) if place == row)
        image, note = images.to_pil(images.decode(item.data, item.path)[None])[0], ""
    return Card(image=image, rows=[], heading=f"{score:.3f}", note=note, framed=framed)


# --------------------------------------------------------------------------------------------- best-of-n and pairs


def sample_in_bulk(
    share: Callable[[Any], Any], device: str | None, engine: EngineOptions, folder: Path, prompts: list[str]
) -> Any:
    """Run `share` in all workers, which share the folder; return what the first worker's call returned."""
    with library(out="output_dir", folder="output_dir", pipe="model"), _cluster() as ray:
        from aigiqa_reward.bulk.cluster import share as share_cluster
        from aigiqa_reward.bulk.sampling import run_shares

        workers = share_cluster(ray, device, engine.cpus_per_worker)
        begun, records = time.monotonic(), "prompts/[0-9]*.json"
        before = sum(1 for _ in folder.rglob(records))
        with progress_text() as show:

            def watch() -> None:
                done = sum(1 for _ in folder.rglob(records))
                rate = (done - before) / (time.monotonic() - begun)
                show(f"{done:,} of {len(prompts):,} prompts, {rate:.2g} per second, {workers.count} workers")

            return run_shares(ray, workers, share, watch)[0]
