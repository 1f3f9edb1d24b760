"""Degradations of generated pictures at known levels: blur, noise, and warped shapes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DEGRADATIONS = ("blur", "noise", "warp")
"""The kinds, in the order of every tensor of levels; each level goes from 0 (none) to 1."""

BLUR, NOISE, WARP = 3.0, 0.3, 7.0
"""Stds at level 1: of the Gaussian in px of a 64-px picture, of the noise, of the displacement in px."""


def blur(images: Tensor, levels: Tensor) -> Tensor:
    """Blur each of (B, 3, H, W) by its level (B,)."""
    offsets = torch.arange(-8, 9, device=images.device, dtype=images.dtype)
    deviations = (BLUR * levels).clamp(min=0.05)[:, None]
    kernels = torch.exp(-0.5 * (offsets / deviations) ** 2)
    kernels = (kernels / kernels.sum(dim=1, keepdim=True)).repeat_interleave(3, dim=0)
    channels = images.flatten(0, 1)[None]
    for shape, padding in (((-1, 1, 17, 1), (0, 0, 8, 8)), ((-1, 1, 1, 17), (8, 8, 0, 0))):
        padded = F.pad(channels, padding, mode="replicate")
        channels = F.conv2d(padded, kernels.reshape(shape), groups=len(kernels))
    return channels[0].unflatten(0, images.shape[:2])


def noise(images: Tensor, levels: Tensor, generator: torch.Generator) -> Tensor:
    """Add Gaussian noise of each level (B,)."""
    deviations = NOISE * levels[:, None, None, None]
    return (images + deviations * torch.randn(images.shape, generator=generator).to(images)).clamp(0, 1)


def warp(images: Tensor, levels: Tensor, generator: torch.Generator) -> Tensor:
    """Displace the pixels of each image along a smooth random field."""
    count, side = images.shape[0], images.shape[-1]
    field = torch.randn((count, 2, 6, 6), generator=generator).to(images)
    field = field * levels[:, None, None, None] * (2 * WARP / side)
    field = F.interpolate(field, size=images.shape[2:], mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    grid = F.affine_grid(torch.eye(2, 3).to(images).expand(count, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid + field, padding_mode="border", align_corners=False)


def degrade(images: Tensor, levels: Tensor, generator: torch.Generator) -> Tensor:
    """Warp, blur and add noise to (B, 3, H, W) in [0, 1], by levels (B, 3) in the order of DEGRADATIONS."""
    blurred = blur(warp(images, levels[:, 2], generator), levels[:, 0])
    return noise(blurred, levels[:, 1], generator)


def random_levels(count: int, *, clean: float, generator: torch.Generator) -> Tensor:
    """Draw levels (count, 3): uniform, each kind absent in half of the pictures, all in a share `clean`."""
    levels = torch.rand((count, len(DEGRADATIONS)), generator=generator)
    levels *= torch.rand(levels.shape, generator=generator) > 0.5
    return levels * (torch.rand(count, generator=generator) > clean)[:, None]
