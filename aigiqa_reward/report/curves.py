"""Curves of a training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aigiqa_reward.report._style import COLORS, GRID, INK, MUTED, plot, save_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ROW = 1.25  # inches, height of a panel
_PANELS = (
    ("reward", COLORS[0], "reward", "reward"),
    ("held-out reward", COLORS[1], "holdout", ""),
    ("diversity", COLORS[2], "diversity", ""),
    ("saturation", COLORS[2], "saturation", ""),
    ("KL", MUTED, "", "kl"),
)
"""Title, color, name in a validation's summary, name in the line of a step."""

_LEAST_TOP = {"diversity": 0.01, "saturation": 0.02, "KL": 1e-6}
"""Panels that begin at 0, and the least top of their axis, so that noise does not look like a trend."""

Line = Mapping[str, Any]


def draw_curves(history: Sequence[Line], kept_step: int | None, path: Path) -> Path:
    """Draw reward, held-out reward, diversity, saturation and KL over steps and wall time, as a PNG.

    Points and strong lines are validations; the thin line is training batches, each point a mean over the last
    twentieth of the training. Panels without values are left out; "reward/NAME" of a step's line adds a panel.

    Args:
        history: lines of `history.jsonl`: `{"step", "seconds", "reward", "kl", ...}` per step, and
            `{"step", "seconds", "validation": {"reward", "holdout", ...}}`.
        kept_step: step whose weights were kept, marked by a line; None marks none.
        path: PNG to write.
    """
    validations = [line["validation"] | line for line in history if "validation" in line]
    steps = [line for line in history if "validation" not in line]
    names = dict.fromkeys(name for line in steps for name in line if name.startswith("reward/"))
    kinds = (_PANELS[0], *((name, COLORS[0], "", name) for name in names), *_PANELS[1:])
    drawn = [(title, color, _points(steps, b), _points(validations, a)) for title, color, a, b in kinds]
    panels = [panel for panel in drawn if len(panel[2]) + len(panel[3])]
    if not panels:
        names = ", ".join(panel[0] for panel in _PANELS)
        raise ValueError(f"history: expected lines of steps or validations, got {len(history)} without any of {names}")
    figure, grid = plot(_ROW * len(panels) + 0.6, [1.0] * len(panels), columns=2, gap=0.04)
    unit, scale = _unit(max(line["seconds"] for line in history))
    kept = next((line for line in validations + steps if line["step"] == kept_step), None)
    for (title, color, batches, validated), pair in zip(panels, grid, strict=True):
        trained = _smoothed(batches)
        for axes, column, divisor in zip(pair, (0, 1), (1, scale), strict=True):
            thin, strong = ((points[:, column] / divisor, points[:, 2]) for points in (trained, validated))
            _panel(axes, thin, strong, color)
            if kept is not None:
                place = kept[("step", "seconds")[column]] / divisor
                axes.axvline(place, color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
        if title in _LEAST_TOP:
            top = 1.15 * max(_LEAST_TOP[title], pair[0].dataLim.y1)
            pair[0].set_ylim(-0.05 * top, top)  # below 0, so that dots at 0 are whole
        else:
            pair[0].set_ylim(*limits(batches, trained, validated))
        pair[0].set_title(title, loc="left", fontsize=9, fontweight="bold", color=INK, pad=4)
    for axes, label in zip(grid[-1], ("step", f"wall time in {unit}"), strict=True):
        axes.set_xlabel(label, fontsize=9, color=INK)
    locator: Any = grid[-1][0].xaxis.get_major_locator()
    locator.set_params(integer=True)
    words = ["dots: validation"] if validations else []
    words += ["thin: training batches"] if steps else []
    words += [f"dashed: step {kept_step}, whose weights were kept"] if kept is not None else []
    figure.suptitle("  ·  ".join(words), fontsize=8.5, color=MUTED, x=0.02, ha="left")
    return save_plot(figure, path)


def _points(lines: Sequence[Line], name: str) -> np.ndarray:
    """Return step, seconds and value (N, 3) of the lines with a finite value."""
    finite = [line for line in lines if isinstance(line.get(name), int | float) and math.isfinite(line[name])]
    return np.array([(line["step"], line["seconds"], line[name]) for line in finite], dtype=float).reshape(-1, 3)


def _smoothed(points: np.ndarray) -> np.ndarray:
    """Replace each value of (N, 3) points by the mean over a last twentieth."""
    window, values = max(1, len(points) // 20), points[:, 2]
    means = [values[max(0, end - window) : end].mean() for end in range(1, len(points) + 1)]
    return np.column_stack([points[:, :2], np.array(means)])


def limits(batches: np.ndarray, *drawn: np.ndarray) -> tuple[float, float]:
    """Return the ends of an axis for drawn points (N, 3), so far apart that noise does not look like a trend.

    The axis spans at least six standard deviations of the noise from one training batch to the next, or one validation
    to the next where there are no batches, and a twentieth of the largest value.
    """
    values = np.concatenate([points[:, 2] for points in drawn])
    noisy = batches if len(batches) > 2 else drawn[-1]
    noise = np.diff(noisy[:, 2]).std() / math.sqrt(2) if len(noisy) > 2 else 0.0
    low, high = values.min(), values.max()
    half = max(1.24 * (high - low), 6 * noise, 0.05 * np.abs(values).max(), 1e-6) / 2
    return float((low + high) / 2 - half), float((low + high) / 2 + half)


def _panel(axes: Axes, thin: tuple[np.ndarray, np.ndarray], strong: tuple[np.ndarray, np.ndarray], color: str) -> None:
    axes.grid(color=GRID, linewidth=0.8)
    axes.tick_params(labelsize=8)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.locator_params(axis="y", nbins=4)
    if len(thin[0]):
        lone = {"marker": "o", "markersize": 2} if len(thin[0]) == 1 else {}
        axes.plot(*thin, color=color, linewidth=1, alpha=0.45 if len(strong[0]) else 1, **lone)
    if len(strong[0]):
        axes.plot(*strong, color=color, linewidth=1.8, marker="o", markersize=4)


def _unit(seconds: float) -> tuple[str, float]:
    """Return a unit in which a time has few digits, and its seconds."""
    if seconds < 300:
        return "seconds", 1.0
    return ("minutes", 60.0) if seconds < 3 * 3600 else ("hours", 3600.0)
