"""Pictures of a training: its curves, and grids of validation images."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

from aigiqa_reward.report._style import (
    COLORS,
    GRID,
    INK,
    MUTED,
    PADDING,
    PAPER,
    WINNER,
    draw_card,
    draw_row,
    fitted,
    font,
    number,
    plot,
    printable,
    save_plot,
    wrapped,
)
from aigiqa_reward.utils.io import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ROW = 1.25  # inches, height of a panel

_PANELS: tuple[tuple[str, str, str | None, str | None], ...] = (
    ("reward", COLORS[0], "reward", "reward"),
    ("held-out reward", COLORS[1], "holdout", None),
    ("diversity", COLORS[2], "diversity", None),
    ("saturation", COLORS[2], "saturation", None),
    ("KL", MUTED, None, "kl"),
)
"""Title, color, name in a validation's summary, name in the line of a step."""

_LEAST_TOP = {"diversity": 0.01, "saturation": 0.02, "KL": 1e-6}
"""Panels that begin at 0, and the least top of their axis, so that noise does not look like a trend."""

Line = Mapping[str, Any]
Points = list[tuple[float, float, float]]
"""Step, seconds and value of each point."""


def draw_curves(history: Sequence[Line], kept_step: int | None, path: Path) -> Path:
    """Draw reward, held-out reward, diversity, saturation and KL over steps and wall time.

    Points and strong lines are validations; the thin line is training batches, each point a mean over the last
    twentieth of the training. Panels without values are left out.

    Args:
        history: lines of `history.jsonl`: `{"step", "seconds", "reward", "kl", ...}` per step, and
            `{"step", "seconds", "validation": {"reward", "holdout", ...}}`.
        kept_step: step whose weights were kept, marked by a line; None marks none.
        path: PNG to write.
    """
    panels = [panel for panel in _PANELS if _validated(history, panel[2]) or _trained(history, panel[3])]
    if not panels:
        names = ", ".join(panel[0] for panel in _PANELS)
        raise ValueError(f"history: expected lines of steps or validations, got {len(history)} without any of {names}")
    figure, grid = plot(_ROW * len(panels) + 0.6, [1.0] * len(panels), columns=2, gap=0.04)
    unit, scale = _unit(max(line["seconds"] for line in history))
    kept = _place_of(history, kept_step)
    for (title, color, of_validation, of_step), pair in zip(panels, grid, strict=True):
        validated, trained = _validated(history, of_validation), _trained(history, of_step)
        for side, axes in enumerate(pair):
            _panel(axes, _along(trained, side, scale), _along(validated, side, scale), color)
            if kept is not None:
                axes.axvline(kept[side] / (scale if side else 1), color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
        if title in _LEAST_TOP:
            top = 1.15 * max(_LEAST_TOP[title], pair[0].dataLim.y1)
            pair[0].set_ylim(-0.05 * top, top)  # below 0, so that dots at 0 are whole
        pair[0].set_title(title, loc="left", fontsize=9, fontweight="bold", color=INK, pad=4)
    for axes, label in zip(grid[-1], ("step", f"wall time in {unit}"), strict=True):
        axes.set_xlabel(label, fontsize=9, color=INK)
    locator: Any = grid[-1][0].xaxis.get_major_locator()
    locator.set_params(integer=True)
    words = ["dots: validation"] if any("validation" in line for line in history) else []
    words += ["thin: training batches"] if any("validation" not in line for line in history) else []
    words += [f"dashed: step {kept_step}, whose weights were kept"] if kept is not None else []
    figure.suptitle("  ·  ".join(words), fontsize=8.5, color=MUTED, x=0.02, ha="left")
    return save_plot(figure, path)


def _panel(axes: Axes, thin: list[tuple[float, float]], strong: list[tuple[float, float]], color: str) -> None:
    axes.grid(color=GRID, linewidth=0.8)
    axes.tick_params(labelsize=8)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.locator_params(axis="y", nbins=4)
    axes.margins(y=0.12)
    if thin:
        lone = {"marker": "o", "markersize": 2} if len(thin) == 1 else {}
        axes.plot(*zip(*thin, strict=True), color=color, linewidth=1, alpha=0.45 if strong else 1, **lone)
    if strong:
        axes.plot(*zip(*strong, strict=True), color=color, linewidth=1.8, marker="o", markersize=4)


def _validated(history: Sequence[Line], name: str | None) -> Points:
    return [
        (line["step"], line["seconds"], line["validation"][name])
        for line in history
        if "validation" in line and _finite(line["validation"].get(name))
    ]


def _trained(history: Sequence[Line], name: str | None) -> Points:
    """Return the values of steps, each the mean over the last twentieth of the training."""
    points = [
        (line["step"], line["seconds"], line[name])
        for line in history
        if name is not None and "validation" not in line and _finite(line.get(name))
    ]
    window = max(1, len(points) // 20)
    smooth = []
    for place, (step, seconds, _) in enumerate(points):
        recent = [value for *_, value in points[max(0, place + 1 - window) : place + 1]]
        smooth.append((step, seconds, sum(recent) / len(recent)))
    return smooth


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _along(points: Points, side: int, scale: float) -> list[tuple[float, float]]:
    return [(seconds / scale if side else step, value) for step, seconds, value in points]


def _place_of(history: Sequence[Line], step: int | None) -> tuple[float, float] | None:
    """Return step and seconds of the kept step, of its validation if there is one."""
    lines = sorted((line for line in history if line["step"] == step), key=lambda line: "validation" not in line)
    return (lines[0]["step"], lines[0]["seconds"]) if lines else None


def _unit(seconds: float) -> tuple[str, float]:
    """Return a unit in which a time has few digits, and its seconds."""
    if seconds < 300:
        return "seconds", 1.0
    return ("minutes", 60.0) if seconds < 3 * 3600 else ("hours", 3600.0)


# --------------------------------------------------------------------------------------------- grids

_MARGIN, _GAP, _LINE = 32, 14, 19  # px around all, between cards, from one line of text to the next
_TITLE, _TEXT, _SMALL = 20, 15, 13  # font sizes in px
_PROMPT, _PROMPT_LINES = 230, 8  # px for the prompts at the left


def draw_grid(
    path: Path,
    *,
    title: str,
    facts: Sequence[str],
    prompts: Sequence[str],
    headings: Sequence[str],
    tiles: Sequence[Sequence[np.ndarray]],
    scores: Mapping[str, np.ndarray],
    side: int,
    framed: int | None = None,
) -> Path:
    """Draw images in rows of prompts, with their scores below; images without any finite score are marked.

    Args:
        path: PNG to write.
        title: heading.
        facts: phrases below the title.
        prompts: (R,) texts of the rows.
        headings: (C,) texts of the columns.
        tiles: R x C images (h, w, 3) uint8.
        scores: (R, C) scores by name.
        side: px of an image's longer side, at most.
        framed: column to mark by frames.
    """
    images = [[fitted(Image.fromarray(np.ascontiguousarray(tile)), side) for tile in row] for row in tiles]
    box = max(image.width for row in images for image in row), max(image.height for row in images for image in row)
    width, height = box[0] + 2 * PADDING, box[1] + 2 * PADDING + _LINE * len(scores) + 6
    total = 2 * _MARGIN + _PROMPT + len(headings) * (width + _GAP)
    notes = wrapped("  ·  ".join(facts), font(_SMALL), total - 2 * _MARGIN, 3)
    top = _MARGIN + 30 + _LINE * len(notes) + 34
    sheet = Image.new("RGB", (total, top + len(images) * (height + _GAP) - _GAP + _MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN + 16), title, INK, font(_TITLE, bold=True), anchor="ls")
    for line, text in enumerate(notes):
        draw.text((_MARGIN, _MARGIN + 42 + _LINE * line), text, MUTED, font(_SMALL), anchor="ls")
    for column, heading in enumerate(headings):
        middle = _MARGIN + _PROMPT + _GAP + column * (width + _GAP) + width / 2
        color = WINNER if column == framed else INK
        draw.text((middle, top - 12), heading, color, font(_SMALL, bold=True), anchor="ms")
    for row, prompt in enumerate(prompts):
        upper = top + row * (height + _GAP)
        lines = wrapped(printable(prompt), font(_TEXT), _PROMPT, min(_PROMPT_LINES, (height - PADDING) // (_LINE + 1)))
        for line, text in enumerate(lines):
            draw.text((_MARGIN, upper + PADDING + 14 + (_LINE + 1) * line), text, INK, font(_TEXT), anchor="ls")
        for column, image in enumerate(images[row]):
            left = _MARGIN + _PROMPT + _GAP + column * (width + _GAP)
            card = left, upper, left + width, upper + height
            values = {name: float(of[row, column]) for name, of in scores.items()}
            note = "" if any(map(math.isfinite, values.values())) else "not finite"
            draw_card(sheet, card, image, box[1], note, framed=column == framed)
            for line, (name, value) in enumerate(values.items()):
                draw_row(draw, card, upper + PADDING + box[1] + 20 + _LINE * line, name, number(value), size=_SMALL)
    picture = io.BytesIO()
    sheet.save(picture, "PNG")
    write_atomically(path, picture.getvalue())
    return path
