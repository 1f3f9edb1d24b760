"""Bootstrap intervals that respect groups: all images of a prompt are drawn together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from aigiqa_reward.evaluation.metrics import Labels, group_codes


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A statistic on all rows, and the bounds of its bootstrap interval."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap_interval(
    statistic: Callable[[np.ndarray, np.ndarray], float],
    groups: Labels,
    *,
    repeats: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Compute the percentile interval of a statistic, drawing whole groups, such as prompts, with replacement.

    A paired difference is simply a statistic that computes one::

        bootstrap_interval(lambda rows, _: srcc(a[rows], y[rows]) - srcc(b[rows], y[rows]), prompts)

    and a statistic that needs groups takes them from its second argument, where a prompt drawn twice is two::

        bootstrap_interval(lambda rows, prompts: selection_gain(a[rows], y[rows], prompts), prompts)

    Args:
        statistic: function of (M,) row numbers and their (M,) integer groups, of which each drawn copy is a
            separate one; first called with all rows, for the estimate. Draws in which it is nan do not count.
        groups: (N,) group of each row.
        repeats: number of draws.
        level: coverage, between 0 and 1.
        seed: random seed.

    Example:
        >>> import numpy as np
        >>> from aigiqa_reward.evaluation import bootstrap_interval
        >>> scores, prompts = np.arange(40.0), np.arange(40) // 4
        >>> interval = bootstrap_interval(lambda rows, _: scores[rows].mean(), prompts, repeats=200)
        >>> interval.estimate, interval.low < interval.estimate < interval.high
        (19.5, True)
    """
    return bootstrap_intervals(
        lambda rows, ids: np.array([statistic(rows, ids)]), groups, repeats=repeats, level=level, seed=seed
    )[0]


def bootstrap_intervals(
    statistics: Callable[[np.ndarray, np.ndarray], np.ndarray],
    groups: Labels,
    *,
    repeats: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[Interval, ...]:
    """Compute S intervals over the same draws, for a function that returns S statistics (S,)."""
    if repeats < 1 or not 0 < level < 1:
        raise ValueError(f"repeats, level: expected at least 1 and a number in (0, 1), got {repeats} and {level}")
    codes, _ = group_codes(groups, len(groups), "groups")
    estimates = statistics(np.arange(len(codes)), codes)
    rng, sizes = np.random.default_rng(seed), np.bincount(codes)
    members = np.split(np.argsort(codes, kind="stable"), np.cumsum(sizes)[:-1])
    drawn = [rng.integers(len(members), size=len(members)) for _ in range(repeats)]
    copies = np.arange(len(members))
    draws = np.array([statistics(np.concatenate([members[g] for g in d]), np.repeat(copies, sizes[d])) for d in drawn])
    tail = (1 - level) / 2
    intervals = []
    for estimate, column in zip(estimates, draws.T, strict=True):
        kept = column[~np.isnan(column)]
        low, high = np.quantile(kept, [tail, 1 - tail]) if len(kept) else (np.nan, np.nan)
        intervals.append(Interval(estimate=float(estimate), low=float(low), high=float(high)))
    return tuple(intervals)
