"""Draw the batches of the quality training: crops of scored images, of degraded ones and of the emoji world."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from data import Sources, read_biq2021
from degradations import DEGRADATIONS, FAILURES, degrade, fail
from loop import Settings
from torch import Tensor

from aigiqa_reward import images as pixels
from aigiqa_reward.toy import degradations as world
from aigiqa_reward.toy.pictures import all_pairs, compose

SIDE, CROP, AREA = 512, 224, 384
"""Sides in px of an image, of a crop, and of the square that a whole image is scaled to."""

WHOLE, NATIVE = 0, 1
"""The views."""

BEST, WORST, LEAST = 0.98, 0.02, 0.3
"""Quantiles of people's scores that clean pictures of the emoji world and the worst failures are to have, and how far
the slightest failure lies from the first to the second."""


@dataclass(frozen=True, kw_only=True)
class QualitySettings(Settings):
    """Settings of the quality training.

    Attributes:
        frozen: first stages of the tower that keep their published weights.
        prompts, generators: size of the grid of generated images in a batch.
        photographs: photographs in a batch.
        degraded: of these images, how many are degraded.
        pictures: pictures of the emoji world, which come clean and with a failure.
        pushed: images that take a step along their gradient.
        enlarged: share of generated images at native resolution that are enlarged, at most twice.
        within, centered: weights of the correlations within generators, and centered by generator and prompt.
        order: weight of the order of images and their degradations.
        anchor: weight of the distance of the emoji world's pictures from their place among people's scores.
        push: weight of what a step along the gradient adds.
    """

    steps: int = 1500
    learning_rate: float = 3e-4
    weight_decay: float = 0.02
    warmup: float = 0.08
    clip: float = 5.0
    ema: float = 0.998
    frozen: int = 3
    prompts: int = 6
    generators: int = 4
    photographs: int = 24
    degraded: int = 4
    pictures: int = 6
    pushed: int = 4
    enlarged: float = 0.15
    within: float = 0.5
    centered: float = 0.5
    order: float = 0.1
    anchor: float = 0.3
    push: float = 0.04


class Batch(NamedTuple):
    """Crops and their views: the grid, photographs, degraded ones, then the world's clean and failed pictures.

    `generated` and `photographs` are people's scores, `pictures` what the world's are to have, in standard deviations
    of those of the benchmark; `source` says which crop each degraded one was made of.
    """

    crops: Tensor
    views: Tensor
    generated: Tensor
    photographs: Tensor
    pictures: Tensor
    source: Tensor


class Batches:
    """Draws batches of the training images."""

    def __init__(self, sources: Sources, settings: QualitySettings) -> None:
        self.settings = settings
        images = sources.images()
        self.rows = np.flatnonzero(sources.is_trained(images) & ~sources.is_left_out(images))
        self.paths, self.scores = images.paths, torch.tensor(images.quality, dtype=torch.float32)
        self.table = {(images.prompts[row], images.generators[row]): int(row) for row in self.rows}
        self.prompts, self.generators = (sorted(set(names)) for names in zip(*self.table, strict=True))
        self.photographs = read_biq2021(sources.biq2021) if sources.biq2021 is not None else None
        self.pairs = all_pairs(held_out=False)
        trained = self.scores[self.rows]
        ends = torch.quantile(trained, torch.tensor([BEST, WORST]))
        self.best, self.worst = ((ends - trained.mean()) / trained.std()).tolist()

    def __call__(self, rng: np.random.Generator) -> Batch:
        drawn = self.settings
        prompts = rng.choice(self.prompts, drawn.prompts, replace=False)
        generators = rng.choice(self.generators, drawn.generators, replace=False)
        grid = [self.table.get((prompt, generator)) for prompt in prompts for generator in generators]
        rows = [int(rng.choice(self.rows)) if row is None else row for row in grid]  # a few are not there
        paths, photographs = [self.paths[row] for row in rows], torch.empty(0)
        if self.photographs is not None:
            chosen = rng.integers(len(self.photographs.paths), size=drawn.photographs)
            paths += [self.photographs.paths[row] for row in chosen]
            photographs = torch.from_numpy(self.photographs.scores[chosen])
        views = rng.integers(2, size=len(paths))
        enlarged = [drawn.enlarged if place < len(rows) else 0.0 for place in range(len(paths))]
        crops = [cut(*each, rng) for each in zip(paths, views, enlarged, strict=True)]
        source = rng.choice(len(crops), drawn.degraded, replace=False)
        worse = [degrade(crops[row], *spoil(rng)) for row in source]
        emoji, emoji_views, wanted = self.emoji(rng)
        return Batch(
            crops=torch.cat([torch.stack(crops + worse), emoji]),
            views=torch.from_numpy(np.concatenate([views, views[source], emoji_views])),
            generated=self.scores[rows],
            photographs=photographs,
            pictures=wanted,
            source=torch.from_numpy(source),
        )

    def emoji(self, rng: np.random.Generator) -> tuple[Tensor, np.ndarray, Tensor]:
        """Clean pictures of the emoji world, the same with one failure each, the views and the wanted scores of all."""
        count = self.settings.pictures
        clean, others = compose(self.pairs[rng.integers(len(self.pairs), size=2 * count)], rng).chunk(2)
        kinds, levels = torch.randint(len(FAILURES) + len(world.DEGRADATIONS), (count,)), 0.2 + 0.8 * torch.rand(count)
        pictures = torch.cat([clean, fail(clean, others, kinds, levels, generator_of(rng))])
        fallen = torch.cat([torch.zeros(count), LEAST + (1 - LEAST) * levels])
        views = np.tile(rng.integers(2, size=count), 2)
        crops = [emoji_crop(*each) for each in zip(pictures, views, strict=True)]
        return torch.stack(crops), views, self.best + (self.worst - self.best) * fallen


def generator_of(rng: np.random.Generator) -> torch.Generator:
    return torch.Generator().manual_seed(int(rng.integers(1 << 30)))


def spoil(rng: np.random.Generator) -> tuple[str, float, torch.Generator]:
    """Draw a degradation and its level."""
    return list(DEGRADATIONS)[rng.integers(len(DEGRADATIONS))], float(rng.uniform(0.2, 1)), generator_of(rng)


def cut(path: Path, view: int, enlarged: float, rng: np.random.Generator) -> Tensor:
    """Read an image and cut a random crop (3, 224, 224) of a view, at native resolution or enlarged by chance."""
    image = pixels.resize(pixels.load(path)[None], (SIDE, SIDE))
    side = int(rng.uniform(0.85, 1.15) * CROP * SIDE / AREA) if view == WHOLE else CROP
    if view == NATIVE and rng.random() < enlarged:
        side = int(rng.uniform(0.5, 1) * CROP)
    top, left = rng.integers(0, SIDE + 1 - side, size=2)
    crop = image[:, :, top : top + side, left : left + side]
    if rng.random() < 0.5:
        crop = crop.flip(3)
    return pixels.resize(crop, (CROP, CROP)).clamp(0, 1)[0]


def emoji_crop(picture: Tensor, view: int) -> Tensor:
    """A picture of the emoji world as the crop of a view: the middle of it at the size of a whole image, or all."""
    if view == NATIVE:
        return pixels.resize(picture[None], (CROP, CROP))[0].clamp(0, 1)
    edge = (AREA - CROP) // 2
    return pixels.resize(picture[None], (AREA, AREA))[0, :, edge : edge + CROP, edge : edge + CROP].clamp(0, 1)
