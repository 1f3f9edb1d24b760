"""Real pictures of the embedded world: emoji composed on colored backgrounds.

Generator, judge and the embedded reward were trained on such pictures and are tested on fresh ones. The emoji are
Fluent 3D (Microsoft, MIT license), collected by examples/train_generator/sprites.py.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image

from aigiqa_reward.toy.world import COLORS, NOUNS, SIDE, is_held_out
from aigiqa_reward.types import Images
from aigiqa_reward.utils.weights import ASSETS

SPRITES = ASSETS / "world" / "sprites.webp"
"""All emoji in the order of `world.THINGS`, row by row, each in the middle of a cell."""

CELL, COLUMNS = 96, 8  # side of a cell in px, and cells per row
SIZES = tuple(range(44, 57, 2))  # sides in px that a cell is scaled to
SHIFT, SHADE = 5, 4.0  # largest distance from the middle in px, and std of the background's color, of 255


@cache
def _sheet() -> Image.Image:
    return Image.open(SPRITES).convert("RGBa")  # premultiplied: no fringe of a transparent pixel's color


@cache
def _sprite(noun: int, size: int, mirrored: bool) -> np.ndarray:
    """(size, size, 4) float32 in [0, 1], colors premultiplied."""
    row, column = divmod(noun, COLUMNS)
    box = (column * CELL, row * CELL, (column + 1) * CELL, (row + 1) * CELL)
    pixels = np.asarray(_sheet().crop(box).resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255
    return pixels[:, ::-1] if mirrored else pixels


def _compose(noun: int, color: int, rng: np.random.Generator) -> np.ndarray:
    """(64, 64, 3) uint8."""
    size = int(rng.choice(SIZES))
    sprite = _sprite(noun, size, bool(rng.integers(2)))
    slack = (SIDE - size) // 2
    top, left = slack + rng.integers(-min(slack, SHIFT), min(slack, SHIFT) + 1, 2)
    shade = np.array(list(COLORS.values())[color]) + rng.normal(0, SHADE, 3)
    picture = np.broadcast_to(np.clip(shade, 0, 255).astype(np.float32) / 255, (SIDE, SIDE, 3)).copy()
    place = picture[top : top + size, left : left + size]
    place *= 1 - sprite[..., 3:]
    place += sprite[..., :3]
    return np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)


def compose(pairs: Int[np.ndarray, "batch 2"], rng: np.random.Generator) -> Images:
    """Compose pictures (B, 3, 64, 64) of (noun, color) indices, at random sizes, places, flips and shades."""
    batch = np.stack([_compose(int(noun), int(color), rng) for noun, color in pairs])
    return torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 255


def all_pairs(*, held_out: bool) -> Int[np.ndarray, "pairs 2"]:
    """Return every (noun, color) that training shows, or every one that it never shows."""
    return np.array([(n, c) for n in range(len(NOUNS)) for c in range(len(COLORS)) if is_held_out(n, c) == held_out])
