"""Words in pictures: the one font, what of a text can be printed, how much of it fits; and numbers as words."""

from __future__ import annotations

import bisect
import importlib.util
import math
from functools import cache
from pathlib import Path

from PIL import ImageFont


@cache
def font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: Latin, Greek, Cyrillic, Arabic and more."""
    library = importlib.util.find_spec("matplotlib")  # found, not imported: that looks for a home, and logs without one
    if library is None or library.origin is None:
        raise ImportError("matplotlib is missing, whose font is used here; pip install matplotlib")
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(library.origin).parent / "mpl-data" / "fonts" / "ttf" / name), size)


def printable(text: str) -> str:
    """In one line, without control characters and halves of characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def wrapped(text: str, typeface: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """At most `most` lines of `width` px, broken between words where that is possible; an ellipsis for what is cut."""
    text, lines = text[:2000], []  # more never fits, and measuring it would take its time
    while text and len(lines) < most:
        end = _fitting(text, typeface, width)
        if end < len(text) and len(lines) == most - 1:
            return [*lines, text[: _fitting(text, typeface, width - typeface.getlength("…"))].rstrip() + "…"]
        if end < len(text) and (space := text.rfind(" ", 1, end + 1)) > 0:
            end = space
        lines.append(text[:end].rstrip())
        text = text[end:].lstrip()
    return lines


def _fitting(text: str, typeface: ImageFont.FreeTypeFont, width: float) -> int:
    """How many of the first characters are no wider than `width` px; at least one."""
    return max(1, bisect.bisect_right(range(1, len(text) + 1), width, key=lambda end: typeface.getlength(text[:end])))


def number(value: float | None) -> str:
    """A score in few digits; a dash for none."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.3g}"
