"""A plain table of scores, for training on one's own data."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from aigiqa_reward.datasets.base import (
    Row,
    ScoredImages,
    columns_of,
    find_column,
    prompt_column,
    read_rows,
    require_columns,
    scored_images,
)
from aigiqa_reward.utils.io import PROMPTS

if TYPE_CHECKING:
    from aigiqa_reward.images import PromptSource

_SCORES = ("quality", "correspondence")
_OPTIONAL = ("generator", "group")
_REMEDY = "rename the column of prompts, or read those of the files with prompts_from='auto' (--prompts-from auto)"


def read_table(file: str | os.PathLike[str], prompts_from: PromptSource | None = None) -> ScoredImages:
    """Read a table with one row per image, in CSV, TSV, JSON, JSON Lines, Parquet or xlsx; no image is opened.

    The columns are path (relative to the folder of the file, or absolute), prompt, and quality, correspondence or
    both: numbers in any unit, higher is better. Optional ones are generator (by default "unknown") and group (which
    a split must keep on one side; by default the prompt). Others are not used. A score without a column is NaN. The
    column prompt may also be called caption or text, and a path is listed once, however it is spelled.

    Args:
        file: table.
        prompts_from: for a table without prompts, where each image's own is read: "embedded" in the file, "sidecar"
            beside it, or "auto" (see `aigiqa_reward.images.read_prompt`). Images without one are left out,
            with a warning.

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
    rows = rows if prompts_from is None else _with_prompts(rows, prompts_from)
    columns, prompt = columns_of(rows), prompt_column(rows, remedy=_REMEDY)
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


def _with_prompts(rows: Sequence[Row], place: PromptSource) -> list[Row]:
    """Add the column prompt, read from the images of the column path; leave out rows whose image has none."""
    from aigiqa_reward.images import ImageError
    from aigiqa_reward.images.metadata import check_source, find_prompt

    check_source("prompts_from", place)
    if column := find_column(rows, PROMPTS, _REMEDY):
        raise ValueError(f"prompts_from: {rows[0].table} has the column {column}; remove it, or leave out prompts_from")
    found, faults = [], []
    for row in rows:
        try:
            prompt = find_prompt(row.table.parent / row["path"], place).text
            found.append(replace(row, cells={**row.cells, "prompt": prompt}))
        except ImageError as error:
            faults.append(str(error))
    if not found:
        raise ValueError(f"prompts_from: none of the {len(rows)} images has a prompt; the first: {faults[0]}")
    if faults:
        left = f"{len(faults)} of its {len(rows)} images are left out, as no prompt can be read for them"
        warnings.warn(f"{rows[0].table}: {left}; the first: {faults[0]}", stacklevel=3)
    return found
