"""The commands `best-of-n` and `pairs`: many prompts into a folder; the same command resumes after an interruption."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import typer

from aigiqa_reward.cli._console import CommandError, Row, emit, first_process, progress, render, say
from aigiqa_reward.cli._io import check_writable, gather_prompts, png, write
from aigiqa_reward.cli._options import (
    OneRewardOptions,
    PipelineOptions,
    PromptOptions,
    RewardOptions,
    SamplingOptions,
    option,
    options,
)
from aigiqa_reward.cli._pipelines import (
    EMBEDDED,
    add_loras,
    check_model,
    library,
    load_pipeline,
    lora_identity,
    meanings,
    mixed_reward,
    process_device,
    report_unknown,
    sampling_arguments,
    spoken,
)
from aigiqa_reward.cli.commands.bulk import EngineOptions, sample_in_bulk
from aigiqa_reward.cli.commands.score import scored

if TYPE_CHECKING:
    from aigiqa_reward import BestOfN, BestOfNOutput
    from aigiqa_reward.sampling.batch_run import ResultsFolder

PAGE, SHEETS = "index.html", "contact-sheets"
"""What is drawn of a folder of results, beside what `best_of_each` writes."""

_TAKEN = {"seed", "out", "folder", "prompts", "settings", "overwrite", "accelerator", "progress"}
"""Arguments of `best_of_each` and `build_preference_pairs` that --set may not have."""

_SEEDS = 2**64
_ROWS = 20  # winners in the table
_SHEET = re.compile(r"\d{5,}\.png")


@options("Pipeline")
class LoraOptions:
    """LoRA and memory of a pipeline that only samples."""

    lora: tuple[str, ...] = option(
        (),
        "LoRA for the pipeline: a .safetensors file, a folder with one or a Hub id, and its scale; repeatable.",
        metavar="PATH[:SCALE]",
    )
    offload: bool = option(False, "Keep the pipeline's parts in host memory while they are not used.")


@options("Search")
class SearchOptions:
    """How candidates are sampled and chosen."""

    n: int = option(16, "Number of candidates per prompt.", "--n", min=1)
    top_k: int = option(1, "Number of winners per prompt, at most --n.", min=1)
    pruning: Literal["none", "halving"] = option(
        "none", "Pruning; halving scores previews and continues with the best, at about half the cost."
    )
    search: Literal["random", "zero_order"] = option(
        "random", "Source of noises; random takes consecutive seeds, zero_order searches near the best noise."
    )
    diverse: bool = option(False, "Among the best 4 x K candidates keep the K (--top-k) that look least alike.")
    batch_size: int = option(4, "Number of candidates sampled at a time; halved if memory runs out.", min=1)
    seed: int = option(0, "Seed of the first candidate of every prompt; candidate i has the seed plus i.")
    negative_prompt: str | None = option(None, "Text that the images should not show.", metavar="TEXT")
    reward_prompt: str | None = option(None, "Text that the reward sees; the prompt by default.", metavar="TEXT")
    output_dir: Path = option(Path("best-of-n"), f"Folder for {PAGE}, results.jsonl, images and {SHEETS}.")
    keep_all: bool = option(False, "Keep the images of all candidates, not of the winners alone.")
    overwrite: bool = option(False, "Start again in the folder of an earlier run.")


def best_of_n(
    pipeline: PipelineOptions,
    loras: LoraOptions,
    prompt: PromptOptions,
    search: SearchOptions,
    sampling: SamplingOptions,
    reward: RewardOptions,
    engine: EngineOptions,
) -> None:
    """Sample N images of each prompt and keep those with the highest reward; run again, it resumes."""
    texts = gather_prompts(prompt.prompt, prompt.prompts, prompt.prompt_column)
    _check(pipeline.model, search)
    call = sampling_arguments(sampling, pipeline.model, _TAKEN, negative_prompt=search.negative_prompt)
    settings = {
        "model": pipeline.model,
        "lora": lora_identity(loras.lora),
        "reward_options": [str(value) for value in dataclasses.astuple(reward)],
    }
    call |= {"seed": search.seed, "overwrite": search.overwrite, "settings": settings}
    if pipeline.model == EMBEDDED and first_process():
        report_unknown(texts)
    if engine.engine == "ray":
        share = partial(_share, pipeline, loras, search, reward, texts, call)
        _conclude(lambda: sample_in_bulk(share, pipeline.device, engine, search.output_dir, texts), search, texts)
    else:
        best = _searching(pipeline, loras, search, reward)
        _conclude(lambda: _sample(best, texts, search.output_dir, call), search, texts, best.reward)


def _share(
    pipeline: PipelineOptions,
    loras: LoraOptions,
    search: SearchOptions,
    reward: RewardOptions,
    prompts: list[str],
    call: dict[str, Any],
    processes: Any,
) -> Drawn | None:
    """Sample the share of one worker of a cluster; the first one, when all are done, draws what is in the folder."""
    from aigiqa_reward.sampling.batch_run import BestOfEachError, ResultsFolder, best_of_each

    best = _searching(pipeline, loras, search, reward)
    with suppress(BestOfEachError):  # the folder has why prompts failed
        best_of_each(best, prompts, search.output_dir, accelerator=processes, progress=False, **call)
    return _draw(search, best.reward, ResultsFolder(search.output_dir, prompts)) if processes.is_main_process else None


def _searching(pipeline: PipelineOptions, loras: LoraOptions, search: SearchOptions, reward: RewardOptions) -> BestOfN:
    """Load what samples and judges."""
    place = process_device(pipeline.device)
    judge = mixed_reward(reward, place)
    pipe = load_pipeline(pipeline.model, place, pipeline.dtype, offload=loras.offload)
    add_loras(pipe, loras.lora)
    from aigiqa_reward import BestOfN

    with library():
        return BestOfN(
            pipe,
            judge,
            search.n,
            search.batch_size,
            search.top_k,
            pruning=None if search.pruning == "none" else search.pruning,
            search=search.search,
            reward_prompt=search.reward_prompt,
            diverse=search.diverse,
            keep="all" if search.keep_all else "thumbnails",
        )


def _check(model: str, search: SearchOptions) -> None:
    """Refuse what cannot be, before anything is loaded."""
    n, folder = search.n, search.output_dir
    if search.top_k > n:
        raise CommandError(f"expected at most --n {n}, got {search.top_k}", argument="top_k")
    if not 0 <= search.seed <= _SEEDS - n:
        text = f"expected an integer from 0 to 2^64 - N = {_SEEDS - n}, got {search.seed}"
        raise CommandError(text, argument="seed")
    check_model(model)
    check_writable(folder)
    for name in (PAGE, SHEETS):
        if (folder / name).exists() and not (folder / "settings.json").exists():
            text = f"{folder / name} exists and is not of an earlier run; choose another folder"
            raise CommandError(text, argument="output_dir")


# --------------------------------------------------------------------------------------------- during and after


class Drawn(NamedTuple):
    """What is printed of the results: rows of the first winners, how many winners there are, the meaning of scores."""

    rows: list[Row]
    winners: int
    meaning: list[str]


def _sample(search: BestOfN, prompts: list[str], folder: Path, arguments: dict[str, Any]) -> None:
    """Fill the folder."""
    from aigiqa_reward.sampling.batch_run import BestOfEachError, best_of_each

    every = search.n * len(prompts)
    with progress("best of n", every) as show, library(out="output_dir"), suppress(BestOfEachError):
        # What an earlier run finished is done.
        best_of_each(search, prompts, folder, progress=lambda done, total: show(every - total + done), **arguments)


def _conclude(
    sample: Callable[[], Drawn | None], search: SearchOptions, prompts: list[str], reward: Any = None
) -> None:
    """Fill the folder; with the reward, draw it, also after failures and interruptions; print the winners."""
    from aigiqa_reward.sampling.batch_run import ResultsFolder

    interrupted = drawn = None
    folder = search.output_dir
    try:
        drawn = sample()
    except KeyboardInterrupt as error:
        interrupted = error
    results = ResultsFolder(folder, prompts)
    if first_process():
        with suppress(KeyboardInterrupt), library():
            drawn = drawn if reward is None else _draw(search, reward, results)
        if drawn is not None:
            _report(drawn, folder)
    if interrupted is not None:
        done = sum(results.finished(index) for index in range(len(prompts)))
        text = f"interrupted: {done} of {len(prompts)} prompts are finished; the same command resumes"
        raise CommandError(text, status=130) from interrupted
    if failures := results.failures():
        if first_process():
            for index, reason in failures.items():
                say("error", f"prompt {index} ({prompts[index][:200]!r}): {spoken(reason)}")
            say("note", "the same command tries them again")
        raise typer.Exit(1)


def _draw(search: SearchOptions, reward: Any, results: ResultsFolder) -> Drawn | None:
    """Draw the contact sheets and the page; None if there is nothing to draw."""
    from aigiqa_reward.report import write_page

    if not any(map(results.reached, range(len(results)))):
        return None
    rows: list[Row] = []
    remarks: list[str] = []
    meaning, n = meanings([reward]), search.n
    notes = [f"{len(results)} prompts, {n} candidates each" if len(results) > 1 else f"{n} candidates", *meaning]
    shown, maps = _drawn_sheets(results, n, rows, remarks), _maps(reward, results, search.reward_prompt)
    write_page(shown, results.path / PAGE, notes=notes, maps=maps, remarks=remarks)
    return Drawn(rows[:_ROWS], len(rows), meaning)


def _report(drawn: Drawn, folder: Path) -> None:
    """Print the winners, and where the rest is."""
    if drawn.rows:
        emit(render(drawn.rows, "table", terminal=sys.stdout.isatty()), saved=True)
        for text in drawn.meaning:
            say("note", text)
    rest = f" ({drawn.winners - _ROWS} more winners there)" if drawn.winners > _ROWS else ""
    say("note", f"in {folder}: {PAGE} (all results), results.jsonl, images, {SHEETS}{rest}")


def _drawn_sheets(
    results: ResultsFolder, n: int, rows: list[Row], remarks: list[str]
) -> Iterator[tuple[str, BestOfNOutput]]:
    """Yield prompts and outputs, one held at a time; on the way add winners' rows and remarks, and draw their sheets.

    A sheet that is newer than what it shows is kept.
    """
    from aigiqa_reward.report import contact_sheet

    kept = set()
    for result in results:
        output, sheet = result.output, results.path / SHEETS / f"{result.index:05d}.png"
        if output is None:
            continue
        for seed, total, quality, correspondence in output.rows():
            image = str(results.image_file(result.index, seed))
            rows.append(scored(image, result.prompt, total, quality, correspondence))
        reached = f"{len(output.all_seeds)} of {n} candidates"
        ended = f"interrupted: {reached}" if result.error is None else f"failed after {reached}: {result.error}"
        remarks.append("" if result.finished else ended)
        drawn = results.record_file(result.index).stat().st_mtime_ns
        if output.images and not (sheet.exists() and sheet.stat().st_mtime_ns >= drawn):
            write(sheet, png(contact_sheet(output, result.prompt)))
        kept.add(sheet.name)
        yield result.prompt, output
    for sheet in (results.path / SHEETS).glob("*.png"):
        if _SHEET.fullmatch(sheet.name) and sheet.name not in kept:  # of an earlier run
            sheet.unlink()


def _maps(reward: Any, results: ResultsFolder, reward_prompt: str | None) -> Iterator[list[dict[str, Any]]]:
    """What the reward says of each winner: distortion maps, and how the words of the prompt fit."""
    from aigiqa_reward import Scorer

    names: Any = getattr(getattr(getattr(reward, "model", None), "config", None), "distortions", ())
    for result in results:
        if result.output is None:
            continue
        images, prompt = result.output.images, reward_prompt or result.prompt
        details = Scorer(reward).score(images, prompt).details if images else {}
        if images and not {"distortion_maps", "word_scores"} & details.keys():
            return
        maps = details.get("distortion_maps", [()] * len(images))
        words = details.get("word_scores", [()] * len(images))
        yield [
            {"words": zip(prompt.split(), scores, strict=False)} | dict(zip(names, found, strict=False))
            for found, scores in zip(maps, words, strict=True)
        ]


# --------------------------------------------------------------------------------------------- pairs


@options("Pairs")
class PairOptions:
    """Which images are paired."""

    n: int = option(4, "Number of images per prompt.", "--n", min=2)
    margin: float = option(0.0, "Difference of rewards that a pair must exceed.", min=0.0)
    pairs_per_prompt: int = option(
        1, "Number of pairs per prompt: best with worst, second best with second worst.", min=1
    )
    guidance_scales: tuple[float, ...] = option(
        (), "Guidance scale to sample each noise with, to pair its best with its worst image; repeat for several."
    )
    reward_guidance: float = option(
        0.0, "Scale of RewardGuidance with which each noise is sampled once more and paired with itself.", min=0.0
    )
    seed: int = option(0, "Seed of the first image of every prompt.", min=0)
    batch_size: int = option(4, "Number of images sampled at a time; halved if memory runs out.", min=1)
    output_dir: Path = option(Path("pairs"), "Folder for the images and pairs.parquet.")
    overwrite: bool = option(False, "Start again in the folder of an earlier run.")


def pairs(
    pipeline: PipelineOptions,
    prompt: PromptOptions,
    reward: OneRewardOptions,
    options: PairOptions,
    sampling: SamplingOptions,
    engine: EngineOptions,
) -> None:
    """Sample N images of each prompt and pair the best with the worst by reward, for DPO; run again, it resumes."""
    check_model(pipeline.model)
    if first_process():
        check_writable(options.output_dir)
    if options.guidance_scales and sampling.guidance_scale is not None:
        raise CommandError("--guidance-scale, --guidance-scales: pass one of them")
    given = dataclasses.asdict(options)
    folder = given.pop("output_dir")
    call = sampling_arguments(sampling, pipeline.model, _TAKEN | given.keys())
    texts = gather_prompts(prompt.prompt, prompt.prompts, prompt.prompt_column)
    share = partial(_pair, pipeline, reward, texts, folder, {**given, "settings": {"model": pipeline.model}, **call})
    count = share() if engine.engine == "local" else sample_in_bulk(share, pipeline.device, engine, folder, texts)
    if first_process():
        say("note", f"{count} pairs of {len(texts)} prompts")
        emit(f"{folder}\n", saved=True)


def _pair(
    pipeline: PipelineOptions,
    reward: OneRewardOptions,
    prompts: Sequence[str],
    folder: Path,
    arguments: dict[str, Any],
    processes: Any = None,
) -> int:
    """Make the pairs, in a worker of a cluster its share; return how many there are."""
    from aigiqa_reward.finetuning import build_preference_pairs
    from aigiqa_reward.sampling.batch_run import BestOfEachError

    place = process_device(pipeline.device)
    judge = mixed_reward(reward, place)
    pipe = load_pipeline(pipeline.model, place, pipeline.dtype)
    arguments = {**arguments, "accelerator": processes}
    kinds = 2 if arguments["reward_guidance"] else max(1, len(arguments["guidance_scales"]))
    every = arguments["n"] * len(prompts) * kinds
    try:
        with progress("pairs", every) as show, library(out="output_dir", folder="output_dir", pipe="model"):
            found = build_preference_pairs(
                pipe, judge, prompts, folder, progress=lambda done, total: show(every - total + done), **arguments
            )
            return len(found)
    except BestOfEachError as error:
        raise CommandError(str(error), status=1) from error
    except KeyboardInterrupt as error:
        raise CommandError(f"interrupted: the same command resumes from what {folder} holds", status=130) from error
