"""One self-contained HTML page of best-of-N results: no scripts, nothing fetched, all texts escaped."""

from __future__ import annotations

import base64
import html
import io
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features

from aigiqa_reward.report._style import CARD, INK, LINE, MUTED, PAPER, WINNER, number
from aigiqa_reward.report.sheet import candidates, summary
from aigiqa_reward.sampling.candidates import BestOfNOutput

WinnerMaps = Sequence[Mapping[str, Any]]
"""For each winner, best first: (H, W) arrays by name."""

_SIDE = 768
"""Longest side in px of an image in the page: sharp on a phone, about 100 kB each."""

_SMALL = 160
"""Up to this side in px images are shown with each pixel a square, and stored without loss."""

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""For the browser: nothing runs and nothing is fetched."""

_LEGEND = "Maps: from dark at 0 to bright at 1; one with values beyond these, from its lowest to its highest."

_WIDTH, _HEIGHT = 640, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 14, 12, 26  # px around the lines, for labels as large as a phone needs them
_APART = 40  # px between labels below the axis, at least


def escaped(text: str) -> str:
    """Escape a text for use between tags and within quotes; control characters and lone surrogates are replaced."""
    kept = "".join(
        c if c.isprintable() or c == "\n" else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text
    )
    return html.escape(kept, quote=True)


def write_page(
    outputs: Iterable[tuple[str, BestOfNOutput]],
    path: str | os.PathLike[str],
    *,
    title: str = "Best of N",
    notes: Sequence[str] = (),
    maps: Iterable[WinnerMaps] = (),
    remarks: Iterable[str] = (),
) -> Path:
    """Write prompts, their winners and the scores of all candidates as one self-contained HTML file.

    Images, at most 768 px, are in the file. Where a search looked at previews, the reward per step is drawn. The page
    follows the reader's light or dark colors, fits a phone, and has neither scripts nor links.

    Args:
        outputs: prompts and what BestOfN or rerank returned for them; may be a generator, whose outputs are written
            one by one and not kept.
        path: page to write.
        title: heading.
        notes: lines below the heading, such as the settings.
        maps: for each prompt, heat maps (H, W) of its winners, such as the distortion maps of a reward; in [0, 1], or
            else scaled there. May end early.
        remarks: for each prompt, a line below it, such as that it was interrupted; blank for none. May end early.

    Example:
        >>> from PIL import Image
        >>> from aigiqa_reward import create_reward, rerank
        >>> from aigiqa_reward.report import write_page
        >>> pictures = [Image.new("RGB", (64, 64), color) for color in ("red", "blue", "green")]
        >>> result = rerank(pictures, "a <red> square", create_reward("compact"))
        >>> page = write_page([("a <red> square", result)], "index.html").read_text()
        >>> "a &lt;red&gt; square" in page, "<script" in page
        (True, False)
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        written = Path(folder) / target.name
        with written.open("w", encoding="utf-8", newline="\n") as file:
            file.write(_head(title, notes))
            of_prompts, of_winners = iter(remarks), iter(maps)
            for place, (prompt, output) in enumerate(outputs):
                file.write(_card(place, prompt, output, next(of_winners, ()), next(of_prompts, "")))
            file.write("</main>\n</body>\n</html>\n")
            file.flush()
            os.fsync(file.fileno())
        written.replace(target)
    return target


def _head(title: str, notes: Sequence[str]) -> str:
    """Return everything before the first prompt."""
    ink = {"paper": PAPER, "card": CARD, "ink": INK, "muted": MUTED, "line": LINE, "best": f"rgb{WINNER}"}
    style = ":root { " + " ".join(f"--{name}: {color};" for name, color in ink.items()) + " }\n"
    style += Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    lines = "".join(f'<p class="note">{escaped(note)}</p>\n' for note in notes)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escaped(_POLICY)}">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escaped(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f'<header><h1 dir="auto">{escaped(title)}</h1>\n{lines}</header>\n<main>\n'
    )


# --------------------------------------------------------------------------------------------- a prompt


