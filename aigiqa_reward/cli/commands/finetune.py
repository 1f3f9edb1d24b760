"""The commands `finetune draft|refl|dpo|ddpo|grpo|nft`: LoRA weights that give a pipeline's images a higher reward."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from aigiqa_reward.cli._console import CommandError, emit, first_process, say
from aigiqa_reward.cli._io import check_writable, gather_prompts, read_prompts
from aigiqa_reward.cli._options import (
    Fields,
    Group,
    OneRewardOptions,
    PipelineOptions,
    PromptOptions,
    SamplingOptions,
    command,
    lazy,
    option,
    options,
)
from aigiqa_reward.cli._pipelines import (
    check_model,
    library,
    load_pipeline,
    mixed_reward,
    process_device,
    sampling_arguments,
)
from aigiqa_reward.utils.checks import how_to_install

if TYPE_CHECKING:
    from aigiqa_reward.finetuning import FinetuneResult

ALGORITHMS = {
    "draft": "Fine-tune with DRaFT: backpropagate the reward through the last sampling steps.",
    "refl": "Fine-tune with ReFL: backpropagate the reward of one late step's predicted image.",
    "dpo": "Fine-tune with Diffusion-DPO: learn from pairs of a better and a worse image.",
    "ddpo": "Fine-tune with DDPO: policy gradient, for rewards without gradients.",
    "grpo": "Fine-tune with Flow-GRPO: policy gradient for flow models such as SD3 and FLUX.",
    "nft": "Fine-tune with DiffusionNFT: contrast better and worse images, for rewards without gradients.",
}
"""Names and help of the subcommands. Their options need torch, and are built when one is called."""

_OPTIONS = {
    "pipe": "model",
    "train_data": "prompts",
    "holdout": "holdout_reward",
}
"""Options of the library's arguments, where they differ."""


_EVERY = 30.0  # seconds between two lines without a terminal
_SHOWN = ("reward", "accuracy")


@options("Prompts")
class PairsOptions:
    """Pairs in place of prompts."""

    pairs: Path | None = option(
        None,
        "Preference pairs in place of prompts: a folder that 'aigiqa-reward pairs' wrote, or Pick-a-Pic's parquet.",
    )


@options("Output and validation")
class RunOptions:
    """Output, validation and resuming."""

    output_dir: Path = option(
        Path("finetuned"), "Folder for pytorch_lora_weights.safetensors, checkpoints, history.jsonl and plots."
    )
    resume_from_checkpoint: Path | None = option(None, "Checkpoint to resume from: latest, a name or a path.")
    report_to: str | None = option(None, "Tracker to log to: tensorboard, wandb or another of Accelerate's.")
    validation_prompts: Path | None = option(
        None, "File of validation prompts that are not trained on; without them the last weights are kept."
    )
    holdout_reward: tuple[str, ...] = option(
        ("auto",),
        "Reward that is not trained on and decides which weights are kept; auto is the quality score of compact, or of "
        "mst_clipiqa if compact is trained; for published rewards, one of another family if its weights are in the "
        "Hub's cache.",
        metavar="NAME[:WEIGHT]",
    )


@options("Memory")
class MemoryOptions:
    """How large pipelines are loaded."""

    quantize: Literal["nf4"] | None = option(
        None,
        "Load the linear layers of the denoiser and of text encoders other than CLIP in 4 bits by bitsandbytes; the "
        "LoRA weights above them are trained in float32.",
    )
    fsdp: bool = option(
        False, "Shard the denoiser's frozen weights over the processes of torchrun or accelerate launch (FSDP2)."
    )


app = typer.Typer(
    cls=Group,
    help="Fine-tune a pipeline with LoRA by a reward; alone, or under torchrun and accelerate launch.",
    no_args_is_help=True,
)


def finetune(
    name: str,
    pipeline: PipelineOptions,
    prompt: PromptOptions,
    pairs: PairsOptions,
    reward: OneRewardOptions,
    algorithm: dict[str, Any],
    config: dict[str, Any],
    run: RunOptions,
    memory: MemoryOptions,
    sampling: SamplingOptions,
) -> None:
    """Fine-tune by the algorithm of that name."""
    check_model(pipeline.model)
    if memory.quantize and find_spec("bitsandbytes") is None:
        raise CommandError(f"needs bitsandbytes: {how_to_install('quantize')}", argument="quantize")
    if memory.fsdp and memory.quantize:
        raise CommandError("shards no quantized weights; leave out one of --fsdp and --quantize", argument="fsdp")
    if memory.fsdp and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise CommandError("is beside accelerate's; leave out accelerate launch --use_fsdp", argument="fsdp")
    if first_process():
        check_writable(run.output_dir)
    watched = []
    if run.validation_prompts is not None:
        watched = read_prompts(run.validation_prompts, "validation_prompts", prompt.prompt_column)
    if run.holdout_reward != ("auto",) and not watched:
        raise CommandError("judges images of --validation-prompts, which is missing", argument="holdout_reward")
    texts = _prompts(prompt, pairs)
    place = process_device(pipeline.device)
    if config.get("mixed_precision") == "fp16" and place == "cpu":
        raise CommandError("fp16 is not for the CPU; use bf16 or no", argument="mixed_precision")
    config["sampling"] = sampling_arguments(sampling, pipeline.model, {"need"})
    tracker = None if run.report_to == "none" else run.report_to
    from aigiqa_reward import finetuning
    from aigiqa_reward.finetuning.checkpoints import find_checkpoint
    from aigiqa_reward.finetuning.logging import check_tracker

    with library(**_OPTIONS):  # whatever can be refused before a large pipeline is loaded
        check_tracker(tracker)
        begun = find_checkpoint(run.output_dir, run.resume_from_checkpoint)
        data = finetuning.read_preference_pairs(pairs.pairs) if pairs.pairs else texts
        method = finetuning.ALGORITHMS[name](**algorithm)
        settings = finetuning.FinetuneConfig(**config)
    judge = mixed_reward(reward, place)
    arguments: dict[str, Any] = {"validation_prompts": watched, "progress": sys.stderr.isatty()}
    if run.holdout_reward != ("auto",):
        arguments["holdout"] = mixed_reward(OneRewardOptions(reward=run.holdout_reward), place, "holdout_reward")
    pipe = load_pipeline(pipeline.model, place, pipeline.dtype, quantize=memory.quantize, fsdp=memory.fsdp)
    if not watched and first_process():
        say("warning", "no --validation-prompts: reward hacking is not detected, and the last weights are kept")
    arguments |= {"resume_from_checkpoint": run.resume_from_checkpoint, "report_to": tracker}
    if first_process():
        what = "validating before training" if watched and begun is None else "training"
        say("note", f"{what}; {run.output_dir / 'history.jsonl'} gets a line per step and validation")
    arguments["callbacks"] = [Pace(settings.max_train_steps)]
    result = _run(pipe, judge, data, method, run.output_dir, settings, arguments)
    if first_process():
        _report(result, run.output_dir)


