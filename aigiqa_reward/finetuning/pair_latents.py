"""Latents of preference pairs: images read when they are needed, encoded once, remembered within bounds."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from aigiqa_reward import images as pixels
from aigiqa_reward.datasets import PreferencePairs
from aigiqa_reward.sampling.families import Family

REMEMBERED = 2 * 2**30
"""Bytes of latents to remember: chosen here; 16,000 pairs of Stable Diffusion's at 512 px, 4,000 at 1024 px."""


class PairLatents:
    """Latents of both images of a pair, for one pipeline at a time.

    Args:
        pairs: whose images are read.
        remembered: bytes of latents to keep in the CPU's memory; the pair unused for longest goes first.

    Raises:
        TypeError: other pairs, as the path of a folder.
        ValueError: none.
    """

    def __init__(self, pairs: PreferencePairs, *, remembered: int = REMEMBERED) -> None:
        if not isinstance(pairs, PreferencePairs):
            raise TypeError(f"pairs: expected PreferencePairs, got {pairs!r}; pass read_preference_pairs(folder)")
        if not len(pairs):
            raise ValueError("pairs: expected at least one, got none")
        self.pairs = pairs
        self.remembered = remembered
        self._family: Family | None = None
        self._known: OrderedDict[int, Tensor] = OrderedDict()
        self._bytes = 0

    def __call__(self, family: Family, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Latents (B, ...) of the better and of the worse images of these pairs, on the CPU, in at least float32.

        Raises:
            ImageError: an image that cannot be read.
        """
        if family is not self._family:
            self._family, self._bytes = family, 0
            self._known.clear()
        rows = torch.stack([self._latents(family, place) for place in places])
        return rows[:, 0], rows[:, 1]

    def _latents(self, family: Family, place: int) -> Tensor:
        """(2, ...) of one pair."""
        if place in self._known:
            self._known.move_to_end(place)
            return self._known[place]
        files = (self.pairs.better[place], self.pairs.worse[place])
        images = torch.cat([fitted(pixels.load(file)[None], family.size()) for file in files])
        with torch.no_grad(), torch.autocast(family.device.type, enabled=False):
            latents = family.encode_images(images.to(family.device)).cpu()
        self._known[place] = latents
        self._bytes += latents.nbytes
        while self._bytes > self.remembered and len(self._known) > 1:
            self._bytes -= self._known.popitem(last=False)[1].nbytes
        return latents


def fitted(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] scaled to cover `size` = (height, width), the same from all sides cut off."""
    height, width = images.shape[2:]
    scale = max(size[0] / height, size[1] / width)
    covering = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    images = pixels.resize(images, covering).clamp(0, 1)  # bicubic overshoots
    top, left = math.floor((covering[0] - size[0]) / 2), math.floor((covering[1] - size[1]) / 2)
    return images[:, :, top : top + size[0], left : left + size[1]]
