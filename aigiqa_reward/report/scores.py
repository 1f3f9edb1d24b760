"""Pictures of the scores of a data set: histograms, and the best and worst images."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from aigiqa_reward.report._style import COLORS, GRID, INK, number, plot, save_plot
from aigiqa_reward.report.sheet import Card, draw_grid

_SIDE, _COLUMNS = 192, 8  # px of an image's longer side; images per row


def histograms(scores: Mapping[str, np.ndarray], path: str | os.PathLike[str]) -> Path:
    """Draw the distributions of scores as a PNG 1280 px wide, one panel per score, with the median as a line.

    Args:
        scores: (N,) numbers by name; NaN and infinite ones are left out.
        path: PNG to write.

    Example:
        >>> import numpy as np
        >>> from aigiqa_reward.report.scores import histograms
        >>> histograms({"total": np.linspace(0, 1, 50)}, "scores.png").name
        'scores.png'
    """
    known = {name: values[np.isfinite(values)] for name, values in scores.items()}
    known = {name: values for name, values in known.items() if len(values)}
    if not known:
        raise ValueError("scores: expected at least one finite number, got none")
    figure, grid = plot(0.6 + 1.9 * len(known), [1.0] * len(known), gap=0.12)
    for [axes], (name, values), color in zip(grid, known.items(), COLORS * len(known), strict=False):
        axes.hist(values, bins=min(100, max(10, round(len(values) ** 0.5))), color=color, alpha=0.75)
        axes.axvline(float(np.median(values)), color=INK, linewidth=1.5)
        text = f"{name}: median {number(float(np.median(values)))}, std {number(float(values.std()))}"
        axes.set_title(f"{text}, {len(values):,} images", loc="left", fontsize=10, fontweight="bold", color=INK)
        axes.set_ylabel("images", fontsize=9, color=INK)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
    return save_plot(figure, path)


def extremes_sheet(best: Sequence[Card], worst: Sequence[Card], *, title: str, facts: Sequence[str]) -> Image.Image:
    """Draw the best images, best first, above the worst, worst first, as an RGB picture.

    Example:
        >>> from PIL import Image
        >>> from aigiqa_reward.report.scores import extremes_sheet
        >>> from aigiqa_reward.report.sheet import Card
        >>> card = Card(image=Image.new("RGB", (64, 64), "red"), rows=[("path", "red.png")], heading="0.500")
        >>> extremes_sheet([card], [card], title="Scores", facts=["1 image"]).mode
        'RGB'
    """
    columns = min(_COLUMNS, max(len(best), len(worst)))
    gap = [Card(image=None, rows=[], note=" ")] * (-len(best) % columns)
    return draw_grid([*best, *gap, *worst], columns, title=title, facts=facts, side=_SIDE)
