"""Arguments and options of `finetune` and `pairs`, each explained once, in the spelling of diffusers' own scripts."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from aigiqa_reward.cli.config_file import config_option
from aigiqa_reward.cli.training_options import MixedPrecision

__all__ = ["AlgorithmName", "MixedPrecision"]


class AlgorithmName(StrEnum):
    """How to fine-tune."""

    DRAFT = "draft"
    REFL = "refl"
    DPO = "dpo"
    DDPO = "ddpo"
    GRPO = "grpo"


class LossName(StrEnum):
    """Of DPO."""

    SIGMOID = "sigmoid"
    HINGE = "hinge"
    IPO = "ipo"


class TimestepsName(StrEnum):
    """Of DPO."""

    UNIFORM = "uniform"
    SAMPLER = "sampler"


_PIPELINE, _DATA, _REWARD, _ALGORITHM = "Pipeline", "Prompts and output", "Rewards", "The algorithm's own"
_TRAINING, _LORA, _WATCH, _SAMPLING = "Training", "LoRA", "Validation and checkpoints", "Sampling"
_PAIRS = "Pairs"
"""Headings in the help."""


def _option(name: str, panel: str, help: str, **more: Any) -> Any:
    """An option spelt as diffusers spells it, and with dashes too."""
    spelt = [f"--{name}"] if "_" not in name else [f"--{name}", f"--{name.replace('_', '-')}"]
    return Option(*spelt, help=help, rich_help_panel=panel, **more)


def _switch(name: str, panel: str, help: str) -> Any:
    """An option to turn on, and off again where a file of options has turned it on."""
    dashed = name.replace("_", "-")
    return Option(f"--{name}/--no-{dashed}", f"--{dashed}", help=help, rich_help_panel=panel)


ConfigOption = Annotated[Path | None, config_option("YAML with options, as 'rank: 8'; the command line wins.")]
AlgorithmArgument = Annotated[
    AlgorithmName,
    Argument(
        help="draft and refl follow the reward's gradient; dpo learns from pairs of images; ddpo, and for flow models "
        "grpo, need the reward's numbers alone."
    ),
]

ModelOption = Annotated[
    str,
    _option(
        "pretrained_model_name_or_path",
        _PIPELINE,
        "A text-to-image pipeline of diffusers: a folder, a Hub id, or 'embedded', the small one of the package.",
        metavar="ID_OR_PATH",
    ),
]
PromptsOption = Annotated[
    Path | None,
    _option(
        "prompts", _DATA, "Prompts to train on: UTF-8, one a line, or .jsonl; pairs bring their own.", metavar="FILE"
    ),
]
PairsPromptsOption = Annotated[
    Path, _option("prompts", _DATA, "Prompts to sample images of: UTF-8, one a line, or .jsonl.", metavar="FILE")
]
OutputOption = Annotated[
    Path,
    _option(
        "output_dir",
        _DATA,
        "Folder for pytorch_lora_weights.safetensors, checkpoints, history.jsonl, validation images and curves.",
        metavar="DIR",
    ),
]

PairsFolderOption = Annotated[
    Path, _option("output_dir", _DATA, "Folder for the images and pairs.parquet.", metavar="DIR")
]

RewardOption = Annotated[str, _option("reward", _REWARD, "What to raise; 'rewards' lists them.", metavar="NAME")]
WeightsOption = Annotated[
    str | None, _option("reward_weights", _REWARD, "A reward that 'train' made.", metavar="FOLDER")
]
HoldoutOption = Annotated[
    str,
    _option(
        "holdout_reward",
        _REWARD,
        "What watches that the reward is not merely pleased; auto is an embedded system with another head, "
        "judging quality alone.",
        metavar="NAME",
    ),
]
CeilingOption = Annotated[
    str,
    _option(
        "reward_ceiling",
        _REWARD,
        "Images beyond it are not pushed further; auto is 1, the best score people gave; none is no ceiling.",
        metavar="X",
    ),
]
_KL = "Weight of the distance to the pipeline without the LoRA; default 0.01, of dpo 0."
KLOption = Annotated[float | None, _option("kl_coeff", _REWARD, _KL, metavar="X")]

TruncationOption = Annotated[
    str | None,
    _option(
        "truncation_steps",
        _ALGORITHM,
        "draft: how many last steps the gradient passes through: 1 by default, 'all', or 'random' as in AlignProp.",
        metavar="K",
    ),
]
LowVarianceOption = Annotated[
    int | None, _option("low_variance", _ALGORITHM, "draft: noises of DRaFT-LV; 0 is DRaFT-K.", min=0, metavar="N")
]
EarliestOption = Annotated[
    float | None,
    _option("earliest", _ALGORITHM, "refl: share of the steps before which no gradient is taken.", metavar="X"),
]
PairsOption = Annotated[
    Path | None,
    _option(
        "pairs",
        _ALGORITHM,
        "dpo: what 'pairs' made, or Pick-a-Pic's parquet; without, they are made first.",
        metavar="PATH",
    ),
]
BetaOption = Annotated[float | None, _option("beta", _ALGORITHM, "dpo: pull towards the reference.", metavar="X")]
LossOption = Annotated[LossName | None, _option("loss", _ALGORITHM, "dpo: its loss.")]
TimestepsOption = Annotated[
    TimestepsName | None,
    _option("timesteps", _ALGORITHM, "dpo: noise levels of the model's training, or of the sampler's steps alone."),
]
RefreshOption = Annotated[
    int | None,
    _option("refresh_every", _ALGORITHM, "dpo: steps after which pairs are made anew.", min=0, metavar="N"),
]
CandidatesOption = Annotated[
    int | None,
    _option("candidates", _ALGORITHM, "dpo: images a prompt that pairs are made of.", min=2, metavar="N"),
]
PairsOfPromptOption = Annotated[
    int | None,
    _option("pairs_per_prompt", _ALGORITHM, "dpo: pairs of them, where they are made first.", min=1, metavar="K"),
]
ScalesOfPairsOption = Annotated[
    list[float] | None,
    _option("guidance_scales", _ALGORITHM, "dpo: at each of which every candidate is sampled; repeat it.", metavar="G"),
]
ClimbOfPairsOption = Annotated[
    float | None,
    _option("reward_guidance", _ALGORITHM, "dpo: pair images with their climbs, of this scale.", min=0.0, metavar="X"),
]
LeastMarginOption = Annotated[
    float | None,
    _option("margin", _ALGORITHM, "dpo: least difference of their rewards.", min=0.0, metavar="X"),
]
GroupOption = Annotated[
    int | None,
    _option("images_per_prompt", _ALGORITHM, "ddpo, grpo: images that are compared.", min=1, metavar="N"),
]
UpdatesOption = Annotated[
    int | None,
    _option("updates_per_round", _ALGORITHM, "ddpo, grpo: steps on the same images.", min=1, metavar="N"),
]
ClipOption = Annotated[
    float | None, _option("clip_range", _ALGORITHM, "ddpo, grpo: how far a ratio may leave 1.", metavar="X")
]
FractionOption = Annotated[
    float | None, _option("timestep_fraction", _ALGORITHM, "ddpo, grpo: share of the steps trained.", metavar="X")
]

BatchOption = Annotated[int, _option("train_batch_size", _TRAINING, "Rows at once on a device.", min=1, metavar="N")]
AccumulationOption = Annotated[
    int, _option("gradient_accumulation_steps", _TRAINING, "Such parts a step.", min=1, metavar="N")
]
CheckpointingOption = Annotated[
    bool, _switch("gradient_checkpointing", _TRAINING, "Less memory, about a third more work.")
]
RateOption = Annotated[float | None, _option("learning_rate", _TRAINING, "By default the algorithm's.", metavar="X")]
ScheduleOption = Annotated[
    str, _option("lr_scheduler", _TRAINING, "constant, linear, cosine, ... of diffusers.", metavar="NAME")
]
WarmupOption = Annotated[int, _option("lr_warmup_steps", _TRAINING, "Steps.", min=0, metavar="N")]
StepsOption = Annotated[int, _option("max_train_steps", _TRAINING, "Steps of the optimizer.", min=1, metavar="N")]
NormOption = Annotated[float, _option("max_grad_norm", _TRAINING, "Longest gradient.", metavar="X")]
AverageOption = Annotated[
    float, _option("ema_decay", _TRAINING, "Of a moving average of the weights; 0 is none.", metavar="X")
]
EightBitOption = Annotated[bool, _switch("use_8bit_adam", _TRAINING, "Needs bitsandbytes.")]
PrecisionOption = Annotated[
    MixedPrecision | None,
    _option("mixed_precision", _TRAINING, "Of denoiser and decoder; default: accelerate's configuration, else no."),
]
SeedOption = Annotated[int, _option("seed", _TRAINING, "Of every random choice.", min=0, metavar="S")]

RankOption = Annotated[int, _option("rank", _LORA, "Of its matrices.", min=1, metavar="R")]
AlphaOption = Annotated[
    float | None, _option("lora_alpha", _LORA, "It is scaled by alpha / rank; by default the rank.", metavar="X")
]
TargetsOption = Annotated[
    list[str] | None,
    _option(
        "target_modules",
        _LORA,
        "Ends of the names of layers to adapt, may be given several times; by default the attention's projections.",
        metavar="NAME",
        show_default=False,
    ),
]

ValidationPromptsOption = Annotated[
    Path | None, _option("validation_prompts", _WATCH, "Prompts to watch, not trained on.", metavar="FILE")
]
ValidationStepsOption = Annotated[
    int, _option("validation_steps", _WATCH, "Steps between validations.", min=1, metavar="N")
]
ValidationSeedsOption = Annotated[
    int, _option("validation_seeds", _WATCH, "Images a validation prompt.", min=1, metavar="N")
]
PatienceOption = Annotated[
    int,
    _option("patience", _WATCH, "Validations in a row in which the held-out reward may fall.", min=1, metavar="N"),
]
CheckpointsOption = Annotated[
    int, _option("checkpointing_steps", _WATCH, "Steps between checkpoints; 0: at the end.", min=0, metavar="N")
]
LimitOption = Annotated[
    int | None, _option("checkpoints_total_limit", _WATCH, "How many are kept.", min=1, metavar="N")
]
ResumeOption = Annotated[
    str | None,
    _option("resume_from_checkpoint", _WATCH, "'latest', or a checkpoint's name or path.", metavar="NAME"),
]
ReportOption = Annotated[str | None, _option("report_to", _WATCH, "A tracker: tensorboard, wandb.", metavar="NAME")]

MarginOption = Annotated[
    float, _option("margin", _PAIRS, "Least difference of the rewards of a pair.", min=0.0, metavar="X")
]
PairsPerPromptOption = Annotated[
    int,
    _option(
        "pairs_per_prompt",
        _PAIRS,
        "Best with worst, second best with second worst, and so on.",
        min=1,
        metavar="K",
    ),
]
ScalesOption = Annotated[
    list[float] | None,
    _option("guidance_scales", _PAIRS, "Pair images with themselves at these scales; repeat it.", metavar="G"),
]
ClimbOption = Annotated[
    float,
    _option(
        "reward_guidance", _PAIRS, "Pair images with their climbs by the reward, of this scale.", min=0.0, metavar="X"
    ),
]
ImagesOption = Annotated[int, _option("n", _PAIRS, "Images a prompt.", min=2, metavar="N")]
AtOnceOption = Annotated[
    int, _option("batch_size", _PAIRS, "Images sampled at once; halved where memory runs out.", min=1, metavar="N")
]
FirstSeedOption = Annotated[
    int, _option("seed", _PAIRS, "Of the first image of every prompt; the next have the next.", min=0, metavar="S")
]

StepsOfSamplingOption = Annotated[
    int | None, _option("num_inference_steps", _SAMPLING, "By default the pipeline's.", min=1, metavar="N")
]
GuidanceOption = Annotated[
    float | None, _option("guidance_scale", _SAMPLING, "By default the pipeline's.", metavar="G")
]
HeightOption = Annotated[int | None, _option("height", _SAMPLING, "In pixels.", min=16, metavar="PX")]
WidthOption = Annotated[int | None, _option("width", _SAMPLING, "In pixels.", min=16, metavar="PX")]
