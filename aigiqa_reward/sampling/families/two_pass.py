"""What transformers on packed latents share: one pass for each branch of guidance, and guidance as an input."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from aigiqa_reward.sampling.families.base import Family
from aigiqa_reward.sampling.families.inputs import Conditioning, Rows


class TwoPass(Family):
    """Prompts and negative prompts are encoded alike and predicted apart; channels are packed by four."""

    one_pass: ClassVar[bool] = False

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning(
            positive=self.rows(prompts), negative=self.rows(self.negatives(prompts)) if self.guided else None
        )

    @abstractmethod
    def rows(self, texts: Sequence[str]) -> Rows:
        """Inputs of the denoiser for these texts."""

    @property
    def channels(self) -> int:
        """Of the latents before they are packed."""
        return self.pipe.transformer.config.in_channels // 4

    def told_guidance(self, latents: Tensor) -> Tensor:
        """The guidance scale (B,) that a distilled denoiser is told."""
        return latents.new_full((len(latents),), float(self.options.guidance_scale or 0), dtype=torch.float32)


class TrueGuidance(TwoPass):
    """Guided by `true_cfg_scale`, and only where there is a negative prompt; `guidance_scale` is an input."""

    @property
    def guidance(self) -> float:
        return float(self.options.true_cfg_scale or 0.0)

    @property
    def guided(self) -> bool:
        return self.guidance > 1 and self.options.negative_prompt is not None
