"""Reader of AGIQA-3K.

Source: C. Li et al., "AGIQA-3K: An Open Database for AI-Generated Image Quality Assessment", IEEE TCSVT
2023, arXiv 2306.04717.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from aigiqa_reward.datasets.base import ScoredImages, find_table, generators_of, read_csv, scored_images

_SCORES = {
    "quality": "mos_quality",
    "quality_std": "std_quality",
    "correspondence": "mos_align",
    "correspondence_std": "std_align",
}
_NAME = re.compile(r"([^/\\]+)_\d+\.jpg")


def read_agiqa3k(folder: str | os.PathLike[str]) -> ScoredImages:
    """Read `data.csv`, which may list any part of the benchmark; images are in `images/`, and none is opened.

    The columns are name, prompt, mos_quality, std_quality, mos_align and std_align; others are not used. Scores are
    mean opinion scores of 0 to 5. The generator of an image is its file name less `_{index}.jpg`: `sd1.5_highcorr`.

    Example:
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from aigiqa_reward.datasets import read_agiqa3k
        >>> Path("agiqa3k/images").mkdir(parents=True)
        >>> Image.new("RGB", (64, 64)).save("agiqa3k/images/sd1.5_normal_000.jpg")
        >>> with open("agiqa3k/data.csv", "w") as file:
        ...     print("name,prompt,adj1,adj2,style,mos_quality,std_quality,mos_align,std_align", file=file)
        ...     print("sd1.5_normal_000.jpg,a red fox,,,,3.1,0.2,4.0,0.3", file=file)
        >>> images = read_agiqa3k("agiqa3k")
        >>> images.generators, images.quality, images.correspondence
        (('sd1.5_normal',), array([3.1]), array([4.]))
    """
    root = Path(folder)
    table = find_table(root, "data.csv", "AGIQA-3K's data.csv and images/")
    rows = read_csv(table, ("name", "prompt", *_SCORES.values()))
    generators = generators_of(rows, "name", _NAME, "{generator}_{index}.jpg")
    return scored_images(rows, root / "images", scores=_SCORES, generators=generators)
