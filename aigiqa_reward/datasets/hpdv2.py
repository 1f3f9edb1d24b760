"""Reader of HPD v2's rankings and choices in their published JSON layout.

Source: X. Wu et al., "Human Preference Score v2: A Solid Benchmark for Evaluating Human Preferences of Text-to-Image
Synthesis", arXiv 2306.09341; https://github.com/tgxs002/HPSv2, https://huggingface.co/datasets/ymhao/HPDv2.

Found there: the fields of both files and the folders `train/` and `test/` (README), and that a lower rank is better and
that paths are relative to a folder of images (the authors' evaluation). Inferred: that this folder is the one named
like the file. `raw_annotations`, the ranks by each annotator, are not read: `rank` is their average.
"""

from __future__ import annotations

import os
from pathlib import Path

from aigiqa_reward.datasets.base import PreferencePairs, image_folder
from aigiqa_reward.datasets.ranked import ranked_pairs, read_entries

_LAYOUTS = (("prompt", "image_path", "rank"), ("prompt", "file_path", "human_preference"))
"""Fields of test.json and of train.json."""


def read_hpdv2(path: str | os.PathLike[str], *, images: str | os.PathLike[str] | None = None) -> PreferencePairs:
    """Read a JSON list of ranked or chosen images as pairs; no image is opened.

    An entry of `test.json` is {prompt, image_path, rank, raw_annotations}: a list of images and the rank of each, the
    lower the better. One of `train.json` is {prompt, file_path, human_preference}: two images, 1 for the preferred one
    and 0 for the other. Every two images of an entry give a pair; two of one rank give none. The group of a pair is its
    prompt.

    Args:
        path: JSON file, or a folder with `test.json`.
        images: folder that the entries' image paths are relative to. None: beside the file, the folder named like it
            (`test` for `test.json`).

    Example:
        >>> import json
        >>> from pathlib import Path
        >>> from aigiqa_reward.datasets import read_hpdv2
        >>> Path("hpd/test").mkdir(parents=True)
        >>> for name in ("a.jpg", "b.jpg", "c.jpg"):
        ...     Path("hpd/test", name).touch()
        >>> entry = {"prompt": "a red fox", "image_path": ["a.jpg", "b.jpg", "c.jpg"], "rank": [1, 0, 2]}
        >>> _ = Path("hpd/test.json").write_text(json.dumps([entry]))
        >>> [path.name for path in read_hpdv2("hpd").better]
        ['b.jpg', 'a.jpg', 'b.jpg']
    """
    file = Path(path)
    file = file / "test.json" if file.is_dir() else file
    if not file.is_file():
        raise ValueError(f"path: expected HPD v2's JSON file, or a folder that holds test.json, got {str(path)!r}")
    root = image_folder(file.parent, file.stem, "images") if images is None else Path(images)
    entries, names = read_entries(file, *_LAYOUTS)
    rows = []
    for number, entry in enumerate(entries, start=1):
        prompt, listed, ranks = (entry[name] for name in names)
        if names is _LAYOUTS[1] and isinstance(ranks, list):
            ranks = [-chosen if type(chosen) is int else chosen for chosen in ranks]
        rows.append((f"{file}, entry {number}", prompt, listed, ranks))
    return ranked_pairs(rows, names, root, file)
