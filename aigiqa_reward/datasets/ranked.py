"""What the readers of ranked images share: a JSON list of entries, and pairs of the images of each."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

from aigiqa_reward.datasets.base import PreferencePairs, refuse_absent
from aigiqa_reward.utils.io import read_json

_MOST_IMAGES = 100
"""Most images of an entry; the published ones have 2 to 9."""


def read_entries(file: Path, *layouts: tuple[str, ...]) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """Read a JSON list of objects with the fields of one layout at least, the first one's; return that as well."""
    entries = read_published_json(file)
    if not isinstance(entries, list) or not entries:
        raise ValueError(
            f"{file}: expected a list of entries {{{', '.join(layouts[0])}}}, got {type(entries).__name__}"
        )
    first = entries[0] if isinstance(entries[0], dict) else {}
    fields = next((layout for layout in layouts if layout[-1] in first), layouts[0])
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict) or any(field not in entry for field in fields):
            got = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
            raise ValueError(f"{file}, entry {number}: expected the fields {', '.join(fields)}, got {got or 'none'}")
    return entries, fields


def read_published_json(file: Path) -> Any:
    """Read JSON, or say that the published file is expected."""
    try:
        return read_json(file)
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON in UTF-8, got {error}; take the published file") from error


def ranked_pairs(
    entries: Iterable[tuple[str, Any, Any, Any]], names: tuple[str, ...], folder: Path, listed_by: Path
) -> PreferencePairs:
    """Return every two images of an entry that differ in rank, the lower rank the better; no image is opened.

    Args:
        entries: place in the file for errors, prompt, paths of images, and ranks.
        names: names of the last three in the file.
        folder: folder that the paths are relative to.
        listed_by: file that lists the images.
    """
    pairs: list[tuple[str, Path, Path]] = []
    for where, prompt, images, ranks in entries:
        if fault := _fault(prompt, images, ranks, names):
            raise ValueError(f"{where}: {fault}")
        for (first, rank), (second, other) in combinations(zip(images, ranks, strict=True), 2):
            if rank != other:
                better, worse = (first, second) if rank < other else (second, first)
                pairs.append((prompt, folder / better, folder / worse))
    if not pairs:
        raise ValueError(f"{listed_by}: expected images of different ranks in at least one entry, got none")
    prompts, better, worse = zip(*pairs, strict=True)
    remedy = "name the folder they are in by images=, or put the published images there"
    refuse_absent(list(dict.fromkeys(better + worse)), listed_by.name, argument="images", remedy=remedy)
    return PreferencePairs(prompts=prompts, better=better, worse=worse)


def _fault(prompt: Any, images: Any, ranks: Any, names: tuple[str, ...]) -> str | None:
    """Return what is wrong with an entry."""
    if not isinstance(prompt, str):
        return f"expected {names[0]} to be a text, got {prompt!r}"
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        return f"expected {names[1]} to be a list of image paths, got {images!r:.200}"
    if not isinstance(ranks, list) or not all(type(rank) in (int, float) and rank == rank for rank in ranks):
        return f"expected {names[2]} to be a list of numbers, got {ranks!r:.200}"
    if len(images) > _MOST_IMAGES:  # they are compared two by two
        return f"expected at most {_MOST_IMAGES} images, got {len(images)}; remove the entry"
    if len(images) != len(ranks):
        return f"expected one rank per image, got {len(ranks)} for {len(images)}; remove the entry"
    if repeated := [name for name in images if images.count(name) > 1]:
        return f"{repeated[0]!r} is listed twice; keep one of the two"
    return None
