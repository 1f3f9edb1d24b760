"""Directions in which climbing moves what the towers see while images hardly differ in them, in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from recipe import Recipe
from torch import Tensor

from aigiqa_reward.models.base import Seen
from aigiqa_reward.models.compact import Compact, CompactHead, Likeness


@dataclass(frozen=True, kw_only=True)
class Known:
    """Statistics (M, columns) of images that nobody pushed, and the prompts' folds (M,), -1 for none.

    The first `scored` rows are the images that people scored.
    """

    statistics: Tensor
    folds: Tensor
    scored: int


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """How climbs moved the statistics (D, columns), and the prompts' folds (D,)."""

    moves: Tensor
    folds: Tensor


def moves(model: Compact, climbs: Sequence[Seen], folds: Tensor) -> Pushed:
    """From each climb's start to each of its kept steps."""
    found, of = [], []
    for seen in climbs:
        statistics = model.statistics(seen)
        starts = {int(seen["rows"][i]): i for i in (seen["step"] == 0).nonzero()[:, 0].tolist()}
        later = (seen["step"] > 0).nonzero()[:, 0]
        before = torch.tensor([starts[row] for row in seen["rows"][later].tolist()])
        found.append(statistics[later] - statistics[before])
        of.append(folds[seen["rows"][later]])
    return Pushed(moves=torch.cat(found), folds=torch.cat(of))


def directions(known: Tensor, moved: Tensor, count: int, shrinkage: float) -> Tensor:
    """(count, columns) unit directions v with the largest v'Mv / v'(C + shrinkage)v, M of moves and C of known rows.

    Rows are fewer than columns, so everything is solved in the rows' space (Woodbury).
    """
    ridge = shrinkage * float(known.square().mean())
    gram = (known @ known.T).double() / len(known) + ridge * torch.eye(len(known), dtype=torch.float64)
    inner = torch.cholesky_solve((known @ moved.T).double() / len(known), torch.linalg.cholesky(gram))
    solved = (moved.double() - inner.T @ known.double()) / ridge
    small = solved @ moved.double().T
    vectors = torch.linalg.eigh((small + small.T) / 2).eigenvectors[:, -count:]
    found = vectors.T @ solved
    return (found / found.norm(dim=1, keepdim=True)).float()


def whitened(known: Tensor, found: Tensor) -> Tensor:
    """The same directions mixed so that known rows have unit covariance along them."""
    along = (known @ found.T).double()
    covariance = along.T @ along / len(known)
    ridge = 1e-3 * covariance.diagonal().mean() * torch.eye(len(found), dtype=torch.float64)
    return (torch.linalg.inv(torch.linalg.cholesky(covariance + ridge)) @ found.double()).float()


def fit_guard(head: Likeness, known: Tensor, moved: Tensor, recipe: Recipe) -> None:
    """Directions and their bias, from statistics and moves in the head's own standard units."""
    mean = known.mean(dim=0)
    unit = moved / moved.norm(dim=1, keepdim=True)
    found = directions(known - mean, unit, len(head.guard), recipe.guard_shrinkage)
    head.guard.copy_(whitened(known - mean, found))
    head.guard_bias.copy_(-head.guard @ mean)


@torch.no_grad()
def held_out(heads: dict[int, CompactHead], known: Known, pushed: Pushed, recipe: Recipe) -> Tensor:
    """Fit each fold's guard without its prompts; how far the scored images lie along them, (scored,), nan elsewhere."""
    found = torch.full((known.scored,), torch.nan)
    for fold, head in heads.items():
        likeness = head.likeness
        inside, own = known.folds != fold, known.folds[: known.scored] == fold
        standard = (known.statistics[inside] - likeness.mean) / likeness.deviation
        fit_guard(likeness, standard, pushed.moves[pushed.folds != fold] / likeness.deviation, recipe)
        found[own] = likeness.pushed(known.statistics[: known.scored][own])
    return found


@torch.no_grad()
def guard(head: CompactHead, known: Known, pushed: Pushed, distances: Tensor, recipe: Recipe) -> None:
    """Fit the guard on everything, with limits from distances of images on unseen prompts."""
    likeness = head.likeness
    standard = (known.statistics - likeness.mean) / likeness.deviation
    fit_guard(likeness, standard, pushed.moves / likeness.deviation, recipe)
    set_limits(likeness, distances, recipe)


def set_limits(likeness: Likeness, distances: Tensor, recipe: Recipe) -> None:
    """The limit up to which trust is 1, and how far beyond it is one half."""
    limit = float(torch.quantile(distances[~distances.isnan()], recipe.guard_known))
    likeness.guard_limits.copy_(torch.tensor([limit, recipe.guard_softness * limit]))
