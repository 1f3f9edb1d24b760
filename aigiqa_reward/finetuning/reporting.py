"""Pictures of a training, drawn from its results and its folder."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aigiqa_reward.finetuning.results import ValidationResult
from aigiqa_reward.report._style import number
from aigiqa_reward.report.curves import Line, draw_curves
from aigiqa_reward.report.sheet import Card, draw_grid
from aigiqa_reward.utils.io import write_atomically

_TILE, _SMALL_TILE = 192, 128  # px, largest side of an image: in one validation, and over time
_STEPS = 10  # columns of the picture over time


def draw_validation(result: ValidationResult, path: Path) -> Path:
    """Draw one validation as a PNG: a row per prompt, a column per seed, reward and held-out reward below each."""
    rows, columns = result.tiles.shape[:2]
    summary = result.summary()
    names = (("reward", "reward"), ("held-out", "holdout"), ("diversity", "diversity"))
    facts = [f"{words} {number(summary[name])}" for words, name in names if name in summary]
    facts += [f"saturation {summary['saturation']:.1%}"] if "saturation" in summary else []
    facts += [f"{result.nonfinite} not finite"] if result.nonfinite else []
    prompts = len(result.prompts)
    facts.append(f"means of {result.reward.size} images, {prompts} {'prompt' if prompts == 1 else 'prompts'}")
    headings, prompts = [f"seed {column}" for column in range(columns)], result.prompts[:rows]
    cards = [_card(result, row, column) for row in range(rows) for column in range(columns)]
    return _draw(cards, headings, path, title=f"Step {result.step}", facts=facts, prompts=prompts, side=_TILE)


def draw_over_time(results: Sequence[ValidationResult], kept_step: int | None, path: Path) -> Path:
    """Draw the first seed's image of each prompt at every validation, a column per step, the kept one framed.

    Of more than ten steps the first, the last, the kept and others evenly between them are drawn.
    """
    if not results:
        raise ValueError("results: expected at least one validation, got none")
    shown = [results[place] for place in drawn_of([result.step for result in results], kept_step)]
    rows = min(len(result.tiles) for result in shown)
    kept = [] if kept_step is None else [f"framed: step {kept_step}, whose weights were kept"]
    facts, prompts = ["seed 0 of each prompt", *kept], shown[0].prompts[:rows]
    cards = [_card(result, row, 0, framed=result.step == kept_step) for row in range(rows) for result in shown]
    headings = [f"step {result.step}" for result in shown]
    return _draw(cards, headings, path, title="Validation over time", facts=facts, prompts=prompts, side=_SMALL_TILE)


def _card(result: ValidationResult, row: int, column: int, *, framed: bool = False) -> Card:
    scores = {"reward": result.reward[row, column], "held-out": result.holdout[row, column]}
    return Card(
        image=Image.fromarray(np.ascontiguousarray(result.tiles[row, column])),
        rows=[(name, number(value)) for name, value in scores.items()],
        note="" if np.isfinite(list(scores.values())).any() else "not finite",
        framed=framed,
    )


def _draw(cards: Sequence[Card], headings: Sequence[str], path: Path, **more: Any) -> Path:
    picture = io.BytesIO()
    draw_grid(cards, len(headings), headings=headings, **more).save(picture, "PNG")
    write_atomically(path, picture.getvalue())
    return path


def drawn_of(steps: Sequence[int], kept: int | None) -> list[int]:
    """Return the places of the ascending steps that `draw_over_time` draws."""
    wanted = set(np.linspace(0, len(steps) - 1, min(_STEPS, len(steps))).round().astype(int).tolist())
    if kept in steps and (place := steps.index(kept)) not in wanted:
        wanted.remove(min(wanted - {0, len(steps) - 1}, key=lambda other: abs(other - place)))
        wanted.add(place)
    return sorted(wanted)


def draw_course(folder: Path, history: Sequence[Line], kept_step: int | None) -> list[Path]:
    """Draw a whole training into its folder: `curves.png` and, if there were validations, `validation.png`.

    `history` are the lines of `history.jsonl`. Images come from `validation/`; steps whose files are gone are left out.
    """
    drawn = []
    steps = sorted({int(line["step"]) for line in history if "validation" in line})
    results = []
    for place in drawn_of(steps, kept_step):
        with contextlib.suppress(ValueError):
            results.append(ValidationResult.read(folder / "validation", steps[place]))
    if results:
        drawn.append(draw_over_time(results, kept_step, folder / "validation.png"))
    with contextlib.suppress(ValueError):  # of a history without anything to draw
        drawn.append(draw_curves(history, kept_step, folder / "curves.png"))
    return drawn
