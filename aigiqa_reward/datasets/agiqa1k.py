"""Reader of AGIQA-1K.

Source: Z. Zhang et al., "A Perceptual Quality Assessment Exploration for AIGC Images", ICMEW 2023,
arXiv 2303.12618; https://github.com/lcysyzxdc/AGIQA-1k-Database.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from aigiqa_reward.datasets.base import ScoredImages, find_table, generators_of, image_folder, read_xlsx, scored_images

_TABLE, _OTHER_SCORES = "AIGC_MOS_Zscore.xlsx", "AIGC_all.csv"
_NAME = re.compile(r"(deepai|dreamStudio)_\d+_\d+_[01]_[01]\.jpg")
_PUBLISHED_TWICE = "dreamStudio_8_9_1_1.jpg"
"""Name of the published table's last two rows, whose scores are 0.44 and 2.08."""


def read_agiqa1k(folder: str | os.PathLike[str]) -> ScoredImages:
    """Read `AIGC_MOS_Zscore.xlsx` (columns Image, Prompt, MOS); images are in `file/` or `images/`, and none is opened.

    `quality` is the mean opinion score, 0 to 5; there are no other scores and no deviations. The generator is the
    first part of the file name: `deepai` (Stable Diffusion v2.0) or `dreamStudio` (a Stable Diffusion inpainting v1.0).
    A prompt has four parts, as in "cat, using phone, city, anime style". The first two, the object pair (our inference
    from the page and the table), are the group: 180 groups of at most eight images. The published table gives two
    scores to `dreamStudio_8_9_1_1.jpg`, which is left out: 1,078 images remain.

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
    remedy = ""
    if (root / _OTHER_SCORES).is_file():
        remedy = (
            f"; {_OTHER_SCORES} holds other scores of these images, not the published opinion scores, and is not read: "
            f"take {_TABLE} from github.com/lcysyzxdc/AGIQA-1k-Database"
        )
    rows = read_xlsx(find_table(root, _TABLE, f"AGIQA-1K's {_TABLE} and images", remedy), ("Image", "Prompt", "MOS"))
    if sum(row["Image"] == _PUBLISHED_TWICE for row in rows) == 2:
        rows = [row for row in rows if row["Image"] != _PUBLISHED_TWICE]
    groups = []
    for row in rows:
        parts = [part.strip() for part in row["Prompt"].split(",")]
        if len(parts) != 4 or not all(parts):
            raise row.error(f"expected a prompt of the form 'object, object, place, style', got {row['Prompt']!r}")
        groups.append(", ".join(parts[:2]))
    return scored_images(
        rows,
        image_folder(root, "file", "images"),
        name="Image",
        prompt="Prompt",
        scores={"quality": "MOS"},
        generators=generators_of(rows, "Image", _NAME, "{deepai or dreamStudio}_{object}_{object}_{place}_{style}.jpg"),
        groups=groups,
    )
