"""The command `best-of-n`: many prompts into a folder, which the same command fills further after an interruption."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from aigiqa_reward.cli import options
from aigiqa_reward.cli import sampling_options as own
from aigiqa_reward.cli.files import check_writable, png, write
from aigiqa_reward.cli.inputs import CommandError
from aigiqa_reward.cli.options import DType
from aigiqa_reward.cli.output import Format, Row, emit, progress, render, say
from aigiqa_reward.cli.pipelines import EMBEDDED, add_lora, check_model, load_pipeline, lora_digest
from aigiqa_reward.cli.plans import file_errors, parse_settings
from aigiqa_reward.cli.prompts import gather_prompts
from aigiqa_reward.cli.runs import first_process, load_reward, process_device, usage_errors

if TYPE_CHECKING:
    from aigiqa_reward.sampling import BestOfN, BestOfNOutput
    from aigiqa_reward.sampling.batch_run import ResultsFolder

PAGE, SHEETS = "index.html", "contact-sheets"
"""What is drawn of a folder of results, beside what `best_of_each` writes."""

_SEEDS = 2**64
_ROWS = 20  # winners in the table
_SHEET = re.compile(r"\d{5,}\.png")


def best_of_n(
    model: own.ModelOption,
    prompt: own.PromptsOption = None,
    prompts: own.PromptListOption = None,
    n: own.CandidatesOption = 16,
    top_k: own.WinnersOption = 1,
    pruning: own.PruningOption = own.Pruning.NONE,
    search: own.SearchOption = own.SearchKind.RANDOM,
    diverse: own.DiverseOption = False,
    batch_size: own.SamplingBatchOption = 4,
    seed: own.SamplingSeedOption = 0,
    steps: own.StepsOption = None,
    guidance_scale: own.GuidanceOption = None,
    negative_prompt: own.NegativePromptOption = None,
    height: own.HeightOption = None,
    width: own.WidthOption = None,
    settings: own.SetOption = None,
    lora: own.LoraOption = None,
    lora_scale: own.LoraScaleOption = 1.0,
    dtype: own.PipelineDTypeOption = own.PipelineDType.AUTO,
    offload: own.OffloadOption = False,
    reward: options.RewardOption = "compact",
    encoder: options.EncoderOption = None,
    encoder_weights: options.EncoderWeightsOption = None,
    weights: options.WeightsOption = None,
    zero_shot: options.ZeroShotOption = False,
    scenario: options.ScenarioOption = None,
    preferences: options.PreferencesOption = None,
    quality_weight: options.QualityWeightOption = None,
    correspondence_weight: options.CorrespondenceWeightOption = None,
    reward_prompt: own.RewardPromptOption = None,
    device: options.DeviceOption = None,
    out: own.OutOption = Path("best-of-n"),
    overwrite: own.AnewOption = False,
) -> None:
    """Sample N images of each prompt and keep those that the reward likes best."""
    texts = gather_prompts(prompt, prompts)
    _check(model, n, top_k, seed, out)
    named = (steps, guidance_scale, negative_prompt, height, width)
    arguments = _pipeline_arguments(model, named, parse_settings(settings or []))
    place = process_device(device)
    towers = (encoder, encoder_weights, weights, zero_shot, scenario, preferences)
    shares = (quality_weight, correspondence_weight)
    judge = load_reward(reward, *towers, *shares, place, DType.FLOAT32)
    pipe = load_pipeline(model, place, dtype, offload=offload)
    add_lora(pipe, lora, lora_scale)
    from aigiqa_reward import BestOfN

    plans = {"pruning": None if pruning is own.Pruning.NONE else pruning.value, "search": search.value}
    with usage_errors():
        best = BestOfN(pipe, judge, n, batch_size, top_k, reward_prompt=reward_prompt, diverse=diverse, **plans)
    chosen = {"model": model, "lora": lora, "lora_weights": lora_digest(lora)}
    chosen["lora_scale"] = lora_scale if lora else None
    chosen["reward_options"] = [None if option is None else str(option) for option in (*towers, *shares)]
    _run(best, texts, out, {"seed": seed, "overwrite": overwrite, "settings": chosen, **arguments})


# --------------------------------------------------------------------------------------------- before


def _check(model: str, n: int, top_k: int, seed: int, out: Path) -> None:
    """Refuse what cannot be, before anything is loaded."""
    if top_k > n:
        raise CommandError(f"--top-k: expected at most --n {n}, got {top_k}")
    if not 0 <= seed <= _SEEDS - n:
        raise CommandError(f"--seed: expected an integer from 0 to 2^64 - N = {_SEEDS - n}, got {seed}")
    check_model(model)
    check_writable(out, option="--out")
    for name in (PAGE, SHEETS):
        if (out / name).exists() and not (out / "settings.json").exists():
            raise CommandError(f"--out: {out / name} exists and is not of an earlier run; choose another folder")


def _pipeline_arguments(model: str, named: tuple[Any, ...], given: Mapping[str, Any]) -> dict[str, Any]:
    names = {
        "num_inference_steps": "--steps",
        "guidance_scale": "--guidance-scale",
        "negative_prompt": "--negative-prompt",
        "height": "--height",
        "width": "--width",
    }
    arguments = {name: value for name, value in zip(names, named, strict=True) if value is not None}
    if twice := sorted(arguments.keys() & given.keys()):
        raise CommandError(f"--set: {twice[0]} is given by {names[twice[0]]} already")
    if taken := sorted({"prompt", "seed", "out", "settings", "overwrite", "accelerator", "progress"} & given.keys()):
        raise CommandError(f"--set: {taken[0]} is no further argument of the pipeline; see the options of this command")
    return (own.EMBEDDED_SAMPLING if model == EMBEDDED else {}) | arguments | dict(given)


# --------------------------------------------------------------------------------------------- during and after


def _run(search: BestOfN, prompts: list[str], out: Path, arguments: dict[str, Any]) -> None:
    """Fill the folder; draw what is in it, also after failures and interruptions."""
    from aigiqa_reward.sampling.batch_run import BestOfEachError, ResultsFolder, best_of_each

    first = first_process()
    ended: BaseException | None = None
    try:
        every = search.n * len(prompts)
        with progress("best of n", every) as show, usage_errors(), file_errors():
            best_of_each(
                search, prompts, out, progress=lambda done, total: show(every - total + done), **arguments
            )  # what an earlier run finished is done
    except CommandError as error:
        raise CommandError(re.sub("^out: ", "--out: ", str(error)), status=error.status) from error
    except (BestOfEachError, KeyboardInterrupt) as error:
        ended = error
    if first:
        with suppress(KeyboardInterrupt), file_errors():
            _draw(search, ResultsFolder(out, prompts))
    if isinstance(ended, KeyboardInterrupt):
        if first:
            done = sum(ResultsFolder(out, prompts).finished(index) for index in range(len(prompts)))
            say(
                "error",
                f"interrupted: {done} of {len(prompts)} prompts are finished; the same command goes on from there",
            )
        raise typer.Exit(130) from ended
    if isinstance(ended, BestOfEachError):
        if first:
            for index, reason in ended.failures.items():
                say("error", f"prompt {index} ({prompts[index][:200]!r}): {reason}")
            say("note", "the same command tries them again")
        raise typer.Exit(1) from ended


def _draw(search: BestOfN, results: ResultsFolder) -> None:
    """The contact sheets, the page, and the winners on stdout."""
    from aigiqa_reward.report import write_page

    reached = [index for index in range(len(results)) if results.reached(index)]
    if not reached:
        return
    _draw_sheets(results)
    rows: list[Row] = []
    notes = [f"{len(results)} prompts, {search.n} candidates each" if len(results) > 1 else f"{search.n} candidates"]
    remarks: list[str] = []
    shown = _noting(results, search.n, rows, remarks)
    write_page(shown, results.path / PAGE, notes=notes, maps=_maps(search.reward, results), remarks=remarks)
    if rows:
        emit(render(rows[:_ROWS], Format.TABLE, terminal=sys.stdout.isatty()))
    rest = f" ({len(rows) - _ROWS} more winners there)" if len(rows) > _ROWS else ""
    say("note", f"in {results.path}: {PAGE} (all of it to look at), results.jsonl, images, {SHEETS}{rest}")


def _draw_sheets(results: ResultsFolder) -> None:
    """One for each prompt with winners; those that are there and newer than what they show stay."""
    from aigiqa_reward.report import contact_sheet

    sheets = results.path / SHEETS
    kept = set()
    for index in filter(results.reached, range(len(results))):
        sheet = sheets / f"{index:05d}.png"
        if not _newer(sheet, results.record_file(index)):
            result = results.read(index)
            if result is None or result.output is None or not result.output.images:
                continue
            write(sheet, png(contact_sheet(result.output, result.prompt, kept_only=True)))
        kept.add(sheet.name)
    for sheet in sheets.glob("*.png"):
        if _SHEET.fullmatch(sheet.name) and sheet.name not in kept:  # of a run that was started anew
            sheet.unlink()


def _newer(sheet: Path, record: Path) -> bool:
    """Whether a sheet is there and was drawn after its prompt's record was written, which is after its images."""
    try:
        return sheet.stat().st_mtime_ns >= record.stat().st_mtime_ns
    except FileNotFoundError:
        return False


