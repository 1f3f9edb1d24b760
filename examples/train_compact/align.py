"""Train how the embedded towers come into one space: contrastively, on pictures and captions of the embedded world.

    python examples/train_compact/align.py --data DIR

DIR holds images of any kind, AGIQA-3K's here; of them neither prompts nor scores are read. They only keep what the map
learns from flat emoji small on images that are nothing like it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from aigiqa_reward import images as pixels
from aigiqa_reward.encoders.compact import CompactEncoder
from aigiqa_reward.toy.pictures import all_pairs, compose
from aigiqa_reward.toy.world import WORDINGS, all_captions, caption
from aigiqa_reward.utils.weights import ASSETS, load_strictly, read_weights, sha256, write_weights

COPIES, STEPS, BATCH, AREA = 6, 1500, 256, 256
ELSEWHERE = 3.0
"""Weight of the squared length of what the map adds to images that are not of the world."""


def encoder_without_alignment() -> CompactEncoder:
    encoder = CompactEncoder()
    for name, tower in (("image", encoder.image), ("text", encoder.text)):
        load_strictly(tower, read_weights(ASSETS / "towers" / f"{name}.safetensors"), source=name)
    return encoder.eval().requires_grad_(False)


@torch.no_grad()
def features_of(encoder: CompactEncoder, batches: list[Tensor]) -> Tensor:
    return torch.cat([encoder.features(pixels.resize_to_area(b, AREA**2, least=32)) for b in tqdm(batches)])


def world(encoder: CompactEncoder) -> tuple[Tensor, np.ndarray]:
    """Features (N, 1280) of clean pictures and their pairs (N, 2)."""
    rng = np.random.default_rng(5)
    pairs = np.repeat(all_pairs(held_out=False), COPIES, axis=0)
    return features_of(encoder, [compose(part, rng) for part in np.array_split(pairs, len(pairs) // 32)]), pairs


def semantic(encoder: CompactEncoder, features: Tensor) -> Tensor:
    with torch.no_grad():
        return F.normalize(encoder.image.classifier(features).softmax(dim=-1) @ encoder.image.class_names, dim=-1)


def train(encoder: CompactEncoder, pictures: Tensor, pairs: np.ndarray, others: Tensor) -> None:
    """Both ways of the contrastive loss; a batch holds each pair once, so that every other caption is wrong."""
    torch.manual_seed(0)  # initial weights and order of this script, which owns its process
    rng = np.random.default_rng(0)
    alignment = encoder.alignment.requires_grad_(True)
    with torch.no_grad():
        captions = encoder.text.encode(all_captions()).pooled
    everything = torch.cat([pictures[::4], others])
    alignment.feature_mean.copy_(everything.mean(dim=0))
    alignment.feature_std.copy_(everything.std(dim=0) + 0.05)  # rarely active channels would be blown up
    alignment.semantic_mean.copy_(semantic(encoder, others).mean(dim=0))
    alignment.text_mean.copy_(encoder.image.class_names.mean(dim=0))
    torch.nn.init.normal_(alignment.place_in.weight, std=0.02)
    texts = captions - alignment.text_mean
    seen, seen_others = semantic(encoder, pictures), semantic(encoder, others)
    optimizer = torch.optim.AdamW(
        [
            {"params": [alignment.place_in.weight, alignment.place_out.weight], "weight_decay": 0.05},
            {"params": [alignment.log_scale], "weight_decay": 0.0},
        ],
        lr=2e-3,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS)
    numbers = pairs[:, 0] * 8 + pairs[:, 1]
    distinct = np.unique(numbers)
    for _ in tqdm(range(STEPS), desc="align"):
        chosen = rng.choice(distinct, BATCH, replace=False)
        first = np.searchsorted(numbers, chosen)  # pairs are sorted, with COPIES of each
        rows = torch.from_numpy(first + rng.integers(COPIES, size=BATCH))
        words = texts[torch.from_numpy(chosen * len(WORDINGS) + rng.integers(len(WORDINGS), size=BATCH))]
        images = F.normalize(alignment(pictures[rows], seen[rows]), dim=-1)
        logits = alignment.log_scale.exp() * images @ F.normalize(words, dim=-1).T
        target = torch.arange(BATCH)
        elsewhere = torch.from_numpy(rng.integers(len(others), size=BATCH))
        added = alignment(others[elsewhere], seen_others[elsewhere]) - (
            seen_others[elsewhere] - alignment.semantic_mean
        )
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        loss = loss + ELSEWHERE * added.square().sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            alignment.log_scale.clamp_(max=np.log(100))  # as CLIP does
    alignment.requires_grad_(False)
    print(f"loss {float(loss):.3f}, scale {encoder.logit_scale:.1f}")


@torch.no_grad()
def check(encoder: CompactEncoder) -> None:
    """The right caption among all others, fresh pictures of trained and of held-out pairs."""
    captions = F.normalize(encoder.encode_text([caption(n, c) for n in range(64) for c in range(8)]), dim=-1)
    for name, held_out in (("trained", False), ("held-out", True)):
        rng = np.random.default_rng(9)
        pairs = all_pairs(held_out=held_out)[:256]
        images = encoder.project(features_of(encoder, [compose(part, rng) for part in np.array_split(pairs, 8)]))
        best = (F.normalize(images, dim=-1) @ captions.T).argmax(dim=1).numpy()
        noun, color = (best // 8 == pairs[:, 0]).mean(), (best % 8 == pairs[:, 1]).mean()
        print(f"{name} pairs, best of 512 captions: noun right {noun:.3f}, color right {color:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with images, in any depth")
    arguments = parser.parse_args()
    encoder = encoder_without_alignment()
    files = sorted(path for path in arguments.data.rglob("*") if path.suffix.lower() in {".jpg", ".png", ".webp"})
    others = features_of(encoder, [pixels.load(file)[None] for file in files])
    pictures, pairs = world(encoder)
    train(encoder, pictures, pairs, others)
    check(encoder)
    path = ASSETS / "towers" / "alignment.safetensors"
    write_weights(path, encoder.alignment.state_dict(), dtype=torch.float16)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, sha256 {sha256(path)}")


if __name__ == "__main__":
    main()
