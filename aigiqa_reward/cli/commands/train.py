"""The command `train`: one of the five systems on human scores or preferences, to a reward in a folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from aigiqa_reward.cli._console import CommandError, emit, report_unreadable, say
from aigiqa_reward.cli._io import HUB_ID, check_writable
from aigiqa_reward.cli._options import PROMPTS_FROM, Fields, argument, command, option, options
from aigiqa_reward.cli._pipelines import assigned, library, parse_settings, usable_device
from aigiqa_reward.utils.io import read_json
from aigiqa_reward.utils.run_folder import RunFolder

if TYPE_CHECKING:
    from accelerate import Accelerator

    from aigiqa_reward.datasets import PreferencePairs, ScoredImages, Split
    from aigiqa_reward.rewards.build import TowerConfig
    from aigiqa_reward.training.by_name import Trained, TrainingPlan

HELP = "Train a reward on human scores, alone or under torchrun; run again, it resumes from the last epoch."

_CHECKPOINT = "checkpoint"

# --------------------------------------------------------------------------------------------- options


@options("Data")
class DataOptions:
    """A model and human scores."""

    model: str = argument("MODEL", "mst_clipiqa, tsp_mgs, sc_agiqa, ma_agiqa, cpa_iqa, or compact with given weights.")
    data: str = option(
        dataclasses.MISSING,
        "Human scores (agiqa3k, agiqa1k, aigciqa2023, aigiqa20k), preferences (imagereward, hpdv2, pickapic, "
        "genai_bench, or pairs, your own choices with the columns prompt, winner and loser), or csv with the columns "
        "path, prompt, quality or correspondence, and optionally generator and group.",
        metavar="NAME:PATH",
    )
    prompts_from: Literal["embedded", "sidecar", "auto"] | None = option(
        None, "For a csv without a column prompt: " + PROMPTS_FROM[0].lower() + PROMPTS_FROM[1:]
    )


@options("Model")
class ModelOptions:
    """Towers and settings of the model."""

    tower: tuple[str, ...] = option(
        (),
        "open_clip model for a tower, ROLE=ARCH[:WEIGHTS] as in clip=ViT-B-16:openai; repeat for several.",
        metavar="ROLE=ARCH",
    )
    settings: tuple[str, ...] = option((), "Field KEY=VALUE of the model's configuration; repeat for several.", "--set")


@options("Training (by default, the model's recipe)")
class MachineOptions:
    """Device and precision of a training."""

    device: str | None = option(None, "Device to train on: cpu, cuda, cuda:1, mps, ...; by default Accelerate's.")
    mixed_precision: Literal["no", "bf16", "fp16"] | None = option(
        None, "Precision of the towers; by default Accelerate's."
    )


@options("Data and output")
class TrainOptions:
    """Split and output of a training."""

    split: str = option(
        "whole",
        "Split: whole trains on all but a tenth of the prompts, which chooses the epoch; group holds out a fifth of "
        "the prompts for a test, random_image a fifth of the images; csv:FILE has the columns name and split.",
    )
    output_dir: Path | None = option(None, "Folder for the reward and the checkpoint; by default aigiqa-MODEL.")
    push_to_hub: bool = option(False, "Upload the reward to the Hugging Face Hub.")
    hub_model_id: str | None = option(None, "Hub repository to upload to; by default named as the output folder.")


def plan_fields(skip: Collection[str] = ()) -> Fields:
    """Return the options of a TrainingPlan that are values."""
    from aigiqa_reward.training.by_name import TrainingPlan

    objects = ("name", "towers", "assistants", "settings", "recipe")
    return Fields(TrainingPlan, "Model", skip=(*objects, *skip))


def recipe_fields() -> Fields:
    """Return the options of a Recipe, whose defaults depend on the model."""
    from aigiqa_reward.training.recipes import Recipe

    return Fields(Recipe, "Training (by default, the model's recipe)", defaults=False)


def build() -> Callable[..., None]:
    """Return the command with all its options."""
    return command(train, plan=plan_fields(), recipe=recipe_fields())


# --------------------------------------------------------------------------------------------- the command


def train(
    data: DataOptions,
    options: TrainOptions,
    model: ModelOptions,
    plan: dict[str, Any],
    recipe: dict[str, Any],
    machine: MachineOptions,
) -> None:
    """Train a reward on human scores."""
    name = options.hub_model_id
    if name is not None and not (options.push_to_hub and HUB_ID.fullmatch(name)):
        text = f"expected owner/name together with --push-to-hub, got {name!r}"
        raise CommandError(text, argument="hub_model_id")
    training = make_plan(data.model, model, plan, recipe)
    mode, file = parse_split(options.split, ("whole", "group", "random_image"))
    table = read(data)
    parts = _parts(table, mode, file, training.seed)
    accelerator = make_accelerator(machine)
    folder = options.output_dir or Path(f"aigiqa-{data.model}")
    if accelerator.is_main_process:
        check_writable(folder)
        run = RunFolder(folder, contents=(_CHECKPOINT, "model.safetensors"), started=_CHECKPOINT)
        with library():
            run.begin(describe(training, model, table, mode, file))
    trained = _train(training, table, parts, folder, accelerator)
    if accelerator.is_main_process:
        _report(trained, parts, folder)
        if options.push_to_hub:
            _upload(trained, name or folder.resolve().name, folder)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if trained.result.unreadable and accelerator.is_main_process:
        raise typer.Exit(1)


def _parts(table: ScoredImages | PreferencePairs, mode: Any, file: Path | None, seed: int) -> Split:
    from aigiqa_reward.datasets import split_rows
    from aigiqa_reward.training.by_name import whole_split

    with library():
        return whole_split(table, seed=seed) if mode == "whole" else split_rows(table, mode=mode, seed=seed, file=file)


def _train(
    plan: TrainingPlan, table: ScoredImages | PreferencePairs, parts: Split, folder: Path, accelerator: Accelerator
) -> Trained:
    """Train to the end, or end the command with how to resume."""
    from aigiqa_reward.training.by_name import train_reward

    show = accelerator.is_main_process and sys.stderr.isatty()
    try:
        with library(folder="output_dir", weights="init", name="model", towers="tower", encoder="tower"):
            return train_reward(plan, table, parts, folder, accelerator=accelerator, progress=show)
    except KeyboardInterrupt as error:
        done = _epochs_done(folder)
        reached = f"after {done} of {plan.chosen_recipe.epochs} epochs" if done else "before the first epoch's end"
        raise CommandError(f"interrupted {reached}; the same command resumes", status=130) from error


def _epochs_done(folder: Path) -> int:
    try:
        return read_json(folder / _CHECKPOINT / "state.json")["epoch"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0


# --------------------------------------------------------------------------------------------- the plan


def make_plan(name: str, model: ModelOptions, plan: dict[str, Any], recipe: dict[str, Any]) -> TrainingPlan:
    """Return the training that the options describe; patience 0 is none, and any patience keeps the best epoch."""
    settings = parse_settings(model.settings)
    with library(name="model", settings="settings"):
        from aigiqa_reward import get_reward_spec
        from aigiqa_reward.training.by_name import TrainingPlan

        get_reward_spec(name)
        found = TrainingPlan(name=name, towers=_towers(model.tower), settings=settings, **plan)
        if "patience" in recipe:
            recipe = {"keep": "best"} | recipe | {"patience": recipe["patience"] or None}
        return replace(found, recipe=replace(found.chosen_recipe, **recipe), cache=found.cache.expanduser())


def _towers(given: Sequence[str]) -> dict[str, TowerConfig]:
    from aigiqa_reward.encoders.open_clip import OpenCLIPConfig

    towers: dict[str, TowerConfig] = {}
    for item in given:
        role, tower = assigned(item, "tower", "ROLE=ARCH[:WEIGHTS]")
        if role in towers:
            raise CommandError(f"got {role} twice", argument="tower")
        local = tower.startswith(("local-dir:", "hf-hub:"))
        architecture, _, weights = (tower, "", "") if local else tower.partition(":")
        towers[role] = OpenCLIPConfig(architecture=architecture, pretrained=weights or None)
    return towers


def read(data: DataOptions) -> ScoredImages | PreferencePairs:
    """Return the scores or preferences that --data names."""
    from aigiqa_reward.datasets import read_data

    with library(source="data", folder="data", path="data"):
        return read_data(data.data, data.prompts_from)


def parse_split(split: str, modes: Sequence[str]) -> tuple[str, Path | None]:
    """Split csv:FILE; return the way to split and the file, None for other ways than csv."""
    mode, colon, file = split.partition(":")
    if (mode == "csv") != bool(file) or (colon and mode != "csv") or mode not in (*modes, "csv"):
        raise CommandError(f"expected {', '.join(modes)} or csv:FILE, got {split!r}", argument="split")
    path = Path(file).expanduser() if file else None
    if path is not None and not path.is_file():
        text = f"expected a CSV file with the columns name and split, found none at {path}"
        raise CommandError(text, argument="split")
    return mode, path


def make_accelerator(machine: MachineOptions) -> Accelerator:
    """Return Accelerate's device, precision and processes."""
    from accelerate import Accelerator

    device = machine.device
    if device not in (None, "cpu"):
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise CommandError(f"each process takes its own device; leave out {device!r}", argument="device")
        os.environ["ACCELERATE_TORCH_DEVICE"] = usable_device(device)  # which Accelerate reads
    with library():
        accelerator = Accelerator(cpu=device == "cpu", mixed_precision=machine.mixed_precision)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":  # Accelerate would ignore it
        raise CommandError("fp16 is not for the CPU; use bf16 or no", argument="mixed_precision")
    return accelerator


