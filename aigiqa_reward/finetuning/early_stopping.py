"""When a training should stop, and which of its validations was the best. Pure: numbers in, decisions out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats

from aigiqa_reward.finetuning.results import ValidationResult, nested, unnested
from aigiqa_reward.utils.checks import integer, number

LEVEL = 0.05
"""One-sided error of each comparison, the usual one."""

_LEAST_SATURATION = 0.1
"""Share of values that saturation must gain before it counts: chosen here, since flat pictures have nearly none."""


class Monitor:
    """Watches the validations of a training, the one before the first step first.

    The best one has the highest mean held-out reward; of equal ones the earlier, since less of the generator was
    changed for it. One with more non-finite images than the first cannot be the best.

    It says stop when one of these has held for `patience` validations in a row:
      - reward hacking: the held-out reward lies below that of the best validation by more than noise explains, while
        the trained reward lies above. Differences are paired over prompts and seeds, and prompts are the independent
        units: t = mean / standard error over prompts' means, below Student's quantile of 0.05 / m. There m is the
        number of validations before: the best of many was lucky, and so the usual bound (-1.645, m = 1) would stop
        trainings with an unchanging held-out reward within ten validations in 20 to 40 of 100 cases (simulated; this
        one in 2 to 3). Fewer than about eight prompts let only large falls be seen.
      - collapse: the images of a prompt differ less than `diversity_share` times as much as at the first validation.
      - saturation: `saturation_factor` times as many pixel values at the ends of the range as at the first validation
        (and 10 % of all more), or only the `saturation_factor`-th part of the others left.
    It says so at once when more than half of the images are not finite.

    Args:
        patience: validations in a row.
        diversity_share: in [0, 1); 0 switches this off.
        saturation_factor: above 1; `math.inf` switches this off.
    """

    def __init__(self, patience: int = 2, *, diversity_share: float = 0.5, saturation_factor: float = 3.0) -> None:
        self.patience = integer("patience", patience, least=1)
        self.diversity_share = number("diversity_share", diversity_share, "in [0, 1)", lambda v: 0 <= v < 1)
        self.saturation_factor = number("saturation_factor", saturation_factor, "above 1", lambda v: v > 1)
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
        return _mean(self._best["holdout"]) if self._best else math.nan

    def add(self, step: int, result: ValidationResult) -> str | None:
        """Take in the next validation, and return `stop`: None, or why to stop in words; once said, it stays.

        Raises:
            ValueError: not after the last step, or with other prompts or seeds.
        """
        self._check(step, result)
        figures = {"diversity": _mean(result.diversity), "saturation": _mean(result.numbers["saturation"])}
        if self._count == 0:
            self._first = {**figures, "nonfinite": float(result.nonfinite)}
        signs = self._signs(result, figures) if self._count else {}
        for kind in self._in_a_row:
            self._in_a_row[kind] = self._in_a_row[kind] + 1 if kind in signs else 0
        self._count += 1
        self.last_step = step
        reasons = [why for kind, why in signs.items() if self._in_a_row[kind] >= self.patience]
        if result.nonfinite * 2 > result.holdout.size:
            reasons.append(f"{result.nonfinite} of {result.holdout.size} validation images are not finite")
        if reasons and self.stop is None:
            self.stop = f"step {step}: {'; '.join(reasons)}"
        mean = _mean(result.holdout)
        finite = math.isfinite(mean) and result.nonfinite <= self._first["nonfinite"]
        if finite and (self.best_step is None or mean > self.best_holdout):
            self.best_step = step
            self._best = {"holdout": result.holdout, "reward": result.reward}
        return self.stop

    def _check(self, step: int, result: ValidationResult) -> None:
        if self.last_step is not None and step <= self.last_step:
            raise ValueError(f"step: expected one after {self.last_step}, whose validation is in already, got {step}")
        if self._best and result.holdout.shape != self._best["holdout"].shape:
            raise ValueError(
                f"result: expected the prompts and seeds of the earlier validations, {self._best['holdout'].shape}, "
                f"got {result.holdout.shape}; a training that goes on must validate on the same images"
            )

    def _signs(self, result: ValidationResult, figures: Mapping[str, float]) -> dict[str, str]:
        """What looks wrong now, in words."""
        found = {}
        if self._best and self._hacked(result):
            rise = _mean(result.reward) - _mean(self._best["reward"])
            found["hacking"] = (
                f"the held-out reward has fallen from {self.best_holdout:.4f} (step {self.best_step}) to "
                f"{_mean(result.holdout):.4f}, more than its noise, while the trained reward rose by {rise:.4f}"
            )
        first, now = self._first["diversity"], figures["diversity"]
        if now < self.diversity_share * first:
            found["collapse"] = f"the images of a prompt differ {_share(now, first)} as much as before the training"
        first, now = self._first["saturation"], figures["saturation"]
        if now > self._most_saturation(first):
            found["saturation"] = f"{now:.0%} of the pixel values are at the ends of the range, {first:.0%} before"
        return found

    def _hacked(self, result: ValidationResult) -> bool:
        fall, error, prompts = paired(result.holdout, self._best["holdout"])
        rise, _, _ = paired(result.reward, self._best["reward"])
        if prompts < 2 or not rise > 0:
            return False
        return fall < float(stats.t.ppf(LEVEL / self._count, prompts - 1)) * error

    def _most_saturation(self, first: float) -> float:
        more = max(self.saturation_factor * first, first + _LEAST_SATURATION)
        return min(more, 1 - (1 - first) / self.saturation_factor) if math.isfinite(self.saturation_factor) else 1.0

    # ----------------------------------------------------------------------------------------- checkpoints

    def state(self) -> dict[str, Any]:
        """All of it, as JSON holds it."""
        return {
            "settings": self._settings(),
            "last_step": self.last_step,
            "best_step": self.best_step,
            "stop": self.stop,
            "count": self._count,
            "first": {name: value if math.isfinite(value) else None for name, value in self._first.items()},
            "best": {name: nested(values) for name, values in self._best.items()},
            "in_a_row": dict(self._in_a_row),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, and decide as the monitor would have that it is of.

        Raises:
            ValueError: it is of a monitor with other settings, or not whole.
        """
        try:
            if state["settings"] != self._settings():
                raise ValueError(f"it was taken with {state['settings']}, this monitor has {self._settings()}")
            first = {name: math.nan if value is None else float(value) for name, value in state["first"].items()}
            best = {name: unnested(values) for name, values in state["best"].items()}
            loaded = (state["last_step"], state["best_step"], state["stop"], int(state["count"]), first, best)
            in_a_row = {kind: int(state["in_a_row"][kind]) for kind in self._in_a_row}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"state: cannot go on from it: {error}; pass what Monitor.state() returned") from error
        self.last_step, self.best_step, self.stop, self._count, self._first, self._best = loaded
        self._in_a_row = in_a_row

    def _settings(self) -> dict[str, Any]:
        factor = self.saturation_factor if math.isfinite(self.saturation_factor) else None
        return {"patience": self.patience, "diversity_share": self.diversity_share, "saturation_factor": factor}


def paired(now: np.ndarray, before: np.ndarray) -> tuple[float, float, int]:
    """Mean difference over the images that both have, its standard error, and the number of independent units.

    Args:
        now: (P, S) scores, NaN where there is none.
        before: (P, S) scores of the same prompts and seeds.

    Returns:
        The mean over prompts of their mean differences; the deviation of these over the root of their number. The
        images of a single prompt are units themselves; the error of one unit is infinite.
    """
    differences = np.asarray(now, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    if len(differences) == 1:
        differences = differences.T
    units = np.array([row[np.isfinite(row)].mean() for row in differences if np.isfinite(row).any()])
    if len(units) == 0:
        return math.nan, math.inf, 0
    error = float(units.std(ddof=1) / math.sqrt(len(units))) if len(units) > 1 else math.inf
    return float(units.mean()), error, len(units)


def _mean(values: np.ndarray) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a mean over nothing, which is NaN
        return float(np.nanmean(values))


def _share(now: float, first: float) -> str:
    return f"{now / first:.0%}" if first else "not"