def _noting(results: ResultsFolder, n: int, rows: list[Row], remarks: list[str]) -> Iterator[tuple[str, BestOfNOutput]]:
    """Prompts and their outputs, one held at a time; winners' rows and a remark of each are added on the way."""
    for result in results:
        output = result.output
        if output is None:
            continue
        rows += [
            Row(
                key=str(results.image_file(result.index, seed)),
                prompt=result.prompt,
                total=output.scores[place],
                quality=output.quality[place],
                correspondence=None if output.correspondence is None else output.correspondence[place],
            )
            for place, seed in enumerate(output.seeds)
        ]
        reached = f"{len(output.all_seeds)} of {n} candidates"
        ended = f"interrupted: {reached}" if result.error is None else f"failed after {reached}: {result.error}"
        remarks.append("" if result.finished else ended)
        yield result.prompt, output


def _maps(reward: Any, results: ResultsFolder) -> Iterator[list[dict[str, Any]]]:
    """The reward's distortion maps of each winner, where it gives such."""
    from aigiqa_reward import Scorer

    names: Any = getattr(getattr(reward.model, "config", None), "distortions", ())
    for result in results if names else ():
        if result.output is None:
            continue
        images = result.output.images
        found = Scorer(reward).score(images, result.prompt).details["distortion_maps"] if images else ()
        yield [dict(zip(names, maps, strict=True)) for maps in found]
