"""Agreement between raters."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from itertools import permutations
from typing import Any, Literal

Level = Literal["nominal", "interval"]


def krippendorff_alpha(units: Iterable[Sequence[Hashable]], *, level: Level = "nominal") -> float:
    """Compute Krippendorff's alpha: 1 is perfect agreement, 0 that of chance; nan where nothing can be compared.

    K. Krippendorff, "Computing Krippendorff's Alpha-Reliability", 2011.

    Args:
        units: the values that the raters gave to each unit, in any order; units with fewer than two do not count.
        level: "nominal" for names, "interval" for numbers, whose differences are squared.

    Example:
        >>> from aigiqa_reward.evaluation import krippendorff_alpha
        >>> krippendorff_alpha([["left", "left"], ["right", "right"], ["tie", "tie"]])
        1.0
        >>> krippendorff_alpha([[1, 2], [4, 4], [5, 4]], level="interval") > 0.5
        True
    """
    if level not in ("nominal", "interval"):
        raise ValueError(f"level: expected 'nominal' or 'interval', got {level!r}")

    def difference(first: Any, second: Any) -> float:
        return float((first - second) ** 2 if level == "interval" else first != second)

    compared = [list(values) for values in units if len(values) > 1]
    counts: dict[Any, int] = {}
    for value in (value for values in compared for value in values):
        counts[value] = counts.get(value, 0) + 1
    total = sum(counts.values())
    within = sum(sum(difference(*two) for two in permutations(values, 2)) / (len(values) - 1) for values in compared)
    chance = sum(counts[a] * counts[b] * difference(a, b) for a, b in permutations(counts, 2))
    return 1 - (total - 1) * within / chance if chance else math.nan
