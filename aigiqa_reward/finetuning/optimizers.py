"""Gradients to weights: the optimizer, its learning rate, the moving average, the sum over processes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aigiqa_reward.finetuning.config import FinetuneConfig
from aigiqa_reward.finetuning.lora import LoRA
from aigiqa_reward.training.fit import WeightAverage

if TYPE_CHECKING:
    from accelerate import Accelerator


MOST_SKIPPED = 20
"""Steps in a row that fp16 may skip. Chosen here: each halves the scale of the gradients, from 2^16 down to below 1."""


class FinetuningError(RuntimeError):
    """A training that cannot go on. What it had is on disk.

    Example:
        >>> from aigiqa_reward import load_embedded_pipeline
        >>> from aigiqa_reward.finetuning import DRaFT, FinetuneConfig, FinetuningError, finetune
        >>> def broken(images, prompts):
        ...     return images.mean(dim=(1, 2, 3)) * float("nan")
        >>> pipe, prompts = load_embedded_pipeline(), ["a red apple on a blue background"]
        >>> settings = FinetuneConfig(max_train_steps=1, train_batch_size=1, sampling={"num_inference_steps": 1})
        >>> try:
        ...     finetune(pipe, broken, prompts, DRaFT(), "broken/", settings, holdout=None, progress=False)
        ... except FinetuningError as error:
        ...     print("nan" in str(error).lower())
        True
    """


def accelerator_of(settings: FinetuneConfig, folder: Path, device: torch.device, report_to: str | None) -> Accelerator:
    """Device, precision and processes of a training.

    Raises:
        ValueError: fp16 on a CPU, which scales no gradients; an optimizer that is not installed.
    """
    if settings.mixed_precision == "fp16" and device.type == "cpu":
        raise ValueError("mixed_precision: fp16 is not for the CPU; take 'bf16' or 'no'")
    if settings.use_8bit_adam:
        _adamw_8bit()  # refused before anything is sampled
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import AutocastKwargs, GradientAccumulationPlugin, ProjectConfiguration

    # Accelerate refuses a second precision in one process: forget that of an earlier training, not the processes.
    if AcceleratorState._shared_state.get("_mixed_precision") not in (None, settings.mixed_precision):
        AcceleratorState._reset_state()
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=settings.mixed_precision,
        # The loop adds up parts itself; a number that `accelerate launch` was given would divide its losses again.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=report_to,
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "logs")),
        # A cast that was cached under no_grad, in the steps before the last K, would cut the gradient off.
        kwargs_handlers=[AutocastKwargs(cache_enabled=False)],
    )


class Optimization:
    """AdamW on the adapter's weights.

    The adapter is not wrapped for distributed training: its gradients are few and come from several calls of the
    denoiser, so they are summed over the processes once a step.

    Args:
        lora: what to train.
        accelerator: device, precision and processes.
        settings: of the training.
        learning_rate: the highest.
    """

    def __init__(self, lora: LoRA, accelerator: Accelerator, settings: FinetuneConfig, learning_rate: float) -> None:
        from diffusers.optimization import get_scheduler

        self.lora, self.accelerator, self.settings = lora, accelerator, settings
        self.weights = list(lora.weights.values())
        kind = _adamw_8bit() if settings.use_8bit_adam else torch.optim.AdamW
        self.inner: torch.optim.Optimizer = kind(self.weights, lr=learning_rate, weight_decay=settings.weight_decay)
        self.rates = get_scheduler(
            settings.lr_scheduler,
            self.inner,
            num_warmup_steps=settings.lr_warmup_steps,
            num_training_steps=settings.max_train_steps,
        )
        self.optimizer: Any = accelerator.prepare(self.inner)
        self.average = WeightAverage(lora.denoiser, settings.ema_decay)
        self._skipped = 0

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return float(self.rates.get_last_lr()[0])

    def autocast(self) -> AbstractContextManager[Any]:
        """The mixed precision of denoiser and decoder."""
        return self.accelerator.autocast() if self.settings.mixed_precision != "no" else nullcontext()

    def averaged(self) -> AbstractContextManager[Any]:
        """The adapter with the moving average in place of its weights, where there is one."""
        return self.average.applied(self.lora.denoiser) if self.average.weights else nullcontext()

    def gather(self, *, finite: bool, asked: bool) -> bool:
        """Sum the gradients of all processes; whether somebody asked to stop.

        Args:
            finite: whether this process's losses were.
            asked: whether this process was asked to stop.

        Raises:
            FinetuningError: losses of some process were NaN or infinite.
        """
        flags = torch.tensor([float(not finite), float(asked)], device=self.weights[0].device)
        if self.accelerator.num_processes > 1:
            gradients = [w.grad if w.grad is not None else torch.zeros_like(w) for w in self.weights]
            flat: Any = self.accelerator.reduce(torch.cat([flags, *(g.flatten() for g in gradients)]), "sum")
            flags, flat = flat[:2], flat[2:]
            for weight, part in zip(self.weights, flat.split([w.numel() for w in self.weights]), strict=True):
                weight.grad = part.view_as(weight)
        if flags[0] > 0:
            raise FinetuningError(f"the loss became NaN or infinite; {self._remedy()}")
        return bool(flags[1] > 0)

    def step(self) -> float:
        """Take a step with the gradients that there are, and drop them; their length before clipping.

        Raises:
            FinetuningError: it is NaN or infinite, which only fp16 may be, whose scale is then lowered.
        """
        norm = self.accelerator.clip_grad_norm_(self.weights, self.settings.max_grad_norm)
        length = math.nan if norm is None else float(norm)
        if not math.isfinite(length) and self.accelerator.scaler is None:
            raise FinetuningError(f"the gradient became NaN or infinite; {self._remedy()}")
        self.optimizer.step()
        skipped = bool(self.optimizer.step_was_skipped)
        self.optimizer.zero_grad()
        self._skipped = self._skipped + 1 if skipped else 0
        if self._skipped > MOST_SKIPPED:
            raise FinetuningError(f"the gradient was NaN or infinite {self._skipped} times in a row; {self._remedy()}")
        if not skipped:
            self.rates.step()
            self.average.update(self.lora.denoiser)
        return length

    def means(self, numbers: Mapping[str, list[Tensor]]) -> dict[str, float]:
        """Means over the parts and processes of what was measured."""
        names = sorted(numbers)
        means: Any = torch.stack([torch.stack(numbers[name]).mean() for name in names])
        if self.accelerator.num_processes > 1:
            means = self.accelerator.reduce(means, "mean")
        return dict(zip(names, means.tolist(), strict=True))

    # ----------------------------------------------------------------------------------------- checkpoints

    def numbers(self) -> dict[str, Any]:
        """What a checkpoint needs beside weights and moments, as JSON has it."""
        scaler = self.accelerator.scaler
        return {
            "rates": {name: value for name, value in self.rates.state_dict().items() if name != "lr_lambdas"},
            "average_steps": self.average.steps,
            "scaler": {} if scaler is None else scaler.state_dict(),
        }

    def restore(self, numbers: Mapping[str, Any], average: Mapping[str, Tensor]) -> None:
        """Go on from `numbers` and the moving average of a checkpoint."""
        self.average.weights = {name: tensor.to(self.weights[0].device) for name, tensor in average.items()}
        self.average.steps = numbers["average_steps"]
        self.rates.load_state_dict({**numbers["rates"], "lr_lambdas": [None] * len(self.inner.param_groups)})
        for group, rate in zip(self.inner.param_groups, self.rates.get_last_lr(), strict=True):
            group["lr"] = rate
        if self.accelerator.scaler is not None and numbers["scaler"]:
            self.accelerator.scaler.load_state_dict(numbers["scaler"])

    def _remedy(self) -> str:
        text = f"lower learning_rate ({self.learning_rate:g}) or max_grad_norm ({self.settings.max_grad_norm:g})"
        return f"{text}, and take mixed_precision='bf16'" if self.settings.mixed_precision == "fp16" else text


def _adamw_8bit() -> Any:
    try:
        import bitsandbytes  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError("use_8bit_adam: needs bitsandbytes: pip install bitsandbytes") from error
    return bitsandbytes.optim.AdamW8bit
