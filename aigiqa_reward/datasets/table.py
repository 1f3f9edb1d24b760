"""A plain table of scores, for training on one's own data."""

from __future__ import annotations

import os
from pathlib import Path

from aigiqa_reward.datasets.base import (
    ScoredImages,
    columns_of,
    prompt_column,
    read_rows,
    require_columns,
    scored_images,
)

_SCORES = ("quality", "correspondence")
_OPTIONAL = ("generator", "group")


def read_table(file: str | os.PathLike[str]) -> ScoredImages:
    """Read a table with one row per image, in CSV, TSV, JSON, JSON Lines, Parquet or xlsx; no image is opened.

    The columns are path (relative to the folder of the file, or absolute), prompt, and quality, correspondence or
    both: numbers in any unit, higher is better. Optional ones are generator (by default "unknown") and group (which
    a split must keep on one side; by default the prompt). Others are not used. A score without a column is NaN. The
    column prompt may also be called caption or text, and a path is listed once, however it is spelled.

    Example:
        >>> from PIL import Image
        >>> from aigiqa_reward.datasets import read_table
        >>> Image.new("RGB", (64, 64), "red").save("a.png")
        >>> with open("scores.csv", "w") as file:
        ...     print("path,prompt,quality", file=file)
        ...     print("a.png,a red square,3.5", file=file)
        >>> images = read_table("scores.csv")
        >>> images.quality, images.has_correspondence
        (array([3.5]), False)
    """
    table = Path(file)
    if not table.is_file():
        raise ValueError(f"file: expected a CSV file with the columns path, prompt and a score, found none at {file!s}")
    rows = read_rows(table)
    columns, prompt = columns_of(rows), prompt_column(rows)
    used = (*_SCORES, *_OPTIONAL)
    require_columns(table, ("path", prompt), columns, "the columns", "rename it, or remove it", optional=used)
    if not any(score in columns for score in _SCORES):
        raise ValueError(
            f"{table}: no column {' or '.join(_SCORES)}; expected at least one of them beside path, prompt, got "
            f"{', '.join(columns)}"
        )
    for row in rows:
        for column in {"path", prompt, *_OPTIONAL} & set(columns):
            if not row[column].strip():
                raise row.error(f"expected a text in column {column}, got a blank cell; fill it or remove the row")
    return scored_images(
        rows,
        table.parent,
        name="path",
        prompt=prompt,
        scores={score: score for score in _SCORES if score in columns},
        generators=[row["generator"] if "generator" in columns else "unknown" for row in rows],
        groups=[row["group"] for row in rows] if "group" in columns else (),
        argument="file",
        remedy="correct the paths, or list only those present",
    )
