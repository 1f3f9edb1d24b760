"""The command `train`: one of the five systems on human scores or preferences, to a reward in a folder."""

from __future__ import annotations

import re
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from aigiqa_reward.cli import training_options as options
from aigiqa_reward.cli.files import check_writable
from aigiqa_reward.cli.inputs import CommandError
from aigiqa_reward.cli.notes import check_arguments, describe_plan, noted
from aigiqa_reward.cli.output import emit, say
from aigiqa_reward.cli.plans import file_errors, make_accelerator, make_plan, parse_split, read, report_unreadable
from aigiqa_reward.cli.runs import usage_errors
from aigiqa_reward.utils.io import read_json

if TYPE_CHECKING:
    from accelerate import Accelerator

    from aigiqa_reward.datasets import PreferencePairs, ScoredImages, Split
    from aigiqa_reward.training.by_name import Trained, TrainingPlan

_MODES = ("whole", "group", "random_image")
_CHECKPOINT = "checkpoint"


def train(
    model: options.SystemArgument,
    data: options.DataOption,
    out: options.TrainedFolderOption = None,
    split: options.TrainingSplitOption = "whole",
    seed: options.TrainingSeedOption = 0,
    preset: options.PresetOption = None,
    init: options.InitOption = None,
    tower: options.TowerOption = None,
    settings: options.SetOption = None,
    epochs: options.EpochsOption = None,
    batch_size: options.TrainingBatchOption = None,
    learning_rate: options.LearningRateOption = None,
    weight_decay: options.WeightDecayOption = None,
    loss: options.LossOption = None,
    rank_weight: options.RankWeightOption = None,
    mismatch_weight: options.MismatchWeightOption = None,
    patience: options.PatienceOption = None,
    train_towers: options.TrainTowersOption = None,
    device: options.TrainingDeviceOption = None,
    mixed_precision: options.MixedPrecisionOption = None,
    cache: options.CacheOption = None,
    max_store_gb: options.MaxStoreOption = None,
    hub_id: options.HubOption = None,
) -> None:
    """Train a reward on human scores; run again, it goes on from the last epoch. Works under torchrun as well."""
    recipe = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate, "weight_decay": weight_decay}
    recipe |= {"loss": loss, "rank_weight": rank_weight, "mismatch_weight": mismatch_weight, "patience": patience}
    recipe |= {"train_towers": train_towers}
    if hub_id is not None and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", hub_id):
        raise CommandError(f"--hub-id: expected owner/name, got {hub_id!r}")
    plan = make_plan(model, preset, init, tower or (), settings or (), seed, cache, max_store_gb, recipe)
    mode, file = parse_split(split, _MODES)
    folder = Path(f"aigiqa-{model}") if out is None else out
    table = read(data)
    parts = _parts(table, mode, file, seed)
    accelerator = make_accelerator(device, mixed_precision)
    arguments = describe_plan(plan, tower or (), table, mode, file)
    with ExitStack() as stack:
        if accelerator.is_main_process:
            check_writable(folder, option="--out")
            check_arguments(folder, folder / _CHECKPOINT, arguments, "--out")
            stack.enter_context(noted(folder, folder / _CHECKPOINT, arguments))
        trained = _train(plan, table, parts, folder, accelerator)
    if accelerator.is_main_process:
        _tell(trained, parts, folder)
        if hub_id is not None:
            _upload(trained, hub_id, folder)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if trained.result.unreadable and accelerator.is_main_process:
        raise typer.Exit(1)


def _parts(table: ScoredImages | PreferencePairs, mode: Any, file: Path | None, seed: int) -> Split:
    from aigiqa_reward.datasets import split_rows
    from aigiqa_reward.training.by_name import whole_split

    with usage_errors():
        return whole_split(table, seed=seed) if mode == "whole" else split_rows(table, mode=mode, seed=seed, file=file)


def _train(
    plan: TrainingPlan,
    table: ScoredImages | PreferencePairs,
    parts: Split,
    folder: Path,
    accelerator: Accelerator,
) -> Trained:
    """Train to the end, or end the command by saying how to go on."""
    from aigiqa_reward.training.by_name import train_reward

    speaks = accelerator.is_main_process
    try:
        with usage_errors(), file_errors():
            return train_reward(
                plan, table, parts, folder, accelerator=accelerator, progress=speaks and sys.stderr.isatty()
            )
    except KeyboardInterrupt as error:
        if speaks:
            done = _epochs_done(folder)
            reached = f"after {done} of {plan.chosen_recipe.epochs} epochs" if done else "before the first epoch's end"
            say("error", f"interrupted {reached}; the same command goes on from there")
        raise typer.Exit(130) from error


def _epochs_done(folder: Path) -> int:
    """How many epochs the checkpoint of a folder has behind it."""
    try:
        return read_json(folder / _CHECKPOINT / "state.json")["epoch"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0


# --------------------------------------------------------------------------------------------- after


def _tell(trained: Trained, parts: Split, folder: Path) -> None:
    """The folder and what the test part says, on stdout; the rest on stderr."""
    result = trained.result
    best = f"the best epoch was {result.best_epoch} of {len(result.history)}, validation {result.best:.4f}"
    say("note", f"{trained.reward.name}: {best}{'; patience ran out' if result.stopped_early else ''}")
    report_unreadable([(str(entry.path), entry.reason) for entry in result.unreadable], folder / "training.json")
    emit(f"{folder}\n{_tested(trained, parts)}")


def _tested(trained: Trained, parts: Split) -> str:
    """One line for each thing that the test part can tell, or none."""
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


def _upload(trained: Trained, hub_id: str, folder: Path) -> None:
    try:
        trained.reward.push_to_hub(hub_id)
    except (OSError, ValueError) as error:  # what huggingface_hub raises is one of the two
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CommandError(
            f"--hub-id: {folder} is whole, but was not uploaded to {hub_id}: {reason}", status=1
        ) from error
    say("note", f"uploaded to https://huggingface.co/{hub_id}")