class Pace:
    """A training callback that prints the time left: after five steps and, without a terminal, every 30 s."""

    def __init__(self, steps: int) -> None:
        self.steps, self.first, self.said = steps, None, time.monotonic()

    def on_step_end(self, step: int, numbers: Mapping[str, float]) -> None:
        """Print a line, if it is due."""
        now = time.monotonic()
        self.first = self.first or (step, now)
        done, left = step - self.first[0], self.steps - step
        if not first_process() or not (done == 4 or (now - self.said >= _EVERY and not sys.stderr.isatty())):
            return
        self.said = now
        text = f"step {step} of {self.steps}" + "".join(f", {n} {numbers[n]:.4f}" for n in _SHOWN if n in numbers)
        if done and left:
            minutes = math.ceil((now - self.first[1]) / done * left / 60)
            text += f", about {minutes} {'minute' if minutes == 1 else 'minutes'} left"
        say("note", text)

    def on_validation(self, step: int, result: object) -> None:
        """Print nothing."""


def _prompts(prompt: PromptOptions, pairs: PairsOptions) -> list[str]:
    """The prompts to train on; none with pairs, which have their own."""
    given = bool(prompt.prompt) or prompt.prompts is not None or prompt.prompt_column is not None
    if pairs.pairs is not None and given:
        raise CommandError("have their own prompts; leave out --prompt and --prompts", argument="pairs")
    return [] if pairs.pairs is not None else gather_prompts(prompt.prompt, prompt.prompts, prompt.prompt_column)


def _run(
    pipe: Any, reward: Any, data: Any, algorithm: Any, folder: Path, config: Any, arguments: Mapping[str, Any]
) -> FinetuneResult:
    """Train; report how to resume what ends early."""
    from aigiqa_reward import finetuning
    from aigiqa_reward.finetuning.checkpoints import checkpoints_in
    from aigiqa_reward.sampling.batch_run import BestOfEachError

    try:
        with library("lower --train-batch-size or use --gradient-checkpointing", **_OPTIONS):
            return finetuning.finetune(pipe, reward, data, algorithm, folder, config, **arguments)
    except (finetuning.FinetuningError, BestOfEachError) as error:
        raise CommandError(str(error), status=1) from error
    except KeyboardInterrupt as error:
        there = checkpoints_in(folder)
        begun = f"; the same command resumes with {folder / 'pairs'}" if (folder / "pairs").is_dir() else ""
        rest = f"; --resume-from-checkpoint latest resumes from {there[-1]}" if there else " before any checkpoint"
        raise CommandError(f"interrupted{rest}{'' if there else begun}", status=130) from error


def _report(result: FinetuneResult, folder: Path) -> None:
    """Print what was kept on stdout, and how it went on stderr."""
    validations = [line for line in result.history if "validation" in line]
    if result.stopped:
        say("note", f"stopped after {result.steps} steps: {result.stopped}")
    if validations:
        first = validations[0]["validation"]
        # None of it, where a training was resumed in another folder and its best validation lies in the first one.
        kept = next((line["validation"] for line in validations if line["step"] == result.kept_step), {})
        for name in ("reward", "holdout", "diversity"):
            if name in first and name in kept:
                say("note", f"validation {name}: {first[name]:.4f} before, {kept[name]:.4f} with the kept weights")
    which = f"the weights after step {result.kept_step}"
    if validations and not result.kept_step:
        which = "those before the first step, as no later validation was better: a LoRA that changes nothing"
    say("note", f"kept: {which}; pipe.load_lora_weights({str(folder)!r})")
    emit(f"{folder}\n", saved=True)


def _build(name: str) -> Callable[..., None]:
    """The command of one algorithm with its own options."""
    from aigiqa_reward import finetuning

    fixed = {"name": name} | ({} if name == "dpo" else {"pairs": PairsOptions()})
    algorithm = Fields(finetuning.ALGORITHMS[name], f"Algorithm ({name})")
    config = Fields(finetuning.FinetuneConfig, "Training", skip=("sampling",))
    return command(finetune, fixed, algorithm=algorithm, config=config)


for _name, _help in ALGORITHMS.items():
    app.command(_name, cls=lazy(partial(_build, _name)), help=_help)(lambda: None)