def describe(
    plan: TrainingPlan, model: ModelOptions, table: ScoredImages | PreferencePairs, split: str, file: Path | None
) -> dict[str, Any]:
    """Return what decides the result of a training, as JSON."""
    return {
        "model": plan.name,
        "data": digest(table),
        "split": [split, None if file is None else hashlib.sha256(file.read_bytes()).hexdigest()[:16]],
        "seed": plan.seed,
        "preset": plan.preset,
        "init": None if plan.init is None else str(plan.init),
        "tower": sorted(model.tower),
        "set": dict(plan.settings),
        **asdict(plan.chosen_recipe),
    }


def digest(table: ScoredImages | PreferencePairs) -> str:
    """Return a hash of the images' names and what people said of them, wherever the images are."""
    from aigiqa_reward.datasets import ScoredImages

    found = hashlib.sha256()
    columns: tuple[Any, ...]
    if isinstance(table, ScoredImages):
        found.update(table.quality.tobytes() + table.correspondence.tobytes())
        columns = (table.names, table.prompts, table.groups)
    else:
        columns = ([path.name for path in table.better], [path.name for path in table.worse], table.prompts)
    found.update(json.dumps(columns).encode())
    return found.hexdigest()[:16]


# --------------------------------------------------------------------------------------------- after


