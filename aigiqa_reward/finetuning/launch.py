"""`finetune`: from a pipeline, a reward and prompts to LoRA weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from aigiqa_reward.finetuning.algorithm import Algorithm
from aigiqa_reward.finetuning.checkpoints import find_checkpoint
from aigiqa_reward.finetuning.holdout import default_holdout
from aigiqa_reward.finetuning.identity import reward_identity
from aigiqa_reward.finetuning.loop import Loop
from aigiqa_reward.finetuning.lora import LoRA
from aigiqa_reward.finetuning.optimisation import FinetuningError, accelerator_of
from aigiqa_reward.finetuning.result import FinetuneResult
from aigiqa_reward.finetuning.settings import FinetuneSettings
from aigiqa_reward.finetuning.tools import Tools
from aigiqa_reward.finetuning.trackers import check_tracker
from aigiqa_reward.finetuning.validation import Validation
from aigiqa_reward.reward import Reward
from aigiqa_reward.sampling.checks import check_reward
from aigiqa_reward.sampling.rollout import Rollout
from aigiqa_reward.sampling.run_settings import reward_name
from aigiqa_reward.types import unreadable_prompts

_AT_ONCE = 256
"""Prompts that a reward reads at once before the training."""


def finetune(
    pipe: Any,
    reward: Any,
    prompts: Sequence[str],
    algorithm: Algorithm,
    output_dir: str | Path,
    settings: FinetuneSettings | None = None,
    *,
    validation_prompts: Sequence[str] = (),
    holdout: Any | Literal["auto"] = "auto",
    resume_from_checkpoint: str | Path | None = None,
    report_to: str | None = None,
    progress: bool = True,
) -> FinetuneResult:
    """Fine-tune a pipeline's denoiser with LoRA so that its images earn a higher reward.

    Every random choice comes from the settings' seed, the step and the row: a training depends neither on how its batch
    is split nor on interruptions. Under `torchrun` and `accelerate launch` the processes share each step's batch.

    Args:
        pipe: a text-to-image pipeline of a family that `sampling.families` lists. It is frozen, and afterwards holds
            the kept adapter, "reward", beside those that it held, which the reference has too and the file has not.
        reward: a Reward, or any `f(images, prompts) -> (B,) tensor or RewardOutput`. It is frozen.
        prompts: to train on.
        algorithm: `Draft`, `ReFL`, `DPO`, `DDPO` or `FlowGRPO`.
        output_dir: holds `pytorch_lora_weights.safetensors` for `pipe.load_lora_weights`, `history.jsonl`,
            `checkpoint-<step>/`, `validation/` and pictures of its course.
        settings: everything else that decides the outcome.
        validation_prompts: on whose images reward and held-out reward are watched; without them the last weights are
            kept, and nothing guards against a hacked reward.
        holdout: a reward that is not trained on; "auto" takes an embedded system with another head.
        resume_from_checkpoint: "latest", or a checkpoint's name or path; None starts anew.
        report_to: a tracker of Accelerate ("tensorboard", "wandb").
        progress: show a progress bar.

    Warns:
        UserWarning: validation prompts that show little: trained on as well, or a single image.

    Raises:
        TypeError: an argument of a wrong type, or a pipeline without an adapter.
        ValueError: an argument that cannot be served; a folder of another training.
        FinetuningError: a loss became NaN; what was reached is on disk.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is written.
    """
    settings, folder = _settings_and_folder(algorithm, settings, output_dir)
    texts = _checked("prompts", prompts) if algorithm.examples is None else list(algorithm.examples)
    check_tracker(report_to)
    tools = _tools(pipe, _frozen(check_reward(reward)), settings, folder, report_to)
    with _taken_off(tools.lora):
        _check_readable(tools.reward, "prompts", texts if algorithm.examples is None else [])
        algorithm.check(tools, texts)
        validation = _validation(tools, validation_prompts, texts, holdout, folder, settings)
        _begin(folder, resume_from_checkpoint)
        algorithm = algorithm.ready(tools, texts, folder, settings, progress=progress)
        texts = texts if algorithm.examples is None else list(algorithm.examples)
        watched = {"holdout_reward": _name_of(holdout), "validation_prompts": list(validation_prompts)}
        loop = Loop(tools, texts, algorithm, folder, settings, validation, watched, progress=progress)
        loop.resume(resume_from_checkpoint, report_to)
    with _checkpointed(tools), _taken_off(tools.lora, but=(FinetuningError, KeyboardInterrupt)):
        return loop.run()


def _settings_and_folder(algorithm: Any, settings: Any, output_dir: Any) -> tuple[FinetuneSettings, Path]:
    if not isinstance(algorithm, Algorithm):
        got = f"the class {algorithm.__name__}" if isinstance(algorithm, type) else repr(algorithm)
        raise TypeError(
            f"algorithm: expected Draft(), ReFL(), DPO(), DDPO() or FlowGRPO(), with settings of its own, got {got}"
        )
    settings = FinetuneSettings() if settings is None else settings
    if not isinstance(settings, FinetuneSettings):
        raise TypeError(
            f"settings: expected FinetuneSettings, got {type(settings).__name__}; pass FinetuneSettings(rank=8, ...)"
        )
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir: expected a folder, got the file {folder}; pass another path")
    if settings.kl_coeff is None:
        settings = replace(settings, kl_coeff=algorithm.kl_coeff)
    return settings, folder


def _begin(folder: Path, resume_from_checkpoint: str | Path | None) -> None:
    """Refuse a folder of something else, before hours of sampling; then make it."""
    find_checkpoint(folder, resume_from_checkpoint)
    folder.mkdir(parents=True, exist_ok=True)


def _check_readable(reward: Any, argument: str, prompts: Sequence[str]) -> None:
    """Refuse before the first step what the reward would refuse in the midst of the training."""
    for start in range(0, len(prompts), _AT_ONCE):
        for why in unreadable_prompts(reward, prompts[start : start + _AT_ONCE]).values():
            raise ValueError(f"{argument}: expected texts that the reward reads: {why.removeprefix('prompts: ')}")


@contextmanager
def _taken_off(lora: LoRA, *, but: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    """Whatever is raised, take the adapter off first, so that the pipeline can be passed again.

    Args:
        lora: the adapter.
        but: what leaves the pipeline with the weights that were kept.
    """
    try:
        yield
    except but:
        raise
    except BaseException:
        lora.remove()
        raise


@contextmanager
def _checkpointed(tools: Tools) -> Iterator[None]:
    """Denoiser and decoder compute their blocks again for the backward pass, where that is wanted; then as before."""
    denoiser, decoder = tools.lora.denoiser, tools.rollout.pipe.vae
    modules = [m for part in (denoiser, decoder) for m in part.modules() if hasattr(m, "gradient_checkpointing")]
    before = [(m.gradient_checkpointing, getattr(m, "_gradient_checkpointing_func", None)) for m in modules]
    if tools.checkpointed or getattr(denoiser, "is_gradient_checkpointing", False):
        # Blocks that are computed again must find the adapter as it was: the distance computes some without it.
        denoiser.enable_gradient_checkpointing(tools.lora.checkpoint)
    if tools.checkpointed and getattr(decoder, "_supports_gradient_checkpointing", False):
        decoder.enable_gradient_checkpointing()
    try:
        yield
    finally:
        for module, (wanted, how) in zip(modules, before, strict=True):
            module.gradient_checkpointing, module._gradient_checkpointing_func = wanted, how


def _validation(
    tools: Tools, prompts: Sequence[str], trained: Sequence[str], holdout: Any, folder: Path, settings: FinetuneSettings
) -> Validation | None:
    if not len(prompts):
        return None
    checked = _checked("validation_prompts", prompts)
    _check_readable(tools.reward, "validation_prompts", checked)
    if tools.accelerator.is_main_process:
        _warn_of_weak(checked, trained, settings.validation_seeds)
    return Validation(
        tools,
        checked,
        seeds=settings.validation_seeds,
        holdout=_held_out(tools, holdout),
        folder=folder / "validation",
        batch_size=settings.train_batch_size,
    )


def _warn_of_weak(prompts: Sequence[str], trained: Sequence[str], seeds: int) -> None:
    """Tell of validation prompts that cannot show what they are there for."""
    known = set(trained)
    if both := [prompt for prompt in prompts if prompt in known]:
        warnings.warn(
            f"validation_prompts: {len(both)} of {len(prompts)} are trained on as well (first: {both[0]!r}), so that "
            "they do not show what the training does to other prompts; take others",
            stacklevel=4,
        )
    if len(prompts) * seeds == 1:
        warnings.warn(
            "validation_prompts: a single image shows no noise, so that no fall of the held-out reward can end the "
            "training; take eight prompts or more, or at least validation_seeds=2",
            stacklevel=4,
        )


def _held_out(tools: Tools, holdout: Any) -> Any:
    if holdout == "auto":
        return _frozen(default_holdout(tools.reward, tools.rollout.family.device))
    trained = reward_identity(tools.reward)
    if holdout is tools.reward or (isinstance(holdout, nn.Module) and reward_identity(holdout) == trained):
        raise ValueError(
            f"holdout: expected a reward that is not trained on, got the trained one, {reward_name(tools.reward)}, "
            "which rises also where it is deceived; leave it out for an embedded system with another head"
        )
    return _frozen(check_reward(holdout))


def _tools(pipe: Any, reward: Any, settings: FinetuneSettings, folder: Path, report_to: str | None) -> Tools:
    rollout = Rollout(pipe, need="fine-tuning", **settings.sampling)
    if getattr(pipe, "_all_hooks", None) or getattr(pipe, "hf_device_map", None):
        raise ValueError(
            "pipe: its parts move between devices (CPU offload, device_map), which a backward pass cannot follow; load "
            "it on one device, and save memory with gradient_checkpointing and a smaller train_batch_size"
        )
    _check_precision(pipe, rollout.family.denoiser, settings)
    accelerator = accelerator_of(settings, folder, rollout.family.device, report_to)
    lora = LoRA(
        rollout.family,
        rank=settings.rank,
        alpha=settings.lora_alpha,
        targets=settings.target_modules,
        seed=settings.seed,
    )
    ceiling = settings.reward_ceiling
    if ceiling == "auto":
        ceiling = 1.0 if isinstance(reward, Reward) else None
    assert not isinstance(ceiling, str)
    assert settings.kl_coeff is not None
    return Tools(
        rollout=rollout,
        lora=lora,
        reward=reward,
        accelerator=accelerator,
        checkpointed=settings.gradient_checkpointing,
        ceiling=ceiling,
        penalty=settings.kl_coeff,
    )


def _check_precision(pipe: Any, denoiser: nn.Module, settings: FinetuneSettings) -> None:
    """Refuse parts in float16 whose gradients nobody scales: the small ones would be 0, without a word."""
    for name, part in (("denoiser", denoiser), ("decoder", pipe.vae)):
        narrow = any(weight.dtype == torch.float16 for weight in part.parameters())
        if narrow and settings.mixed_precision != "fp16":
            raise ValueError(
                f"pipe: its {name} is in float16, in which small gradients vanish; load it in bfloat16 "
                "(torch_dtype=torch.bfloat16), or pass mixed_precision='fp16', which scales them"
            )


def _checked(argument: str, prompts: Sequence[str]) -> list[str]:
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise TypeError(f"{argument}: expected a list of texts, got {type(prompts).__name__}")
    if other := [prompt for prompt in prompts if not isinstance(prompt, str)]:
        raise TypeError(f"{argument}: expected texts, got {type(other[0]).__name__} ({other[0]!r})")
    blank = [place for place, prompt in enumerate(prompts) if not prompt.strip()]
    if blank or not len(prompts):
        what = f"a blank one at place {blank[0]}" if blank else "none"
        raise ValueError(f"{argument}: expected texts, got {what}; give one prompt a line, without empty lines")
    return list(prompts)


def _name_of(holdout: Any) -> str:
    return holdout if isinstance(holdout, str) else reward_identity(holdout)


def _frozen(reward: Any) -> Any:
    if isinstance(reward, nn.Module):
        reward.requires_grad_(False).eval()
    return reward
