"""The command `pairs`: images of which a reward prefers one to another, for DPO."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from aigiqa_reward.cli import finetuning_options as own
from aigiqa_reward.cli import options
from aigiqa_reward.cli.files import check_writable
from aigiqa_reward.cli.finetuning_runs import option_errors, reward_of, sampling_arguments
from aigiqa_reward.cli.inputs import CommandError
from aigiqa_reward.cli.output import emit, progress, say
from aigiqa_reward.cli.pipelines import check_model, load_pipeline
from aigiqa_reward.cli.prompts import read_prompts
from aigiqa_reward.cli.runs import first_process, process_device
from aigiqa_reward.cli.sampling_options import AnewOption, PipelineDType, PipelineDTypeOption, SetOption

_OF_PAIRS = ("n", "margin", "pairs_per_prompt", "reward_guidance", "seed", "batch_size", "overwrite")
_TAKEN = ("prompts", "folder", "out", "accelerator", "settings", "progress", *_OF_PAIRS)


def pairs(
    pretrained_model_name_or_path: own.ModelOption,
    prompts: own.PairsPromptsOption,
    output_dir: own.PairsFolderOption = Path("pairs"),
    config: own.ConfigOption = None,
    reward: own.RewardOption = "compact",
    reward_weights: own.WeightsOption = None,
    n: own.ImagesOption = 4,
    margin: own.MarginOption = 0.0,
    pairs_per_prompt: own.PairsPerPromptOption = 1,
    guidance_scales: own.ScalesOption = None,
    reward_guidance: own.ClimbOption = 0.0,
    seed: own.FirstSeedOption = 0,
    batch_size: own.AtOnceOption = 4,
    num_inference_steps: own.StepsOfSamplingOption = None,
    guidance_scale: own.GuidanceOption = None,
    height: own.HeightOption = None,
    width: own.WidthOption = None,
    settings: SetOption = None,
    dtype: PipelineDTypeOption = PipelineDType.AUTO,
    device: options.DeviceOption = None,
    overwrite: AnewOption = False,
) -> None:
    """Sample N images of each prompt and pair the best with the worst by reward; the same command goes on."""
    _pairs(dict(locals()))


def _pairs(given: Mapping[str, Any]) -> None:
    """The command with all its options by name."""
    folder, model = given["output_dir"], given["pretrained_model_name_or_path"]
    check_model(model, option="--pretrained_model_name_or_path")
    if first_process():
        check_writable(folder, option="--output_dir")
    sampling = sampling_arguments(given, _TAKEN)
    texts = read_prompts(given["prompts"], "--prompts")
    place = process_device(given["device"])
    judge = reward_of(given["reward"], given["reward_weights"], place)
    pipe = load_pipeline(model, place, given["dtype"], option="--pretrained_model_name_or_path")
    found = _build(pipe, judge, texts, given, sampling)
    if first_process():
        say("note", f"{len(found)} pairs of {len(texts)} prompts")
        emit(f"{folder}\n")


def _build(pipe: Any, judge: Any, prompts: list[str], given: Mapping[str, Any], sampling: Mapping[str, Any]) -> Any:
    from aigiqa_reward.finetuning import build_preference_pairs
    from aigiqa_reward.sampling.batch_run import BestOfEachError

    chosen = {"model": given["pretrained_model_name_or_path"]}
    scales = tuple(given["guidance_scales"] or ())
    kinds = 2 if given["reward_guidance"] else max(1, len(scales))
    folder, every = given["output_dir"], given["n"] * len(prompts) * kinds
    arguments = {**{name: given[name] for name in _OF_PAIRS}, "guidance_scales": scales, "settings": chosen, **sampling}
    try:
        with progress("pairs", every) as show, option_errors(given):
            return build_preference_pairs(
                pipe, judge, prompts, folder, progress=lambda done, total: show(every - total + done), **arguments
            )  # what an earlier run finished is done
    except BestOfEachError as error:
        raise CommandError(str(error), status=1) from error
    except KeyboardInterrupt as error:
        if first_process():
            say("error", f"interrupted: the same command goes on from what {folder} holds")
        raise typer.Exit(130) from error
