"""Pictures of validations: one, with its numbers, and the same images over the time of a training."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

from aigiqa_reward.finetuning.results import ValidationResult
from aigiqa_reward.report.lettering import font, number, printable, wrapped
from aigiqa_reward.utils.io import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_DPI, _WIDTH, _ROW = 160, 8.0, 1.25  # dots an inch; inches: 1280 px in all, the height of a panel
_INK, _MUTED, _GRID = "#18181b", "#686a73", "#e4e6ea"
_TRAINED, _HELD, _OTHER = "#0072b2", "#d55e00", "#009e73"
"""Three of Okabe and Ito's colors, which the color-blind tell apart (jfly.uni-koeln.de/color)."""

_PANELS: tuple[tuple[str, str, str | None, str | None], ...] = (
    ("reward", _TRAINED, "reward", "reward"),
    ("held-out reward", _HELD, "holdout", None),
    ("diversity", _OTHER, "diversity", None),
    ("saturation", _OTHER, "saturation", None),
    ("KL", _MUTED, None, "kl"),
)
"""Title, color, name in a validation's summary, name in a step's line."""

_LEAST_TOP = {"diversity": 0.01, "saturation": 0.02, "KL": 1e-6}
"""Panels that begin at 0, and the least that they reach to, so that nothing looks like something."""

Line = Mapping[str, Any]
Points = list[tuple[float, float, float]]


def draw_curves(history: Sequence[Line], kept_step: int | None, path: Path) -> Path:
    """Draw reward, held-out reward, diversity, saturation and KL against steps and wall time.

    Points and strong lines are validations; the thin line is the training's batches, each point a mean over the last
    twentieth of the training. What the history does not hold gets no panel.

    Args:
        history: the lines of `history.jsonl`: `{"step", "seconds", "reward", "kl", ...}` of steps, and
            `{"step", "seconds", "validation": {"reward", "holdout", ...}}`.
        kept_step: whose weights were kept, marked by a line; None marks none.
        path: of the PNG, written whole or not at all.

    Returns:
        The path.

    Raises:
        ValueError: nothing to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels = [panel for panel in _PANELS if _validated(history, panel[2]) or _trained(history, panel[3])]
    if not panels:
        names = ", ".join(panel[0] for panel in _PANELS)
        raise ValueError(
            f"history: expected lines of steps or validations, got {len(history)} that tell none of {names}"
        )
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.04)  # inches
    figure = Figure(figsize=(_WIDTH, _ROW * len(panels) + 0.6), dpi=_DPI, layout=layout, facecolor="white")
    every = figure.subplots(len(panels), 2, sharex="col", sharey="row", squeeze=False)
    unit, scale = _unit(max(line["seconds"] for line in history))
    kept = _place_of(history, kept_step)
    for (title, color, of_validation, of_step), pair in zip(panels, every, strict=True):
        validated, trained = _validated(history, of_validation), _trained(history, of_step)
        for side, axes in enumerate(pair):
            _panel(axes, _along(trained, side, scale), _along(validated, side, scale), color)
            if kept is not None:
                axes.axvline(kept[side] / (scale if side else 1), color=_INK, linewidth=1.2, linestyle=(0, (4, 2)))
        if title in _LEAST_TOP:
            top = 1.15 * max(_LEAST_TOP[title], pair[0].dataLim.y1)
            pair[0].set_ylim(-0.05 * top, top)  # below 0, so that dots at 0 are whole
        pair[0].set_title(title, loc="left", fontsize=9, fontweight="bold", color=_INK, pad=4)
    for axes, label in zip(every[-1], ("step", f"wall time in {unit}"), strict=True):
        axes.set_xlabel(label, fontsize=9, color=_INK)
    every[-1][0].xaxis.get_major_locator().set_params(integer=True)
    words = ["dots: validation"] if any("validation" in line for line in history) else []
    words += ["thin: training batches"] if any("validation" not in line for line in history) else []
    if kept is not None:
        words.append(f"dashed: step {kept_step}, whose weights were kept")
    figure.suptitle("  ·  ".join(words), fontsize=8.5, color=_MUTED, x=0.02, ha="left")
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture, metadata={"Software": None})
    write_atomically(path, picture.getvalue())
    return path


def draw_course(folder: Path, history: Sequence[Line], kept_step: int | None) -> list[Path]:
    """Draw a whole training into its folder: `curves.png`, and where there were validations `validation.png`.

    Images come from `validation/`, where `ValidationResult.write` put them; steps whose files are gone are left out.

    Args:
        folder: of the training.
        history: the lines of `history.jsonl`.
        kept_step: whose weights were kept.

    Returns:
        What was drawn.
    """
    drawn = []
    steps = sorted({int(line["step"]) for line in history if "validation" in line})
    results = []
    for place in drawn_of(steps, kept_step):
        with contextlib.suppress(ValueError):
            results.append(ValidationResult.read(folder / "validation", steps[place]))
    if results:
        drawn.append(draw_over_time(results, kept_step, folder / "validation.png"))
    with contextlib.suppress(ValueError):  # of a history that tells nothing to draw
        drawn.append(draw_curves(history, kept_step, folder / "curves.png"))
    return drawn


def _panel(axes: Axes, thin: list[tuple[float, float]], strong: list[tuple[float, float]], color: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_MUTED)
    axes.set_axisbelow(True)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.tick_params(labelsize=8, color=_MUTED, labelcolor=_INK)
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
    """A step's numbers, each the mean over the last twentieth of the training."""
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
    """Step and seconds of the kept step: of its validation where there is one."""
    lines = [line for line in history if line["step"] == step]
    lines.sort(key=lambda line: "validation" not in line)
    return (lines[0]["step"], lines[0]["seconds"]) if lines else None


