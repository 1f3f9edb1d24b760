"""What the tests of fine-tuning share: prompts, a reward that is a function of pixels, an adapter with an effect."""

from __future__ import annotations

from typing import Any

import torch
from pipelines import FEW_STEPS
from torch import Tensor

from aigiqa_reward.finetuning.lora import LoRA

PROMPTS = ("a red apple", "a blue car at night", "two green frogs")
CALL: dict[str, Any] = {**FEW_STEPS, "guidance_scale": 1.0}


def warmth(images: Tensor, prompts: list[str]) -> Tensor:
    assert len(images) == len(prompts)
    lengths = torch.tensor([len(prompt) / 10 for prompt in prompts], dtype=images.dtype)
    return (images[:, 0].square() - images[:, 1] * images[:, 2]).mean(dim=(1, 2)) * lengths


def stir(lora: LoRA, size: float = 0.3, seed: int = 0) -> LoRA:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in lora.weights.values():
            weight.add_(size * torch.randn(weight.shape, generator=generator).to(weight))
    return lora
