"""CLIPScore: how well an image fits its prompt, by any CLIP.

Hessel et al. 2021, "CLIPScore: A Reference-free Evaluation Metric for Image Captioning". The raw score is the cosine of
image and prompt; the paper puts "A photo depicts " before the prompt, and reports 2.5 max(cosine, 0). Negative cosines
stay negative here, since a clamp would end their gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from aigiqa_reward import images as pixels
from aigiqa_reward.encoders.clip import VIT_L, CLIPTower, from_open_clip
from aigiqa_reward.encoders.open_clip import OpenCLIPEncoder
from aigiqa_reward.models.published import CLIPReward
from aigiqa_reward.types import Images, PromptFeatures


class CLIPScore(CLIPReward):
    """CLIPScore by a CLIP of transformers, or one of open_clip with CLIP's own text transformer; total = 2.5 raw."""

    name = "clipscore"
    aspect = "correspondence"
    sizes = VIT_L
    scale = 2.5

    def __init__(self, tower: CLIPTower | OpenCLIPEncoder, prefix: str = "") -> None:
        super().__init__(tower)
        self.prefix = prefix

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> Self:
        if "open_clip" in description:
            tower = OpenCLIPEncoder.from_description(description["open_clip"])
        else:
            tower = CLIPTower(description["config"], cls.fit)
        return cls(tower, description["prefix"])

    def describe(self) -> dict[str, Any]:
        own = super().describe() if isinstance(self.tower, CLIPTower) else {"open_clip": self.tower.describe()}
        return {**own, "prefix": self.prefix}

    @classmethod
    def read_description(cls, folder: Path | None) -> dict[str, Any]:
        return {**super().read_description(folder), "prefix": ""}

    @classmethod
    def rename(cls, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return super().rename(from_open_clip(tensors) if "visual.proj" in tensors else tensors)

    def encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return super().encode_texts([self.prefix + text for text in texts])

    def raw_scores(self, images: Images, prompts: PromptFeatures | None) -> dict[str, Tensor]:
        return super().raw_scores(pixels.center_crop(images, self.tower.image_size, nearest=True), prompts)