def _card(place: int, prompt: str, output: BestOfNOutput, maps: WinnerMaps, remark: str) -> str:
    figures = "".join(
        _figure(rank, prompt, output, winner or {})
        for rank, winner in zip_longest(range(len(output.seeds)), maps[: len(output.seeds)])
    )
    calls = [] if output.denoiser_calls is None else [f"{output.denoiser_calls} denoiser calls"]
    facts = escaped("  ·  ".join([*summary(output), *calls]))
    graph = (
        f'<figure class="curves">{drawn}<figcaption>Reward of the clean image that is predicted at each step; the '
        "winners in color.</figcaption></figure>\n"
        if (drawn := curves(output))
        else ""
    )
    legend = f'<p class="note">{_LEGEND}</p>\n' if any(maps[: len(output.seeds)]) else ""
    remarked = f'<p class="note"><strong>{escaped(remark)}</strong></p>\n' if remark else ""
    nothing = "" if output.seeds else '<p class="note">No candidate could be ranked.</p>\n'
    return (
        f'<article aria-labelledby="prompt-{place}">\n<h2 id="prompt-{place}" dir="auto">{escaped(prompt)}</h2>\n'
        f'<p class="note">{facts}</p>\n{remarked}{nothing}<div class="winners">\n{figures}</div>\n'
        f"{legend}{graph}<details><summary>All {len(output.all_seeds)} candidates</summary>\n{_table(output)}"
        "</details>\n</article>\n"
    )


def _figure(rank: int, prompt: str, output: BestOfNOutput, maps: Mapping[str, Any]) -> str:
    seed, image = output.seeds[rank], output.images[rank]
    scores = [("total", output.scores[rank]), ("quality", output.quality[rank])]
    if output.correspondence is not None:
        scores.append(("correspondence", output.correspondence[rank]))
    rows = "".join(f"<div><dt>{name}</dt><dd>{number(value)}</dd></div>" for name, value in scores)
    small = ' class="small"' if max(image.size) <= _SMALL else ""
    heat = "".join(_heat_map(name, values) for name, values in maps.items())
    return (
        f'<figure class="winner{" best" if rank == 0 else ""}">\n'
        f'<img{small} src="{_image(image)}" width="{image.width}" height="{image.height}" '
        f'alt="{escaped(f"Winner {rank + 1}, seed {seed}: {prompt}")}">\n'
        f"<figcaption><b>{rank + 1}</b> seed {escaped(str(seed))}\n<dl>{rows}</dl></figcaption>\n"
        + (f'<div class="maps">{heat}</div>\n' if heat else "")
        + "</figure>\n"
    )


def _table(output: BestOfNOutput) -> str:
    aspect = "<th>correspondence</th>" if output.all_correspondence is not None else ""
    rows = []
    for candidate in candidates(output):
        cells = [str(candidate.seed), number(candidate.total), number(candidate.quality)]
        cells += [number(candidate.correspondence)] if aspect else []
        cells.append(candidate.outcome or ("" if candidate.place is None else f"winner {candidate.place + 1}"))
        mark = "" if candidate.place is None else ' class="best"'
        rows.append(f"<tr{mark}>{''.join(f'<td>{escaped(cell)}</td>' for cell in cells)}</tr>\n")
    head = f"<tr><th>seed</th><th>total</th><th>quality</th>{aspect}<th>outcome</th></tr>"
    return f'<div class="scroll"><table>\n<thead>{head}</thead>\n<tbody>\n{"".join(rows)}</tbody></table></div>\n'


# --------------------------------------------------------------------------------------------- rewards per step


def curves(output: BestOfNOutput) -> str:
    """Draw a line per candidate over the steps at which it was scored; empty without previews.

    Lines have the class `curve`; those of winners also `best`, and they come last, on top.
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
    """Return the last step and those before it whose labels do not overlap."""
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


# --------------------------------------------------------------------------------------------- pixels


def _image(image: Image.Image) -> str:
    """Encode an image as a data URI: WebP, or PNG if it is small or Pillow has no WebP."""
    shown, data = image.convert("RGB"), io.BytesIO()
    shown.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    if max(image.size) <= _SMALL or not features.check("webp"):
        shown.save(data, format="PNG", optimize=True)
        return _uri("png", data)
    shown.save(data, format="WEBP", quality=88)
    return _uri("webp", data)


def _heat_map(name: str, values: Any) -> str:
    import matplotlib

    array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, dtype=np.float64)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"maps: expected (H, W) for {name!r}, got shape {array.shape}; pass one map per name")
    finite = array[np.isfinite(array)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    bottom, top = (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)
    scaled = np.nan_to_num((array - bottom) / ((top - bottom) or 1.0), nan=0.0, posinf=1.0, neginf=0.0)
    colors = matplotlib.colormaps["magma"](scaled, bytes=True)[..., :3]
    data = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(colors)).save(data, format="PNG")
    label = escaped(name.replace("_", " "))
    extent = f"{number(low)} to {number(high)}" if math.isfinite(low) else ""
    return (
        f'<figure><img src="{_uri("png", data)}" width="{array.shape[1]}" height="{array.shape[0]}" alt="Map: {label}">'
        f"<figcaption>{label}<br>{extent}</figcaption></figure>"
    )


def _uri(kind: str, data: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
