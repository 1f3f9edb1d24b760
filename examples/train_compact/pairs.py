"""Draw the batches of the match training: what the frozen tower saw of images, and their captions, right and wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from data import Sources, digest, read_flickr8k, read_visor
from degradations import FAILURES, fail
from loop import Settings
from safetensors.torch import load_file
from texts import Captions, load_states
from torch import Tensor
from towers import published_tower
from tqdm import tqdm

from aigiqa_reward import images as pixels
from aigiqa_reward.encoders.compact import MATCH_TOWER
from aigiqa_reward.models.compact import CompactConfig, map_statistics
from aigiqa_reward.toy.degradations import degrade, random_levels
from aigiqa_reward.toy.pictures import all_pairs, compose
from aigiqa_reward.toy.world import COLORS
from aigiqa_reward.types import Images
from aigiqa_reward.utils.weights import write_weights

if TYPE_CHECKING:
    from match import MatchTraining

SIDE = CompactConfig().match_side
BATCH = 16

COPIES, FAILED, CLEAN, WORST = 10, 0.3, 0.7, 0.6
"""Pictures of each of the world's pairs, and the share with a failure; of the other pictures the share without
degradation, and the greatest level of the degraded ones."""

VISOR_HELD_OUT = 5
"""Every so many of VISOR's prompts is not trained on, for figures."""


@dataclass(frozen=True, kw_only=True)
class MatchSettings(Settings):
    """Settings of the match training.

    Attributes:
        layer_rate: factor of the learning rate of the text tower's last layer.
        dropout, weak_dropout: before the linear layers of the whole image, and of places, sentences and words.
        flickr8k, agiqa3k, visor, world: images in a batch.
        visor_weight: probability that a caption of VISOR is right; that of AGIQA-3K is its human correspondence, as a
            share of the best, that of a failed picture of the world its distance from the worst; others have 1. It
            is the image's weight in all losses of right captions.
        hard: weight of the order of a caption and the same made wrong.
        probability: weight of the probability of a match.
        wrong: within it, weight of captions made wrong.
        words: weight of the support of right and of wrong words.
        lowest: weight of finding the wrong word among a caption's words.
    """

    steps: int = 500
    learning_rate: float = 1e-3
    weight_decay: float = 0.2
    warmup: float = 0.1
    clip: float = 2.0
    ema: float = 0.995
    layer_rate: float = 0.2
    dropout: float = 0.5
    weak_dropout: float = 0.1
    flickr8k: int = 92
    agiqa3k: int = 16
    visor: int = 8
    world: int = 12
    visor_weight: float = 0.5
    hard: float = 0.5
    probability: float = 0.5
    wrong: float = 0.3
    words: float = 0.5
    lowest: float = 0.3


class Batch(NamedTuple):
    """B images, their captions (B first), and the wrong captions of the images `has_wrong`.

    Attributes:
        seen: what the match tower saw of the images: `pooled`, `semantic` and `places`.
        weights: (B,) weight of each image, the probability that its caption is right.
        texts: (B,) number of each right caption.
        states, mask: states of the B + W captions before the last layer.
        has_wrong: (W,) number of the image of each wrong caption.
        bad: (W, L) which tokens are wrong.
    """

    seen: dict[str, Tensor]
    weights: Tensor
    texts: Tensor
    states: Tensor
    mask: Tensor
    has_wrong: Tensor
    bad: Tensor


