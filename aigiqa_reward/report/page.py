"""One self-contained HTML page of best-of-N results: no scripts, nothing fetched, all texts escaped."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from PIL import Image, features

from aigiqa_reward.report._style import CARD, INK, LINE, MUTED, PAPER, WINNER, number
from aigiqa_reward.report.sheet import candidates, number_word, summary
from aigiqa_reward.sampling.candidates import BestOfNOutput
from aigiqa_reward.utils.io import replacement

WinnerMaps = Sequence[Mapping[str, Any]]
"""For each winner, best first: (H, W) arrays by name."""

_SIDE = 768  # px, longest side of an image in the page: sharp on a phone, about 100 kB each
_SMALL = 160  # px, up to this side images are shown with each pixel a square, and stored without loss
_PALETTE = {"paper": PAPER, "card": CARD, "ink": INK, "muted": MUTED, "line": LINE, "best": f"rgb{WINNER}"}

_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 626, 12, 214  # px of the curves' axes in a drawing of 640 x 240 px
_APART = 40  # px between labels below the axis, at least


def write_page(
    outputs: Iterable[tuple[str, BestOfNOutput]],
    path: str | os.PathLike[str],
    *,
    title: str = "Best of N",
    notes: Sequence[str] = (),
    maps: Iterable[WinnerMaps] = (),
    remarks: Iterable[str] = (),
    names: Mapping[int, str] = MappingProxyType({}),
) -> Path:
    """Write prompts, their winners and the scores of all candidates as one self-contained HTML file.

    Images, at most 768 px, are in the file. Where a search looked at previews, the reward per step is drawn. The page
    has neither scripts nor links.

    Args:
        outputs: prompts and what BestOfN or rerank returned for them; may be a generator, whose outputs are written
            one by one and not kept.
        path: page to write.
        title: heading.
        notes: lines below the heading, such as the settings.
        maps: for each prompt, heat maps (H, W) of its winners, such as the distortion maps of a reward; in [0, 1], or
            else scaled there; and under "words" pairs of a word and how far the image supports it, in [0, 1]. May end
            early.
        remarks: for each prompt, a line below it, such as that it was interrupted; blank for none. May end early.
        names: what to show in place of a candidate's number, such as its file.

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
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, finalize=_cleaned, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = number
    page = environment.get_template("page.html")
    with replacement(path) as file:
        cards = _cards(outputs, iter(maps), iter(remarks), names)
        for part in page.generate(title=title, notes=notes, palette=_PALETTE, cards=cards):
            file.write(part.encode())
    return Path(path)


def _cleaned(value: object) -> object:
    """Replace control characters and lone surrogates in a text that goes into the page."""
    if hasattr(value, "__html__"):  # marked as safe
        return value
    return "".join(
        c if c.isprintable() or c == "\n" else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in str(value)
    )


def _cards(
    outputs: Iterable[tuple[str, BestOfNOutput]],
    maps: Iterator[WinnerMaps],
    remarks: Iterator[str],
    names: Mapping[int, str],
) -> Iterator[dict[str, Any]]:
    for place, (prompt, output) in enumerate(outputs):
        word = "image" if names else "candidate"
        heat = next(maps, ())[: len(output.winners)]
        calls = [] if output.denoiser_calls is None else [f"{output.denoiser_calls} denoiser calls"]
        yield {
            "place": place,
            "prompt": prompt,
            "number": "image" if names else number_word(output),
            "word": f"{word}s",
            "placed": "place" if names else "winner",
            "names": names,
            "facts": "  ·  ".join([*summary(output, word), *calls]),
            "remark": next(remarks, ""),
            "winners": [_winner(output, i, f or {}, names) for i, f in zip_longest(range(len(output.winners)), heat)],
            "curves": _curves(output),
            "aspects": [name for name in ("quality", "correspondence") if getattr(output, f"all_{name}") is not None],
            "candidates": list(candidates(output)),
        }


def _winner(output: BestOfNOutput, place: int, maps: Mapping[str, Any], names: Mapping[int, str]) -> dict[str, Any]:
    image, number = output.images[place], output.winners[place]
    columns = {"total": output.scores, "quality": output.quality, "correspondence": output.correspondence}
    return {
        "rank": place + 1,
        "name": names.get(number, f"{number_word(output)} {number}"),
        **_image(image),
        "small": max(image.size) <= _SMALL,
        "scores": [(name, column[place]) for name, column in columns.items() if column is not None],
        "words": [(word, float(score)) for word, score in maps.get("words", ())],
        "maps": [_heat_map(name, values) for name, values in maps.items() if name != "words"],
    }


def _curves(output: BestOfNOutput) -> dict[str, Any] | None:
    """Lay out a line per candidate over the steps at which it was scored, winners last; None without previews."""
    totals = dict(zip(output.all_seeds, output.all_scores, strict=True))
    ways: dict[int, list[tuple[int, float]]] = {}
    for seed, looks in output.previews.items():
        way = [*((look.step, look.total) for look in looks), *((look.steps, totals[seed]) for look in looks[-1:])]
        if finite := [(step, value) for step, value in way if math.isfinite(value)]:
            ways[seed] = finite
    if not ways:
        return None
    steps, values = ([point[i] for way in ways.values() for point in way] for i in range(2))
    low, high, best = min(values), max(values), output.winners
    margin = 0.05 * (high - low) or 0.5 * abs(high) or 0.5

    def x(step: float) -> float:
        return round(_LEFT + (_RIGHT - _LEFT) * step / max(steps), 1)

    def y(total: float) -> float:
        return round(_BOTTOM - (_BOTTOM - _TOP) * (total - low + margin) / (high - low + 2 * margin), 1)

    marks: list[tuple[float, int]] = []
    for step in sorted(set(steps), reverse=True):  # the last one, and those whose labels do not overlap it
        if not marks or marks[-1][0] - x(step) >= _APART:
            marks.append((x(step), int(step)))
    return {
        "ticks": [(y(total), total) for total in sorted({low, high})],
        "marks": marks,
        "lines": [
            {"seed": seed, "best": seed in best, "points": [(x(step), y(total)) for step, total in ways[seed]]}
            for seed in sorted(ways, key=lambda seed: seed in best)
        ],
    }


def _image(image: Image.Image) -> dict[str, Any]:
    """Encode an image: WebP, or PNG if it is small or Pillow has no WebP."""
    shown = image.convert("RGB")
    shown.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    lossless = max(image.size) <= _SMALL or not features.check("webp")
    options = {"format": "PNG", "optimize": True} if lossless else {"format": "WEBP", "quality": 88}
    return {"source": _uri(shown, **options), "width": image.width, "height": image.height}


def _heat_map(name: str, values: Any) -> dict[str, Any]:
    import matplotlib

    array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, dtype=np.float64)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"maps: expected (H, W) for {name!r}, got shape {array.shape}; pass one map per name")
    finite = array[np.isfinite(array)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    bottom, top = (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)
    scaled = np.nan_to_num((array - bottom) / ((top - bottom) or 1.0), nan=0.0, posinf=1.0, neginf=0.0)
    image = Image.fromarray(np.ascontiguousarray(matplotlib.colormaps["magma"](scaled, bytes=True)[..., :3]))
    size = {"width": image.width, "height": image.height}
    return {"name": name.replace("_", " "), "source": _uri(image, format="PNG"), "low": low, "high": high, **size}


def _uri(image: Image.Image, **options: Any) -> str:
    data = io.BytesIO()
    image.save(data, **options)
    return f"data:image/{options['format'].lower()};base64,{base64.b64encode(data.getvalue()).decode()}"
