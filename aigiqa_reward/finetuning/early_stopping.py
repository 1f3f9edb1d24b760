"""Early stopping: when a training should stop, and which of its validations was the best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats

from aigiqa_reward.finetuning.results import ValidationResult, mean

LEVEL = 0.05  # one-sided significance level of each comparison
_DIVERSITY_SHARE = 0.5  # of the first validation's diversity, below which the images have collapsed
_SATURATION_FACTOR, _LEAST_SATURATION = 3.0, 0.1  # by which saturation must grow: flat pictures start with nearly none


class Monitor:
    """Watches the validations of a training, starting with the one before the first step.

    The best validation has the highest mean held-out reward (of equal ones the earliest), and no more non-finite images
    than the first. The training should stop when one of these is true for `patience` consecutive validations:
      - reward hacking: the held-out reward is significantly lower than at the best validation, while the trained
        reward is higher. Differences are paired over prompts and seeds, and prompts are the independent units:
        t = mean / standard error over the prompts' means, compared with Student's quantile of 0.05 / m. There m is the
        number of earlier validations, since the best of many was lucky: with m = 1, 20 to 40 of 100 simulated trainings
        with a constant held-out reward would stop within ten validations (with this bound 2 to 3).
      - collapse: the images of a prompt differ less than half as much as at the first validation.
      - saturation: three times as many pixel values at the ends of the range as at the first validation (and 10
        percentage points more), or only a third of the others left.
    It should stop at once when more than half of the images are not finite.
    """

    def __init__(self, patience: int = 2) -> None:
        self.patience = patience
        self.last_step: int | None = None
        self.best_step: int | None = None
        self.stop: str | None = None
        self._count = 0
        self._first: dict[str, float] = {}
        self._best: dict[str, np.ndarray] = {}
        self._in_a_row = {"hacking": 0, "collapse": 0, "saturation": 0}

    @property
    def best_holdout(self) -> float:
        """Mean held-out reward of the best validation; NaN before there is one."""
        return mean(self._best["holdout"]) if self._best else math.nan

    def add(self, step: int, result: ValidationResult) -> str | None:
        """Add the next validation, and return `stop`: the reason to stop, or None. A reason stays."""
        figures = {"diversity": mean(result.diversity), "saturation": mean(result.numbers["saturation"])}
        if self._count == 0:
            self._first = {**figures, "nonfinite": float(result.nonfinite)}
        signs = self._signs(result, figures) if self._count else {}
        for kind in self._in_a_row:
            self._in_a_row[kind] = self._in_a_row[kind] + 1 if kind in signs else 0
        self._count, self.last_step = self._count + 1, step
        reasons = [why for kind, why in signs.items() if self._in_a_row[kind] >= self.patience]
        if result.nonfinite * 2 > result.holdout.size:
            reasons.append(f"{result.nonfinite} of {result.holdout.size} validation images are not finite")
        if reasons and self.stop is None:
            self.stop = f"step {step}: {'; '.join(reasons)}"
        average = mean(result.holdout)
        finite = math.isfinite(average) and result.nonfinite <= self._first["nonfinite"]
        if finite and (self.best_step is None or average > self.best_holdout):
            self.best_step = step
            self._best = {"holdout": result.holdout, "reward": result.reward}
        return self.stop

    def _signs(self, result: ValidationResult, figures: Mapping[str, float]) -> dict[str, str]:
        """Return what looks wrong now, by kind."""
        found = {}
        if self._best and self._hacked(result):
            rise = mean(result.reward) - mean(self._best["reward"])
            found["hacking"] = (
                f"the held-out reward has fallen from {self.best_holdout:.4f} (step {self.best_step}) to "
                f"{mean(result.holdout):.4f}, more than its noise, while the trained reward rose by {rise:.4f}"
            )
        first, now = self._first["diversity"], figures["diversity"]
        if now < _DIVERSITY_SHARE * first:
            found["collapse"] = f"the images of a prompt differ {now / first:.0%} as much as before the training"
        first, now = self._first["saturation"], figures["saturation"]
        more = max(_SATURATION_FACTOR * first, first + _LEAST_SATURATION)
        if now > min(more, 1 - (1 - first) / _SATURATION_FACTOR):
            found["saturation"] = f"{now:.0%} of the pixel values are at the ends of the range, {first:.0%} before"
        return found

    def _hacked(self, result: ValidationResult) -> bool:
        fall, error, prompts = paired(result.holdout, self._best["holdout"])
        rise, _, _ = paired(result.reward, self._best["reward"])
        if prompts < 2 or not rise > 0:
            return False
        return fall < float(stats.t.ppf(LEVEL / self._count, prompts - 1)) * error

    def state(self) -> dict[str, Any]:
        """Return the state for a JSON file, in which NaN becomes null."""
        return {
            "last_step": self.last_step,
            "best_step": self.best_step,
            "stop": self.stop,
            "count": self._count,
            "first": self._first,
            "best": {name: values.tolist() for name, values in self._best.items()},
            "in_a_row": self._in_a_row,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.last_step, self.best_step, self.stop = state["last_step"], state["best_step"], state["stop"]
        self._count, self._in_a_row = state["count"], dict(state["in_a_row"])
        self._first = {name: math.nan if value is None else value for name, value in state["first"].items()}
        self._best = {name: np.array(values, dtype=np.float64) for name, values in state["best"].items()}


def paired(now: np.ndarray, before: np.ndarray) -> tuple[float, float, int]:
    """Return the mean difference of scores (P, S), its standard error, and the number of independent units.

    The units are the prompts' mean differences; with a single prompt, its images. The error of one unit is infinite.
    """
    differences = np.asarray(now, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    if len(differences) == 1:
        differences = differences.T
    units = np.array([row[np.isfinite(row)].mean() for row in differences if np.isfinite(row).any()])
    error = float(units.std(ddof=1) / math.sqrt(len(units))) if len(units) > 1 else math.inf
    return mean(units), error, len(units)
