"""Splits that keep groups whole, since with a prompt on both sides a score would measure memory of the prompt."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np

from aigiqa_reward.datasets.base import PreferencePairs, ScoredImages, path_key, read_csv, refuse_repeats

TEST_FRACTION = 0.2
"""Share of the groups: 80/20, as in the published protocols."""

VALIDATION_FRACTION = 0.1
"""Share of the other groups that chooses the epoch; the published protocols choose it on the test part."""

_MODES = ("group", "random_image", "csv")
_PARTS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Row numbers of a table in three parts that share none; validation chooses the epoch, test is only reported.

    Example:
        >>> import numpy as np
        >>> from aigiqa_reward.datasets import Split
        >>> split = Split(train=np.array([0, 1, 2]), validation=np.array([3]), test=np.array([4, 5]))
        >>> split.test
        array([4, 5])
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    def __post_init__(self) -> None:
        for field in fields(self):
            rows = getattr(self, field.name)
            if rows.ndim != 1 or rows.dtype.kind not in "iu" or (rows < 0).any():
                raise ValueError(f"{field.name}: expected row numbers from 0, got {rows.dtype} of shape {rows.shape}")
        rows, times = np.unique(np.concatenate([self.train, self.validation, self.test]), return_counts=True)
        if (times > 1).any():
            raise ValueError(f"train, validation, test: expected no row twice, got row {rows[times > 1][0]} again")


def split_rows(
    images: ScoredImages | PreferencePairs,
    *,
    mode: Literal["group", "random_image", "csv"] = "group",
    seed: int,
    file: str | os.PathLike[str] | None = None,
) -> Split:
    """Split images, or pairs, into train, validation and test, by the groups (or the file) and the seed alone.

    Args:
        images: images or pairs.
        mode: `group`: 20 % of the groups are test, 10 % of the others validation. `random_image`: the same over single
            rows, for comparison with published figures; prompts of the test part are then seen in training.
            `csv`: the parts that `file` assigns.
        seed: random seed; in mode `csv` used only where the file has no validation rows.
        file: CSV file for mode `csv`, with the columns name (as in `images.names`) and split: train, validation (or
            val) or test. It lists every image, and may list others. Without validation rows, 10 % of the groups of
            the train rows are drawn.

    Example:
        >>> from pathlib import Path
        >>> from aigiqa_reward.datasets import PreferencePairs, split_rows
        >>> better, worse = ([Path(f"{name}{row}.png") for row in range(20)] for name in "ab")
        >>> prompts = [f"prompt {row // 2}" for row in range(20)]
        >>> pairs = PreferencePairs(prompts=tuple(prompts), better=tuple(better), worse=tuple(worse))
        >>> split = split_rows(pairs, seed=0)
        >>> len(split.train), len(split.validation), len(split.test)
        (14, 2, 4)
        >>> {prompts[row] for row in split.test} & {prompts[row] for row in split.train}
        set()
    """
    if mode not in _MODES:
        raise ValueError(f"mode: expected one of {', '.join(_MODES)}, got {mode!r}")
    if (file is None) == (mode == "csv"):
        expected, got = ("the table of parts", "none") if file is None else ("none", repr(str(file)))
        raise ValueError(f"file: expected {expected} with mode {mode!r}, got {got}; a file goes with mode 'csv'")
    if file is not None:
        return _assigned_split(images, Path(file), seed)
    groups = np.asarray(images.groups) if mode == "group" else np.arange(len(images))
    count = len(np.unique(groups))
    if count < 3:
        kind = "groups" if mode == "group" else "rows"
        raise ValueError(f"images: expected at least 3 {kind}, one per part, got {count}")
    test = group_split(groups, TEST_FRACTION, seed)
    return _with_validation(groups, np.flatnonzero(~test), np.flatnonzero(test), seed)


def group_folds(groups: Sequence[str] | Sequence[int] | np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Deal whole groups into folds of nearly equal size: shuffled, from the largest, each to the smallest fold so far.

    The fold of a group depends on the groups, their sizes and the seed, not on the order of the rows.

    Args:
        groups: (N,) group of each row, such as its prompt.
        folds: number of folds, from 2 to the number of groups.
        seed: random seed of the shuffle.

    Returns:
        (N,) int64, the fold of each row, 0 to folds - 1.

    Example:
        >>> from aigiqa_reward.datasets import group_folds
        >>> folds = group_folds(["a", "a", "b", "b", "c", "c"], folds=3, seed=0)
        >>> [len(set(folds[rows])) for rows in ([0, 1], [2, 3], [4, 5])], len(set(folds))
        ([1, 1, 1], 3)
    """
    codes, sizes = _groups(groups)
    if not 2 <= folds <= len(sizes):
        raise ValueError(f"folds: expected from 2 to {len(sizes)}, the number of groups, got {folds}")
    shuffled = np.random.default_rng(seed).permutation(len(sizes))
    fold_of_group = np.empty(len(sizes), dtype=np.int64)
    filled = np.zeros(folds, dtype=np.int64)
    for group in shuffled[np.argsort(-sizes[shuffled], kind="stable")]:
        fold_of_group[group] = fold = int(np.argmin(filled))
        filled[fold] += sizes[group]
    return fold_of_group[codes]