def _report(trained: Trained, parts: Split, folder: Path) -> None:
    """Print the folder and the scores of the test part on stdout, the rest on stderr."""
    result = trained.result
    best = f"the best epoch was {result.best_epoch} of {len(result.history)}, validation {result.best:.4f}"
    say("note", f"{trained.reward.name}: {best}{'; patience ran out' if result.stopped_early else ''}")
    report_unreadable([(str(entry.path), entry.reason) for entry in result.unreadable], folder / "training.json")
    tested = _tested(trained, parts)
    emit(f"{folder}\n{tested}", saved=not tested)


def _tested(trained: Trained, parts: Split) -> str:
    """One line for each aspect that the test part has."""
    from aigiqa_reward.training.fit import predict
    from aigiqa_reward.training.tasks import ScoreTask

    task, source = trained.task, trained.source
    model: Any = trained.reward.model
    rows = task.usable(parts.test, source.readable)
    if not len(rows):
        return ""
    quality, correspondence = predict(model, task.prompts, source, task.rows(rows), progress=False)
    if not isinstance(task, ScoreTask):
        share = task.measure(quality, correspondence, rows, "srcc")
        return f"test: the preferred image scores higher in {share:.4f} of {len(rows)} pairs\n"
    images = task.images
    aspects = (("quality", quality, images.quality), ("correspondence", correspondence, images.correspondence))
    return "".join(_line(name, found, human[rows]) for name, found, human in aspects if found is not None)


def _line(aspect: str, predicted: Any, human: Any) -> str:
    import numpy as np

    from aigiqa_reward.evaluation.metrics import MIN_ROWS, correlations

    known = np.isfinite(human)
    if known.sum() < MIN_ROWS:
        return ""
    found = correlations(predicted[known], human[known])
    return f"test: {aspect} SRCC {found.srcc:.4f}, PLCC {found.plcc:.4f}, {known.sum()} images\n"


def _upload(trained: Trained, name: str, folder: Path) -> None:
    try:
        trained.reward.push_to_hub(name)
    except (OSError, ValueError) as error:  # what huggingface_hub raises is one of the two
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        text = f"{folder} is complete, but was not uploaded to {name}: {reason}"
        raise CommandError(text, argument="push_to_hub", status=1) from error
    say("note", f"uploaded to https://huggingface.co/{name}")
