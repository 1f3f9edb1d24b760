"""The command `finetune`: LoRA weights for a pipeline whose images a reward likes better."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from aigiqa_reward.cli import finetuning_options as own
from aigiqa_reward.cli import options
from aigiqa_reward.cli.files import check_writable
from aigiqa_reward.cli.finetuning_runs import option_errors, reward_of, sampling_arguments
from aigiqa_reward.cli.inputs import CommandError
from aigiqa_reward.cli.output import emit, say
from aigiqa_reward.cli.pipelines import check_model, load_pipeline
from aigiqa_reward.cli.prompts import read_prompts
from aigiqa_reward.cli.runs import first_process, process_device
from aigiqa_reward.cli.sampling_options import PipelineDType, PipelineDTypeOption, SetOption

if TYPE_CHECKING:
    from aigiqa_reward.finetuning import FinetuneResult
    from aigiqa_reward.finetuning.algorithms.base import Algorithm

OF_ALGORITHM = {
    "draft": ("truncation_steps", "low_variance"),
    "refl": ("earliest",),
    "dpo": (
        *("pairs", "beta", "loss", "timesteps", "refresh_every"),
        *("candidates", "pairs_per_prompt", "guidance_scales", "reward_guidance", "margin"),
    ),
    "ddpo": ("images_per_prompt", "updates_per_round", "clip_range", "timestep_fraction"),
    "grpo": ("images_per_prompt", "updates_per_round", "clip_range", "timestep_fraction"),
}
"""Options that only some algorithms take, named as their settings are."""

OF_LOOP = (
    *("rank", "lora_alpha", "train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"),
    *("learning_rate", "lr_scheduler", "lr_warmup_steps", "max_train_steps", "max_grad_norm", "ema_decay"),
    *("use_8bit_adam", "kl_coeff", "checkpointing_steps", "checkpoints_total_limit", "validation_steps"),
    *("validation_seeds", "patience", "seed"),
)
"""Options that are fields of FinetuneConfig as they stand."""


def finetune(
    algorithm: own.AlgorithmArgument,
    pretrained_model_name_or_path: own.ModelOption,
    prompts: own.PromptsOption = None,
    output_dir: own.OutputOption = Path("finetuned"),
    config: own.ConfigOption = None,
    reward: own.RewardOption = "compact",
    reward_weights: own.WeightsOption = None,
    holdout_reward: own.HoldoutOption = "auto",
    reward_ceiling: own.CeilingOption = "auto",
    kl_coeff: own.KLOption = None,
    truncation_steps: own.TruncationOption = None,
    low_variance: own.LowVarianceOption = None,
    earliest: own.EarliestOption = None,
    pairs: own.PairsOption = None,
    beta: own.BetaOption = None,
    loss: own.LossOption = None,
    timesteps: own.TimestepsOption = None,
    refresh_every: own.RefreshOption = None,
    candidates: own.CandidatesOption = None,
    pairs_per_prompt: own.PairsOfPromptOption = None,
    guidance_scales: own.ScalesOfPairsOption = None,
    reward_guidance: own.ClimbOfPairsOption = None,
    margin: own.LeastMarginOption = None,
    images_per_prompt: own.GroupOption = None,
    updates_per_round: own.UpdatesOption = None,
    clip_range: own.ClipOption = None,
    timestep_fraction: own.FractionOption = None,
    train_batch_size: own.BatchOption = 4,
    gradient_accumulation_steps: own.AccumulationOption = 1,
    gradient_checkpointing: own.CheckpointingOption = False,
    learning_rate: own.RateOption = None,
    lr_scheduler: own.ScheduleOption = "constant",
    lr_warmup_steps: own.WarmupOption = 0,
    max_train_steps: own.StepsOption = 500,
    max_grad_norm: own.NormOption = 1.0,
    ema_decay: own.AverageOption = 0.0,
    use_8bit_adam: own.EightBitOption = False,
    mixed_precision: own.PrecisionOption = None,
    seed: own.SeedOption = 0,
    rank: own.RankOption = 8,
    lora_alpha: own.AlphaOption = None,
    target_modules: own.TargetsOption = None,
    validation_prompts: own.ValidationPromptsOption = None,
    validation_steps: own.ValidationStepsOption = 50,
    validation_seeds: own.ValidationSeedsOption = 4,
    patience: own.PatienceOption = 2,
    checkpointing_steps: own.CheckpointsOption = 100,
    checkpoints_total_limit: own.LimitOption = 2,
    resume_from_checkpoint: own.ResumeOption = None,
    report_to: own.ReportOption = None,
    num_inference_steps: own.StepsOfSamplingOption = None,
    guidance_scale: own.GuidanceOption = None,
    height: own.HeightOption = None,
    width: own.WidthOption = None,
    settings: SetOption = None,
    dtype: PipelineDTypeOption = PipelineDType.AUTO,
    device: options.DeviceOption = None,
) -> None:
    """Fine-tune a pipeline with LoRA by a reward; alone, or under torchrun and accelerate launch."""
    _finetune(dict(locals()))


def _finetune(given: Mapping[str, Any]) -> None:
    """The command with all its options by name."""
    folder, model = given["output_dir"], given["pretrained_model_name_or_path"]
    own_settings = _own_settings(given)
    check_model(model, option="--pretrained_model_name_or_path")
    if first_process():
        check_writable(folder, option="--output_dir")
    texts = [] if given["prompts"] is None else read_prompts(given["prompts"], "--prompts")
    watched = given["validation_prompts"]
    watched = [] if watched is None else read_prompts(watched, "--validation_prompts")
    loop_settings = _loop_settings(given)
    place = process_device(given["device"])
    if given["mixed_precision"] is own.MixedPrecision.FP16 and place == "cpu":
        raise CommandError("--mixed_precision: fp16 is not for the CPU; take bf16 or no")
    from aigiqa_reward import finetuning
    from aigiqa_reward.finetuning.checkpoints import find_checkpoint
    from aigiqa_reward.finetuning.logging import check_tracker

    with option_errors(given):  # whatever can be refused before a large pipeline is loaded
        check_tracker(_tracker(given))
        find_checkpoint(folder, given["resume_from_checkpoint"])
        algorithm = _algorithm(given["algorithm"].value, own_settings)
        settings = finetuning.FinetuneConfig(**loop_settings)
    judge = reward_of(given["reward"], given["reward_weights"], place)
    holdout: Any = "auto"
    if given["holdout_reward"] != "auto":
        holdout = reward_of(given["holdout_reward"], None, place, option="holdout_reward")
    pipe = load_pipeline(model, place, given["dtype"], option="--pretrained_model_name_or_path")
    arguments = {"validation_prompts": watched, "holdout": holdout, "progress": sys.stderr.isatty()}
    arguments |= {"resume_from_checkpoint": given["resume_from_checkpoint"], "report_to": _tracker(given)}
    if not watched and first_process():
        say("warning", "no --validation_prompts: nothing watches for a hacked reward, and the last weights are kept")
    result = _run(given, (pipe, judge, texts, algorithm, folder, settings), arguments)
    if first_process():
        _tell(result, folder)


def _run(given: Mapping[str, Any], inputs: tuple[Any, ...], arguments: Mapping[str, Any]) -> FinetuneResult:
    """The training; what ends it early is told in words of the command line."""
    from aigiqa_reward import finetuning
    from aigiqa_reward.finetuning.checkpoints import checkpoints_in
    from aigiqa_reward.sampling.batch_run import BestOfEachError

    folder = given["output_dir"]
    try:
        with option_errors(given):
            return finetuning.finetune(*inputs, **arguments)
    except (finetuning.FinetuningError, BestOfEachError) as error:
        raise CommandError(str(error), status=1) from error
    except KeyboardInterrupt as error:
        if first_process():
            there = checkpoints_in(folder)
            pairs = folder / "pairs"
            begun = f"; the same command goes on with {pairs}" if pairs.is_dir() else ""
            rest = f"; --resume_from_checkpoint latest goes on from {there[-1]}" if there else " before any checkpoint"
            say("error", f"interrupted{rest}{'' if there else begun}")
        raise typer.Exit(130) from error


def _own_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the chosen algorithm that were given.

    Raises:
        CommandError: one of another algorithm was given, or what is to be trained on or watched does not go together.
    """
    name = given["algorithm"].value
    for option in dict.fromkeys(option for names in OF_ALGORITHM.values() for option in names):
        if given[option] is not None and option not in OF_ALGORITHM[name]:
            of = [other for other, names in OF_ALGORITHM.items() if option in names]
            raise CommandError(f"--{option}: an option of {' and '.join(of)}, not of {name}; leave it out")
    if (given["prompts"] is None) == (given["pairs"] is None):
        got = "none" if given["prompts"] is None else "both"
        more = " or --pairs, which bring their own" if name == "dpo" else ""
        raise CommandError(f"--prompts: expected a file of prompts{more}, got {got}")
    if given["holdout_reward"] != "auto" and given["validation_prompts"] is None:
        raise CommandError("--holdout_reward: judges images of --validation_prompts, which is missing")
    return {option: given[option] for option in OF_ALGORITHM[name] if given[option] is not None}


