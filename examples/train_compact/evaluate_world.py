"""Check the compact reward on fresh pictures of the embedded world: captions told apart, degradation seen.

    python examples/train_compact/evaluate_world.py [--pictures 256]

Half of the pictures show pairs of thing and colour that neither the reward nor the generator was trained on.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from tqdm import tqdm
from world import CAPTIONS, draw_captions

from aigiqa_reward import Reward, create_reward
from aigiqa_reward.embedded.degradations import degrade
from aigiqa_reward.embedded.judge import DEGRADATIONS
from aigiqa_reward.embedded.pictures import all_pairs, compose

LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)


@torch.inference_mode()
def choices(reward: Reward, pairs: np.ndarray) -> float:
    """How often the right one of eight captions has the highest correspondence."""
    generator = torch.Generator().manual_seed(9)
    pictures = compose(pairs, np.random.default_rng(9))
    numbers, right = draw_captions(torch.from_numpy(pairs), generator)
    scores = [
        reward(pictures, [CAPTIONS[number] for number in column]).correspondence
        for column in tqdm(numbers.T.tolist(), desc="captions", unit="caption of each")
    ]
    table = torch.stack(scores, dim=1)
    rivals = table.masked_fill(right.all(dim=2), -torch.inf).amax(dim=1)
    return float((table[:, 0] > rivals).float().mean())


@torch.inference_mode()
def qualities(reward: Reward, pairs: np.ndarray, column: int) -> list[float]:
    """Mean quality at each level of one degradation."""
    pictures = compose(pairs, np.random.default_rng(10))
    means = []
    for level in LEVELS:
        levels = torch.zeros(len(pictures), len(DEGRADATIONS))
        levels[:, column] = level
        degraded = degrade(pictures, levels, torch.Generator().manual_seed(10))
        means.append(float(reward(degraded, None).quality.mean()))
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=256, help="of each kind")
    arguments = parser.parse_args()
    reward, rng = create_reward("compact"), np.random.default_rng(8)
    for name, held_out in (("trained pairs", False), ("held-out pairs", True)):
        pairs = all_pairs(held_out=held_out)
        drawn = pairs[rng.integers(len(pairs), size=arguments.pictures)]
        print(f"right caption of 8, {name}: {choices(reward, drawn):.3f} of {arguments.pictures} pictures")
    for column, name in enumerate(DEGRADATIONS):
        means = qualities(reward, drawn[:128], column)
        print(f"quality at {name} {LEVELS}: {', '.join(f'{mean:.3f}' for mean in means)}")


if __name__ == "__main__":
    main()
