"""Towers of the systems, and the views of an image that they get."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from aigiqa_reward import images as pixels
from aigiqa_reward.encoders.blip import BLIPEncoder
from aigiqa_reward.encoders.compact import CompactEncoder
from aigiqa_reward.encoders.open_clip import OpenCLIPEncoder
from aigiqa_reward.encoders.timm import TimmEncoder
from aigiqa_reward.models.base import ModelConfig
from aigiqa_reward.types import Images

View: TypeAlias = Float[Tensor, "batch 3 view_height view_width"]

ContrastiveEncoder: TypeAlias = OpenCLIPEncoder | CompactEncoder  # images, their places, texts and words in one space
LevelsEncoder: TypeAlias = TimmEncoder | CompactEncoder  # maps of the last blocks
GroundedTextEncoder: TypeAlias = BLIPEncoder | CompactEncoder  # texts read with attention to an image


@dataclass(frozen=True, kw_only=True)
class CropsConfig(ModelConfig):
    """Settings of a model that scores crops.

    Attributes:
        crops: number of crops, whose scores are averaged.
        train_crops: random crops of each image in training.
        short_side: short side in px to which smaller images are enlarged.
        resolution: short side in px to which larger images are scaled down; None for native resolution.
    """

    crops: int = 15
    train_crops: int
    short_side: int = 512
    resolution: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resolution is not None and self.resolution < self.short_side:
            raise ValueError(f"resolution: expected None or at least {self.short_side=}, got {self.resolution}")


def whole_view(images: Images, encoder: ContrastiveEncoder, side: int) -> View:
    """Scale the whole image to about side x side px with its aspect kept, or letterbox it to the tower's fixed size."""
    if encoder.any_size:
        return pixels.resize_to_area(images, side * side, least=32)
    return square_view(images, encoder, encoder.image_size)


def square_view(images: Images, encoder: ContrastiveEncoder | GroundedTextEncoder, side: int) -> View:
    """Letterbox the whole image to side x side px, in the tower's mean color."""
    return pixels.letterbox(images, side, fill=images.new_tensor(encoder.mean))


def native_crops(
    images: Images, side: int, config: CropsConfig, *, generator: Generator | None, crops: int | None
) -> Float[Tensor, "batch count 3 side side"]:
    """Cut square crops of `side` px: evenly spaced, or at random places of `generator` that all images share.

    Crops of a small image are cut first and enlarged then, which keeps a long thin one from filling the memory.
    `crops` replaces the configured number.
    """
    count = crops or (config.crops if generator is None else config.train_crops)
    if config.resolution is not None:
        images = pixels.reduce_to(images, config.resolution)
    native = max(1, round(side * min(1, min(images.shape[2:]) / config.short_side)))
    if generator is None:
        cut = pixels.even_crops(images, native, count)
    else:
        cut = pixels.random_crops(images, native, count, generator=generator)
    return pixels.resize(cut.flatten(0, 1), (side, side)).unflatten(0, cut.shape[:2])


class FixedTexts(nn.Module):
    """Embeddings of fixed texts, computed once per device and dtype of a frozen tower, until weights are loaded."""

    def __init__(self, texts: Sequence[str]) -> None:
        super().__init__()
        self.texts = tuple(texts)
        self._kept: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def forward(self, encoder: ContrastiveEncoder, like: Tensor) -> Tensor:
        if any(parameter.requires_grad for parameter in encoder.parameters()):
            self._kept.clear()
            return encoder.encode_text(self.texts).to(like.dtype)
        key = (like.device, like.dtype)
        if key not in self._kept:
            with torch.no_grad():
                self._kept[key] = encoder.encode_text(self.texts).to(like.dtype)
        return self._kept[key]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FixedTexts:
        self._kept.clear()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        self._kept.clear()
        super()._load_from_state_dict(*arguments, **keywords)
