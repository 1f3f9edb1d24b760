"""Arguments and options of `train` and `evaluate`, each explained once. What is not given, the recipe says."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

from typer import Argument, Option


class Preset(StrEnum):
    """Named towers."""

    PAPER = "paper"


class MixedPrecision(StrEnum):
    """What Accelerate computes in beside float32."""

    NO = "no"
    BF16 = "bf16"
    FP16 = "fp16"


_DATA, _MODEL, _TRAINING, _OUTPUT = "Data", "Model", "Training (by default, what the model's recipe says)", "Output"
"""Headings in the help."""

SystemArgument = Annotated[
    str,
    Argument(
        metavar="MODEL",
        help="mst_clipiqa, tsp_mgs, sc_agiqa, ma_agiqa or cpa_iqa; compact with --init. 'rewards' says more of them.",
    ),
]
DataOption = Annotated[
    str,
    Option(
        metavar="NAME:PATH",
        help="Human scores (agiqa3k, agiqa1k, aigciqa2023, aigiqa20k), preferences (imagereward, pickapic) or csv:FILE "
        "with the columns path, prompt and quality or correspondence, and where there are such generator and group.",
        rich_help_panel=_DATA,
    ),
]
TrainingSplitOption = Annotated[
    str,
    Option(
        metavar="SPLIT",
        help="whole: train on all, less a tenth of the prompts that chooses the epoch; group: hold a fifth of the "
        "prompts out as well, to test on; random_image: of the images; csv:FILE with the columns name and split.",
        rich_help_panel=_DATA,
    ),
]
ProtocolSplitOption = Annotated[
    str | None,
    Option(
        metavar="SPLIT",
        help="group, the default: no prompt on two sides; random_image: prompts of the test part are seen in training "
        "too; csv:FILE with the columns name and split.",
        rich_help_panel=_DATA,
        show_default=False,
    ),
]
TrainingSeedOption = Annotated[
    int,
    Option("--seed", min=0, metavar="S", help="Of the split, the first weights, the order.", rich_help_panel=_DATA),
]
SeedsOption = Annotated[
    int | None,
    Option(min=1, metavar="N", help="Splits to train and test on; 10.", rich_help_panel=_DATA, show_default=False),
]
AblationSeedsOption = Annotated[
    int | None,
    Option(
        min=0,
        metavar="N",
        help="How many of them for each module switched off; 3, and 0 leaves these out.",
        rich_help_panel=_DATA,
        show_default=False,
    ),
]
SameGeneratorOption = Annotated[
    str,
    Option(
        metavar="PREFIX",
        help="Generators whose names begin with it are one: what picking the best among its images alone gains.",
        rich_help_panel=_DATA,
    ),
]

PresetOption = Annotated[
    Preset | None,
    Option(
        help="The published towers, from the Hub, and the published recipe, in place of the compact towers and the "
        "embedded head's recipe.",
        rich_help_panel=_MODEL,
        show_default=False,
    ),
]
InitOption = Annotated[
    str | None,
    Option(
        metavar="embedded|FOLDER",
        help="Go on from a trained head: the embedded one, or that of a saved reward; by default a fresh one.",
        rich_help_panel=_MODEL,
    ),
]
TowerOption = Annotated[
    list[str] | None,
    Option(
        metavar="ROLE=ARCH[:WEIGHTS]",
        help="An open_clip model as a tower, such as clip=ViT-B-16:openai or clip=local-dir:FOLDER; repeat it for "
        "several. Roles: coarse, fine (mst_clipiqa), clip (tsp_mgs, cpa_iqa), matcher (ma_agiqa, with --preset paper). "
        "Towers of timm and BLIP, and assistants, are not offered here: see aigiqa_reward.benchmark.TrainingPlan.",
        rich_help_panel=_MODEL,
        show_default=False,
    ),
]
SetOption = Annotated[
    list[str] | None,
    Option(
        "--set",
        metavar="KEY=VALUE",
        help="A field of the model's configuration, the value as JSON or a plain word; repeat it for several.",
        rich_help_panel=_MODEL,
        show_default=False,
    ),
]
GivenWeightsOption = Annotated[
    str | None,
    Option(
        "--weights",
        metavar="embedded|FOLDER|ID",
        help="Train nothing: score all images with the embedded weights, or those of a saved reward; MODEL may then be "
        "compact, and the data preferences.",
        rich_help_panel=_MODEL,
    ),
]

EpochsOption = Annotated[int | None, Option(metavar="N", help="At most.", rich_help_panel=_TRAINING)]
TrainingBatchOption = Annotated[
    int | None, Option("--batch-size", metavar="N", help="Images a step and process.", rich_help_panel=_TRAINING)
]
LearningRateOption = Annotated[float | None, Option(metavar="X", help="At its highest.", rich_help_panel=_TRAINING)]
WeightDecayOption = Annotated[float | None, Option(metavar="X", help="Of the optimizer.", rich_help_panel=_TRAINING)]
LossOption = Annotated[
    str | None,
    Option(metavar="NAME", help="Of scores: mse, mae, smooth_l1, pairwise or none.", rich_help_panel=_TRAINING),
]
RankWeightOption = Annotated[
    float | None, Option(metavar="X", help="Of the loss that keeps pairs in order.", rich_help_panel=_TRAINING)
]
MismatchWeightOption = Annotated[
    float | None,
    Option(metavar="X", help="Of the loss that wants other prompts to fit less.", rich_help_panel=_TRAINING),
]
PatienceOption = Annotated[
    int | None,
    Option(
        min=0,
        metavar="N",
        help="Epochs without a better validation after which training ends; 0: all epochs are trained.",
        rich_help_panel=_TRAINING,
    ),
]
TrainTowersOption = Annotated[
    bool | None,
    Option(
        "--train-towers/--no-train-towers",
        help="Train the towers too, or the head alone, on stored features.",
        rich_help_panel=_TRAINING,
        show_default=False,
    ),
]

TrainingDeviceOption = Annotated[
    str | None,
    Option(
        "--device", metavar="D", help="cpu, cuda, cuda:1, mps, ...; by default Accelerate's.", rich_help_panel=_TRAINING
    ),
]
MixedPrecisionOption = Annotated[
    MixedPrecision | None,
    Option(
        help="Of the towers; by default what `accelerate launch` was told, else no.",
        rich_help_panel=_TRAINING,
        show_default=False,
    ),
]
CacheOption = Annotated[
    Path | None,
    Option(
        metavar="DIR",
        help="Where the towers' features are kept, computed once; by default ~/.cache/aigiqa-reward/features.",
        rich_help_panel=_TRAINING,
    ),
]
MaxStoreOption = Annotated[
    float | None,
    Option("--max-store-gb", min=0, metavar="GB", help="The most they may take; 20.", rich_help_panel=_TRAINING),
]

TrainedFolderOption = Annotated[
    Path | None,
    Option(
        "--out",
        metavar="DIR",
        help="Folder for the reward, training.json and the checkpoint; by default aigiqa-MODEL.",
        rich_help_panel=_OUTPUT,
    ),
]
HubOption = Annotated[
    str | None,
    Option(metavar="OWNER/NAME", help="Upload the reward to the Hub afterwards.", rich_help_panel=_OUTPUT),
]
ReportFolderOption = Annotated[
    Path | None,
    Option(
        "--report",
        metavar="DIR",
        help="Folder for table.md, table.csv, quality.png, correspondence.png and srcc.png, and for the seeds that are "
        "finished; by default aigiqa-MODEL-report.",
        rich_help_panel=_OUTPUT,
    ),
]