class Pairs:
    """Draws batches of the training images and captions."""

    def __init__(self, sources: Sources, settings: MatchSettings, runs: Path) -> None:
        self.settings, images = settings, sources.images()
        files = {"agiqa3k": list(images.paths)}
        self.rows = {"agiqa3k": np.flatnonzero(sources.is_trained(images))}
        self.weights = {"agiqa3k": images.correspondence / images.correspondence.max()}
        if sources.flickr8k is not None:
            files["flickr8k"] = list(read_flickr8k(sources.flickr8k))
        if sources.visor is not None:
            prompts = read_visor(sources.visor)
            files["visor"] = list(prompts)
            held_out = np.unique(list(prompts.values()))[::VISOR_HELD_OUT]
            self.rows["visor"] = np.flatnonzero(~np.isin(list(prompts.values()), held_out))
            self.weights["visor"] = np.full(len(prompts), settings.visor_weight)
        self.world = np.repeat(all_pairs(held_out=False), COPIES, axis=0)
        self.features = {name: load_features(name, paths, runs) for name, paths in files.items()}
        self.features["world"] = load_features("world", self.world, runs)
        self.weights["world"] = 1 - failures(len(self.world)).numpy()
        captions = Captions(sources)
        self.captions = captions.of
        self.states, self.tower = load_states(captions.texts, runs)
        self.names = [name for name in ("flickr8k", "agiqa3k", "visor", "world") if name in self.features]
        for name in self.names:
            count = len(self.features[name]["pooled"])
            self.rows.setdefault(name, np.arange(count))
            self.weights.setdefault(name, np.ones(count))

    def __call__(self, rng: np.random.Generator) -> Batch:
        seen, weights, texts, wrong = [], [], [], []
        for name in self.names:
            rows = rng.choice(self.rows[name], getattr(self.settings, name), replace=False)
            seen.append({part: stored[rows].float() for part, stored in self.features[name].items()})
            weights.append(self.weights[name][rows])
            for row in rows:
                number = row if name != "world" else self.world[row] @ (len(COLORS), 1)
                known = self.captions[name][number]
                drawn = known[rng.integers(len(known))]
                texts.append(drawn.text)
                wrong.append(drawn.wrong[rng.integers(len(drawn.wrong))] if drawn.wrong else None)
        has_wrong = [row for row, each in enumerate(wrong) if each is not None]
        found = [each for each in wrong if each is not None]
        states, mask, spans = self.states.read(texts + [each.text for each in found])
        start, end = torch.tensor([each[1:] for each in found]).T[..., None]
        wrong_spans = spans[len(texts) :]
        return Batch(
            seen={part: torch.cat([each[part] for each in seen]) for part in seen[0]},
            weights=torch.from_numpy(np.concatenate(weights)).float(),
            texts=torch.tensor(texts),
            states=states,
            mask=mask,
            has_wrong=torch.tensor(has_wrong),
            bad=(wrong_spans[..., 0] >= start) & (wrong_spans[..., 1] <= end),
        )

    @torch.no_grad()
    def standardize(self, model: MatchTraining) -> None:
        """Take mean and std of what the tower saw from every fourth training image, of places from every sixteenth."""
        matcher = model.matcher
        for module, every, parts in (
            (matcher.standard_pooled, 4, ("pooled", "semantic")),
            (matcher.standard_places, 16, ("places",)),
        ):
            rows = {name: self.rows[name][::every] for name in self.names}
            seen = [torch.cat([self.features[name][part][rows[name]] for name in self.names]).float() for part in parts]
            if len(seen) == 2:  # as Matcher.look does
                seen[1] = F.normalize(seen[1] - matcher.text_mean, dim=-1)
            module.fit(torch.cat(seen, dim=-1))
            module.deviation += 1e-3


def load_features(name: str, of: Sequence[Path] | np.ndarray, runs: Path) -> dict[str, Tensor]:
    """Load what the match tower sees of files or of the world's pairs, or compute and store it, in half precision."""
    named = of.tolist() if isinstance(of, np.ndarray) else [path.name for path in of]
    path = runs / f"{name}-{digest(named)}.safetensors"
    if not path.exists():
        write_weights(path, compute_features(name, of))
    return load_file(path)


@torch.inference_mode()
def compute_features(name: str, of: Sequence[Path] | np.ndarray) -> dict[str, Tensor]:
    """Compute `pooled` (N, 3504), `semantic` (N, 384) and `places` (N, 64, 472), as the compact reward does."""
    tower, seen = published_tower(MATCH_TOWER), []
    batches = pictures(of) if isinstance(of, np.ndarray) else photographs(of)
    for images in tqdm(batches, total=-(-len(of) // BATCH), desc=name, unit="batch", position=1):
        last, levels = tower.encoder.observe(pixels.resize(images, (SIDE, SIDE)).clamp(0, 1))
        pooled = torch.cat([map_statistics(last, 1e-6), map_statistics(levels, 1e-6)], dim=1)
        parts = {"pooled": pooled, "semantic": tower.place(tower.encoder.pool(last))}
        parts["places"] = levels.flatten(2).transpose(1, 2)
        seen.append({part: x.half() for part, x in parts.items()})
    return {part: torch.cat([each[part] for each in seen]) for part in seen[0]}


def photographs(paths: Sequence[Path]) -> Iterator[Images]:
    for start in range(0, len(paths), BATCH):
        yield torch.cat([pixels.resize(pixels.load(file)[None], (SIDE, SIDE)) for file in paths[start : start + BATCH]])


def failures(count: int) -> Tensor:
    """Draw the level (N,) of the failure of each of the world's pictures, 0 for those without."""
    generator = torch.Generator().manual_seed(4)
    levels = 0.2 + 0.8 * torch.rand(count, generator=generator)
    return levels * (torch.rand(count, generator=generator) < FAILED)


def pictures(pairs: np.ndarray) -> Iterator[Images]:
    """Pictures of the emoji world, some slightly degraded, some with a failure."""
    generator, failed = torch.Generator().manual_seed(3), failures(len(pairs))
    levels = random_levels(len(pairs), clean=CLEAN, generator=generator) * WORST * (failed == 0)[:, None]
    kinds = torch.randint(len(FAILURES), (len(pairs),), generator=generator)
    for start in range(0, len(pairs), BATCH):
        part, rng = slice(start, start + BATCH), np.random.default_rng([5, start])
        clean, others = compose(pairs[part], rng), compose(rng.permutation(pairs)[: len(pairs[part])], rng)
        spoiled = fail(clean, others, kinds[part], failed[part], generator)
        yield torch.where((failed[part] > 0)[:, None, None, None], spoiled, degrade(clean, levels[part], generator))
