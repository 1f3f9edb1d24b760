"""Reader of preference pairs in one table: of `build_preference_pairs`, of a page of labels, or one's own."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aigiqa_reward.datasets.base import PreferencePairs, extra_data
from aigiqa_reward.datasets.pickapic import read_pickapic
from aigiqa_reward.utils.io import write_atomically

PAIRS_FILE = "pairs.parquet"
"""Table in a folder of pairs."""

PAIRS_COLUMNS = ("prompt", "winner", "loser")
"""Columns that it needs; files are relative to its folder."""

_PICKAPIC = ("caption", "jpg_0", "jpg_1")


def read_preference_pairs(path: str | os.PathLike[str]) -> PreferencePairs:
    """Read the pairs of `build_preference_pairs`, or those of Pick-a-Pic in its published layout.

    Args:
        path: Folder with `pairs.parquet` or with other Parquet files of Pick-a-Pic, or one Parquet file of either. The
            columns are prompt, winner and loser; the latter two are files, relative to the folder of the table.

    Example:
        >>> import pandas
        >>> from PIL import Image
        >>> from aigiqa_reward.datasets import read_preference_pairs
        >>> for name in ("a.png", "b.png"):
        ...     Image.new("RGB", (64, 64)).save(name)
        >>> row = {"prompt": "a red fox", "winner": "a.png", "loser": "b.png"}
        >>> pandas.DataFrame([row]).to_parquet("pairs.parquet")
        >>> read_preference_pairs("pairs.parquet").worse[0].name
        'b.png'
    """
    source = Path(path)
    file = source / PAIRS_FILE if source.is_dir() else source
    if source.is_dir() and not file.is_file() and any(source.glob("*.parquet")):
        return read_pickapic(source)
    if not file.is_file():
        raise ValueError(f"pairs: no file {file}; expected a folder or a Parquet file of build_preference_pairs")
    parquet = extra_data("pyarrow.parquet", f"reading {file.name}")
    try:
        names = parquet.read_schema(file).names
        rows = parquet.read_table(file, columns=[name for name in PAIRS_COLUMNS if name in names]).to_pylist()
    except Exception as error:  # pyarrow raises errors of many kinds for damaged files
        raise ValueError(f"pairs: cannot read {file} as Parquet ({error}); make it again") from error
    if missing := [name for name in PAIRS_COLUMNS if name not in names]:
        if all(name in names for name in _PICKAPIC):
            return read_pickapic(file)
        raise ValueError(
            f"pairs: {file} has no column {', '.join(missing)}; expected {', '.join(PAIRS_COLUMNS)}, or Pick-a-Pic's "
            f"{', '.join(_PICKAPIC)}; got {', '.join(names)}"
        )
    if not rows:
        raise ValueError(f"pairs: {file} has no pair: lower the margin that it was made with, or raise n")
    for place, row in enumerate(rows):
        if wrong := [name for name in PAIRS_COLUMNS if not (isinstance(row[name], str) and row[name].strip())]:
            raise ValueError(f"pairs: {file}, row {place} (the first is 0): expected a text in {', '.join(wrong)}")
    pairs = named_pairs(rows, file.parent)
    if absent := [image for image in (*pairs.better, *pairs.worse) if not image.is_file()]:
        raise ValueError(
            f"pairs: {len(absent)} of the {2 * len(pairs)} images named in {file} are missing (first: {absent[0]}); "
            "put them back, or make the pairs again"
        )
    return pairs


def named_pairs(rows: Sequence[Mapping[str, Any]], folder: Path) -> PreferencePairs:
    """Return the pairs of a table's rows."""
    better, worse = (tuple(folder / row[name] for row in rows) for name in ("winner", "loser"))
    return PreferencePairs(prompts=tuple(row["prompt"] for row in rows), better=better, worse=worse)


def write_pairs_table(
    folder: Path, rows: Iterable[Mapping[str, Any] | tuple[str, ...]], columns: Sequence[str] = PAIRS_COLUMNS
) -> Path:
    """Write the table of a folder of pairs, and return it; images are absolute or relative to the folder."""
    data = io.BytesIO()
    pandas = extra_data("pandas", f"writing {PAIRS_FILE}")
    pandas.DataFrame(list(rows), columns=list(columns)).to_parquet(data, index=False)
    write_atomically(folder / PAIRS_FILE, data.getvalue())
    return folder / PAIRS_FILE
