"""Ways in which a picture of any size is spoilt, at levels from 0 (not at all) to 1."""

from __future__ import annotations

import io
from collections.abc import Callable

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from aigiqa_reward import images as pixels

BLUR, NOISE, SHRINK, FINEST, COARSEST = 4.0, 0.25, 8.0, 60, 5
"""At level 1: deviation of the blur in px of a 512-px picture, of the noise, and times smaller; qualities of JPEG at
levels just above 0 and at 1. The worst of each is plainly visible."""


def blur(image: Tensor, level: float, generator: torch.Generator) -> Tensor:
    """Gaussian, (3, H, W)."""
    del generator
    deviation = max(1e-3, BLUR * level * min(image.shape[1:]) / 512)
    radius = max(1, min(int(3 * deviation) + 1, min(image.shape[1:]) - 1))
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / deviation) ** 2)
    kernel = (kernel / kernel.sum()).to(image)
    rows = F.conv2d(F.pad(image[:, None], (0, 0, radius, radius), mode="reflect"), kernel.view(1, 1, -1, 1))
    return F.conv2d(F.pad(rows, (radius, radius, 0, 0), mode="reflect"), kernel.view(1, 1, 1, -1))[:, 0]


def noise(image: Tensor, level: float, generator: torch.Generator) -> Tensor:
    """Gaussian, independent in each pixel and channel."""
    return (image + NOISE * level * torch.randn(image.shape, generator=generator).to(image)).clamp(0, 1)


def jpeg(image: Tensor, level: float, generator: torch.Generator) -> Tensor:
    """Written and read again."""
    del generator
    file = io.BytesIO()
    quality = round(FINEST + (COARSEST - FINEST) * level)
    pixels.to_pil(image[None])[0].save(file, "jpeg", quality=quality)
    return pixels.load(Image.open(file)).to(image)


def shrink(image: Tensor, level: float, generator: torch.Generator) -> Tensor:
    """Scaled down and up again."""
    del generator
    height, width = image.shape[1:]
    factor = SHRINK**level
    small = pixels.resize(image[None], (max(16, round(height / factor)), max(16, round(width / factor))))
    return pixels.resize(small, (height, width))[0].clamp(0, 1)


DEGRADATIONS: dict[str, Callable[[Tensor, float, torch.Generator], Tensor]] = {
    "blur": blur,
    "noise": noise,
    "jpeg": jpeg,
    "downscale": shrink,
}


def degrade(image: Tensor, kind: str, level: float, generator: torch.Generator) -> Tensor:
    """One kind at one level, (3, H, W) in [0, 1]; level 0 is the image itself."""
    return image if level == 0 else DEGRADATIONS[kind](image, level, generator)
