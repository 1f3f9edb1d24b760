"""FinetuneConfig: which values are accepted, and what its fields say."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest

from aigiqa_reward.finetuning import FinetuneConfig

ZERO = "rank lora_alpha gradient_accumulation_steps max_grad_norm checkpoints_total_limit validation_steps patience"
NEGATIVE = "learning_rate lr_warmup_steps kl_coeff checkpointing_steps"
REFUSED: list[tuple[str, Any]] = [(name, 0) for name in ZERO.split()] + [(name, -1) for name in NEGATIVE.split()]
REFUSED += [("rank", 1.5), ("rank", None), ("lora_alpha", "8"), ("target_modules", ()), ("target_modules", "to_q")]
REFUSED += [("train_batch_size", True), ("learning_rate", math.nan), ("lr_scheduler", "sine"), ("ema_decay", 1.0)]
REFUSED += [("lr_warmup_steps", 5), ("max_train_steps", 10.0), ("weight_decay", math.inf), ("mixed_precision", "fp32")]
REFUSED += [("reward_ceiling", "none"), ("validation_seeds", 0), ("sampling", None), ("seed", 0.5)]
ACCEPTED: dict[str, Any] = {"lora_alpha": 0.5, "target_modules": ("to_q",), "learning_rate": None, "lr_warmup_steps": 5}
ACCEPTED |= {"lr_scheduler": "constant_with_warmup", "max_grad_norm": math.inf, "ema_decay": 0, "kl_coeff": 0}
ACCEPTED |= {"reward_ceiling": -2.5, "checkpointing_steps": 0, "checkpoints_total_limit": None}


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_invalid_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{name}: expected .*got"):
        FinetuneConfig(**{name: value})


def test_the_ends_of_the_ranges_are_accepted() -> None:
    config = FinetuneConfig(**ACCEPTED)
    assert {name: getattr(config, name) for name in ACCEPTED} == ACCEPTED
    assert FinetuneConfig(lora_alpha=None, reward_ceiling=None).reward_ceiling is None


def test_every_field_has_a_help_of_one_sentence() -> None:
    helps = {field.name: field.metadata["help"] for field in fields(FinetuneConfig)}
    assert not [name for name, text in helps.items() if not text[0].isupper() or not text.endswith(".") or ". " in text]


def test_the_launcher_sets_the_default_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    assert FinetuneConfig().mixed_precision == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert FinetuneConfig().mixed_precision == "bf16"
    assert FinetuneConfig(mixed_precision="no").mixed_precision == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ValueError, match="mixed_precision: expected one of no, bf16, fp16, got 'fp8'"):
        FinetuneConfig()
