"""Scaling, cropping and normalizing, all differentiable."""

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
"""`Images` of another size."""


def resize(images: Images, size: tuple[int, int]) -> Resized:
    """Antialiased bicubic to `size` = (height, width): Pillow's BICUBIC, but differentiable, unclamped and unrounded.

    It equals Pillow's on float images; on 8-bit ones Pillow also rounds and clips between its two passes, which
    moves single pixels beside saturated edges by more than 1/255. Half precision is interpolated, and returned, as
    float32.

    Example:
        >>> import torch
        >>> from aigiqa_reward import images
        >>> images.resize(torch.rand(1, 3, 64, 48), (32, 24)).shape
        torch.Size([1, 3, 32, 24])
    """
    if images.dtype in (torch.float16, torch.bfloat16):
        images = images.float()
    if tuple(images.shape[2:]) == size:
        return images
    return F.interpolate(images, size=size, mode="bicubic", align_corners=False, antialias=True)


def resize_to_area(images: Images, area: int, *, least: int) -> Resized:
    """Scale to about `area` pixels, keeping the aspect ratio; no side falls below `least` px.

    Example:
        >>> import torch
        >>> from aigiqa_reward import images
        >>> images.resize_to_area(torch.rand(1, 3, 128, 64), 45 * 45, least=16).shape
        torch.Size([1, 3, 64, 32])
        >>> images.resize_to_area(torch.rand(1, 3, 512, 32), 32 * 32, least=16).shape
        torch.Size([1, 3, 128, 16])
    """
    height, width = images.shape[2:]
    scale = math.sqrt(area / (height * width))
    return resize(images, (max(least, round(height * scale)), max(least, round(width * scale))))


def enlarge_to(images: Images, short_side: int) -> Resized:
    """Bring the short side up to `short_side` px, keeping the aspect ratio; larger images pass unchanged.

    Example:
        >>> import torch
        >>> from aigiqa_reward import images
        >>> images.enlarge_to(torch.rand(1, 3, 64, 48), 96).shape
        torch.Size([1, 3, 128, 96])
    """
    return images if min(images.shape[2:]) >= short_side else _with_short_side(images, short_side)


def reduce_to(images: Images, short_side: int) -> Resized:
    """Bring the short side down to `short_side` px, keeping the aspect ratio; smaller images pass unchanged.

    Example:
        >>> import torch
        >>> from aigiqa_reward import images
        >>> images.reduce_to(torch.rand(1, 3, 64, 48), 24).shape
        torch.Size([1, 3, 32, 24])
    """
    return images if min(images.shape[2:]) <= short_side else _with_short_side(images, short_side)


def _with_short_side(images: Images, short_side: int) -> Resized:
    height, width = images.shape[2:]
    scale = short_side / min(height, width)
    return resize(images, (max(short_side, round(height * scale)), max(short_side, round(width * scale))))


def letterbox(images: Images, side: int, *, fill: Float[Tensor, " 3"]) -> Float[Tensor, "batch 3 side side"]:
    """The whole image inside a `side` x `side` square: aspect kept, centered, the rest filled with the color `fill`.

    Example:
        >>> import torch
        >>> from aigiqa_reward import images
        >>> boxed = images.letterbox(torch.ones(1, 3, 64, 32), 64, fill=torch.zeros(3))
        >>> boxed.shape, boxed[0, 0, 0, [0, 15, 16, 47, 48, 63]]
        (torch.Size([1, 3, 64, 64]), tensor([0., 0., 1., 1., 0., 0.]))
    """
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
    """Lay maps of a letterboxed square over the image again: the inverse of `letterbox`'s geometry.

    Args:
        maps: (B, C, s, s) of the whole square, of any resolution.
        size: (height, width) of the image that was letterboxed.

    Returns:
        (B, C, height, width), bilinear; what covered the filled borders is cut off.

    Raises:
        ValueError: maps that are not square.

    Example:
        >>> import torch
        >>> from aigiqa_reward.images import letterbox, unletterbox
        >>> image = torch.rand(1, 3, 40, 80)
        >>> unletterbox(letterbox(image, 80, fill=torch.zeros(3)), (40, 80)).shape
        torch.Size([1, 3, 40, 80])
    """
    if maps.ndim != 4 or maps.shape[2] != maps.shape[3]:
        raise ValueError(f"maps: expected (B, C, s, s) of a square, got shape {tuple(maps.shape)}")
    height, width = size
    side = max(size)
    square = F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)
    top, left = (side - height) // 2, (side - width) // 2
    return square[:, :, top : top + height, left : left + width]


def normalize(images: Images, mean: Sequence[float], std: Sequence[float]) -> Images:
    """Subtract the channel means and divide by the channel deviations of a tower's pretraining.

    Example:
        >>> import torch
        >>> from aigiqa_reward import images
        >>> images.normalize(torch.full((1, 3, 16, 16), 0.75), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))[0, :, 0, 0]
        tensor([1., 1., 1.])
    """
    return (images - images.new_tensor(mean).view(1, 3, 1, 1)) / images.new_tensor(std).view(1, 3, 1, 1)


def even_crops(images: Images, side: int, count: int) -> Float[Tensor, "batch count 3 side side"]:
    """`count` square crops of `side` px at native resolution, evenly spaced over the image, border to border.

    The crops lie on a grid whose rows and columns follow the aspect ratio; if the grid has more places than
    `count`, evenly spaced ones of them in reading order are taken. An image with a side below `side` is cropped to
    squares of its short side, which are then enlarged.

    Example:
        >>> import torch
        >>> from aigiqa_reward import images
        >>> images.even_crops(torch.rand(2, 3, 128, 96), 64, 4).shape
        torch.Size([2, 4, 3, 64, 64])
    """
    height, width = images.shape[2:]
    return _crops(images, side, even_offsets(height, width, min(side, height, width), count))


def random_crops(
    images: Images, side: int, count: int, *, generator: torch.Generator
) -> Float[Tensor, "batch count 3 side side"]:
    """`count` square crops of `side` px at native resolution, at places drawn from `generator`, one set for all.

    Example:
        >>> import torch
        >>> from aigiqa_reward import images
        >>> generator = torch.Generator().manual_seed(0)
        >>> images.random_crops(torch.rand(2, 3, 128, 96), 64, 4, generator=generator).shape
        torch.Size([2, 4, 3, 64, 64])
    """
    height, width = images.shape[2:]
    native = min(side, height, width)
    tops = torch.randint(height - native + 1, (count,), generator=generator).tolist()
    lefts = torch.randint(width - native + 1, (count,), generator=generator).tolist()
    return _crops(images, side, list(zip(tops, lefts, strict=True)))


def even_offsets(height: int, width: int, side: int, count: int) -> list[tuple[int, int]]:
    """Top left corners (top, left) of `count` evenly spaced squares of `side` px in a height x width image.

    Example:
        >>> from aigiqa_reward import images
        >>> images.even_offsets(128, 96, side=64, count=4)
        [(0, 0), (0, 32), (64, 0), (64, 32)]
    """
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
    if native == side:
        return crops
    return resize(crops.flatten(0, 1), (side, side)).unflatten(0, crops.shape[:2])
