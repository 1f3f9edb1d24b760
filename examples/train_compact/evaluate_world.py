"""Check the compact reward on fresh pictures of the embedded world: right and wrong captions, and degradation.

    python examples/train_compact/evaluate_world.py [--pictures 256]

So many pictures of pairs that reward and generator were trained on, and as many of pairs that neither ever saw.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from aigiqa_reward import Reward, create_reward
from aigiqa_reward.models.base import ModelOutput
from aigiqa_reward.toy.degradations import DEGRADATIONS, degrade
from aigiqa_reward.toy.pictures import all_pairs, compose
from aigiqa_reward.toy.world import COLORS, NOUNS, WORDINGS, caption

LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)


def eight_captions(noun: int, color: int, rng: np.random.Generator) -> list[str]:
    """The right caption and seven wrong ones: two of another color, two of another thing, three of both other."""
    nouns = rng.permutation(np.delete(np.arange(len(NOUNS)), noun))
    colors = rng.permutation(np.delete(np.arange(len(COLORS)), color))
    wrong = [(noun, colors[0]), (noun, colors[1]), (nouns[0], color), (nouns[1], color)]
    wrong += [(nouns[2 + step], colors[2 + step]) for step in range(3)]
    return [caption(*pair, wording=int(rng.integers(len(WORDINGS)))) for pair in [(noun, color), *wrong]]


@torch.inference_mode()
def look(reward: Reward, pictures: Tensor) -> dict[str, Tensor]:
    """Compute what the towers see of all pictures."""
    parts = [reward.model.forward_features(part) for part in tqdm(pictures.split(8), desc="pictures", unit="batch")]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def judge(reward: Reward, seen: dict[str, Tensor], captions: list[str]) -> ModelOutput:
    return reward.model.forward_head(seen, reward.encode_prompts(captions), None)


@torch.inference_mode()
def choices(reward: Reward, pairs: np.ndarray) -> tuple[float, float]:
    """How often the right one of eight captions has the highest correspondence, and one swapped word the lowest score.

    The swapped word is that of the color or of the thing in "a key on red", half of the pictures each.
    """
    rng = np.random.default_rng(9)
    seen = look(reward, compose(pairs, rng))
    captions = [eight_captions(noun, color, rng) for noun, color in pairs.tolist()]
    scores = [judge(reward, seen, list(column)).correspondence for column in zip(*captions, strict=True)]
    best = torch.stack(scores, dim=1).argmax(dim=1) == 0
    swapped, lowest = rng.integers(1, 8, size=len(pairs)), []
    for row, (noun, color) in enumerate(pairs.tolist()):
        other = (noun, (color + swapped[row]) % len(COLORS)) if row % 2 else ((noun + swapped[row]) % len(NOUNS), color)
        text = caption(*other, wording=1)
        words = judge(reward, {name: x[row : row + 1] for name, x in seen.items()}, [text]).details["word_scores"][0]
        right = caption(noun, color, wording=1).split()
        if len(right) == len(text.split()):
            lowest.append(text.split()[int(words.argmin())] not in right)
    return float(best.float().mean()), float(np.mean(lowest))


@torch.inference_mode()
def qualities(reward: Reward, pairs: np.ndarray, column: int) -> list[float]:
    """Mean quality at each level of one degradation."""
    pictures = compose(pairs, np.random.default_rng(10))
    means = []
    for level in LEVELS:
        levels = torch.zeros(len(pictures), len(DEGRADATIONS))
        levels[:, column] = level
        degraded = degrade(pictures, levels, torch.Generator().manual_seed(10))
        parts = [reward(part, None).quality for part in degraded.split(8)]
        means.append(float(torch.cat(parts).mean()))
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=256, help="of each kind")
    arguments = parser.parse_args()
    reward, rng = create_reward("compact"), np.random.default_rng(8)
    for name, held_out in (("trained pairs", False), ("held-out pairs", True)):
        pairs = all_pairs(held_out=held_out)
        drawn = pairs[rng.integers(len(pairs), size=arguments.pictures)]
        right, lowest = choices(reward, drawn)
        print(f"right caption of 8, {name}: {right:.3f} of {arguments.pictures} pictures")
        print(f"swapped word has the lowest score, {name}: {lowest:.3f}")
    pairs = all_pairs(held_out=True)
    for column, name in enumerate(DEGRADATIONS):
        means = qualities(reward, pairs[rng.integers(len(pairs), size=arguments.pictures)], column)
        print(f"quality at {name} {LEVELS}: {', '.join(f'{mean:.3f}' for mean in means)}")


if __name__ == "__main__":
    main()
