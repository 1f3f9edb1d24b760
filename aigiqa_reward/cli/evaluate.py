"""The command `evaluate`: what a model reaches on images that it was not trained on, beside controls and ablations."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from aigiqa_reward.cli import training_options as options
from aigiqa_reward.cli.evaluation_files import benchmark_of, read_predicted, read_unreadable, title_of, write_report
from aigiqa_reward.cli.files import check_writable
from aigiqa_reward.cli.given_weights import evaluate_weights
from aigiqa_reward.cli.inputs import CommandError
from aigiqa_reward.cli.notes import check_arguments, describe_plan, noted
from aigiqa_reward.cli.output import say
from aigiqa_reward.cli.plans import file_errors, make_accelerator, make_plan, parse_split, read, report_unreadable
from aigiqa_reward.cli.runs import usage_errors

if TYPE_CHECKING:
    from accelerate import Accelerator

    from aigiqa_reward.datasets import ScoredImages
    from aigiqa_reward.evaluation import ProtocolReport
    from aigiqa_reward.training.by_name import TrainingPlan
    from aigiqa_reward.training.report import ProtocolSettings

_SEEDS, _ABLATION_SEEDS = 10, 3
_MODES = ("group", "random_image")


def evaluate(
    model: options.SystemArgument,
    data: options.DataOption,
    report: options.ReportFolderOption = None,
    seeds: options.SeedsOption = None,
    ablation_seeds: options.AblationSeedsOption = None,
    split: options.ProtocolSplitOption = None,
    same_generator: options.SameGeneratorOption = "sd1.5",
    weights: options.GivenWeightsOption = None,
    preset: options.PresetOption = None,
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
) -> None:
    """Train and test on several splits, or test given weights; run again, it goes on from the last finished seed."""
    recipe = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate, "weight_decay": weight_decay}
    recipe |= {"loss": loss, "rank_weight": rank_weight, "mismatch_weight": mismatch_weight, "patience": patience}
    recipe |= {"train_towers": train_towers}
    folder = Path(f"aigiqa-{model}-report") if report is None else report
    if weights is not None:
        others = {"seeds": seeds, "ablation_seeds": ablation_seeds, "split": split, "preset": preset, "tower": tower}
        others |= {"set": settings, "mixed_precision": mixed_precision, "cache": cache, "max_store_gb": max_store_gb}
        useless = [f"--{name.replace('_', '-')}" for name, value in (others | recipe).items() if value is not None]
        if useless:
            raise CommandError(f"{', '.join(useless)}: with --weights nothing is trained; leave it out")
        evaluate_weights(model, weights, data, folder, device, same_generator)
        return
    plan = make_plan(model, preset, None, tower or (), settings or (), 0, cache, max_store_gb, recipe)
    mode, file = parse_split(split or _MODES[0], _MODES)
    protocol = _protocol(seeds, ablation_seeds, mode, file, same_generator)
    table = _scored(data)
    accelerator = _alone(device, mixed_precision)
    arguments = describe_plan(plan, tower or (), table, mode, file) | {"--same-generator": same_generator}
    _measure(plan, table, protocol, folder, accelerator, arguments, data)


def _protocol(
    seeds: int | None, ablation_seeds: int | None, mode: Any, file: Path | None, same_generator: str
) -> ProtocolSettings:
    from aigiqa_reward.training.report import ProtocolSettings

    count = _SEEDS if seeds is None else seeds
    ablations = min(_ABLATION_SEEDS, count) if ablation_seeds is None else ablation_seeds
    if ablations > count:
        raise CommandError(f"--ablation-seeds: expected at most --seeds {count}, got {ablations}")
    return ProtocolSettings(
        seeds=count, ablation_seeds=ablations, mode=mode, file=file, same_generator=same_generator or None
    )


def _scored(data: str) -> ScoredImages:
    from aigiqa_reward.datasets import ScoredImages

    table = read(data)
    if not isinstance(table, ScoredImages):
        raise CommandError(
            f"--data: {data.partition(':')[0]} holds preferences, and the protocol measures scores; --weights measures "
            "in which share of the pairs a trained reward agrees"
        )
    return table


def _alone(device: str | None, precision: str | None) -> Accelerator:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise CommandError("evaluate trains in one process; start it without torchrun or accelerate launch")
    return make_accelerator(device, precision)


def _measure(
    plan: TrainingPlan,
    table: ScoredImages,
    protocol: ProtocolSettings,
    folder: Path,
    accelerator: Accelerator,
    arguments: dict[str, Any],
    data: str,
) -> None:
    """Run the protocol, and write and print what it found."""
    state = folder / "report.json"
    arguments |= {"--seeds": protocol.seeds, "--ablation-seeds": protocol.ablation_seeds}
    check_writable(folder, option="--report")
    check_arguments(folder, state, arguments, "--report")
    towers = ", ".join(arguments["--tower"]) or ("published towers" if plan.preset else "compact towers")
    with noted(folder, state, arguments):
        found = _run(plan, table, protocol, folder, accelerator, title_of(plan.name, data, towers))
    rows, predicted = read_predicted(folder / "seed0.npz", len(table))
    write_report(found, table, rows, predicted, folder, benchmark_of(data), part="test part of seed 0")
    unreadable = read_unreadable(folder / "unreadable.json")
    report_unreadable(unreadable, folder / "unreadable.json")
    if unreadable:
        raise typer.Exit(1)


def _run(
    plan: TrainingPlan,
    table: ScoredImages,
    protocol: ProtocolSettings,
    folder: Path,
    accelerator: Accelerator,
    title: str,
) -> ProtocolReport:
    from aigiqa_reward.training.report import run_protocol

    show = sys.stderr.isatty()
    try:
        with usage_errors(), file_errors():
            return run_protocol(plan, table, protocol, folder, title=title, accelerator=accelerator, progress=show)
    except KeyboardInterrupt as error:
        say("error", "interrupted; the same command goes on from what is finished")
        raise typer.Exit(130) from error
