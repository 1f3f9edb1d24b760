"""Reader of AIGIQA-20K.

Source: C. Li et al., "AIGIQA-20K: A Large Database for AI-Generated Image Quality Assessment", CVPRW
2024, arXiv 2404.03407; published for the NTIRE 2024 challenge as AIGCQA-30K-Image.
"""

from __future__ import annotations

import csv
import math
import os
import re
from contextlib import suppress
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
_NAME = re.compile(r"([^/\\]+)_\d+\.png")


def read_aigiqa20k(folder: str | os.PathLike[str]) -> ScoredImages:
    """Read the training part, `info_train.csv`; images are in `train/` or `images/`, and none is opened.

    The columns are name, prompt and mos, or those three without a header (recognized by a number in the third cell
    of the first line). The published file lists 14,000 images; any part will do. A rater gave one score, 0 to 5, for
    quality and alignment with the prompt together: it is put into `quality`, and `correspondence` is NaN. The
    generator of an image is its file name less `_{index}.png`: `DALLE2`, `LCM_SD1.5`.

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
    first: list[str] = []
    with table.open(newline="", encoding="utf-8-sig", errors="replace") as file, suppress(csv.Error):
        first = next(csv.reader(file), [])
    has_header = len(first) != len(_COLUMNS) or math.isnan(number_or_nan(first[-1]))
    rows = read_csv(table, _COLUMNS, header=None if has_header else _COLUMNS)
    generators = generators_of(rows, "name", _NAME, "{generator}_{index}.png")
    return scored_images(rows, image_folder(root, "train", "images"), scores={"quality": "mos"}, generators=generators)
