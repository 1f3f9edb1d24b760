"""The command line's arguments and options, each explained once: type, unit, meaning."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from aigiqa_reward.cli.output import Format


class DType(StrEnum):
    """Floating-point types to compute in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


_INPUTS, _REWARD, _OUTPUT, _SAMPLING = "Inputs", "Reward", "Output", "Sampling"
"""Headings in the help."""

ImagesArgument = Annotated[
    list[str],
    Argument(
        metavar="IMAGES",
        help="Image files and folders. A folder stands for its image files by extension, sorted, without hidden ones. "
        "Put -- before names that begin with a dash.",
    ),
]
PromptOption = Annotated[
    str | None,
    Option(metavar="TEXT", help="The prompt of all images. Without prompts, quality alone.", rich_help_panel=_INPUTS),
]
PromptsFileOption = Annotated[
    Path | None,
    Option(
        metavar="FILE",
        help="A prompt for each image: UTF-8 text with one a line, in the order of the images; .jsonl with objects of "
        "path and prompt; or .csv with the columns path,prompt or name,prompt. Paths are relative to the working "
        "directory or to FILE; an image whose path is not in FILE is looked up by its file name.",
        rich_help_panel=_INPUTS,
    ),
]
RecursiveOption = Annotated[
    bool, Option("--recursive", help="Take the images of subfolders as well.", rich_help_panel=_INPUTS)
]

RewardOption = Annotated[
    str, Option(metavar="NAME", help="Which reward; the command 'rewards' lists them.", rich_help_panel=_REWARD)
]
EncoderOption = Annotated[
    str | None,
    Option(
        metavar="ARCH",
        help="open_clip architecture of a reward that takes one, such as ViT-B-32, or local-dir:PATH of a folder with "
        "open_clip_config.json and weights.",
        rich_help_panel=_REWARD,
    ),
]
EncoderWeightsOption = Annotated[
    str | None,
    Option(
        metavar="TAG|FILE",
        help="Its weights: an open_clip tag such as openai (fetched from the Hub), or a .safetensors file.",
        rich_help_panel=_REWARD,
    ),
]
WeightsOption = Annotated[
    str | None,
    Option(
        metavar="PATH|ID",
        help="Instead of the embedded weights: a folder that reward.save_pretrained wrote, or a Hub id owner/name.",
        rich_help_panel=_REWARD,
    ),
]
ZeroShotOption = Annotated[
    bool,
    Option(
        "--zero-shot",
        help="tsp_mgs without anything trained: on --encoder or, without it, the embedded towers.",
        rich_help_panel=_REWARD,
    ),
]
ScenarioOption = Annotated[
    str | None,
    Option(
        metavar="NAME",
        help="What cpa_iqa is to judge images for; the command 'scenarios' lists them.",
        rich_help_panel=_REWARD,
    ),
]
PreferencesOption = Annotated[
    Path | None,
    Option(
        metavar="FILE",
        help="Scenarios of your own for cpa_iqa, as JSON: each one's name and its weights of global, local, implicit, "
        "distortion and low_level, before a softmax.",
        rich_help_panel=_REWARD,
    ),
]
QualityWeightOption = Annotated[
    float | None,
    Option(
        metavar="X",
        help="Share of quality in total, at least 0; 0.5 unless a saved reward says otherwise.",
        rich_help_panel=_REWARD,
    ),
]
CorrespondenceWeightOption = Annotated[
    float | None, Option(metavar="Y", help="Share of correspondence in total, likewise.", rich_help_panel=_REWARD)
]
DeviceOption = Annotated[
    str | None,
    Option(
        metavar="D",
        help="Where to compute: cpu, cuda, cuda:1, mps, ... By default cuda if there is one, else cpu.",
        rich_help_panel=_REWARD,
    ),
]
DTypeOption = Annotated[
    DType,
    Option(
        metavar="TYPE",
        help="What the reward's towers compute in: float32, bfloat16 or float16; its heads stay in float32.",
        rich_help_panel=_REWARD,
    ),
]
BatchSizeOption = Annotated[
    int, Option(min=1, metavar="N", help="Images read and scored at a time.", rich_help_panel=_REWARD)
]

FormatOption = Annotated[
    Format,
    Option(
        "--format",
        help="A table to read; or JSON Lines or CSV with path, prompt, total, quality, correspondence, error.",
        rich_help_panel=_OUTPUT,
    ),
]
OutputOption = Annotated[
    Path | None,
    Option(
        metavar="FILE",
        help="Write the result to FILE instead of stdout, in one step; an existing file is replaced.",
        rich_help_panel=_OUTPUT,
    ),
]
TopKOption = Annotated[
    int | None,
    Option(min=1, metavar="K", help="Keep the K best only; by default all.", rich_help_panel=_OUTPUT),
]
CopyToOption = Annotated[
    Path | None,
    Option(
        metavar="DIR",
        help="Copy the ranked images to DIR as 001_NAME, 002_NAME, ..., with the ranking in ranking.jsonl.",
        rich_help_panel=_OUTPUT,
    ),
]
OverwriteOption = Annotated[
    bool,
    Option(
        "--overwrite", help="Replace what an earlier run left in DIR under the same names.", rich_help_panel=_OUTPUT
    ),
]

SamplingPromptOption = Annotated[
    str, Option("--prompt", metavar="TEXT", help="What to sample images of.", rich_help_panel=_SAMPLING)
]
SeedOption = Annotated[
    int,
    Option(
        min=0,
        max=2**32 - 1,  # torch's CPU generator looks at 32 bits
        metavar="S",
        help="Seed of the first candidate; candidate i has the seed S + i.",
        rich_help_panel=_SAMPLING,
    ),
]

DemoCandidatesOption = Annotated[
    int, Option("--n", min=1, max=1000, metavar="N", help="How many candidates to sample.", rich_help_panel=_SAMPLING)
]
DemoOutOption = Annotated[
    Path,
    Option(
        metavar="DIR",
        help="Folder for contact-sheet.png (all candidates), results.jsonl (their scores) and best.png. Those of an "
        "earlier demo are replaced.",
        rich_help_panel=_OUTPUT,
    ),
]
OpenOption = Annotated[
    bool, Option("--open", help="Open the contact sheet in the system's viewer.", rich_help_panel=_OUTPUT)
]
