"""Train the judge of the embedded world on composed pictures, and check it on fresh ones.

From the repository's root:

    python examples/train_generator/judge.py --runs runs/generator      # about 8 minutes on two cores
    python examples/train_generator/judge.py                            # only check the judge that ships
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fit import fit
from torch import Tensor

from aigiqa_reward.toy.degradations import DEGRADATIONS, degrade, random_levels
from aigiqa_reward.toy.judge import Judge, load_judge
from aigiqa_reward.toy.pictures import compose
from aigiqa_reward.toy.world import COLORS, NOUNS
from aigiqa_reward.utils.weights import ASSETS, sha256, write_weights

STEPS = 4000
BATCH = 64
CLEAN = 0.4
"""Share of pictures without a degradation."""


def random_pairs(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 2) random (noun, color), those held out from the generator as well."""
    return np.stack([rng.integers(len(NOUNS), size=count), rng.integers(len(COLORS), size=count)], axis=1)


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, scale and shift each picture a little; with the background continued beyond the edge."""
    count = len(images)
    angle, scale = (0.08 * torch.randn(count, generator=generator) for _ in range(2))
    cosine, sine = angle.cos() * scale.exp(), angle.sin() * scale.exp()
    shift = 0.05 * torch.randn((2, count), generator=generator)
    matrix = torch.stack([torch.stack([cosine, -sine, shift[0]], 1), torch.stack([sine, cosine, shift[1]], 1)], 1)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def loss_of(judge: Judge, generator: torch.Generator) -> Tensor:
    """Noun and color of degraded and blended pictures, whose truth is two at once, and the levels of degradation."""
    rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
    pairs = random_pairs(rng, BATCH)
    images = moved(compose(pairs, rng), generator)
    images = (images + 0.05 * torch.randn((BATCH, 3, 1, 1), generator=generator)).clamp(0, 1)
    labels = [F.one_hot(torch.from_numpy(pairs[:, i]), count).float() for i, count in enumerate((64, 8))]
    share = torch.where(torch.rand(BATCH, generator=generator) < 0.15, torch.rand(BATCH, generator=generator), 1.0)
    images = share[:, None, None, None] * images + (1 - share[:, None, None, None]) * images.roll(1, 0)
    labels = [share[:, None] * label + (1 - share[:, None]) * label.roll(1, 0) for label in labels]
    levels = random_levels(BATCH, clean=CLEAN, generator=generator)
    images = degrade(images, levels, generator).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        noun, color, degradation = (logits.float() for logits in judge.logits(images))
    return (
        F.cross_entropy(noun, labels[0])
        + F.cross_entropy(color, labels[1])
        + 20 * F.mse_loss(degradation.sigmoid(), levels)
    )


@torch.no_grad()
def check(judge: Judge) -> None:
    """Print how often the judge is right on fresh clean pictures, and how it follows growing degradation."""
    rng, generator = np.random.default_rng(10**9), torch.Generator().manual_seed(10**9)
    pairs = random_pairs(rng, 4096)
    images = compose(pairs, rng)
    verdict = judge.examine(images)
    right = torch.stack([verdict.nouns.argmax(1), verdict.colors.argmax(1)], 1) == torch.from_numpy(pairs)
    print(f"clean pictures: noun {right[:, 0].float().mean():.4f}, color {right[:, 1].float().mean():.4f}, ", end="")
    print(f"both {right.all(1).float().mean():.4f}")
    truth = torch.from_numpy(pairs)
    for column, name in enumerate(DEGRADATIONS):
        for level in (0.0, 0.25, 0.5, 0.75, 1.0):
            levels = torch.zeros(512, 3)
            levels[:, column] = level
            seen = judge.examine(degrade(images[:512], levels, generator))
            score = seen.nouns.gather(1, truth[:512, :1]) + seen.colors.gather(1, truth[:512, 1:])
            print(f"{name} {level:.2f}: measured {seen.degradation[:, column].mean():.2f}, score {score.mean():.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="folder for checkpoints; without it the judge that ships is checked")
    parser.add_argument("--out", type=Path, default=ASSETS / "judge" / "model.safetensors")
    arguments = parser.parse_args()
    if arguments.runs is None:
        check(load_judge())
        return
    arguments.runs.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)  # initial weights of this script, which owns its process
    judge = Judge().to(memory_format=torch.channels_last)
    judge = fit(judge, loss_of, steps=STEPS, learning_rate=3e-3, ema=0.995, checkpoint=arguments.runs / "judge.pt")
    tensors = {name: t.half() if t.ndim >= 2 else t for name, t in judge.state_dict().items()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_weights(arguments.out, tensors)
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e6:.2f} MB, sha256 {sha256(arguments.out)}")
    check(judge)


if __name__ == "__main__":
    main()
