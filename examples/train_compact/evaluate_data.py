"""Measure the compact reward beyond AGIQA-3K: photographs, captions, captions made wrong, and its own gradient.

    python examples/train_compact/evaluate_data.py --agiqa3k DIR --biq2021 DIR --flickr8k DIR

BIQ2021's test photographs, Flickr8k's images that no training used (`dev` in its table), and the held-out fold of
AGIQA-3K. Takes about a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from data import FOLDS, read_biq2021
from negatives import wrong_caption
from torch import Tensor
from tqdm import tqdm

from aigiqa_reward import Scorer, create_reward
from aigiqa_reward import images as pixels
from aigiqa_reward.datasets import group_folds, read_agiqa3k
from aigiqa_reward.datasets.base import read_csv
from aigiqa_reward.evaluation import srcc
from aigiqa_reward.rewards.reward import Reward

STEPS, STEP, CLIMBED = 20, 1 / 255, 24
"""Of an ascent: steps, their root mean square in pixel values, and images."""

DEV = 1000
"""Photographs of Flickr8k, with their first captions."""


def photographs(reward: Reward, folder: Path) -> float:
    """Return the SRCC of quality and BIQ2021's test scores."""
    images = read_biq2021(folder, "Test")
    quality = Scorer(reward, batch_size=4).score(images.paths, None).quality
    assert quality is not None
    return srcc(quality.numpy(), images.scores)


@torch.inference_mode()
def captions(reward: Reward, folder: Path) -> list[str]:
    """Return how often DEV captions are best for their own image, and above those made wrong."""
    first: dict[str, str] = {}
    for row in read_csv(folder / "captions.csv", ("image", "split", "caption")):
        if row["split"] != "train" and len(first) < DEV:
            first.setdefault(row["image"], row["caption"])
    names, texts = list(first), list(first.values())
    parts = [
        reward.model.forward_features(pixels.load(folder / "images" / name)[None]) for name in tqdm(names, "dev images")
    ]
    seen = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def scores(text: str, rows: Tensor | slice) -> Tensor:
        some = {name: tensor[rows] for name, tensor in seen.items()}
        features = reward.encode_prompts([text]).expand(len(some["whole"]))
        return reward.model.forward_head(some, features, None).correspondence

    table = torch.stack([scores(text, slice(None)) for text in tqdm(texts, "dev captions")], dim=1)
    right = float((table.argmax(dim=1) == torch.arange(len(texts))).float().mean())
    rng, found = np.random.default_rng(0), {}
    for row, text in enumerate(tqdm(texts, "wrong captions")):
        if wrong := wrong_caption(text, rng):
            both = torch.tensor([row, (row + 7) % len(texts)])  # the image, and another one
            apart = scores(text, both) > scores(wrong.text, both)
            found.setdefault(wrong.kind, []).append(apart.float())
    lines = [f"Flickr8k dev, right caption of {len(texts)} has the highest correspondence: {right:.3f}"]
    for kind, values in sorted(found.items()):
        own, other = torch.stack(values).mean(dim=0).tolist()
        lines.append(f"right above wrong {kind}: {own:.3f}; with another image {other:.3f} ({len(values)} captions)")
    return lines


def climb(reward: Reward, folder: Path) -> float:
    """Return the mean rise of quality by an ascent, in standard deviations of quality over the held-out fold."""
    images = read_agiqa3k(folder)
    held_out = np.flatnonzero(group_folds(images.prompts, FOLDS, seed=0) == 0)
    quality = Scorer(reward, batch_size=4).score([images.paths[row] for row in held_out], None).quality
    assert quality is not None
    rises = []
    for row in tqdm(held_out[:: len(held_out) // CLIMBED][:CLIMBED], "ascents"):
        image = pixels.load(images.paths[row])[None]
        start = float(reward(image).quality.detach())
        for _ in range(STEPS):
            leaf = image.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(reward(leaf).quality.sum(), leaf)
            image = (image + STEP * gradient / gradient.square().mean().sqrt()).clamp(0, 1)
        rises.append(float(reward(image).quality.detach()) - start)
    return float(np.mean(rises)) / float(quality.std())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("agiqa3k", "biq2021", "flickr8k"):
        parser.add_argument(f"--{name}", type=Path, required=True, help="its folder, as for train.py")
    arguments = parser.parse_args()
    reward = create_reward("compact").requires_grad_(False)
    print(f"BIQ2021 test, SRCC of quality: {photographs(reward, arguments.biq2021):.3f}")
    print("\n".join(captions(reward, arguments.flickr8k)))
    rise = climb(reward, arguments.agiqa3k)
    print(f"{STEPS} steps of gradient ascent raise quality by {rise:.2f} standard deviations")


if __name__ == "__main__":
    main()
