"""Correlations of predictions with human scores, raw and after the 4-parameter logistic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from scipy.optimize import least_squares
from scipy.special import expit
from scipy.stats import kendalltau, rankdata

Numbers: TypeAlias = Sequence[float | int] | np.ndarray
"""(N,) finite numbers."""

Labels: TypeAlias = Sequence[str] | Sequence[int] | np.ndarray
"""(N,) names or integers of the groups that rows belong to."""

ROUNDING = 1e-9
"""Share of the values' range below which differences count as rounding; float64 has 1e-16."""

MIN_ROWS = 5
"""Fewest rows to correlate, one more than the logistic has parameters."""

_LOG_WIDTHS = (-6.0, 6.0)  # of the logistic, in standard deviations of the predictions: from a step to a straight line


def numbers(values: Numbers, argument: str) -> np.ndarray:
    """Return (N,) finite numbers as float64."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(f"{argument}: expected a sequence of at least one number, got shape {array.shape}")
    return check_finite(array, argument)


def check_finite(array: np.ndarray, argument: str) -> np.ndarray:
    """Return an array (N, ...), checked to hold finite numbers."""
    bad = np.flatnonzero(~np.isfinite(array).all(axis=tuple(range(1, array.ndim))))
    if len(bad):
        raise ValueError(f"{argument}: expected finite numbers, got others in {len(bad)} rows, the first row {bad[0]}")
    return array


def pair(predicted: Numbers, target: Numbers, *, at_least: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return predictions and targets, (N,) finite numbers each."""
    x, y = numbers(predicted, "predicted"), numbers(target, "target")
    if len(x) != len(y) or len(x) < at_least:
        raise ValueError(f"predicted, target: expected equal lengths of at least {at_least}, got {len(x)} and {len(y)}")
    return x, y


def group_codes(labels: Labels, length: int, argument: str) -> tuple[np.ndarray, int]:
    """Return labels as integers from 0, and the number of distinct ones."""
    array = np.asarray(labels)
    if array.shape != (length,) or length == 0:
        raise ValueError(f"{argument}: expected {max(length, 1)} labels, one per row, got shape {array.shape}")
    values, codes = np.unique(array, return_inverse=True)
    return codes, len(values)


def is_constant(values: np.ndarray) -> bool:
    """Return whether all values are equal up to rounding."""
    return bool(np.ptp(values) <= 1e-14 * np.abs(values).max())


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Return Pearson's correlation of x and y (N,); NaN if either is constant up to rounding."""
    if is_constant(x) or is_constant(y):
        return float("nan")
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip(np.dot(x, y) / (np.linalg.norm(x) * np.linalg.norm(y)), -1.0, 1.0))


@dataclass(frozen=True, kw_only=True)
class Correlations:
    """Agreement of predictions with human scores; nan where one of the two is constant.

    Attributes:
        srcc: Spearman's rank correlation, ties sharing their mean rank.
        plcc: Pearson's correlation of the raw predictions.
        plcc_fitted: Pearson's correlation after the 4-parameter logistic, fitted on the same rows, for
            reporting only. The curve may fall, so a reversed predictor is positive here; `srcc` has the sign.
        krcc: Kendall's tau-b.
        rmse: root mean squared error after the logistic, in the target's units.
    """

    srcc: float
    plcc: float
    plcc_fitted: float
    krcc: float
    rmse: float


def correlations(predicted: Numbers, target: Numbers) -> Correlations:
    """Correlate predictions (N,) with human scores (N,), N >= 5.

    Constant predictions have no correlation: all four are nan, and `rmse` is that of the mean score.
    """
    x, y = pair(predicted, target, at_least=MIN_ROWS)
    fitted = fit_logistic4(x, y)(x)
    tau = float("nan") if is_constant(x) or is_constant(y) else float(np.asarray(kendalltau(x, y))[0])
    return Correlations(
        srcc=srcc(x, y),
        plcc=pearson(x, y),
        plcc_fitted=pearson(fitted, y),
        krcc=tau,
        rmse=float(np.sqrt(np.mean((fitted - y) ** 2))),
    )


def srcc(predicted: Numbers, target: Numbers) -> float:
    """Return Spearman's rank correlation of predictions (N,) with human scores (N,); nan if either is constant.

    Example:
        >>> from aigiqa_reward.evaluation import srcc
        >>> round(srcc([1, 2, 3, 4], [10, 20, 40, 30]), 3), srcc([1, 1, 1, 1], [10, 20, 40, 30])
        (0.8, nan)
    """
    x, y = pair(predicted, target)
    return float("nan") if is_constant(x) or is_constant(y) else pearson(rankdata(x), rankdata(y))


@dataclass(frozen=True, kw_only=True)
class Logistic4:
    """The curve y = b2 + (b1 - b2) / (1 + exp(-(x - b3) / |b4|)), from b2 on the left to b1 on the right.

    Source: the monotonic fit of the Video Quality Experts Group (final report, phase II, 2003), usual in
    image quality assessment.
    """

    b1: float
    b2: float
    b3: float
    b4: float

    def __call__(self, values: Numbers) -> np.ndarray:
        """Return the curve at `values`, in their shape."""
        x = np.asarray(values, dtype=np.float64)
        return self.b2 + (self.b1 - self.b2) * expit((x - self.b3) / abs(self.b4))


def fit_logistic4(predicted: Numbers, target: Numbers) -> Logistic4:
    """Fit the 4-parameter logistic by least squares, the best of three starting widths.

    Constant predictions get the flat curve at the mean target. The width b4 stays within exp(-6) and exp(6)
    standard deviations of the predictions, from a step to a straight line.
    """
    x, y = pair(predicted, target, at_least=MIN_ROWS)
    if is_constant(x):
        return Logistic4(b1=float(y.mean()), b2=float(y.mean()), b3=float(x[0]), b4=1.0)
    center, spread = float(x.mean()), float(x.std())
    z = (x - center) / spread
    ends = (float(y.max()), float(y.min()))
    b1, b2 = ends if np.dot(z, y - y.mean()) >= 0 else ends[::-1]

    def residuals(b: np.ndarray) -> np.ndarray:
        return b[1] + (b[0] - b[1]) * expit((z - b[2]) / np.exp(b[3])) - y

    bounds = ([-np.inf, -np.inf, -np.inf, _LOG_WIDTHS[0]], [np.inf, np.inf, np.inf, _LOG_WIDTHS[1]])
    starts = [[b1, b2, 0.0, log_width] for log_width in (-1.5, 0.0, 1.5)]
    fits = [least_squares(residuals, start, bounds=bounds, x_scale="jac", max_nfev=500) for start in starts]
    b = min(fits, key=lambda fit: fit.cost).x
    return Logistic4(b1=float(b[0]), b2=float(b[1]), b3=center + spread * float(b[2]), b4=spread * float(np.exp(b[3])))
