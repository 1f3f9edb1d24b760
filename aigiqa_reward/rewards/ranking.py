"""Ranking of scores and running selection of the best: numbers in, numbers out."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat

from aigiqa_reward.utils.checks import integer


def rank(scores: Iterable[SupportsFloat]) -> list[int]:
    """Return the indices of scores (N,), best first: ties go to the earlier one, NaN comes last.

    Example:
        >>> from aigiqa_reward.rewards.ranking import rank
        >>> rank([0.2, float("nan"), 0.7, 0.7])
        [2, 3, 0, 1]
    """
    values = [float(score) for score in scores]
    return sorted(range(len(values)), key=lambda index: _key(values[index], index))


@dataclass(frozen=True)
class Ranked:
    """A candidate in a `TopK`: its score, never NaN, its number, and the object pushed with it."""

    score: float
    index: int
    item: Any


class TopK:
    """The best `k` candidates of a stream, in whichever order they are pushed; the smaller number wins a tie."""

    def __init__(self, k: int) -> None:
        self.k = integer("k", k, least=1)
        self._held: list[Ranked] = []

    def __len__(self) -> int:
        """Number of candidates held, at most `k`."""
        return len(self._held)

    def accepts(self, score: SupportsFloat, index: int) -> bool:
        """Return whether `push` would keep this candidate; ask first where its item is expensive."""
        if math.isnan(float(score)) or len(self._held) < self.k:
            return not math.isnan(float(score))
        return _key(float(score), index) < _key(self._held[-1].score, self._held[-1].index)

    def push(self, score: SupportsFloat, index: int, item: Any) -> bool:
        """Add a candidate with a unique number and an item if it is one of the best `k`; return whether it is."""
        if accepted := self.accepts(score, index):
            bisect.insort(self._held, Ranked(float(score), index, item), key=lambda held: _key(held.score, held.index))
            del self._held[self.k :]
        return accepted

    def items(self) -> list[Ranked]:
        """Return the candidates held, best first."""
        return list(self._held)


def spread(distances: Sequence[Sequence[float]], count: int) -> list[int]:
    """Select the places of `count` candidates that are far apart, starting with the best one; ties go to the better.

    Greedy farthest-first traversal (Gonzalez 1985): the smallest distance in the selection is at least half of the
    largest possible. `distances` are (K, K), candidates best first; places are ascending.
    """
    taken = [0]
    while len(taken) < count:
        left = [place for place in range(len(distances)) if place not in taken]
        taken.append(max(left, key=lambda place: (min(distances[place][other] for other in taken), -place)))
    return sorted(taken)


def _key(score: float, index: int) -> tuple[bool, float, int]:
    """Sort key, best first: NaN last, then higher scores, then smaller indices."""
    missing = math.isnan(score)
    return missing, 0.0 if missing else -score, index