def _unit(seconds: float) -> tuple[str, float]:
    """The unit that gives numbers of a few digits, and its seconds."""
    if seconds < 300:
        return "seconds", 1.0
    return ("minutes", 60.0) if seconds < 3 * 3600 else ("hours", 3600.0)


_PAPER, _CARD, _TEXT_INK, _TEXT_MUTED, _KEPT = (
    (242, 243, 245),
    (255, 255, 255),
    (24, 24, 27),
    (104, 106, 115),
    (234, 88, 12),
)
_MARGIN, _GAP, _PADDING, _FRAME = 32, 14, 10, 5  # px: around all, between cards, in a card, the kept step's frame
_TITLE, _TEXT, _SMALL = 20, 15, 13  # font sizes in px
_LINE = 19  # px from one line of text to the next
_TILE, _SMALL_TILE = 192, 128
"""Side in px that images are brought to: in one validation, and over time."""

_PROMPT = 230
"""Width in px of the prompts, on the left."""

_PROMPT_LINES = 8
_STEPS = 10
"""Columns of the picture over time: the first, the last, the kept, and others evenly between."""


@dataclass(frozen=True, kw_only=True)
class _Cell:
    """An image and what is said below it."""

    tile: np.ndarray
    finite: bool
    lines: Sequence[tuple[str, str]]
    kept: bool = False


def draw_validation(result: ValidationResult, path: Path) -> Path:
    """Draw one validation: a row a prompt, a column a seed, below each image its reward and held-out reward.

    Args:
        result: to draw.
        path: of the PNG, written whole or not at all.

    Returns:
        The path.
    """
    rows, columns = result.tiles.shape[:2]
    cells = [[_cell(result, row, column) for column in range(columns)] for row in range(rows)]
    headings = [f"seed {column}" for column in range(columns)]
    summary = result.summary()
    told = [("reward", "reward"), ("held-out", "holdout"), ("diversity", "diversity")]
    facts = [f"{words} {number(summary[name])}" for words, name in told if name in summary]
    if "saturation" in summary:
        facts.append(f"saturation {summary['saturation']:.1%}")
    if result.nonfinite:
        facts.append(f"{result.nonfinite} not finite")
    images, prompts = result.reward.size, len(result.prompts)
    facts.append(f"means of {images} images, {prompts} {'prompt' if prompts == 1 else 'prompts'}")
    return _draw(path, f"Step {result.step}", facts, result.prompts[:rows], headings, cells, side=_TILE)


def draw_over_time(results: Sequence[ValidationResult], kept_step: int | None, path: Path) -> Path:
    """Draw the first seed's image of each prompt at every validation, one column a step, the kept one framed.

    Of more than ten steps the first, the last, the kept and others evenly between them are drawn.

    Args:
        results: by ascending step, with the same prompts.
        kept_step: whose weights were kept; None marks none.
        path: of the PNG, written whole or not at all.

    Returns:
        The path.

    Raises:
        ValueError: no results.
    """
    if not results:
        raise ValueError("results: expected at least one validation, got none; without validations nothing is drawn")
    chosen = [results[place] for place in drawn_of([result.step for result in results], kept_step)]
    rows = min(len(result.tiles) for result in chosen)
    cells = [[_cell(r, row, 0, kept=r.step == kept_step) for r in chosen] for row in range(rows)]
    headings = [f"step {r.step}" for r in chosen]
    notes = ["seed 0 of each prompt"]
    if kept_step is not None:
        notes.append(f"framed: step {kept_step}, whose weights were kept")
    return _draw(path, "Validation over time", notes, chosen[0].prompts[:rows], headings, cells, side=_SMALL_TILE)


