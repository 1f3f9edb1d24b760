"""Reader of ImageReward's rankings in their published JSON layout.

Source: J. Xu et al., "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation", NeurIPS
2023, arXiv 2304.05977; https://github.com/THUDM/ImageReward.
"""

from __future__ import annotations

import os
from itertools import combinations
from pathlib import Path
from typing import Any

from aigiqa_reward.datasets.base import PreferencePairs, image_folder, refuse_absent
from aigiqa_reward.utils.io import read_json

_FIELDS = ("id", "prompt", "generations", "ranking")
_MOST_IMAGES = 100
"""Most images of an entry; the published ones have 4 to 9."""


def read_imagereward(path: str | os.PathLike[str], *, images: str | os.PathLike[str] | None = None) -> PreferencePairs:
    """Read a JSON list of ranked images as pairs; no image is opened.

    An entry is {id, prompt, generations, ranking}: a list of images of the prompt, and the rank of each, 1 the best.
    Every two images of an entry give a pair, the lower rank the better; two of one rank give none. The group of a
    pair is its prompt, which a few entries share.

    Args:
        path: JSON file (`train.json`, `valid.json`, `test.json`), or a folder with `train.json`.
        images: folder that the entries' image paths are relative to. None: beside the file, the folder named like it,
            `test_images` for `test.json`, or else `images`.

    Example:
        >>> import json
        >>> from pathlib import Path
        >>> from aigiqa_reward.datasets import read_imagereward
        >>> Path("imagereward/images").mkdir(parents=True)
        >>> for name in ("a.png", "b.png", "c.png"):
        ...     Path("imagereward/images", name).touch()
        >>> entry = {"id": "0", "prompt": "a red fox", "generations": ["a.png", "b.png", "c.png"], "ranking": [2, 1, 3]}
        >>> _ = Path("imagereward/train.json").write_text(json.dumps([entry]))
        >>> [path.name for path in read_imagereward("imagereward").better]
        ['b.png', 'a.png', 'b.png']
    """
    file = Path(path)
    if file.is_dir():
        file = file / "train.json"
    if not file.is_file():
        expected = "ImageReward's JSON file, or a folder that holds train.json"
        raise ValueError(f"path: expected {expected}, got {str(path)!r}; name the file itself for another part")
    root = image_folder(file.parent, f"{file.stem}_images", "images") if images is None else Path(images)
    pairs: list[tuple[str, Path, Path]] = []
    for prompt, generations, ranking in _read_entries(file):
        for (first, rank), (second, other) in combinations(zip(generations, ranking, strict=True), 2):
            if rank != other:
                better, worse = (first, second) if rank < other else (second, first)
                pairs.append((prompt, root / better, root / worse))
    if not pairs:
        raise ValueError(f"{file}: expected images of different ranks in at least one entry, got none")
    prompts, better, worse = zip(*pairs, strict=True)
    remedy = "name the folder they are in by images="
    refuse_absent(list(dict.fromkeys(better + worse)), file.name, argument="images", remedy=remedy)
    return PreferencePairs(prompts=prompts, better=better, worse=worse)


def _read_entries(file: Path) -> list[tuple[str, list[str], list[float]]]:
    """Read prompt, images and ranks of every entry."""
    try:
        entries = read_json(file)
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON in UTF-8, got {error}; take the published file") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{file}: expected a list of entries {{{', '.join(_FIELDS)}}}, got {type(entries).__name__}")
    places: dict[str, int] = {}
    for number, entry in enumerate(entries, start=1):
        where = f"{file}, entry {number}"
        if not isinstance(entry, dict) or any(field not in entry for field in _FIELDS):
            got = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
            raise ValueError(f"{where}: expected the fields {', '.join(_FIELDS)}, got {got or 'none'}")
        identity = str(entry["id"])
        if (first := places.setdefault(identity, number)) != number:
            raise ValueError(f"{where}: the id {identity!r} is that of entry {first} as well; keep one of the two")
        if fault := _fault(entry):
            raise ValueError(f"{where} (id {identity!r}): {fault}")
    return [(entry["prompt"], entry["generations"], entry["ranking"]) for entry in entries]


def _fault(entry: dict[str, Any]) -> str | None:
    """Return what is wrong with an entry."""
    images, ranking = entry["generations"], entry["ranking"]
    if not isinstance(entry["prompt"], str):
        return f"expected prompt to be a text, got {entry['prompt']!r}"
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        return f"expected generations to be a list of image paths, got {images!r:.200}"
    if not isinstance(ranking, list) or not all(type(rank) in (int, float) and rank == rank for rank in ranking):
        return f"expected ranking to be a list of numbers, got {ranking!r:.200}"
    if len(images) > _MOST_IMAGES:  # they are compared two by two
        return f"expected at most {_MOST_IMAGES} images, got {len(images)}; remove the entry"
    if len(images) != len(ranking):
        return f"expected one rank per image, got {len(ranking)} for {len(images)}; remove the entry"
    if repeated := [name for name in images if images.count(name) > 1]:
        return f"{repeated[0]!r} is listed twice; keep one of the two"
    return None
