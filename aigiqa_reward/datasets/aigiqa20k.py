"""Reader of the training part of AIGIQA-20K in its published layout.

Source: C. Li et al., "AIGIQA-20K: A Large Database for AI-Generated Image Quality Assessment", CVPRW 2024, arXiv
2404.03407; published for the NTIRE 2024 challenge as AIGCQA-30K-Image.
"""

from __future__ import annotations

import csv
import math
import os
import re
from pathlib import Path

from aigiqa_reward.datasets.base import (
    ScoredImages,
    find_table,
    generators_of,
    image_folder,
    number_or_nan,
    read_csv,
    scored_images,
)

_COLUMNS = ("name", "prompt", "mos")
_NAME = re.compile(r"(?P<generator>[^/\\]+)_\d+\.png")


def read_aigiqa20k(folder: str | os.PathLike[str]) -> ScoredImages:
    """Read `info_train.csv` and find the images in `train/` or `images/`; none is opened.

    The file may list any part of the benchmark; the published one lists 14,000 images. Scores stay as published,
    mean opinion scores of 0 to 5. A rater gave one score for quality and alignment with the prompt together: it is
    put into `quality`, and `correspondence` is NaN. The generator of an image is its file name less `_{index}.png`:
    `DALLE2`, `LCM_SD1.5`.

    Args:
        folder: folder of `info_train.csv`, with the columns name, prompt and mos, or those three without a header
            (recognized by a number in the third cell of the first line), and of the images.

    Returns:
        The images in the order of the file.

    Example:
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from aigiqa_reward.datasets import read_aigiqa20k
        >>> Path("aigiqa20k/train").mkdir(parents=True)
        >>> Image.new("RGB", (64, 64)).save("aigiqa20k/train/DALLE2_0000.png")
        >>> with open("aigiqa20k/info_train.csv", "w") as file:
        ...     print("name,prompt,mos", file=file)
        ...     print("DALLE2_0000.png,a red fox,3.1", file=file)
        >>> images = read_aigiqa20k("aigiqa20k")
        >>> images.generators, images.quality, images.has_correspondence
        (('DALLE2',), array([3.1]), False)
    """
    root = Path(folder)
    table = find_table(root, "info_train.csv", "AIGIQA-20K's info_train.csv and train/")
    rows = read_csv(table, _COLUMNS, header=None if _has_header(table) else _COLUMNS)
    generators = generators_of(rows, "name", _NAME, "{generator}_{index}.png")
    return scored_images(rows, image_folder(root, "train", "images"), scores={"quality": "mos"}, generators=generators)


def _has_header(table: Path) -> bool:
    with table.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        try:
            first = next(csv.reader(file), [])
        except csv.Error:
            return True  # `read_csv` reports what is wrong
    return len(first) != len(_COLUMNS) or math.isnan(number_or_nan(first[-1]))
