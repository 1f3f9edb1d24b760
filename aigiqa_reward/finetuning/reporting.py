"""Pictures of a training, drawn from its results and its folder."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from aigiqa_reward.finetuning.results import ValidationResult
from aigiqa_reward.report._style import number
from aigiqa_reward.report.curves import Line, draw_curves, draw_grid

_TILE, _SMALL_TILE = 192, 128
"""Largest side of an image in px: in one validation, and over time."""

_STEPS = 10
"""Columns of the picture over time."""


def draw_validation(result: ValidationResult, path: Path) -> Path:
    """Draw one validation: a row per prompt, a column per seed, below each image its reward and held-out reward.

    Args:
        result: validation to draw.
        path: PNG to write.
    """
    rows, columns = result.tiles.shape[:2]
    summary = result.summary()
    names = (("reward", "reward"), ("held-out", "holdout"), ("diversity", "diversity"))
    facts = [f"{words} {number(summary[name])}" for words, name in names if name in summary]
    if "saturation" in summary:
        facts.append(f"saturation {summary['saturation']:.1%}")
    if result.nonfinite:
        facts.append(f"{result.nonfinite} not finite")
    prompts = len(result.prompts)
    facts.append(f"means of {result.reward.size} images, {prompts} {'prompt' if prompts == 1 else 'prompts'}")
    return draw_grid(
        path,
        title=f"Step {result.step}",
        facts=facts,
        prompts=result.prompts[:rows],
        headings=[f"seed {column}" for column in range(columns)],
        tiles=list(map(list, result.tiles)),
        scores={"reward": result.reward, "held-out": result.holdout},
        side=_TILE,
    )


def draw_over_time(results: Sequence[ValidationResult], kept_step: int | None, path: Path) -> Path:
    """Draw the first seed's image of each prompt at every validation, a column per step, the kept one framed.

    Of more than ten steps the first, the last, the kept and others evenly between them are drawn.

    Args:
        results: validations by ascending step, with the same prompts.
        kept_step: step whose weights were kept; None marks none.
        path: PNG to write.
    """
    if not results:
        raise ValueError("results: expected at least one validation, got none")
    shown = [results[place] for place in drawn_of([result.step for result in results], kept_step)]
    steps = [result.step for result in shown]
    rows = min(len(result.tiles) for result in shown)
    kept = [] if kept_step is None else [f"framed: step {kept_step}, whose weights were kept"]
    return draw_grid(
        path,
        title="Validation over time",
        facts=["seed 0 of each prompt", *kept],
        prompts=shown[0].prompts[:rows],
        headings=[f"step {step}" for step in steps],
        tiles=[[result.tiles[row, 0] for result in shown] for row in range(rows)],
        scores={
            "reward": np.stack([result.reward[:rows, 0] for result in shown], axis=1),
            "held-out": np.stack([result.holdout[:rows, 0] for result in shown], axis=1),
        },
        side=_SMALL_TILE,
        framed=steps.index(kept_step) if kept_step in steps else None,
    )


def drawn_of(steps: Sequence[int], kept: int | None) -> list[int]:
    """Return the places of the ascending steps that `draw_over_time` draws."""
    if len(steps) <= _STEPS:
        return list(range(len(steps)))
    wanted = set(np.linspace(0, len(steps) - 1, _STEPS).round().astype(int).tolist())
    if kept in steps and (place := steps.index(kept)) not in wanted:
        wanted.remove(min(wanted - {0, len(steps) - 1}, key=lambda other: abs(other - place)))
        wanted.add(place)
    return sorted(wanted)


def draw_course(folder: Path, history: Sequence[Line], kept_step: int | None) -> list[Path]:
    """Draw a whole training into its folder: `curves.png` and, if there were validations, `validation.png`.

    Images come from `validation/`, where `ValidationResult.write` put them; steps whose files are gone are left out.

    Args:
        folder: folder of the training.
        history: lines of `history.jsonl`.
        kept_step: step whose weights were kept.

    Returns:
        The pictures that were drawn.
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
