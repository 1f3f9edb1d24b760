"""Settings of a fine-tuning that do not depend on the algorithm."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

from aigiqa_reward.utils.checks import integer, number

MixedPrecision = Literal["no", "bf16", "fp16"]
Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]

SCHEDULES: tuple[str, ...] = get_args(Schedule)
"""Learning rate schedules of `diffusers.optimization.get_scheduler`."""


def _launched() -> MixedPrecision:
    return cast(MixedPrecision, os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Settings of a fine-tuning, apart from pipeline, reward, training data and algorithm.

    Each field's help is in its metadata: `dataclasses.fields(FinetuneConfig)[0].metadata["help"]`.

    Example:
        >>> from aigiqa_reward.finetuning import FinetuneConfig
        >>> FinetuneConfig(max_train_steps=200, sampling={"num_inference_steps": 30}).learning_rate is None
        True
        >>> FinetuneConfig(rank=0)
        Traceback (most recent call last):
            ...
        ValueError: rank: expected an integer of at least 1, got 0; pass rank=1 or more
    """

    rank: int = field(default=8, metadata={"help": "LoRA rank."})
    lora_alpha: float | None = field(default=None, metadata={"help": "LoRA alpha; None takes the rank."})
    target_modules: tuple[str, ...] | None = field(
        default=None, metadata={"help": "Name endings of the layers to adapt; None takes the attention projections."}
    )
    train_batch_size: int = field(default=4, metadata={"help": "Rows per forward pass of the denoiser and process."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches accumulated per optimizer step."})
    gradient_checkpointing: bool = field(
        default=False,
        metadata={"help": "Recompute activations of denoiser and decoder in the backward pass to save memory."},
    )
    learning_rate: float | None = field(default=None, metadata={"help": "Learning rate, by default the algorithm's."})
    lr_scheduler: Schedule = field(default="constant", metadata={"help": "Learning rate schedule of diffusers."})
    lr_warmup_steps: int = field(default=0, metadata={"help": "Optimizer steps of learning rate warmup."})
    max_train_steps: int = field(default=500, metadata={"help": "Total number of optimizer steps."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Maximum gradient norm for clipping."})
    weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay of AdamW."})
    use_8bit_adam: bool = field(default=False, metadata={"help": "Use the 8-bit AdamW of bitsandbytes."})
    ema_decay: float = field(
        default=0.0,
        metadata={"help": "Decay in [0, 1) of an EMA of the weights, which is then validated and saved; 0 uses none."},
    )
    mixed_precision: MixedPrecision = field(
        default_factory=_launched,
        metadata={
            "help": "Precision of denoiser and decoder, by default that of `accelerate launch`, else no; LoRA weights "
            "and reward stay in float32."
        },
    )
    kl_coeff: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the KL penalty to the pipeline without the adapter, 0 for none; None takes the "
            "algorithm's default."
        },
    )
    reward_ceiling: float | Literal["auto"] | None = field(
        default="auto",
        metadata={
            "help": "Total above which an image gets no gradient; auto takes 1 (the best human score) for calibrated "
            "rewards, and none for others."
        },
    )
    checkpointing_steps: int = field(
        default=100, metadata={"help": "Steps between checkpoints; 0 for only one at the end."}
    )
    checkpoints_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep; None keeps all."})
    validation_steps: int = field(default=50, metadata={"help": "Optimizer steps between validations."})
    validation_seeds: int = field(default=4, metadata={"help": "Number of images per validation prompt."})
    patience: int = field(
        default=2,
        metadata={"help": "Consecutive validations with a falling held-out reward before the training stops."},
    )
    sampling: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Arguments of the pipeline call for training and validation images (num_inference_steps, "
            "guidance_scale, height, width, ...)."
        },
    )
    seed: int = field(default=0, metadata={"help": "Random seed."})
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the output folder to the Hugging Face Hub."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Hub repository, by default the folder's name."})

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
                f"lr_warmup_steps: expected 0 with lr_scheduler='constant', got {self.lr_warmup_steps}; pass "
                "lr_scheduler='constant_with_warmup'"
            )
        if self.mixed_precision not in get_args(MixedPrecision):
            raise ValueError(f"mixed_precision: expected no, bf16 or fp16, got {self.mixed_precision!r}")
        if not isinstance(self.sampling, Mapping):
            raise TypeError(
                f"sampling: expected a dict of arguments of the pipeline call, got {self.sampling!r}; pass for example "
                "{'num_inference_steps': 30}"
            )
        if isinstance(self.target_modules, str) or self.target_modules == ():
            raise ValueError(
                "target_modules: expected a tuple of layer names, or None for the attention projections, got "
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
_NUMBERS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "lora_alpha": ("above 0", lambda value: 0 < value < math.inf),
    "learning_rate": ("above 0", lambda value: 0 < value < math.inf),
    "max_grad_norm": ("above 0, math.inf for no clipping", lambda value: value > 0),
    "weight_decay": ("of at least 0", lambda value: 0 <= value < math.inf),
    "ema_decay": ("in [0, 1)", lambda value: 0 <= value < 1),
    "kl_coeff": ("of at least 0", lambda value: 0 <= value < math.inf),
}
_OPTIONAL = ("lora_alpha", "learning_rate", "checkpoints_total_limit", "kl_coeff")
