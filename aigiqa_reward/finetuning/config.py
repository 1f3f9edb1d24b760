"""Settings of a fine-tuning that do not depend on the algorithm."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from aigiqa_reward.utils.checks import integer, number

MixedPrecision = Literal["no", "bf16", "fp16"]
Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
"""Of `diffusers.optimization.get_scheduler`."""


def _launched() -> Any:
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """What decides a fine-tuning beside pipeline, reward, prompts and algorithm.

    Attributes:
        rank: of the LoRA matrices.
        lora_alpha: the adapter is scaled by lora_alpha / rank; None is the rank.
        target_modules: ends of the names of the layers to adapt; None is the attention's projections.
        train_batch_size: rows that go through the denoiser at once, a process.
        gradient_accumulation_steps: such parts a step of the optimizer.
        gradient_checkpointing: keep no activations of denoiser and decoder for the backward pass.
        learning_rate: None is the algorithm's default.
        lr_scheduler: of diffusers, by step of the optimizer.
        lr_warmup_steps: steps of the optimizer.
        max_train_steps: steps of the optimizer in all.
        max_grad_norm: longest gradient of the whole; `math.inf` for no clipping.
        weight_decay: of AdamW. It pulls the adapter towards none.
        use_8bit_adam: bitsandbytes' AdamW.
        ema_decay: of a moving average of the weights, in [0, 1), which is then validated and kept; 0 takes none.
        mixed_precision: of denoiser and decoder, by default what `accelerate launch` was told, else "no"; LoRA weights
            and reward stay in float32.
        kl_coeff: weight of the distance to the pipeline without the adapter; 0 does not compute it, but in DPO. None is
            the algorithm's default: 0.01, and 0 for DPO, whose beta is such a pull.
        reward_ceiling: total beyond which an image is not pushed further; "auto" is 1, the best score people gave, for
            our calibrated rewards, and none for others.
        checkpointing_steps: steps between checkpoints; 0 writes one at the end alone.
        checkpoints_total_limit: checkpoints kept; None keeps all.
        validation_steps: steps between validations.
        validation_seeds: images a validation prompt.
        patience: validations in a row in which the held-out reward may have fallen while the trained one rises.
        sampling: arguments of the pipeline's call with which training and validation sample: num_inference_steps,
            guidance_scale, height, width, ...
        seed: of every random choice.

    Example:
        >>> from aigiqa_reward.finetuning import FinetuneConfig
        >>> FinetuneConfig(max_train_steps=200, sampling={"num_inference_steps": 30}).learning_rate is None
        True
        >>> FinetuneConfig(rank=0)
        Traceback (most recent call last):
            ...
        ValueError: rank: expected an integer of at least 1, got 0; pass rank=1 or more
    """

    rank: int = 8
    lora_alpha: float | None = None
    target_modules: tuple[str, ...] | None = None
    train_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    learning_rate: float | None = None
    lr_scheduler: Schedule = "constant"
    lr_warmup_steps: int = 0
    max_train_steps: int = 500
    max_grad_norm: float = 1.0
    weight_decay: float = 1e-4
    use_8bit_adam: bool = False
    ema_decay: float = 0.0
    mixed_precision: MixedPrecision = field(default_factory=_launched)
    kl_coeff: float | None = None
    reward_ceiling: float | Literal["auto"] | None = "auto"
    checkpointing_steps: int = 100
    checkpoints_total_limit: int | None = 2
    validation_steps: int = 50
    validation_seeds: int = 4
    patience: int = 2
    sampling: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in _COUNTS.items():
            if (value := getattr(self, name)) is not None or name not in _OPTIONAL:
                integer(name, value, least=least)
        for name, (expected, accepts) in _NUMBERS.items():
            if (value := getattr(self, name)) is not None or name not in _OPTIONAL:
                number(name, value, expected, accepts)
        if self.reward_ceiling not in ("auto", None):
            number("reward_ceiling", self.reward_ceiling, "or 'auto', or None for no ceiling", math.isfinite)
        if self.lr_scheduler not in SCHEDULES:
            raise ValueError(f"lr_scheduler: expected one of {', '.join(SCHEDULES)}, got {self.lr_scheduler!r}")
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            raise ValueError(
                f"lr_warmup_steps: lr_scheduler='constant' would not heed {self.lr_warmup_steps} steps of it; take "
                "'constant_with_warmup'"
            )
        if self.mixed_precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"mixed_precision: expected no, bf16 or fp16, got {self.mixed_precision!r}")
        if not isinstance(self.sampling, Mapping):
            raise TypeError(
                f"sampling: expected arguments of the pipeline's call by name, got {self.sampling!r}; pass "
                "{'num_inference_steps': 30}, say, or leave it out"
            )
        if isinstance(self.target_modules, str) or self.target_modules == ():
            raise ValueError(
                f"target_modules: expected several names of layers, or None for the attention's projections, got "
                f"{self.target_modules!r}"
            )


_COUNTS = {
    "rank": 1,
    "train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "lr_warmup_steps": 0,
    "max_train_steps": 1,
    "checkpointing_steps": 0,
    "checkpoints_total_limit": 1,
    "validation_steps": 1,
    "validation_seeds": 1,
    "patience": 1,
    "seed": 0,
}
_NUMBERS: dict[str, tuple[str, Any]] = {
    "lora_alpha": ("above 0", lambda value: 0 < value < math.inf),
    "learning_rate": ("above 0", lambda value: 0 < value < math.inf),
    "max_grad_norm": ("above 0, math.inf for no clipping", lambda value: value > 0),
    "weight_decay": ("of at least 0", lambda value: 0 <= value < math.inf),
    "ema_decay": ("in [0, 1)", lambda value: 0 <= value < 1),
    "kl_coeff": ("of at least 0", lambda value: 0 <= value < math.inf),
}
_OPTIONAL = ("lora_alpha", "learning_rate", "checkpoints_total_limit", "kl_coeff")
