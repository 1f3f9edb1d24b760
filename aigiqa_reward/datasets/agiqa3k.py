"""Reader of AGIQA-3K in its published layout.

Source: C. Li et al., "AGIQA-3K: An Open Database for AI-Generated Image Quality Assessment", IEEE TCSVT 2023,
arXiv 2306.04717.
"""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from aigiqa_reward.datasets.base import ScoredImages

_SCORES = {
    "quality": "mos_quality",
    "quality_std": "std_quality",
    "correspondence": "mos_align",
    "correspondence_std": "std_align",
}
_COLUMNS = ("name", "prompt", *_SCORES.values())
_NAME = re.compile(r"(?P<generator>[^/\\]+)_\d+\.jpg")


def read_agiqa3k(folder: str | os.PathLike[str]) -> ScoredImages:
    """Read `data.csv` and find the images in `images/`; none is opened.

    The file may list any part of the benchmark. Scores stay as published, mean opinion scores of 0 to 5. The
    generator of an image is its file name less `_{index}.jpg`: `sd1.5_highcorr`, `AttnGAN_normal`.

    Args:
        folder: holds `data.csv`, with the published columns name, prompt, adj1, adj2, style, mos_quality,
            std_quality, mos_align and std_align (adjectives and style are not used), and `images`.

    Returns:
        The images in the order of the file.

    Raises:
        ValueError: a file, column or image is missing, a name is repeated or of another form, or a score is
            not a number.
    """
    root = Path(folder)
    table = root / "data.csv"
    if not table.is_file():
        raise ValueError(f"folder: expected AGIQA-3K's data.csv and images/ in {str(root)!r}, but there is no data.csv")
    rows = _read_rows(table)
    names = tuple(row["name"] for _, row in rows)
    paths = tuple(root / "images" / name for name in names)
    absent = [path for path in paths if not path.is_file()]
    if absent:
        raise ValueError(
            f"folder: {len(absent)} of the {len(paths)} images that data.csv lists are absent, the first "
            f"{str(absent[0])!r}; put the published images there, or list only those present"
        )
    scores = {
        field: np.array([_score(row, column, line, table) for line, row in rows], dtype=np.float64)
        for field, column in _SCORES.items()
    }
    return ScoredImages(
        names=names,
        paths=paths,
        prompts=tuple(row["prompt"] for _, row in rows),
        generators=tuple(_generator(row["name"], line, table) for line, row in rows),
        **scores,
    )


def _read_rows(table: Path) -> list[tuple[int, dict[str, str]]]:
    """The rows of data.csv, each with the number of its last line."""
    with table.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, restval="")
        missing = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(
                f"{table}: no column {', '.join(missing)}; expected the published columns "
                f"{', '.join(_COLUMNS)}, got {', '.join(reader.fieldnames or ()) or 'an empty file'}"
            )
        rows = [(reader.line_num, row) for row in reader]
    if not rows:
        raise ValueError(f"{table}: expected a row per image, got the header alone")
    seen: set[str] = set()
    for line, row in rows:
        _generator(row["name"], line, table)
        if row["name"] in seen:
            raise ValueError(f"{table}, line {line}: {row['name']!r} is listed twice; keep one of the two")
        seen.add(row["name"])
    return rows


def _generator(name: str, line: int, table: Path) -> str:
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{table}, line {line}: expected a name of the form {{generator}}_{{index}}.jpg, got {name!r}")
    return match["generator"]


def _score(row: Mapping[str, str], column: str, line: int, table: Path) -> float:
    try:
        value = float(row[column])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(
            f"{table}, line {line}: expected a finite number in column {column}, got {row[column]!r}; "
            "correct the cell or remove the row"
        )
    return value
