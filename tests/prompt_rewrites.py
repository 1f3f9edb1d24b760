"""Prompts of the embedded world, a reward that is known beforehand, and a pipeline that spoils some images."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from aigiqa_reward import RewardOutput

SETTINGS = {"num_inference_steps": 2, "guidance_scale": 1.0}
APPLE, PENGUIN, CROWN = "a red apple", "a penguin on a blue background", "a crown on white"


class Seen:
    """Quality is the red channel's mean, correspondence the length of the text; notes what it was asked."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, images: Tensor, prompts: list[str]) -> RewardOutput:
        assert len(images) == len(prompts) and not images.requires_grad
        self.texts += prompts
        red = images[:, 0].mean(dim=(1, 2))
        length = torch.tensor([float(len(prompt)) for prompt in prompts])
        return RewardOutput(total=red + length, quality=red, correspondence=length)


class Spoilt:
    """The pipeline, whose images of some prompts are NaN, or blanked by a safety checker."""

    def __init__(self, pipe: Any, nan: str = "", flagged: str = "") -> None:
        self._pipe, self._nan, self._flagged = pipe, nan, flagged

    def __call__(self, prompt: Any, **arguments: Any) -> Any:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        images = self._pipe(prompts, **arguments).images
        for row, text in enumerate(prompts):
            images[row] = torch.nan if text == self._nan else images[row]
        return SimpleNamespace(images=images, nsfw_content_detected=[text == self._flagged for text in prompts])
