"""What the measures share: the accepted inputs, their checks, and Pearson's correlation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

Numbers: TypeAlias = Sequence[float | int] | np.ndarray
"""(N,) finite numbers."""

Labels: TypeAlias = Sequence[str] | Sequence[int] | np.ndarray
"""(N,) names or integers that say which group each row belongs to."""

ROUNDING = 1e-9
"""Differences below this share of the values' range are rounding: chosen here, far above float64's 1e-16."""


def numbers(values: Numbers, argument: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(f"{argument}: expected a sequence of at least one number, got shape {array.shape}")
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
        raise ValueError(
            f"{argument}: expected finite numbers, got {len(bad)} NaN or infinite ones, "
            f"the first at row {bad[0]}; drop or repair those rows"
        )
    return array


def pair(predicted: Numbers, target: Numbers, *, at_least: int = 1) -> tuple[np.ndarray, np.ndarray]:
    x, y = numbers(predicted, "predicted"), numbers(target, "target")
    if len(x) != len(y):
        raise ValueError(f"predicted, target: expected equal lengths, got {len(x)} and {len(y)}")
    if len(x) < at_least:
        raise ValueError(f"predicted, target: expected at least {at_least} rows, got {len(x)}")
    return x, y


def group_codes(labels: Labels, length: int, argument: str) -> tuple[np.ndarray, int]:
    """Labels as integers 0 to count - 1."""
    array = np.asarray(labels)
    if array.shape != (length,) or length == 0:
        raise ValueError(f"{argument}: expected {max(length, 1)} labels, one a row, got shape {array.shape}")
    values, codes = np.unique(array, return_inverse=True)
    return codes, len(values)


def is_constant(values: np.ndarray) -> bool:
    return bool(np.ptp(values) <= 1e-14 * np.abs(values).max())


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    if is_constant(x) or is_constant(y):
        return float("nan")
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip(np.dot(x, y) / (np.linalg.norm(x) * np.linalg.norm(y)), -1.0, 1.0))
