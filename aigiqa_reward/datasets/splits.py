"""Splits that keep groups whole: with a prompt on both sides, a score would measure memory of the prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def group_folds(groups: Sequence[str] | Sequence[int] | np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Deal whole groups into folds of nearly equal size.

    Groups are shuffled, then dealt from the largest to the smallest, each to the fold with the fewest rows so
    far. The fold of a group depends on the groups, their sizes and the seed, not on the order of the rows.

    Args:
        groups: (N,) the group of each row, such as its prompt.
        folds: number of folds, from 2 to the number of groups.
        seed: of the shuffle.

    Returns:
        (N,) int64, the fold of each row, 0 to folds - 1. The largest fold exceeds the smallest by at most the
        rows of one group.

    Raises:
        ValueError: no rows, or `folds` out of range.
    """
    codes, sizes = _groups(groups)
    if not 2 <= folds <= len(sizes):
        raise ValueError(f"folds: expected from 2 to {len(sizes)}, the number of groups, got {folds}")
    shuffled = np.random.default_rng(seed).permutation(len(sizes))
    fold_of_group = np.empty(len(sizes), dtype=np.int64)
    filled = np.zeros(folds, dtype=np.int64)
    for group in shuffled[np.argsort(-sizes[shuffled], kind="stable")]:
        fold = int(np.argmin(filled))
        fold_of_group[group] = fold
        filled[fold] += sizes[group]
    return fold_of_group[codes]


def group_split(groups: Sequence[str] | Sequence[int] | np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Draw a fraction of the groups, such as the prompts to hold out.

    Args:
        groups: (N,) the group of each row.
        fraction: of the groups, between 0 and 1; rounded to whole groups, and at least one on either side.
        seed: of the draw.

    Returns:
        (N,) bool, True for the rows of the drawn groups.

    Raises:
        ValueError: `fraction` out of range, or fewer than two groups.
    """
    codes, sizes = _groups(groups)
    if not 0 < fraction < 1:
        raise ValueError(f"fraction: expected a number between 0 and 1, got {fraction}")
    if len(sizes) < 2:
        raise ValueError(f"groups: expected at least two to split, got {len(sizes)}")
    count = min(max(1, round(fraction * len(sizes))), len(sizes) - 1)
    drawn = np.random.default_rng(seed).permutation(len(sizes))[:count]
    return np.isin(codes, drawn)


def _groups(groups: Sequence[str] | Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Groups as integers (N,), and the number of rows of each."""
    array = np.asarray(groups)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(f"groups: expected one label a row, at least one, got shape {array.shape}")
    _, codes, sizes = np.unique(array, return_inverse=True, return_counts=True)
    return codes, sizes
