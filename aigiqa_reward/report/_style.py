"""Style of everything that is drawn: palette, fonts, wrapped texts, numbers, matplotlib figures."""

from __future__ import annotations

import bisect
import importlib.util
import io
import math
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import ImageFont

from aigiqa_reward.utils.io import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, LINE, GRID = "#18181b", "#686a73", "#d9dce1", "#e4e6ea"
PAPER, CARD, EMPTY = "#f2f3f5", "#ffffff", "#e8eaed"

WINNER = (234, 88, 12)
"""Color of the frame around the winner and of nothing else in a contact sheet, sRGB."""

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7b3294", "#8c6d31")
"""Six of Okabe and Ito's colors, which the color-blind can distinguish (jfly.uni-koeln.de/color), and two darker."""

DPI, WIDTH = 160, 8.0  # of plots; inches: 1280 px


@cache
def font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Load DejaVu Sans, which comes with matplotlib and has Latin, Greek, Cyrillic, Arabic and more."""
    library = importlib.util.find_spec("matplotlib")  # found, not imported: that looks for a home, and logs without one
    if library is None or library.origin is None:
        raise ImportError("matplotlib is missing, whose font is used here; pip install matplotlib")
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(library.origin).parent / "mpl-data" / "fonts" / "ttf" / name), size)


def printable(text: str) -> str:
    """Put a text in one line, without control characters and lone surrogates."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def wrapped(text: str, typeface: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """Break a text into at most `most` lines of `width` px, between words if possible; a cut text ends with …."""

    def fitting(width: float) -> int:
        """Return how many of the first characters fit; at least one."""
        ends = range(1, len(text) + 1)
        return max(1, bisect.bisect_right(ends, width, key=lambda end: typeface.getlength(text[:end])))

    text, lines = text[:2000], []  # more never fits, and measuring it would take long
    while text and len(lines) < most:
        end = fitting(width)
        if end < len(text) and len(lines) == most - 1:
            return [*lines, text[: fitting(width - typeface.getlength("…"))].rstrip() + "…"]
        if end < len(text) and (space := text.rfind(" ", 1, end + 1)) > 0:
            end = space
        lines.append(text[:end].rstrip())
        text = text[end:].lstrip()
    return lines


def number(value: float | None) -> str:
    """Format a score with few digits; a dash for none."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.3g}"


def plot(
    height: float, heights: Sequence[float], columns: int = 1, *, gap: float = 0.1
) -> tuple[Figure, list[list[Axes]]]:
    """Make a white figure, 1280 px wide and `height` inches high, with rows of panels of relative heights."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=gap)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout=layout, facecolor="white")
    shared = {"sharex": "col", "sharey": "row", "squeeze": False}
    grid = figure.subplots(len(heights), columns, height_ratios=list(heights), **shared)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(MUTED)
        axes.set_axisbelow(True)
        axes.tick_params(color=MUTED, labelcolor=INK)
    return figure, grid.tolist()


def save_plot(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure as a PNG, whatever the user's matplotlib settings are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    target = Path(path)
    if target.suffix != ".png":
        raise ValueError(f"path: expected a name that ends in .png, got {str(target)!r}")
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture, metadata={"Software": None})
    write_atomically(target, picture.getvalue())
    return target
