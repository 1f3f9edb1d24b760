"""Plots of predictions against human scores, and of repeated splits."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from aigiqa_reward.evaluation import ProtocolReport, SummaryRow, correlations, fit_logistic4
from aigiqa_reward.report._style import COLORS, DPI, GRID, INK, MUTED, font, plot, printable, save_plot, wrapped

_TITLE, _TEXT, _SMALL = 13, 10, 8.5  # font sizes in points
_MARKERS = ("o", "^", "s")
_NAMED = len(COLORS) * len(_MARKERS)  # generators with a distinct look; of more, the rarest are drawn alike
_ROW = 0.46  # inches, the height of one predictor


def scatter_plot(
    predicted: Sequence[float] | np.ndarray,
    target: Sequence[float] | np.ndarray,
    path: str | os.PathLike[str],
    *,
    title: str,
    x_label: str,
    y_label: str,
    generators: Sequence[str] | np.ndarray | None = None,
) -> Path:
    """Draw predictions against human scores as a PNG of 1280 x 960 px: points, fitted logistic, SRCC and PLCC.

    Args:
        predicted: (N,) finite predictions, N >= 5; the horizontal axis.
        target: (N,) finite human scores; the vertical axis.
        path: PNG to write.
        title: title, cut after two lines.
        x_label: name and unit of the predictions.
        y_label: name and unit of the human scores.
        generators: (N,) group of each point, shown by color and marker and listed from the highest mean score to the
            lowest; the rarest beyond 24 share one look. None draws all points alike.

    Example:
        >>> import numpy as np
        >>> from aigiqa_reward.report import scatter_plot
        >>> human = np.linspace(1, 5, 20)
        >>> labels = {"title": "held-out prompts", "x_label": "predicted quality", "y_label": "human score"}
        >>> scatter_plot(human / 5, human, "scatter.png", **labels).stat().st_size > 10_000
        True
    """
    agreement, curve = correlations(predicted, target), fit_logistic4(predicted, target)
    x, y = np.asarray(predicted, dtype=np.float64), np.asarray(target, dtype=np.float64)
    if generators is not None and np.shape(generators) != x.shape:
        raise ValueError(f"generators: expected {len(x)} names, one per point, got shape {np.shape(generators)}")
    figure, [[axes]] = plot(6.0, [1.0])
    axes.tick_params(labelsize=_TEXT)
    _heading(figure, title)
    handles = _points(axes, x, y, generators)
    axes.set_xlim(*_limits(x))
    axes.set_ylim(*_limits(y))
    along = np.linspace(*_limits(x), 800)
    axes.plot(along, curve(along), color=INK, linewidth=2, zorder=3)
    _plain(axes.xaxis.label, _fitted(x_label, _TEXT, 800), _TEXT, INK)
    _plain(axes.yaxis.label, _fitted(y_label, _TEXT, 750), _TEXT, INK)
    axes.grid(color=GRID, linewidth=0.8)
    if handles:
        legend = figure.legend(list(handles.values()), ["x"] * len(handles), loc="outside right center", frameon=False)
        for text, name in zip(legend.get_texts(), handles, strict=True):
            _plain(text, _fitted(name, _SMALL, 280), _SMALL, INK)
    srcc, plcc, fitted = (
        "–" if np.isnan(value) else f"{value:.3f}".replace("-", "−")
        for value in (agreement.srcc, agreement.plcc, agreement.plcc_fitted)
    )
    words = f"SRCC {srcc}\nPLCC {plcc}, fitted {fitted} (line)\n{len(x):,} images"
    _corner(figure, axes, np.append(x, along), np.append(y, curve(along)), words)
    return save_plot(figure, path)


def protocol_plot(report: ProtocolReport, path: str | os.PathLike[str]) -> Path:
    """Draw the SRCC of every predictor as a PNG 1280 px wide: a point per seed, a bar at the mean, a panel per task.

    A seed has the same height in every row, so that predictors can be compared seed by seed; the first is on top.

    Args:
        report: report with at least one entry.
        path: PNG to write.

    Example:
        >>> from aigiqa_reward.evaluation import ProtocolReport, score_split
        >>> from aigiqa_reward.report import protocol_plot
        >>> human, prompts, generators = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], list("ppqqrr"), ["sd1.5"] * 6
        >>> rows = {"task": "quality", "target": human, "prompts": prompts, "generators": generators}
        >>> scores = [score_split(seed, "model", predicted=human, **rows) for seed in (0, 1)]
        >>> report = ProtocolReport(title="mine", protocol="2 seeds").with_scores(scores)
        >>> protocol_plot(report, "protocol.png").name
        'protocol.png'
    """
    rows = report.summary()
    if not rows:
        raise ValueError("report: expected the scores of one seed at least, got none; add them with with_scores")
    tasks = list(dict.fromkeys(row.task for row in rows))
    panels = [[row for row in rows if row.task == task] for task in tasks]
    seeds = sorted({entry.seed for entry in report.scores})
    values = {entry.key: entry.srcc for entry in report.scores}
    heights = [_ROW * len(panel) + 0.3 for panel in panels]
    figure, grid = plot(sum(heights) + 0.55 * len(panels) + 1.1, heights)
    _heading(figure, report.title)
    for [axes], task, panel in zip(grid, tasks, panels, strict=True):
        for place, row in enumerate(panel):
            _row(axes, place, row, [values.get((seed, row.predictor, task), np.nan) for seed in seeds])
        axes.set_ylim(len(panel) - 0.4, -0.6)
        axes.set_yticks(range(len(panel)), [_fitted(row.predictor, _TEXT, 330, most=2) for row in panel])
        for label in axes.get_yticklabels():
            label.set_parse_math(False)
        axes.set_title(task.capitalize(), loc="left", fontsize=_TEXT, fontweight="bold", color=INK)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        axes.tick_params(labelsize=_TEXT)
        axes.tick_params(axis="y", length=0)
    known = np.array([value for value in values.values() if not np.isnan(value)])
    grid[0][0].set_xlim(*_limits(known) if len(known) else (-1, 1))  # all panels share it
    grid[-1][0].set_xlabel("SRCC on the test part", fontsize=_TEXT, color=INK)
    note = f"Points: seeds. Bar and numbers: mean ± standard deviation over seeds. Protocol: {report.protocol}"
    _plain(figure.supxlabel("x"), _fitted(note, _SMALL, 1200, most=3), _SMALL, MUTED)
    return save_plot(figure, path)


def line_plot(x: Sequence[float], y: Sequence[float], x_label: str, y_label: str) -> Figure:
    """Return a figure of one line through points.

    Example:
        >>> from aigiqa_reward.report import line_plot
        >>> len(line_plot([0, 1, 2], [0.1, 0.4, 0.5], "step", "reward").axes)
        1
    """
    figure, [[axes]] = plot(3.0, [1.0])
    axes.plot(x, y, color=COLORS[0], linewidth=1.8, marker="o", markersize=4)
    axes.grid(color=GRID, linewidth=0.8)
    _plain(axes.xaxis.label, printable(x_label), _TEXT, INK)
    _plain(axes.yaxis.label, printable(y_label), _TEXT, INK)
    return figure


def _fitted(text: str, size: float, width: int, *, most: int = 1, bold: bool = False) -> str:
    """Break a text into at most `most` lines of `width` px, for a font size in points."""
    return "\n".join(wrapped(printable(text), font(round(size * DPI / 72), bold=bold), width, most))


def _plain(text: Text, content: str, size: float, color: str) -> None:
    text.set(text=content, parse_math=False, fontsize=size, color=color)


def _heading(figure: Figure, title: str) -> None:
    _plain(figure.suptitle("x", fontweight="bold"), _fitted(title, _TITLE, 1200, most=2, bold=True), _TITLE, INK)


def _limits(values: np.ndarray) -> tuple[float, float]:
    """Return the range of values with a margin."""
    low, high = float(values.min()), float(values.max())
    margin = 0.04 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def _points(
    axes: Axes, x: np.ndarray, y: np.ndarray, generators: Sequence[str] | np.ndarray | None
) -> dict[str, Line2D]:
    """Draw the points, and return the legend's marker of each group."""
    size = float(np.clip(600 / len(x) ** 0.5, 10, 40))
    if generators is None:
        axes.scatter(x, y, s=size, color=COLORS[0], alpha=0.5, linewidths=0, zorder=2)
        return {}
    names, codes, counts = np.unique(np.asarray(generators, dtype=str), return_inverse=True, return_counts=True)
    named = np.argsort(-counts, kind="stable")[: _NAMED if len(names) > _NAMED else None]
    means = np.bincount(codes, weights=y) / counts
    handles = {}
    looks = [(COLORS[i % len(COLORS)], _MARKERS[i // len(COLORS)]) for i in range(_NAMED)]
    groups = [(str(names[group]), codes == group) for group in named[np.argsort(-means[named], kind="stable")]]
    if len(named) < len(names):
        groups.append((f"{len(names) - len(named)} others", ~np.isin(codes, named)))
        looks = [*looks, (MUTED, "x")]
    for (name, mask), (color, marker) in zip(groups, looks, strict=False):
        stroke = 1.0 if marker == "x" else 0.0
        axes.scatter(x[mask], y[mask], s=size, c=color, marker=marker, alpha=0.6, linewidths=stroke, zorder=2)
        handles[name] = Line2D([], [], color=color, marker=marker, linestyle="", markersize=6)
    return handles


def _corner(figure: Figure, axes: Axes, x: np.ndarray, y: np.ndarray, content: str) -> None:
    """Write in a corner without points (x, y), or above them all if there is none; to be called last."""
    frame = {"facecolor": "white", "edgecolor": GRID, "alpha": 0.9, "boxstyle": "round,pad=0.5"}
    text = axes.text(0.02, 0.97, content, transform=axes.transAxes, va="top", linespacing=1.4, zorder=4, bbox=frame)
    text.set(parse_math=False, fontsize=_TEXT, color=INK)
    figure.draw_without_rendering()  # gives the panel and the text their sizes
    panel, box = axes.get_window_extent(), text.get_window_extent()
    width, height = (box.x1 - panel.x0 + 24) / panel.width, (panel.y1 - box.y0 + 24) / panel.height  # with its frame
    (low_x, high_x), (low_y, high_y) = axes.get_xlim(), axes.get_ylim()
    across, up = (x - low_x) / (high_x - low_x), (y - low_y) / (high_y - low_y)
    for right, top in ((0, 1), (1, 0), (0, 0), (1, 1)):
        if not np.any((np.abs(across - right) < width) & (np.abs(up - top) < height)):
            text.set(position=(0.98 if right else 0.02, 0.97 if top else 0.03))
            text.set(ha="right" if right else "left", va="top" if top else "bottom")
            return
    axes.set_ylim(low_y, low_y + (high_y - low_y) / (1 - height))


def _row(axes: Axes, place: int, row: SummaryRow, values: Sequence[float]) -> None:
    """Draw one predictor: its seeds, the mean, and the numbers beside the panel."""
    heights = place + (np.linspace(-0.22, 0.22, len(values)) if len(values) > 1 else np.zeros(1))
    axes.axhline(place, color=GRID, linewidth=0.8, zorder=1)
    axes.scatter(values, heights, s=22, color=COLORS[0], alpha=0.75, linewidths=0, zorder=3)
    if row.srcc.count:
        axes.plot([row.srcc.mean] * 2, [place - 0.32, place + 0.32], color=INK, linewidth=2.4, zorder=2)
    partly = f" ({row.srcc.count} of {len(values)})" if row.srcc.count < len(values) else ""
    figures = f"{row.srcc}{partly}" if row.srcc.count else "undefined"
    look = {"va": "center_baseline", "fontsize": _TEXT, "color": INK if row.srcc.count else MUTED}
    axes.text(1.02, place, figures, transform=axes.get_yaxis_transform(), **look)
