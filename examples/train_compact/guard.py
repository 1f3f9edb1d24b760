"""Guard the compact reward against its own gradient: climb it, learn where climbing leads, and climb again.

    python examples/train_compact/guard.py --data DIR --runs runs/compact

after train.py, with the same folders. A climb moves the towers' statistics in directions in which images hardly differ;
those are found in closed form, as the generalized eigenvectors of both covariances. In each round somebody who
knows the guard climbs around it, and what that moved joins the rest. The limit is where `guard_known` of the images
that people scored lie, on prompts that a fold's guard never saw; guarded.npz has the held-out scores. Half an hour on
a core.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from climbing import Climber
from features import store
from fit_guard import Known, guard, held_out, moves, set_limits
from predictions import Predictions
from recipe import Recipe
from torch import Tensor
from train import FOLDS, export, gather, towers_only
from variations import KINDS, vary

from aigiqa_reward import images as pixels
from aigiqa_reward.datasets import ScoredImages, group_folds, read_agiqa3k
from aigiqa_reward.models.compact import Compact, CompactHead
from aigiqa_reward.utils.weights import ASSETS, load_strictly, read_weights, write_weights

EMBEDDED = ASSETS / "compact" / "model.safetensors"

ROUNDS, EVERY, OFFSET = 6, 45, 7
"""Rounds of climbing; each takes every so manieth image, starting at another one."""

VARIED = 6
"""Every so manieth image is varied."""

WORLD = 3
"""Every so manieth picture of the embedded world counts."""


def varied(images: ScoredImages, model: Compact, path: Path) -> dict[str, Tensor]:
    """What the towers see of every VARIED-th image varied, and `rows`."""
    rows = np.arange(3, len(images), VARIED)

    def batch(chosen: np.ndarray) -> Tensor:
        return torch.stack(
            [vary(pixels.load(images.paths[rows[i]]), KINDS[i % len(KINDS)], np.random.default_rng(i)) for i in chosen]
        )

    return store(model, len(rows), batch, path, kept={"rows": torch.from_numpy(rows)})


def guarded(table: Predictions, trust: np.ndarray) -> Predictions:
    """Held-out predictions times the trust of each image."""
    names = ("predicted_quality", "predicted_correspondence", "image_only_correspondence")
    names += ("shuffled_prompt_correspondence", "wrong_prompt_correspondence")
    scores = {name: getattr(table, name) for name in names}
    return replace(table, **{name: (score.T * trust).T for name, score in scores.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of AGIQA-3K with data.csv and images/")
    parser.add_argument("--runs", type=Path, required=True, help="folder of train.py")
    arguments = parser.parse_args()
    images, runs, recipe = read_agiqa3k(arguments.data), arguments.runs, Recipe()
    model = towers_only()
    material = gather(model, images, runs)
    load_strictly(model, model.state_dict() | read_weights(EMBEDDED), source=str(EMBEDDED))
    folds = torch.from_numpy(group_folds(images.prompts, FOLDS, seed=0))
    extra = varied(images, model, runs / "varied.safetensors")
    seen = [material.scored, material.spoilt, {n: t[::WORLD] for n, t in material.world.items()}, extra]
    statistics = [model.statistics(part) for part in seen]
    none = torch.full((len(statistics[2]),), -1)
    of = [folds, folds[material.spoilt["rows"]], none, folds[extra["rows"]]]
    known = Known(statistics=torch.cat(statistics), folds=torch.cat(of), scored=len(images))
    climber, climbs = Climber(model=model, paths=list(images.paths), prompts=list(images.prompts)), []
    heads = {fold: fold_head(model, runs, fold) for fold in range(FOLDS)}
    for number in range(ROUNDS):
        rows = np.arange(OFFSET * number % EVERY, len(images), EVERY)
        climbs.append(climber.climb_all(rows, runs / f"climb{number}.safetensors", anywhere=number == 0))
        pushed = moves(model, climbs, folds)
        judged = heads if number == ROUNDS - 1 else {0: heads[0]}
        distances = held_out(judged, known, pushed, recipe)
        guard(model.head, known, pushed, distances, recipe)
        print(f"round {number}: limits {[round(limit, 2) for limit in model.head.likeness.guard_limits.tolist()]}")
    trust = torch.ones(len(images))
    for fold, head in heads.items():
        set_limits(head.likeness, distances, recipe)
        own = folds == fold
        trust[own] = head.likeness.trust(known.statistics[: len(images)][own])
        write_weights(runs / f"fold{fold}.safetensors", head.state_dict())
    table = Predictions.load(runs / "predictions.npz")
    guarded(table, trust.double().numpy()).save(runs / "guarded.npz")
    print(f"trust below 1 for {float((trust < 1).float().mean()):.3f} of scored images, least {float(trust.min()):.2f}")
    export(model, EMBEDDED)


def fold_head(model: Compact, runs: Path, fold: int) -> CompactHead:
    """The head of a fold, from train.py."""
    own = model.head
    head = CompactHead(model.config, own.likeness.mean.numel(), own.described_mean.numel(), own.semantic_mean.numel())
    head.load_state_dict(read_weights(runs / f"fold{fold}.safetensors"))
    return head.requires_grad_(False)


if __name__ == "__main__":
    main()
