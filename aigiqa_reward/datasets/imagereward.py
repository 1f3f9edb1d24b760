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
        images: folder that the entries' image paths are relative to. None: the folder named like the file,
            `test_images` for `test.json`, or else `images`, beside the file.

    Returns:
        The pairs in the order of the file.

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
        raise ValueError(
            f"path: expected ImageReward's JSON file, or a folder that holds train.json, got {str(path)!r}; name the "
            "file itself for another part"
        )
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
    refuse_absent(
        list(dict.fromkeys(better + worse)),
        file.name,
        argument="images",
        remedy="name the folder they are in by images=",
    )
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
    checked = []
    for number, entry in enumerate(entries, start=1):
        where = f"{file}, entry {number}"
        if not isinstance(entry, dict) or any(field not in entry for field in _FIELDS):
            got = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
            raise ValueError(f"{where}: expected the fields {', '.join(_FIELDS)}, got {got or 'none'}")
        identity = str(entry["id"])
        if identity in places:
            raise ValueError(
                f"{where}: the id {identity!r} is that of entry {places[identity]} as well; keep one of the two"
            )
        places[identity] = number
        checked.append(_check_entry(entry, f"{where} (id {identity!r})"))
    return checked


def _check_entry(entry: dict[str, Any], where: str) -> tuple[str, list[str], list[float]]:
    prompt, generations, ranking = entry["prompt"], entry["generations"], entry["ranking"]
    if not isinstance(prompt, str):
        raise ValueError(f"{where}: expected prompt to be a text, got {prompt!r}")
    _check_list(generations, str, "generations", "image paths", where)
    _check_list(ranking, (int, float), "ranking", "numbers", where)
    if len(generations) > _MOST_IMAGES:  # they are compared two by two
        raise ValueError(f"{where}: expected at most {_MOST_IMAGES} images, got {len(generations)}; remove the entry")
    if len(generations) != len(ranking):
        raise ValueError(
            f"{where}: expected one rank per image, got {len(ranking)} for {len(generations)}; remove the entry"
        )
    repeated = [name for name in generations if generations.count(name) > 1]
    if repeated:
        raise ValueError(f"{where}: {repeated[0]!r} is listed twice; keep one of the two")
    return prompt, generations, ranking


def _check_list(value: Any, kind: type | tuple[type, ...], field: str, expected: str, where: str) -> None:
    for item in value if isinstance(value, list) else [None]:
        if not isinstance(item, kind) or isinstance(item, bool) or item != item:
            raise ValueError(f"{where}: expected {field} to be a list of {expected}, got {value!r:.200}")
