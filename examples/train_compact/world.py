"""Pictures of the embedded world in the training: spoilt for quality, with right and wrong captions for the prompt.

No people scored them; what is known is their order: less degraded is better, and a caption's thing and color are there
or not. Pairs of thing and color that the generator never saw stay out of this training too.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from recipe import Recipe
from torch import Tensor

from aigiqa_reward.toy.degradations import degrade, random_levels
from aigiqa_reward.toy.pictures import all_pairs, compose
from aigiqa_reward.toy.world import COLORS, NOUNS, WORDINGS, all_captions

COPIES = 5
"""Pictures of each pair."""

CLEAN = 0.4
"""Share of pictures without a degradation."""

CAPTIONS = tuple(all_captions())


def pictures() -> tuple[int, Callable[[np.ndarray], Tensor], dict[str, Tensor]]:
    """How many, how to get a batch of them, and their pairs (N, 2) and levels of degradation (N, 3)."""
    generator = torch.Generator().manual_seed(3)
    pairs = np.repeat(all_pairs(held_out=False), COPIES, axis=0)
    levels = random_levels(len(pairs), clean=CLEAN, generator=generator)

    def batch(rows: np.ndarray) -> Tensor:
        composed = compose(pairs[rows], np.random.default_rng([3, int(rows[0])]))
        return degrade(composed, levels[rows], torch.Generator().manual_seed(int(rows[0])))

    return len(pairs), batch, {"pairs": torch.from_numpy(pairs), "levels": levels}


def world_quality(levels: Tensor, recipe: Recipe) -> Tensor:
    """Compute quality targets of pictures of these levels (N, 3); only their order is known, no person scored them."""
    return recipe.world_quality * 2 ** -levels.sum(dim=1)


def wanted(pairs: Tensor, recipe: Recipe) -> Tensor:
    """What the match should add to the score of each of N pictures by each of CAPTIONS, (N, captions); 0 on average."""
    numbers = torch.arange(len(CAPTIONS)) // len(WORDINGS)
    noun = pairs[:, :1] == numbers // len(COLORS)
    color = pairs[:, 1:] == numbers % len(COLORS)
    shares = recipe.noun_share * noun + recipe.color_share * color
    return shares - recipe.noun_share / len(NOUNS) - recipe.color_share / len(COLORS)
