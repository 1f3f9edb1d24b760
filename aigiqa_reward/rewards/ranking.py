"""Ranking and running selection. Pure: numbers in, numbers out; knows no pipelines and no pixels."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat

from aigiqa_reward.utils.checks import integer


def rank(scores: Iterable[SupportsFloat]) -> list[int]:
    """Indices of `scores`, best first.

    Higher is better. The order is stable: a tie goes to the earlier one, and NaN comes last.

    Args:
        scores: (N,) numbers: a list, an array or a tensor.

    Example:
        >>> rank([0.2, float("nan"), 0.7, 0.7])
        [2, 3, 0, 1]
    """
    values = [float(score) for score in scores]
    return sorted(range(len(values)), key=lambda index: _key(values[index], index))


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """One candidate that a `TopK` holds.

    Attributes:
        score: higher is better; never NaN.
        index: which candidate it is; of two equal scores the smaller index is the better one.
        item: what was pushed with it.
    """

    score: float
    index: int
    item: Any


class TopK:
    """The best `k` of a stream of candidates, holding no more than `k` of them at a time.

    The outcome depends only on the candidates, not on the order in which they are pushed.
    """

    def __init__(self, k: Any) -> None:
        """Start empty.

        Args:
            k: how many to hold, an integer of at least 1.

        Raises:
            TypeError: if `k` is not an integer.
            ValueError: if `k` is below 1.
        """
        self.k = integer("k", k, least=1)
        self._held: list[Ranked] = []

    def __len__(self) -> int:
        """How many candidates are held now, at most `k`."""
        return len(self._held)

    def accepts(self, score: SupportsFloat, index: int) -> bool:
        """Whether `push` would keep this candidate; ask first where making the item costs something."""
        value = float(score)
        if math.isnan(value):
            return False
        if len(self._held) < self.k:
            return True
        worst = self._held[-1]
        return _key(value, index) < _key(worst.score, worst.index)

    def push(self, score: SupportsFloat, index: int, item: Any) -> bool:
        """Take a candidate in if it belongs to the best `k` so far, in place of the worst one held.

        Args:
            score: higher is better; NaN never enters.
            index: number of the candidate, given to no other one; the smaller wins a tie.
            item: what to hold for it.

        Returns:
            Whether it was kept.
        """
        if not self.accepts(score, index):
            return False
        entry = Ranked(score=float(score), index=index, item=item)
        bisect.insort(self._held, entry, key=lambda held: _key(held.score, held.index))
        del self._held[self.k :]
        return True

    def items(self) -> list[Ranked]:
        """The candidates held now, best first."""
        return list(self._held)


def spread(distances: Sequence[Sequence[float]], count: int) -> list[int]:
    """Which `count` of K candidates lie far apart: the best one, then always the farthest from those taken.

    Greedy farthest-first traversal (Gonzalez 1985), at most twice as narrow as the widest choice there is.

    Args:
        distances: (K, K) symmetric, at least 0; rows in the candidates' order, best first.
        count: in [1, K].

    Returns:
        Their places, ascending, so best first. Of equally far ones the better is taken.
    """
    taken = [0]
    while len(taken) < count:
        left = [place for place in range(len(distances)) if place not in taken]
        taken.append(max(left, key=lambda place: (min(distances[place][other] for other in taken), -place)))
    return sorted(taken)


# --------------------------------------------------------------------------------------------- search plans


@dataclass(frozen=True, kw_only=True)
class Round:
    """One pruning: after `step` steps the best `survivors` go on."""

    step: int
    survivors: int


@dataclass(frozen=True, kw_only=True)
class Halving:
    """Successive halving (Karnin et al. 2013; Jamieson & Talwalkar 2016) over the steps of a sampler.

    The defaults were chosen on the embedded generator, on prompts apart from those of the published figures: early
    previews rank candidates poorly, so five gentle rounds lose less than three that halve, at the same price.

    Attributes:
        at: shares of the steps, in (0, 1) and growing, after which previews are scored.
        keep: share of the candidates that goes on each time, in (0, 1).

    Example:
        >>> plan = Halving(at=(0.25, 0.5), keep=0.5)  # BestOfN(..., pruning=plan)
        >>> [(pruning.step, pruning.survivors) for pruning in plan.rounds(n=16, steps=20)]
        [(5, 8), (10, 4)]
        >>> plan.calls(n=16, steps=20)  # of 320 without pruning
        160
    """

    at: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7)
    keep: float = 0.65

    def __post_init__(self) -> None:
        if not self.at or any(not 0 < share < 1 for share in self.at) or list(self.at) != sorted(set(self.at)):
            raise ValueError(f"at: expected growing shares of the steps within (0, 1), got {self.at!r}")
        if not 0 < self.keep < 1:
            raise ValueError(f"keep: expected a share in (0, 1), got {self.keep!r}; a half is usual")

    def rounds(self, n: int, steps: int, least: int = 1) -> list[Round]:
        """When to prune and down to how many.

        Args:
            n: candidates at the start.
            steps: of the sampler.
            least: candidates that must be left at the end.

        Returns:
            Rounds with growing steps and falling survivors. Shares that come to the same step are one round in which
            as many leave as in all of them, so that a sampler of few steps costs no larger a part of its whole; rounds
            at which nobody would leave are left out.
        """
        found: dict[int, int] = {}
        alive = n
        for share in self.at:
            step = max(1, round(share * steps))
            left = max(least, math.ceil(alive * self.keep))
            if step < steps and left < alive:
                found[step] = alive = left
        return [Round(step=step, survivors=survivors) for step, survivors in found.items()]

    def calls(self, n: int, steps: int, least: int = 1) -> int:
        """Denoiser calls of the whole search, one a candidate and step."""
        calls, alive, before = 0, n, 0
        for pruning in self.rounds(n, steps, least):
            calls += alive * (pruning.step - before)
            alive, before = pruning.survivors, pruning.step
        return calls + alive * (steps - before)


@dataclass(frozen=True, kw_only=True)
class ZeroOrder:
    """Zero-order search among noises (Ma et al. 2025, Inference-Time Scaling for Diffusion Models, section 3).

    The first `neighbors` candidates are independent. Then, again and again, the best noise so far is the pivot p, and
    each of the next `neighbors` candidates starts from sqrt(1 - radius^2) p + radius e with fresh noise e, which is
    Gaussian again.

    Attributes:
        neighbors: candidates a round, at least 1.
        radius: in (0, 1]; 1 is random search.

    Example:
        >>> ZeroOrder(neighbors=4, radius=0.5).radius  # BestOfN(..., search=ZeroOrder(...))
        0.5
    """

    neighbors: int = 4
    radius: float = 0.5

    def __post_init__(self) -> None:
        integer("neighbors", self.neighbors, least=1)
        if not 0 < self.radius <= 1:
            raise ValueError(f"radius: expected a number in (0, 1], got {self.radius!r}; 1 is random search")


# --------------------------------------------------------------------------------------------- checks


def _key(score: float, index: int) -> tuple[bool, float, int]:
    """Sorts best first: NaN last, then higher scores, then smaller indices."""
    missing = math.isnan(score)
    return missing, 0.0 if missing else -score, index
