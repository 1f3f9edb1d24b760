"""From gradients to weights: optimizer, learning rate schedule, EMA, reduction over processes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from aigiqa_reward.finetuning.config import FinetuneConfig
from aigiqa_reward.finetuning.lora import LoRA
from aigiqa_reward.utils.checks import how_to_install

if TYPE_CHECKING:
    from accelerate import Accelerator

MOST_SKIPPED = 20  # consecutive steps in fp16: each halves the gradient scale, from 2^16 down to below 1


class FinetuningError(RuntimeError):
    """A training that cannot continue; its weights are on disk.

    Example:
        >>> from aigiqa_reward.finetuning import FinetuningError
        >>> issubclass(FinetuningError, RuntimeError)
        True
    """


def accelerator_of(config: FinetuneConfig, folder: Path, device: torch.device, report_to: str | None) -> Accelerator:
    """Create the accelerator of a training."""
    if config.mixed_precision == "fp16" and device.type == "cpu":
        raise ValueError("mixed_precision: expected bf16 or no on a CPU, got fp16; pass mixed_precision='bf16'")
    if config.use_8bit_adam:
        _adamw_8bit()  # a missing package must raise before anything is sampled
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import AutocastKwargs, GradientAccumulationPlugin, ProjectConfiguration

    # Accelerate refuses a second precision in one process: forget the earlier one, but not the processes.
    if AcceleratorState._shared_state.get("_mixed_precision") not in (None, config.mixed_precision):
        AcceleratorState._reset_state()
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=config.mixed_precision,
        # The trainer accumulates by itself; a number from `accelerate launch` would divide the losses again.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=report_to,
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "logs")),
        # A cast cached under no_grad, in the steps before the last K, would cut off the gradient.
        kwargs_handlers=[AutocastKwargs(cache_enabled=False)],
    )


class Optimization:
    """AdamW on the adapter's weights, with learning rate schedule and EMA.

    Gradients are summed over the processes once per step: they are small and come from several calls of the denoiser.
    """

    def __init__(self, lora: LoRA, accelerator: Accelerator, config: FinetuneConfig, learning_rate: float) -> None:
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        self.accelerator, self.config = accelerator, config
        self.weights = list(lora.weights.values())
        kind = _adamw_8bit() if config.use_8bit_adam else torch.optim.AdamW
        self.inner: torch.optim.Optimizer = kind(self.weights, lr=learning_rate, weight_decay=config.weight_decay)
        steps: Any = {"num_warmup_steps": config.lr_warmup_steps, "num_training_steps": config.max_train_steps}
        self.rates = get_scheduler(config.lr_scheduler, self.inner, **steps)
        self.optimizer: Any = accelerator.prepare(self.inner)
        # By default the first update would replace the average; with -1 the decay of update n is (1 + n) / (10 + n).
        self.ema = EMAModel(self.weights, decay=config.ema_decay, update_after_step=-1) if config.ema_decay else None
        self._skipped = 0
        self._unmoved: list[Tensor] | None = None  # the weights within `at_worst`

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        return float(self.rates.get_last_lr()[0])

    def autocast(self) -> AbstractContextManager[Any]:
        """Context with the mixed precision of denoiser and decoder."""
        return self.accelerator.autocast() if self.config.mixed_precision != "no" else nullcontext()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Context with the EMA in place of the adapter's weights, if there is one."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.weights)
        self.ema.copy_to(self.weights)
        try:
            yield
        finally:
            self.ema.restore(self.weights)

    @contextmanager
    def at_worst(self, radius: float) -> Iterator[None]:
        """Context with the weights moved up the loss's gradient by `radius` times their norm, and no gradients yet.

        A gradient that is zero or not finite moves nothing.
        """
        weights, gradients = self.weights, [weight.grad for weight in self.weights]
        norms = [get_total_norm([v.detach() for v in values if v is not None]) for values in (weights, gradients)]
        factor = float(radius * norms[0] / norms[1])
        self._unmoved = [weight.detach().clone() for weight in weights]
        try:
            with torch.no_grad():
                for weight, gradient in zip(weights, gradients, strict=True):
                    if gradient is not None and math.isfinite(factor):
                        weight.add_(gradient, alpha=factor)
                    weight.grad = None
            yield
        finally:
            with torch.no_grad():
                for weight, before in zip(weights, self._unmoved, strict=True):
                    weight.copy_(before)
            self._unmoved = None

    def settled(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the adapter's state as it is outside of `averaged` and `at_worst`."""
        stored = self._unmoved
        if stored is None and self.ema is not None:
            stored = self.ema.temp_stored_params
        return state if stored is None else dict(zip(state, stored, strict=True))

    def gather(self, *, finite: bool, asked: bool, broken: str = "") -> bool:
        """Sum the gradients of all processes, and return whether any process was asked to stop.

        A loss that was not `finite` raises a FinetuningError, which says what was `broken` in this process.
        """
        flags = torch.tensor([float(not finite), float(asked)], device=self.weights[0].device)
        if self.accelerator.num_processes > 1:
            gradients = [w.grad if w.grad is not None else torch.zeros_like(w) for w in self.weights]
            flat: Any = self.accelerator.reduce(torch.cat([flags, *(g.flatten() for g in gradients)]), "sum")
            flags, flat = flat[:2], flat[2:]
            for weight, part in zip(self.weights, flat.split([w.numel() for w in self.weights]), strict=True):
                weight.grad = part.view_as(weight)
        if flags[0] > 0:
            raise FinetuningError(f"the loss became NaN or infinite; {broken}{self._remedy()}")
        return bool(flags[1] > 0)

    def step(self) -> float:
        """Take an optimizer step, and return the gradient norm before clipping."""
        norm = self.accelerator.clip_grad_norm_(self.weights, self.config.max_grad_norm)
        length = math.nan if norm is None else float(norm)
        if not math.isfinite(length) and self.accelerator.scaler is None:
            raise FinetuningError(f"the gradient became NaN or infinite; {self._remedy()}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._skipped = self._skipped + 1 if self.optimizer.step_was_skipped else 0
        if self._skipped > MOST_SKIPPED:
            raise FinetuningError(f"the gradient was NaN or infinite {self._skipped} times in a row; {self._remedy()}")
        if not self._skipped:
            self.rates.step()
            if self.ema is not None:
                self.ema.step(self.weights)
        return length

    def means(self, numbers: Mapping[str, list[Tensor]]) -> dict[str, float]:
        """Average logged numbers over the batches of a step and over processes."""
        names = sorted(numbers)
        means: Any = torch.stack([torch.stack(numbers[name]).mean() for name in names])
        if self.accelerator.num_processes > 1:
            means = self.accelerator.reduce(means, "mean")
        return dict(zip(names, means.tolist(), strict=True))

    def state(self) -> dict[str, Any]:
        """Return the state of optimizer, learning rate, EMA and gradient scaler, for `torch.save`."""
        scaler = self.accelerator.scaler
        return {
            "optimizer": self.inner.state_dict(),
            "lr_scheduler": self.rates.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.inner.load_state_dict(state["optimizer"])
        self.rates.load_state_dict(state["lr_scheduler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
            self.ema.to(self.weights[0].device)
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _remedy(self) -> str:
        if not self.rates.last_epoch:
            own = "no weight was trained yet, so the reward or the pipeline gives NaN by itself: correct the reward"
            return f"{own}, or load a pipeline that overflows in float16 in bfloat16 or float32"
        text = f"lower learning_rate ({self.learning_rate:g}) or max_grad_norm ({self.config.max_grad_norm:g})"
        return f"{text}, and take mixed_precision='bf16'" if self.config.mixed_precision == "fp16" else text


def _adamw_8bit() -> Any:
    try:
        import bitsandbytes  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"use_8bit_adam: needs bitsandbytes: {how_to_install('quantize')}") from error
    return bitsandbytes.optim.AdamW8bit  # pyright: ignore[reportPrivateImportUsage]
