"""SigLIP 2: how well an image fits its prompt, in many languages.

Tschannen et al. 2025, "SigLIP 2: Multilingual Vision-Language Encoders with Improved Semantic Understanding,
Localization, and Dense Features". The raw score is the logit exp(logit_scale) cos(image, prompt) + logit_bias, whose
sigmoid is the probability that both belong together.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from aigiqa_reward.encoders.clip import UNUSED
from aigiqa_reward.encoders.siglip import SigLIPTower
from aigiqa_reward.models.base import FullPrecision
from aigiqa_reward.models.published import CLIPReward, read_tokenizer
from aigiqa_reward.types import Images, PromptFeatures
from aigiqa_reward.utils.io import read_json

_TOWER = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
_SO400M = {"vision_config": {**_TOWER, "image_size": 384, "patch_size": 14}}
_SO400M["text_config"] = {**_TOWER, "vocab_size": 256000, "projection_size": 1152, "max_position_embeddings": 64}


class _Bias(FullPrecision):
    def __init__(self) -> None:
        super().__init__()
        self.logit_bias = nn.Parameter(torch.zeros(()))


class SigLIP2(CLIPReward):
    """A SigLIP or SigLIP 2 of one image size; the total is the logit."""

    name = "siglip2"
    aspect = "correspondence"

    def __init__(self, config: Mapping[str, Any], tokenizer: str) -> None:
        super().__init__(SigLIPTower(config, tokenizer))
        self.bias = _Bias()

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> Self:
        return cls(description["config"], description["tokenizer"])

    def describe(self) -> dict[str, Any]:
        return {"config": self.tower.config, "tokenizer": self.tower.tokenizer_json}

    @classmethod
    def read_description(cls, folder: Path | None) -> dict[str, Any]:
        if folder is None:
            return {"config": _SO400M, "tokenizer": ""}
        found = read_json(folder / "config.json")
        return {"config": {key: found[key] for key in _SO400M}, "tokenizer": read_tokenizer(folder)}

    @classmethod
    def rename(cls, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        scalars = {"logit_scale": "cosine.logit_scale", "logit_bias": "bias.logit_bias"}
        return {
            scalars.get(name, f"tower.siglip.{name}"): tensor.reshape(()) if name in scalars else tensor
            for name, tensor in tensors.items()
            if name not in UNUSED
        }

    def raw_scores(self, images: Images, prompts: PromptFeatures | None) -> dict[str, Tensor]:
        return {"raw": self.cosine.logit_scale.exp() * self.cosines(images, prompts) + self.bias.logit_bias}
