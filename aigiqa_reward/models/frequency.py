"""How visible the frequencies of a patch are: the contrast sensitivity function on its Fourier spectrum (SC-AGIQA)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from aigiqa_reward.types import Images

PIXELS_PER_DEGREE = 32.0
"""Of visual angle: chosen here, a 512 px image at a width of 16 degrees, about two picture widths away."""

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the luminance (ITU-R BT.601)."""


def contrast_sensitivity(frequency: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """a(v) = 2.6 (0.0192 + 0.114 v) exp(-(0.114 v)^1.1) for v in cycles a degree (Mannos and Sakrison 1974)."""
    scaled = 0.114 * frequency
    return 2.6 * (0.0192 + scaled) * torch.exp(-(scaled**1.1))


def frequency_weights(
    crops: Images, grid: tuple[int, int], *, pixels_per_degree: float = PIXELS_PER_DEGREE
) -> Float[Tensor, "batch places"]:
    """How visible each patch's frequencies are, in (0, 1): the weights w of AQAFP (SC-AGIQA, eq. 8).

    The luminance of each patch goes through a Fourier transform; the amplitudes without the mean, weighted with a(v),
    are averaged to a score; a sigmoid follows. Every row is computed from its own pixels (the released code adds the
    scores over the whole batch, so that every image gets the same map).

    Our inferences: the viewing distance; scores are taken relative to the mean and deviation over the row's own
    patches, since the sigmoid of raw amplitudes is nearly the same everywhere.

    Args:
        crops: (B, 3, S, S) in [0, 1].
        grid: rows and columns of patches, divisors of S; a place of the feature map each.
        pixels_per_degree: of visual angle.

    Returns:
        (B, rows * columns), in reading order; differentiable.
    """
    rows, columns = grid
    height, width = crops.shape[2:]
    if height % rows or width % columns:
        raise ValueError(f"grid: expected divisors of {height} x {width} px, got {rows} x {columns}")
    luma = (crops * crops.new_tensor(LUMA).view(1, 3, 1, 1)).sum(dim=1)
    patches = luma.unflatten(1, (rows, -1)).unflatten(3, (columns, -1)).transpose(2, 3)  # (B, rows, columns, p, q)
    spectrum = torch.fft.fft2(patches, norm="ortho")
    amplitude = (spectrum.real.square() + spectrum.imag.square() + 1e-12).sqrt()
    down, across = (torch.fft.fftfreq(n, device=crops.device, dtype=crops.dtype) for n in patches.shape[3:])
    cycles = torch.hypot(down[:, None], across[None]) * pixels_per_degree
    sensitivity = contrast_sensitivity(cycles)
    sensitivity[0, 0] = 0  # the mean brightness is no contrast
    score = (amplitude * sensitivity).mean(dim=(3, 4)).flatten(1)
    deviation = score.var(dim=1, keepdim=True, unbiased=False).add(1e-8).sqrt()
    return torch.sigmoid((score - score.mean(dim=1, keepdim=True)) / deviation)
