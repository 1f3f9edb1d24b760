"""Pictures of the embedded world in the training: degraded for quality, with right and wrong captions for the prompt.

No people scored them; what is known is their order: less degraded is better, and a caption's thing and colour are there
or not. Pairs of thing and colour that the generator never saw stay out of this training too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from features import StoredFeatures, stem
from recipe import Recipe
from torch import Tensor
from tqdm import tqdm

from aigiqa_reward import images as pixels
from aigiqa_reward.embedded.degradations import degrade, random_levels
from aigiqa_reward.embedded.pictures import all_pairs, compose
from aigiqa_reward.embedded.world import COLOURS, NOUNS, WORDINGS, all_captions
from aigiqa_reward.encoders.compact import CompactImageTower
from aigiqa_reward.encoders.timm import TimmEncoder
from aigiqa_reward.models.blocks import colour_histogram
from aigiqa_reward.models.compact import COLOURS as COLOUR_STEPS
from aigiqa_reward.models.compact import CompactConfig
from aigiqa_reward.training.losses import pairwise_margin_loss
from aigiqa_reward.weights import read_weights, write_weights

COPIES = 5
"""Pictures of each pair."""

CLEAN = 0.4
"""Share of pictures without a degradation."""

CAPTIONS = tuple(all_captions())


@dataclass(frozen=True)
class World:
    """N pictures with the maps that training starts from, as `StoredFeatures` holds them, and the truth about them."""

    whole: np.ndarray  # (N, 1, C, h, w) float16
    crops: np.ndarray  # (N, 1, C, h', w') float16
    pooled: Tensor  # (N, 1280)
    semantic: Tensor  # (N, 384)
    colours: Tensor  # (N, 125)
    pairs: Tensor  # (N, 2) noun and colour
    levels: Tensor  # (N, 3) of degradation

    def maps(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Of the whole picture and of its crop."""
        view = np.zeros(len(rows), dtype=int)
        return StoredFeatures.maps(self.whole, rows, view), StoredFeatures.maps(self.crops, rows, view)


@torch.no_grad()
def store_world(encoder: TimmEncoder, tower: CompactImageTower, config: CompactConfig, path: Path) -> World:
    """Compose the pictures and compute their maps into `path`, once."""
    if not path.exists():
        rng, generator = np.random.default_rng(3), torch.Generator().manual_seed(3)
        pairs = np.repeat(all_pairs(held_out=False), COPIES, axis=0)
        levels = random_levels(len(pairs), clean=CLEAN, generator=generator)
        whole, crops, features, colours = [], [], [], []
        for start in tqdm(range(0, len(pairs), 32), desc="world", unit="32 pictures"):
            part = slice(start, start + 32)
            batch = degrade(compose(pairs[part], rng), levels[part], generator)
            large = pixels.resize_to_area(batch, config.area**2, least=32)
            whole.append(stem(encoder, large)[:, None].half())
            crops.append(stem(encoder, pixels.even_crops(batch, config.crop, 1)[:, 0])[:, None].half())
            features.append(tower(large))
            colours.append(colour_histogram(large, COLOUR_STEPS))
        tensors = {"whole": torch.cat(whole), "crops": torch.cat(crops), "colours": torch.cat(colours)}
        for name in ("pooled", "semantic"):
            tensors[name] = torch.cat([getattr(part, name) for part in features])
        write_weights(path, tensors | {"pairs": torch.from_numpy(pairs), "levels": levels})
    stored = read_weights(path)
    return World(
        whole=stored["whole"].half().numpy(),
        crops=stored["crops"].half().numpy(),
        pooled=stored["pooled"],
        semantic=stored["semantic"],
        colours=stored["colours"],
        pairs=stored["pairs"],
        levels=stored["levels"],
    )


def order_loss(quality: Tensor, levels: Tensor, recipe: Recipe) -> Tensor:
    """Less degraded pictures have to be better."""
    return pairwise_margin_loss(quality, -levels.sum(dim=1), margin=recipe.margin)


def wanted(pairs: Tensor, recipe: Recipe) -> Tensor:
    """What the match should add to the score of each of N pictures by each of CAPTIONS, (N, captions); 0 on average."""
    numbers = torch.arange(len(CAPTIONS)) // len(WORDINGS)
    noun = pairs[:, :1] == numbers // len(COLOURS)
    colour = pairs[:, 1:] == numbers % len(COLOURS)
    shares = recipe.noun_share * noun + recipe.colour_share * colour
    return shares - recipe.noun_share / len(NOUNS) - recipe.colour_share / len(COLOURS)
