"""Check the compact reward where nobody scored: spoilt images, images climbed by gradient, images unlike its own.

    python examples/train_compact/evaluate_limits.py --data DIR --runs runs/compact [--unguarded] [--out sheet.png]

DIR is AGIQA-3K, --runs the folder of train.py, whose five heads judge the images of prompts that they never saw.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from degradations import DEGRADATIONS, degrade
from features import looking
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from train import FOLDS

from aigiqa_reward import Reward, create_reward
from aigiqa_reward import images as pixels
from aigiqa_reward.datasets import ScoredImages, group_folds, read_agiqa3k
from aigiqa_reward.toy.pictures import all_pairs, compose
from aigiqa_reward.utils.weights import read_weights

LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
STEPS, STEP = 20, 1 / 255
"""Of the ascent: the root mean square change of a pixel in each step."""


class Views:
    """The embedded reward, and beside it the folds' heads on the same towers."""

    def __init__(self, runs: Path, images: ScoredImages) -> None:
        self.reward = create_reward("compact")
        self.folds = group_folds(images.prompts, FOLDS, seed=0)
        self.heads = []
        for fold in range(FOLDS):
            model = create_reward("compact").model
            model.head.load_state_dict(read_weights(runs / f"fold{fold}.safetensors"))
            self.heads.append(model)
            model.semantic, model.fine, model.text = self.reward.model.semantic, self.reward.model.fine, None

    @torch.inference_mode()
    def held_out(self, images: Tensor, rows: np.ndarray) -> Tensor:
        """Quality (B,) by the heads that never saw the prompts of these rows."""
        with looking():  # as the training looked
            seen = {name: tensor.float() for name, tensor in self.reward.model.forward_features(images).items()}
        every = torch.stack([model.forward_head(seen, None, None).quality for model in self.heads])
        return every[torch.from_numpy(self.folds[rows]), torch.arange(len(rows))]


def monotone(views: Views, images: ScoredImages, count: int) -> None:
    """Mean held-out quality at each level of each degradation, and how many images are worse at the last."""
    rows = np.linspace(0, len(images) - 1, count).astype(int)
    originals = [pixels.load(images.paths[row]) for row in rows]

    def qualities(kind: str, level: float) -> Tensor:
        parts = []
        for part in np.array_split(np.arange(count), -(-count // 8)):
            spoilt = [degrade(originals[i], kind, level, torch.Generator().manual_seed(int(i))) for i in part]
            parts.append(views.held_out(torch.stack(spoilt), rows[part]))
        return torch.cat(parts)

    clean = qualities("blur", 0.0)
    for kind in DEGRADATIONS:
        levels = tqdm(LEVELS[1:], desc=kind, unit="level", leave=False)
        quality = torch.stack([clean, *(qualities(kind, level) for level in levels)])
        lower = (quality[-1] < quality[0]).float().mean()
        means = ", ".join(f"{mean:.3f}" for mean in quality.mean(dim=1).tolist())
        print(f"quality at {kind} {LEVELS}: {means}; worst below clean in {lower:.1%} of {count} images")


def climb(reward: Reward, image: Tensor) -> Tensor:
    """STEPS steps up the gradient of quality, each of STEP root mean square, kept in [0, 1]."""
    for _ in range(STEPS):
        leaf = image.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(reward(leaf, None).quality.sum(), leaf)
        image = (image + STEP * gradient / gradient.square().mean().sqrt()).clamp(0, 1)
    return image


def ascend(views: Views, images: ScoredImages, out: Path, count: int) -> None:
    """Climb on a few images; print what the reward, held-out heads and another system say; write a sheet."""
    rows = np.linspace(100, len(images) - 100, count).astype(int)
    other, tiles, changes = create_reward("mst_clipiqa"), [], []
    for row in tqdm(rows, desc="climb", unit="image"):
        before = pixels.load(images.paths[row])[None]
        after = climb(views.reward, before)
        pair, twice = torch.cat([before, after]), np.array([row, row])
        with torch.inference_mode():
            output, foreign = views.reward(pair, None), other(pair, [images.prompts[row]] * 2).quality
        held = views.held_out(pair, twice)
        views_of = {"reward": output.quality, "trust": output.details["trust"], "fold": held, "mst": foreign}
        figures = (f"{name} {a:.3f} -> {b:.3f}" for name, (a, b) in views_of.items())
        print(f"{images.names[row]}: {', '.join(figures)}")
        changes.append({name: float(b - a) for name, (a, b) in views_of.items()})
        tiles.append(torch.cat([before, after, (0.5 + 4 * (after - before)).clamp(0, 1)], dim=3))
    means = (f"{name} {np.mean([change[name] for change in changes]):+.3f}" for name in changes[0])
    print(f"mean change over {count} images: {', '.join(means)}")
    width = min(tile.shape[3] for tile in tiles)
    sheet = pixels.to_pil(torch.cat([tile[..., :width] for tile in tiles], dim=2))[0]
    sheet.resize((sheet.width // 2, sheet.height // 2), Image.Resampling.LANCZOS).save(out)
    print(f"{out}: before, after, 4 x the difference")


@torch.inference_mode()
def unlike(views: Views, images: ScoredImages, count: int = 64) -> None:
    """Share of images beyond the threshold of details["out_of_distribution"], and the median."""
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    rows = np.linspace(0, len(images) - 1, count).astype(int)
    colors = torch.rand(count, 3, 1, 1, generator=generator).expand(-1, -1, 256, 256)
    pairs = all_pairs(held_out=True)
    kinds = {
        "images that people scored": lambda i: pixels.load(images.paths[rows[i]])[None],
        "uniform noise": lambda i: torch.rand(1, 3, 512, 512, generator=generator),
        "one color": lambda i: colors[i : i + 1].clone(),
        "the embedded world": lambda i: compose(pairs[rng.integers(len(pairs), size=1)], rng),
    }
    for name, make in kinds.items():
        far = torch.cat([views.reward(make(i), None).details["out_of_distribution"] for i in range(count)])
        print(f"out of distribution, {name}: {(far > 1).float().mean():.2f} flagged, median {far.median():.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of AGIQA-3K with data.csv and images/")
    parser.add_argument("--runs", type=Path, required=True, help="folder of train.py")
    parser.add_argument("--images", type=int, default=200, help="to spoil")
    parser.add_argument("--climbs", type=int, default=6, help="images to climb on")
    parser.add_argument("--unguarded", action="store_true", help="climb without the guard, and do nothing else")
    parser.add_argument("--out", type=Path, default=Path("climbed.png"), help="the sheet of images before and after")
    arguments = parser.parse_args()
    images = read_agiqa3k(arguments.data)
    views = Views(arguments.runs, images)
    if arguments.unguarded:
        views.reward.model.head.likeness.guard_limits[0] = torch.inf
    else:
        unlike(views, images)
    ascend(views, images, arguments.out, arguments.climbs)
    if not arguments.unguarded:
        monotone(views, images, arguments.images)


if __name__ == "__main__":
    main()
