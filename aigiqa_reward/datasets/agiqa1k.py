"""Reader of AGIQA-1K in its published layout.

Source: Z. Zhang et al., "A Perceptual Quality Assessment Exploration for AIGC Images", ICMEW 2023, arXiv 2303.12618;
https://github.com/lcysyzxdxc/AGIQA-1k-Database.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from aigiqa_reward.datasets.base import (
    Row,
    ScoredImages,
    find_table,
    generators_of,
    image_folder,
    read_xlsx,
    scored_images,
)

_TABLE = "AIGC_MOS_Zscore.xlsx"
_OTHER_SCORES = "AIGC_all.csv"
_NAME = re.compile(r"(?P<generator>deepai|dreamStudio)_\d+_\d+_[01]_[01]\.jpg")
_PUBLISHED_TWICE = "dreamStudio_8_9_1_1.jpg"
"""Name of the published table's last two rows, whose scores are 0.44 and 2.08."""


def read_agiqa1k(folder: str | os.PathLike[str]) -> ScoredImages:
    """Read `AIGC_MOS_Zscore.xlsx` and find the images in `file/` or `images/`; none is opened.

    Scores stay as published, mean opinion scores of 0 to 5, put into `quality`; the benchmark has no score of
    correspondence and no deviations. The generator is the first part of the file name: `deepai` (Stable
    Diffusion v2.0) or `dreamStudio` (a Stable Diffusion inpainting v1.0), as the benchmark's page says.

    A prompt has four parts: a main object, a second one, a place and a style, as in "cat, using phone, city, anime
    style". A group is the first two, the object pair, so that the two places and two styles of a pair, by both
    generators, stay together: 180 groups of at most eight images. That the first two parts of the text are those
    objects is our inference from the page and the table. The numbers in a file name are not used: both generators
    count their own selection of objects.

    The published table has 1,080 rows, of which the last two have one name, `dreamStudio_8_9_1_1.jpg`, with two
    scores. Both are left out, so that 1,078 images remain; any other name that is repeated is an error.

    Args:
        folder: folder of the table, with the columns Image, Prompt and MOS, and of the images, in `file` (as in the
            published archive) or `images`. `AIGC_all.csv` beside it holds other scores and is not read.

    Returns:
        The images in the order of the table.

    Raises:
        ImportError: the extra `data` is not installed.

    Example:
        >>> import pandas
        >>> from pathlib import Path
        >>> from aigiqa_reward.datasets import read_agiqa1k
        >>> Path("agiqa1k/file").mkdir(parents=True)
        >>> Path("agiqa1k/file/deepai_0_0_0_0.jpg").touch()
        >>> row = {"Image": "deepai_0_0_0_0.jpg", "Prompt": "cat, using phone, city, anime style", "MOS": 2.5}
        >>> pandas.DataFrame([row]).to_excel("agiqa1k/AIGC_MOS_Zscore.xlsx")
        >>> read_agiqa1k("agiqa1k").groups
        ('cat, using phone',)
    """
    root = Path(folder)
    table = find_table(root, _TABLE, f"AGIQA-1K's {_TABLE} and images", _remedy(root))
    rows = read_xlsx(table, ("Image", "Prompt", "MOS"))
    if sum(row["Image"] == _PUBLISHED_TWICE for row in rows) == 2:
        rows = [row for row in rows if row["Image"] != _PUBLISHED_TWICE]
    return scored_images(
        rows,
        image_folder(root, "file", "images"),
        name="Image",
        prompt="Prompt",
        scores={"quality": "MOS"},
        generators=generators_of(rows, "Image", _NAME, "{deepai or dreamStudio}_{object}_{object}_{place}_{style}.jpg"),
        groups=[_object_pair(row) for row in rows],
    )


def _remedy(root: Path) -> str:
    if not (root / _OTHER_SCORES).is_file():
        return ""
    return (
        f"; {_OTHER_SCORES} holds other scores of these images, not the published opinion scores, and is not "
        f"read: take {_TABLE} from github.com/lcysyzxdc/AGIQA-1k-Database"
    )


def _object_pair(row: Row) -> str:
    parts = [part.strip() for part in row["Prompt"].split(",")]
    if len(parts) != 4 or not all(parts):
        raise row.error(f"expected a prompt of the form 'object, object, place, style', got {row['Prompt']!r}")
    return ", ".join(parts[:2])
