"""Reader of a plain table of scores, so that a reward can be trained on anyone's own."""

from __future__ import annotations

import os
from pathlib import Path

from aigiqa_reward.datasets.base import ScoredImages, numbers, read_csv, refuse_absent, refuse_repeats, unpublished

_COLUMNS = ("path", "prompt")
_SCORES = ("quality", "correspondence")


def read_table(file: str | os.PathLike[str]) -> ScoredImages:
    """Read a CSV file with one row an image; no image is opened.

    The columns are path (relative to the folder of the file, or absolute), prompt, and quality, correspondence or
    both: numbers in any unit, higher is better. Optional ones are generator (without it, "unknown") and group (what
    a split must keep on one side; without it, the prompt). Others are not used.

    Args:
        file: the CSV file, in UTF-8, whose first line names the columns.

    Returns:
        The images in the order of the file; the name of one is its path as written. A score without a column is
        NaN, and so are the deviations.

    Raises:
        ValueError: the file, a column or an image is missing, a path is repeated, a text is blank, or a score is not
            a number.

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
    rows = read_csv(table, _COLUMNS, expected="the columns")
    columns = rows[0].cells
    if not any(score in columns for score in _SCORES):
        raise ValueError(
            f"{table}: no column {' or '.join(_SCORES)}; expected at least one of them beside {', '.join(_COLUMNS)}, "
            f"got {', '.join(columns)}"
        )
    names = tuple(row.text("path") for row in rows)
    refuse_repeats(rows, "path")
    paths = tuple(table.parent / name for name in names)
    refuse_absent(paths, table.name, argument="file", remedy="correct the paths, or list only those present")
    scores = {score: numbers(rows, score) if score in columns else unpublished(len(rows)) for score in _SCORES}
    return ScoredImages(
        names=names,
        paths=paths,
        prompts=tuple(row.text("prompt") for row in rows),
        generators=tuple(row.text("generator") if "generator" in columns else "unknown" for row in rows),
        quality=scores["quality"],
        quality_std=unpublished(len(rows)),
        correspondence=scores["correspondence"],
        correspondence_std=unpublished(len(rows)),
        groups=tuple(row.text("group") for row in rows) if "group" in columns else (),
    )
