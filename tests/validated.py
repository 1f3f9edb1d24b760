"""A small validation of the embedded generator, and results made up of given numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from aigiqa_reward import load_embedded_pipeline
from aigiqa_reward.finetuning.context import TrainingContext
from aigiqa_reward.finetuning.lora import LoRA
from aigiqa_reward.finetuning.results import PER_IMAGE, ValidationResult
from aigiqa_reward.finetuning.validation import Validation
from aigiqa_reward.sampling.rollout import Rollout
from aigiqa_reward.types import RewardOutput

CALL: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0}
PROMPTS = ("a red apple on a blue background", "a green frog on a yellow background", "a cat")
SEEDS = 3


def redness(images: Tensor, prompts: list[str]) -> RewardOutput:
    assert len(images) == len(prompts)
    quality = (images[:, 0] - images[:, 1]).mean(dim=(1, 2))
    length = torch.tensor([float(len(prompt)) for prompt in prompts], dtype=quality.dtype)
    return RewardOutput(total=quality + length, quality=quality, correspondence=length)


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    assert len(images) == len(prompts)
    return images.mean(dim=(1, 2, 3))


def tools_of(pipe: Any, reward: Any = redness) -> TrainingContext:
    rollout = Rollout(pipe, **CALL)
    lora = LoRA(rollout.family, rank=4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in lora.weights.values():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return TrainingContext(rollout=rollout, lora=lora, reward=reward, accelerator=Accelerator(cpu=True))


def validate(folder: Path | None = None) -> ValidationResult:
    torch.set_num_threads(1)
    tools = tools_of(load_embedded_pipeline())
    return Validation(tools, PROMPTS, brightness, seeds=SEEDS, folder=folder, batch_size=2).run(7)


def made_up(step: int, holdout: Any, reward: Any, *, diversity: float = 0.2, saturation: float = 0.01, bad: int = 0):
    holdout, reward = (np.array(values, dtype=np.float64) for values in (holdout, reward))
    numbers = {name: np.zeros_like(holdout) for name in PER_IMAGE}
    numbers |= {"holdout": holdout, "reward": reward, "saturation": np.full_like(holdout, saturation)}
    return ValidationResult(
        step=step,
        prompts=tuple(f"prompt {i}" for i in range(len(holdout))),
        numbers=numbers,
        diversity=np.full(len(holdout), diversity),
        nonfinite=bad,
        tiles=np.zeros((1, 1, 16, 16, 3), dtype=np.uint8),
    )
