"""Settings that no training can have are refused by name."""

from __future__ import annotations

import math
from typing import Any

import pytest

from aigiqa_reward.finetuning import FinetuneConfig, ReFL

REFUSED: list[tuple[str, Any]] = [
    ("rank", 0),
    ("rank", 1.5),
    ("rank", None),
    ("lora_alpha", 0),
    ("lora_alpha", "8"),
    ("target_modules", ()),
    ("target_modules", "to_q"),
    ("train_batch_size", 0),
    ("train_batch_size", True),
    ("gradient_accumulation_steps", 0),
    ("learning_rate", 0),
    ("learning_rate", -1e-4),
    ("learning_rate", math.nan),
    ("lr_scheduler", "sine"),
    ("lr_warmup_steps", -1),
    ("max_train_steps", 0),
    ("max_train_steps", 10.0),
    ("max_grad_norm", 0),
    ("max_grad_norm", None),
    ("weight_decay", -0.1),
    ("weight_decay", math.inf),
    ("ema_decay", 1.0),
    ("ema_decay", -0.1),
    ("mixed_precision", "fp32"),
    ("mixed_precision", None),
    ("kl_coeff", -1),
    ("kl_coeff", math.inf),
    ("reward_ceiling", "none"),
    ("reward_ceiling", math.nan),
    ("checkpointing_steps", -1),
    ("checkpoints_total_limit", 0),
    ("validation_steps", 0),
    ("validation_seeds", 0),
    ("patience", 0),
    ("seed", -1),
    ("seed", 0.5),
]
ACCEPTED: list[tuple[str, Any]] = [
    ("lora_alpha", None),
    ("lora_alpha", 0.5),
    ("target_modules", ("to_q",)),
    ("learning_rate", None),
    ("max_grad_norm", math.inf),
    ("ema_decay", 0),
    ("kl_coeff", 0),
    ("reward_ceiling", None),
    ("reward_ceiling", -2.5),
    ("checkpointing_steps", 0),
    ("checkpoints_total_limit", None),
    ("lr_warmup_steps", 0),
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_what_cannot_be_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{name}: expected .*{'got' if value is not None else ''}"):
        FinetuneConfig(**{name: value})


@pytest.mark.parametrize(("name", "value"), ACCEPTED)
def test_the_ends_of_the_ranges_are_served(name: str, value: Any) -> None:
    assert getattr(FinetuneConfig(**{name: value}), name) == value


@pytest.mark.parametrize("share", [1, -0.1, math.nan])
def test_refl_starts_within_the_steps(share: float) -> None:
    with pytest.raises(ValueError, match=r"^earliest: expected a number in \[0, 1\), a share of the steps"):
        ReFL(earliest=share)


def test_warm_up_is_not_left_unheeded() -> None:
    with pytest.raises(ValueError, match=r"^lr_warmup_steps: lr_scheduler='constant' .* 'constant_with_warmup'"):
        FinetuneConfig(lr_warmup_steps=5)
    assert FinetuneConfig(lr_warmup_steps=5, lr_scheduler="constant_with_warmup").lr_warmup_steps == 5


def test_precision_is_the_launchers_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert FinetuneConfig().mixed_precision == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert FinetuneConfig().mixed_precision == "bf16"
    assert FinetuneConfig(mixed_precision="no").mixed_precision == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ValueError, match="mixed_precision: expected no, bf16 or fp16, got 'fp8'"):
        FinetuneConfig()
