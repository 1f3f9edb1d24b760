"""Ways to degrade a picture of any size, and failures of pictures of the emoji world, at levels from 0 (none) to 1."""

from __future__ import annotations

import io
from collections.abc import Callable

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from aigiqa_reward import images as pixels
from aigiqa_reward.toy import degradations as world

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


def blob(count: int, share: Tensor, generator: torch.Generator, side: int) -> Tensor:
    """Draw smooth random regions (B, 1, H, W), near 1 inside, that cover about `share` (B,) of a picture."""
    field = F.interpolate(torch.randn((count, 1, 5, 5), generator=generator), size=(side, side), mode="bicubic")
    limits = torch.stack([torch.quantile(one, 1 - float(part)) for one, part in zip(field, share, strict=True)])
    return torch.sigmoid(12 * (field - limits[:, None, None, None]))


def thing_of(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the thing is (B, 1, H, W), near 1 there, and the background (B, 3, 1, 1) of composed pictures."""
    background = pictures[:, :, :1, :1]
    return (8 * (pictures - background).square().mean(dim=1, keepdim=True).sqrt()).clamp(max=1), background


def melt(pictures: Tensor, others: Tensor, levels: Tensor, generator: torch.Generator) -> Tensor:
    """The thing becomes a smooth shape with a crisp outline and without inner detail."""
    del others, generator
    there, background = thing_of(pictures)
    mixed = torch.cat([pictures * there, there.expand_as(pictures)])
    weighted, where = world.blur(mixed, (0.4 + 1.2 * levels).repeat(2)).chunk(2)
    shape = torch.sigmoid(24 * (where[:, :1] - 0.5))
    return weighted / where.clamp(min=1e-3) * shape + background * (1 - shape)


def merge(pictures: Tensor, others: Tensor, levels: Tensor, generator: torch.Generator) -> Tensor:
    """A part of the thing is replaced by that of another picture."""
    region = blob(len(pictures), 0.1 + 0.4 * levels, generator, pictures.shape[2])
    there, _ = thing_of(others)
    return pictures * (1 - region) + region * (others * there + pictures[:, :, :1, :1] * (1 - there))


def erase(pictures: Tensor, others: Tensor, levels: Tensor, generator: torch.Generator) -> Tensor:
    """A part of the thing is missing."""
    del others
    region = blob(len(pictures), 0.1 + 0.4 * levels, generator, pictures.shape[2])
    return pictures * (1 - region) + region * pictures[:, :, :1, :1]


def flatten(pictures: Tensor, others: Tensor, levels: Tensor, generator: torch.Generator) -> Tensor:
    """The thing takes one color, its own mean or any."""
    del others
    there, _ = thing_of(pictures)
    mean = (pictures * there).sum(dim=(2, 3), keepdim=True) / there.sum(dim=(2, 3), keepdim=True).clamp(min=1)
    drawn = torch.rand(mean.shape, generator=generator)
    color = torch.where(torch.rand((len(mean), 1, 1, 1), generator=generator) < 0.5, mean, drawn)
    share = there * (0.3 + 0.7 * levels)[:, None, None, None]
    return pictures * (1 - share) + share * color


FAILURES = (melt, merge, erase, flatten)
"""What goes wrong with a thing: functions of pictures (B, 3, H, W), other pictures, levels (B,) and a generator."""


def fail(pictures: Tensor, others: Tensor, kinds: Tensor, levels: Tensor, generator: torch.Generator) -> Tensor:
    """Let each picture fail in one way: a number of FAILURES, or beyond them of the world's degradations."""
    changed = [failure(pictures, others, levels, generator) for failure in FAILURES]
    for kind in range(len(world.DEGRADATIONS)):
        only = levels[:, None] * F.one_hot(torch.tensor(kind), len(world.DEGRADATIONS))
        changed.append(world.degrade(pictures, only, generator))
    return torch.stack(changed)[kinds, torch.arange(len(pictures))].clamp(0, 1)