def group_split(groups: Sequence[str] | Sequence[int] | np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Draw a fraction of the groups, such as the prompts to hold out, at least one on either side.

    Returns:
        (N,) bool, True for the rows of the drawn groups.

    Example:
        >>> from aigiqa_reward.datasets import group_split
        >>> held_out = group_split(["a", "a", "b", "b", "c", "c", "d", "d"], 0.25, seed=0)
        >>> int(held_out.sum()), bool(held_out[0] == held_out[1])
        (2, True)
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
    """Return groups as integers (N,), and the number of rows of each."""
    array = np.asarray(groups)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(f"groups: expected one label per row, at least one, got shape {array.shape}")
    _, codes, sizes = np.unique(array, return_inverse=True, return_counts=True)
    return codes, sizes


def _with_validation(groups: np.ndarray, rest: np.ndarray, test: np.ndarray, seed: int) -> Split:
    """Draw the validation groups from the rows that are not test."""
    drawn = group_split(groups[rest], VALIDATION_FRACTION, seed)
    return Split(train=rest[~drawn], validation=rest[drawn], test=test)


def _assigned_split(images: ScoredImages | PreferencePairs, file: Path, seed: int) -> Split:
    """Return the parts that a file assigns."""
    if not isinstance(images, ScoredImages):
        raise ValueError("mode: 'csv' lists images by name, and pairs have none; take mode 'group'")
    if not file.is_file():
        raise ValueError(f"file: expected a CSV file with the columns name and split, found none at {str(file)!r}")
    rows = read_csv(file, ("name", "split"), expected="the columns")
    refuse_repeats(rows, "name")
    part_of: dict[str, str] = {}
    for row in rows:
        if row["split"] not in _PARTS:
            raise row.error(f"expected split to be train, validation (or val) or test, got {row['split']!r}")
        part_of[path_key(row["name"])] = _PARTS[row["split"]]
    if unlisted := [name for name in images.names if path_key(name) not in part_of]:
        raise ValueError(
            f"{file}: expected a row for every image, got none for {len(unlisted)} of {len(images)}, the first "
            f"{unlisted[0]!r}; add them, or drop the images by subset()"
        )
    parts = np.array([part_of[path_key(name)] for name in images.names])
    train, validation, test = (np.flatnonzero(parts == part) for part in ("train", "validation", "test"))
    if not len(train) or not len(test):
        raise ValueError(f"{file}: expected images in both train and test, got {len(train)} and {len(test)}")
    if len(validation):
        return Split(train=train, validation=validation, test=test)
    groups = np.asarray(images.groups)
    if len(np.unique(groups[train])) < 2:
        raise ValueError(f"{file}: expected validation rows, or train rows of two groups to draw them from, got one")
    return _with_validation(groups, train, test, seed)
