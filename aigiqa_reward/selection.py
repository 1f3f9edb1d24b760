"""Ranking and running selection. Pure: numbers in, numbers out; knows no pipelines and no pixels."""

from __future__ import annotations

import bisect
import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, SupportsFloat


def rank(scores: Iterable[SupportsFloat]) -> list[int]:
    """Indices of `scores`, best first.

    Higher is better. The order is stable: a tie goes to the earlier one, and NaN comes last.

    Args:
        scores: (N,) numbers: a list, an array or a tensor.
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


def integer(argument: str, value: Any, *, least: int | None = None) -> int:
    """Return `value` as an int.

    Args:
        argument: the name to use in errors.
        value: anything that Python counts with, but True and False.
        least: smallest accepted value, if there is one.

    Raises:
        TypeError: if it is not an integer.
        ValueError: if it is below `least`.
    """
    expected = "an integer" if least is None else f"an integer of at least {least}"
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(
            f"{argument}: expected {expected}, got {value!r} ({type(value).__name__}); "
            f"pass a whole number, for example {argument}={max(1, least or 1)}"
        )
    number = operator.index(value)
    if least is not None and number < least:
        raise ValueError(f"{argument}: expected {expected}, got {number}; pass {argument}={least} or more")
    return number


def _key(score: float, index: int) -> tuple[bool, float, int]:
    """Sorts best first: NaN last, then higher scores, then smaller indices."""
    missing = math.isnan(score)
    return missing, 0.0 if missing else -score, index
