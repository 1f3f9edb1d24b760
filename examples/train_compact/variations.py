"""Harmless variations of an image, as cameras, editors and file formats make them, and noise of every grain.

The guard must not take them for pixels that were pushed to raise a score.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from degradations import jpeg
from torch import Tensor
from torchvision.transforms import functional as vision

from aigiqa_reward import images as pixels

KINDS = ("colors", "sharpened", "compressed", "enlarged part", "mirrored", "noise")

STRONGEST_NOISE, COARSEST_NOISE = 6 / 255, 8
"""Root mean square, and side in px of the grains; the ascent's own steps add up to about 3 / 255."""


def vary(image: Tensor, kind: str, rng: np.random.Generator) -> Tensor:
    """One variation of (3, H, W) in [0, 1], of the same size."""
    size = tuple(image.shape[1:])
    if kind == "colors":
        for adjust in (vision.adjust_brightness, vision.adjust_contrast, vision.adjust_saturation):
            image = adjust(image, float(rng.uniform(0.75, 1.3)))
    elif kind == "sharpened":
        image = vision.adjust_sharpness(image, float(rng.uniform(1.5, 4)))
    elif kind == "compressed":
        image = jpeg(image, float(rng.uniform(-0.6, 0.0)), torch.Generator())
    elif kind == "enlarged part":
        side = [int(length * rng.uniform(0.55, 0.9)) for length in size]
        top, left = (int(rng.integers(0, length - part)) for length, part in zip(size, side, strict=True))
        part = image[None, :, top : top + side[0], left : left + side[1]]
        image = pixels.resize(part, size)[0]
    elif kind == "mirrored":
        image = image.flip(2)
    else:
        grain = 2 ** int(rng.integers(0, 1 + int(np.log2(COARSEST_NOISE))))
        noise = torch.from_numpy(rng.normal(size=(1, 3, -(-size[0] // grain), -(-size[1] // grain)))).float()
        noise = F.interpolate(noise, size=size, mode="bicubic")[0]
        image = image + float(rng.uniform(0.1, 1)) * STRONGEST_NOISE * noise / noise.std()
    return image.clamp(0, 1)