def _tracker(given: Mapping[str, Any]) -> str | None:
    """None for "none", as other trainers have it."""
    return None if given["report_to"] == "none" else given["report_to"]


def _algorithm(name: str, settings: Mapping[str, Any]) -> Algorithm:
    from aigiqa_reward import finetuning

    chosen = dict(settings)
    if chosen.get("truncation_steps", "").isdecimal():
        chosen["truncation_steps"] = int(chosen["truncation_steps"])
    if "pairs" in chosen:
        chosen["pairs"] = finetuning.read_preference_pairs(chosen["pairs"])
    if "guidance_scales" in chosen:
        chosen["guidance_scales"] = tuple(chosen["guidance_scales"])
    for named in {"loss", "timesteps"} & chosen.keys():
        chosen[named] = chosen[named].value
    return finetuning.ALGORITHMS[name](**chosen)


def _loop_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    targets, precision = given["target_modules"], given["mixed_precision"]
    return {
        **{name: given[name] for name in OF_LOOP},
        **({} if precision is None else {"mixed_precision": precision.value}),
        "target_modules": tuple(targets) if targets else None,
        "reward_ceiling": _ceiling(given["reward_ceiling"]),
        "sampling": sampling_arguments(given),
    }


def _ceiling(text: str) -> float | str | None:
    if text in ("auto", "none"):
        return None if text == "none" else text
    try:
        return float(text)
    except ValueError as error:
        raise CommandError(f"--reward_ceiling: expected a number, auto or none, got {text!r}") from error


def _tell(result: FinetuneResult, folder: Path) -> None:
    """What was kept, on stdout; how it went, on stderr."""
    validations = [line for line in result.history if "validation" in line]
    if result.stopped:
        say("note", f"stopped after {result.steps} steps: {result.stopped}")
    if validations:
        first = validations[0]["validation"]
        # None of it, where a training went on in another folder and its best validation lies in the first one.
        kept = next((line["validation"] for line in validations if line["step"] == result.kept_step), {})
        for name in ("reward", "holdout", "diversity"):
            if name in first and name in kept:
                say("note", f"validation {name}: {first[name]:.4f} before, {kept[name]:.4f} with the kept weights")
    which = f"the weights after step {result.kept_step}"
    if validations and not result.kept_step:
        which = "those before the first step, of which no later validation was better: a LoRA that changes nothing"
    say("note", f"kept: {which}; pipe.load_lora_weights({str(folder)!r})")
    emit(f"{folder}\n")
