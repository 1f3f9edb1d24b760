"""Reader of ImageReward's rankings in their published JSON layout.

Source: J. Xu et al., "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation", NeurIPS
2023, arXiv 2304.05977; https://github.com/THUDM/ImageReward.
"""

from __future__ import annotations

import os
from pathlib import Path

from aigiqa_reward.datasets.base import PreferencePairs, image_folder
from aigiqa_reward.datasets.ranked import ranked_pairs, read_entries

_FIELDS = ("id", "prompt", "generations", "ranking")


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
    entries, _ = read_entries(file, _FIELDS)
    places: dict[str, int] = {}
    for number, entry in enumerate(entries, start=1):
        if (first := places.setdefault(str(entry["id"]), number)) != number:
            fault = f"the id {str(entry['id'])!r} is that of entry {first} as well; keep one of the two"
            raise ValueError(f"{file}, entry {number}: {fault}")
    rows = (
        (f"{file}, entry {number} (id {str(entry['id'])!r})", *(entry[field] for field in _FIELDS[1:]))
        for number, entry in enumerate(entries, start=1)
    )
    return ranked_pairs(rows, _FIELDS[1:], root, file)
