"""How results are written down: numbers in tables, and plain values for JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> list[str]:
    """Its lines; the first `words` columns hold words, the others numbers, which are aligned to the right."""
    ruler = ["---"] * words + ["---:"] * (len(header) - words)
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    return ["| " + " | ".join(cells) + " |" for cells in (header, ruler, *escaped)]


def plain(value: Any) -> Any:
    """Dictionaries, lists, names and numbers, with None for nan."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    return value
