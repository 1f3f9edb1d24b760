"""Reward per step of a search's candidates, as SVG within a page."""

from __future__ import annotations

import math
from collections.abc import Callable

from aigiqa_reward.images.lettering import number
from aigiqa_reward.report._text import escaped
from aigiqa_reward.sampling.candidates import BestOfNOutput

_WIDTH, _HEIGHT = 640, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 14, 12, 26  # px around the lines, for labels as large as a phone needs them
_APART = 40  # px between labels below the axis, at least


def curves(output: BestOfNOutput) -> str:
    """One line a candidate, over the steps at which the reward saw it and its end; empty without previews.

    Candidates' lines have the class `curve`, winners' also `best` and come last, so on top.
    """
    ways = {seed: way for seed in output.all_seeds if (way := _way(output, seed))}
    values = [total for way in ways.values() for _, total in way]
    if not any(output.previews.values()) or not values:
        return ""
    steps = max(step for way in ways.values() for step, _ in way)
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.5 * abs(high) or 0.5
    bottom, top = low - margin, high + margin

    def x(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / steps

    def y(total: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (total - bottom) / (top - bottom)

    lines = []
    for seed in sorted(ways, key=lambda seed: seed in output.seeds):
        points = " ".join(f"{x(step):.1f},{y(total):.1f}" for step, total in ways[seed])
        dots = "".join(f'<circle cx="{x(step):.1f}" cy="{y(total):.1f}" r="2.2"/>' for step, total in ways[seed])
        mark = " best" if seed in output.seeds else ""
        label = f"<title>seed {escaped(str(seed))}</title>"
        lines.append(f'<g class="curve{mark}">{label}<polyline points="{points}"/>{dots}</g>\n')
    base = _HEIGHT - _BOTTOM
    ticks = "".join(
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(total):.1f}" y2="{y(total):.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{y(total) + 4:.1f}" text-anchor="end">{number(total)}</text>'
        for total in ([low, high] if high > low else [low])
    )
    marks = "".join(
        f'<text x="{x(step):.1f}" y="{base + 18}" text-anchor="middle">{step}</text>'
        for step in _spread({step for way in ways.values() for step, _ in way}, x)
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="Reward per step">\n{ticks}\n{marks}\n'
        f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>\n'
        f'<text x="{_LEFT - 6}" y="{base + 18}" text-anchor="end">steps</text>\n{"".join(lines)}</svg>'
    )


def _spread(steps: set[int], x: Callable[[float], float]) -> list[int]:
    """The last step and those before it whose labels do not run into one another."""
    shown: list[int] = []
    for step in sorted(steps, reverse=True):
        if not shown or x(shown[-1]) - x(step) >= _APART:
            shown.append(step)
    return shown


def _way(output: BestOfNOutput, seed: int) -> list[tuple[int, float]]:
    previews = output.previews.get(seed, ())
    way = [(preview.step, preview.total) for preview in previews if math.isfinite(preview.total)]
    total = output.all_scores[output.all_seeds.index(seed)]
    if math.isfinite(total) and previews:
        way.append((previews[-1].steps, total))
    return way
