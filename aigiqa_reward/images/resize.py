"""Resizing, cropping and normalizing, all differentiable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from aigiqa_reward.types import Images

Resized: TypeAlias = Float[Tensor, "batch 3 new_height new_width"]


def resize(images: Images, size: tuple[int, int]) -> Resized:
    """Resize to (height, width) by Pillow's antialiased BICUBIC, but differentiable, unclamped and unrounded.

    It equals Pillow's on float images. On 8-bit ones Pillow also rounds and clips between its two passes, which moves
    single pixels beside saturated edges by more than 1/255. Half precision is interpolated and returned as float32.
    """
    if images.dtype in (torch.float16, torch.bfloat16):
        images = images.float()
    if tuple(images.shape[2:]) == size:
        return images
    return F.interpolate(images, size=size, mode="bicubic", align_corners=False, antialias=True)


def resize_to_area(images: Images, area: int, *, least: int) -> Resized:
    """Scale to about `area` pixels, keeping the aspect ratio; no side falls below `least` px."""
    height, width = images.shape[2:]
    scale = math.sqrt(area / (height * width))
    return resize(images, (max(least, round(height * scale)), max(least, round(width * scale))))


def reduce_to(images: Images, short_side: int) -> Resized:
    """Bring the short side down to `short_side` px, keeping the aspect ratio; smaller images pass unchanged."""
    height, width = images.shape[2:]
    scale = min(1, short_side / min(height, width))
    return images if scale == 1 else resize(images, (round(height * scale), round(width * scale)))


def center_crop(images: Images, side: int, *, nearest: bool = False) -> Float[Tensor, "batch 3 side side"]:
    """Resize the short side to `side` px and cut out the center.

    An odd margin puts half a pixel less before the crop, as transformers does; with `nearest` it is rounded half to
    even, as torchvision does.
    """
    height, width = images.shape[2:]
    short = min(height, width)
    images = resize(images, (int(side * height / short), int(side * width / short)))
    margins = images.shape[2] - side, images.shape[3] - side
    top, left = (round(margin / 2) if nearest else margin // 2 for margin in margins)
    return images[:, :, top : top + side, left : left + side]


def letterbox(images: Images, side: int, *, fill: Float[Tensor, " 3"]) -> Float[Tensor, "batch 3 side side"]:
    """Center the whole image in a `side` x `side` square, aspect kept, the rest filled with the color `fill`."""
    height, width = images.shape[2:]
    scale = side / max(height, width)
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    small = resize(images, (new_height, new_width))
    if new_height == side and new_width == side:
        return small
    top, left = (side - new_height) // 2, (side - new_width) // 2
    color = fill.to(small).view(1, 3, 1, 1)
    padding = (left, side - new_width - left, top, side - new_height - top)
    return F.pad(small - color, padding) + color


def unletterbox(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Undo the geometry of `letterbox`: bring maps (B, C, s, s) to the image's (height, width), bilinearly."""
    if maps.ndim != 4 or maps.shape[2] != maps.shape[3]:
        raise ValueError(f"maps: expected (B, C, s, s) of a square, got shape {tuple(maps.shape)}")
    (height, width), side = size, max(size)
    square = F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)
    top, left = (side - height) // 2, (side - width) // 2
    return square[:, :, top : top + height, left : left + width]


def normalize(images: Images, mean: Sequence[float], std: Sequence[float]) -> Images:
    """Subtract the channel means and divide by the channel stds."""
    return (images - images.new_tensor(mean).view(1, 3, 1, 1)) / images.new_tensor(std).view(1, 3, 1, 1)


def even_crops(images: Images, side: int, count: int) -> Float[Tensor, "batch count 3 side side"]:
    """Cut `count` squares of `side` px at native resolution, evenly spaced from border to border.

    They lie on a grid that follows the aspect ratio; of more places than `count`, evenly spaced ones are taken. Smaller
    images are cropped to squares of their short side, which are then enlarged.
    """
    height, width = images.shape[2:]
    return _crops(images, side, even_offsets(height, width, min(side, height, width), count))


def random_crops(
    images: Images, side: int, count: int, *, generator: torch.Generator
) -> Float[Tensor, "batch count 3 side side"]:
    """Cut `count` squares of `side` px at native resolution, at random places that all images share."""
    height, width = images.shape[2:]
    native = min(side, height, width)
    tops = torch.randint(height - native + 1, (count,), generator=generator).tolist()
    lefts = torch.randint(width - native + 1, (count,), generator=generator).tolist()
    return _crops(images, side, list(zip(tops, lefts, strict=True)))


def even_offsets(height: int, width: int, side: int, count: int) -> list[tuple[int, int]]:
    """Return the corners (top, left) of `count` evenly spaced squares of `side` px in a height x width image."""
    rows = min(count, max(1, round(math.sqrt(count * height / width))))
    columns = math.ceil(count / rows)
    tops = [round(step * (height - side)) for step in _evenly(rows)]
    lefts = [round(step * (width - side)) for step in _evenly(columns)]
    grid = [(top, left) for top in tops for left in lefts]
    return [grid[round(step * (len(grid) - 1))] for step in _evenly(count)]


def _evenly(count: int) -> list[float]:
    return [0.5] if count == 1 else [step / (count - 1) for step in range(count)]


def _crops(images: Tensor, side: int, offsets: list[tuple[int, int]]) -> Tensor:
    native = min(side, *images.shape[2:])
    crops = torch.stack([images[:, :, t : t + native, le : le + native] for t, le in offsets], dim=1)
    return resize(crops.flatten(0, 1), (side, side)).unflatten(0, crops.shape[:2])