def drawn_of(steps: Sequence[int], kept: int | None) -> list[int]:
    """Places of the steps, which ascend, that `draw_over_time` draws."""
    if len(steps) <= _STEPS:
        return list(range(len(steps)))
    wanted = set(np.linspace(0, len(steps) - 1, _STEPS).round().astype(int).tolist())
    if kept in steps and (place := steps.index(kept)) not in wanted:
        wanted.remove(min(wanted - {0, len(steps) - 1}, key=lambda other: abs(other - place)))
        wanted.add(place)
    return sorted(wanted)


def _cell(result: ValidationResult, row: int, column: int, *, kept: bool = False) -> _Cell:
    reward, held = float(result.reward[row, column]), float(result.holdout[row, column])
    return _Cell(
        tile=result.tiles[row, column],
        finite=math.isfinite(reward) or math.isfinite(held),
        lines=list(zip(("reward", "held-out"), (number(reward), number(held)), strict=True)),
        kept=kept,
    )


def _draw(
    path: Path,
    title: str,
    facts: Sequence[str],
    prompts: Sequence[str],
    headings: Sequence[str],
    cells: Sequence[Sequence[_Cell]],
    *,
    side: int,
) -> Path:
    images = [[_fitted(cell.tile, side) for cell in row] for row in cells]
    box = max(image.width for row in images for image in row), max(image.height for row in images for image in row)
    width, height = box[0] + 2 * _PADDING, box[1] + 2 * _PADDING + _LINE * len(cells[0][0].lines) + 6
    total = 2 * _MARGIN + _PROMPT + len(headings) * (width + _GAP)
    notes = wrapped("  ·  ".join(facts), font(_SMALL), total - 2 * _MARGIN, 3)
    top = _MARGIN + 30 + _LINE * len(notes) + 34
    sheet = Image.new("RGB", (total, top + len(cells) * (height + _GAP) - _GAP + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN + 16), title, _TEXT_INK, font(_TITLE, bold=True), anchor="ls")
    for line, text in enumerate(notes):
        draw.text((_MARGIN, _MARGIN + 42 + _LINE * line), text, _TEXT_MUTED, font(_SMALL), anchor="ls")
    left = _MARGIN + _PROMPT + _GAP
    for column, heading in enumerate(headings):
        kept = cells[0][column].kept
        place = left + column * (width + _GAP) + width / 2, top - 12
        draw.text(place, heading, _KEPT if kept else _TEXT_INK, font(_SMALL, bold=True), anchor="ms")
    for row, prompt in enumerate(prompts):
        upper = top + row * (height + _GAP)
        lines = wrapped(printable(prompt), font(_TEXT), _PROMPT, min(_PROMPT_LINES, (height - _PADDING) // (_LINE + 1)))
        for line, text in enumerate(lines):
            draw.text((_MARGIN, upper + _PADDING + 14 + (_LINE + 1) * line), text, _TEXT_INK, font(_TEXT), anchor="ls")
        for column, cell in enumerate(cells[row]):
            corner = left + column * (width + _GAP), upper
            _draw_cell(sheet, draw, cell, images[row][column], corner, (width, height), box)
    picture = io.BytesIO()
    sheet.save(picture, "PNG")
    write_atomically(path, picture.getvalue())
    return path


def _draw_cell(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    cell: _Cell,
    image: Image.Image,
    corner: tuple[int, int],
    size: tuple[int, int],
    box: tuple[int, int],
) -> None:
    left, top = corner
    right, bottom = left + size[0], top + size[1]
    if cell.kept:
        draw.rectangle((left - _FRAME, top - _FRAME, right - 1 + _FRAME, bottom - 1 + _FRAME), _KEPT)
    draw.rectangle((left, top, right - 1, bottom - 1), _CARD)
    place = left + (size[0] - image.width) // 2, top + _PADDING + (box[1] - image.height) // 2
    sheet.paste(image, place)
    if not cell.finite:
        middle = left + size[0] / 2, top + _PADDING + box[1] / 2
        draw.text(middle, "not finite", _CARD, font(_SMALL), anchor="mm")
    for line, (name, value) in enumerate(cell.lines):
        baseline = top + _PADDING + box[1] + 20 + _LINE * line
        draw.text((left + _PADDING, baseline), name, _TEXT_MUTED, font(_SMALL), anchor="ls")
        draw.text((right - _PADDING, baseline), value, _TEXT_INK, font(_SMALL, bold=line == 0), anchor="rs")


def _fitted(tile: np.ndarray, side: int) -> Image.Image:
    """The image with its longer side about `side` px: enlarged by a whole factor, in squares, or smoothly below 2."""
    image = Image.fromarray(np.ascontiguousarray(tile))
    scale = side / max(image.size)
    if scale >= 2:
        return image.resize((image.width * int(scale), image.height * int(scale)), Image.Resampling.NEAREST)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)
