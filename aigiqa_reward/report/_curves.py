"""Reward per step of a search's candidates, as SVG within a page."""

from __future__ import annotations

import math

from aigiqa_reward.report._text import number
from aigiqa_reward.sampling.candidates import BestOfNOutput

_WIDTH, _HEIGHT = 640, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 12, 34  # px around the lines, for the labels


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
        label = f"<title>seed {seed}</title>"
        lines.append(f'<g class="curve{mark}">{label}<polyline points="{points}"/>{dots}</g>\n')
    base = _HEIGHT - _BOTTOM
    ticks = "".join(
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(total):.1f}" y2="{y(total):.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{y(total) + 4:.1f}" text-anchor="end">{number(total)}</text>'
        for total in ([low, high] if high > low else [low])
    )
    seen = sorted({step for way in ways.values() for step, _ in way})
    marks = "".join(f'<text x="{x(step):.1f}" y="{base + 16}" text-anchor="middle">{step}</text>' for step in seen)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="Reward per step">\n{ticks}\n{marks}\n'
        f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>\n'
        f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">steps</text>\n{"".join(lines)}</svg>'
    )


def _way(output: BestOfNOutput, seed: int) -> list[tuple[int, float]]:
    previews = output.previews.get(seed, ())
    way = [(preview.step, preview.total) for preview in previews if math.isfinite(preview.total)]
    total = output.all_scores[output.all_seeds.index(seed)]
    if math.isfinite(total) and previews:
        way.append((previews[-1].steps, total))
    return way
