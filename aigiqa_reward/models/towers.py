"""What the systems need of their frozen towers; models are given towers and never import a library of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from aigiqa_reward import images as pixels
from aigiqa_reward.types import Images

View: TypeAlias = Float[Tensor, "batch 3 view_height view_width"]
"""`Images` at the size at which a tower sees them."""


class Tower(Protocol):
    """A frozen tower that a saved reward can build again."""

    image_size: int

    def describe(self) -> dict[str, Any]:
        """What is needed besides the weights, as JSON."""
        ...


class ContrastiveEncoder(Tower, Protocol):
    """Images, places of an image, texts and words in one space of width d (CLIP and what stands for it)."""

    mean: tuple[float, float, float]
    any_size: bool

    @property
    def width(self) -> int:
        """Width d of the joint space."""
        ...

    @property
    def feature_width(self) -> int:
        """Width of the pooled features before they are projected into it."""
        ...

    @property
    def logit_scale(self) -> float:
        """Inverse temperature of the similarities."""
        ...

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to (B, feature_width)."""
        ...

    def project(self, features: Tensor) -> Tensor:
        """(..., feature_width) to (..., d)."""
        ...

    def encode_map(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to the embeddings of its places (B, d, h, w)."""
        ...

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """P texts to (P, d)."""
        ...

    def encode_words(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """P texts to their words (P, L, d) and a mask (P, L); warns of words beyond the window."""
        ...


class LevelsEncoder(Tower, Protocol):
    """A tower whose last blocks are read together."""

    @property
    def level_channels(self) -> int:
        """Channels C of `levels`."""
        ...

    def levels(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) in [0, 1] to the concatenated maps (B, C, h, w)."""
        ...


class GroundedTextEncoder(Tower, Protocol):
    """Reads a text in sight of an image (BLIP's image-grounded text encoder and what stands for it)."""

    mean: tuple[float, float, float]

    @property
    def grounded_width(self) -> int:
        """Width of the states."""
        ...

    def look(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) in [0, 1] to what the text encoder attends to, (B, T, v)."""
        ...

    def read(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """P texts to `text` (P, L, ...) and `mask` (P, L)."""
        ...

    def ground(self, seen: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """The states (B, L, grounded_width) of B texts in sight of B images."""
        ...


def whole_view(images: Images, encoder: ContrastiveEncoder, side: int) -> View:
    """The whole image for a tower: at about side x side px with its aspect kept, or letterboxed to its fixed size."""
    if encoder.any_size:
        return pixels.resize_to_area(images, side * side, least=32)
    return square_view(images, encoder, encoder.image_size)


def square_view(images: Images, encoder: ContrastiveEncoder | GroundedTextEncoder, side: int) -> View:
    """The whole image letterboxed to side x side px, in the tower's mean color."""
    return pixels.letterbox(images, side, fill=images.new_tensor(encoder.mean))


def native_crops(
    images: Images,
    side: int,
    count: int,
    *,
    short_side: int,
    resolution: int | None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch count 3 side side"]:
    """Crops of `side` px of images whose short side is at least `short_side` and, where given, at most `resolution` px.

    Of a smaller image the crops are taken first and enlarged then, which keeps a long thin one from filling the memory.

    Args:
        images: (B, 3, H, W).
        side: of the crops.
        count: how many.
        short_side: smaller images are looked at as if enlarged to it.
        resolution: larger ones are scaled down to it.
        generator: draws the places, the same for all images of the batch; None spaces them evenly.
    """
    if resolution is not None:
        images = pixels.reduce_to(images, resolution)
    native = max(1, round(side * min(1, min(images.shape[2:]) / short_side)))
    if generator is None:
        crops = pixels.even_crops(images, native, count)
    else:
        crops = pixels.random_crops(images, native, count, generator=generator)
    return pixels.resize(crops.flatten(0, 1), (side, side)).unflatten(0, crops.shape[:2])


class FixedTexts(nn.Module):
    """Embeddings of texts that never change, computed once for each device and dtype of a frozen tower.

    A submodule of the model that holds the tower, so that loading weights or casting them forgets what was computed.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        super().__init__()
        self.texts = tuple(texts)
        self._kept: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def forward(self, encoder: ContrastiveEncoder, like: Tensor) -> Tensor:
        """(texts, d) on the device and in the dtype of `like`; outside the graph unless the tower is being trained."""
        if isinstance(encoder, nn.Module) and any(p.requires_grad for p in encoder.parameters()):
            self.forget()
            return encoder.encode_text(self.texts).to(like.dtype)
        key = (like.device, like.dtype)
        if key not in self._kept:
            with torch.no_grad():
                self._kept[key] = encoder.encode_text(self.texts).to(like.dtype)
        return self._kept[key]

    def forget(self) -> None:
        """Compute again at the next call: the tower has other weights."""
        self._kept.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FixedTexts:
        self.forget()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        self.forget()
        super()._load_from_state_dict(*arguments, **keywords)
