"""Tables of human scores and preferences, and what their readers share: rows, images and errors with file and line."""

from __future__ import annotations

import csv
import importlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from aigiqa_reward.utils.io import read_regular

MAX_SHEET_BYTES, MAX_SHEET_ROWS = 20_000_000, 100_000
"""Bounds of an .xlsx file and of its rows; the benchmarks' sheets have 1,080 rows at most."""

_SCORES = ("quality", "quality_std", "correspondence", "correspondence_std")


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredImages:
    """N images with their human scores, in the benchmark's units, higher is better. Row i is image i.

    Attributes:
        names: name of each image in the benchmark, length N.
        paths: file of each image.
        prompts: prompt that each image was made from.
        generators: generator, and variant, that made each image.
        quality: (N,) float64, mean opinion score of perceptual quality; NaN where the benchmark has none.
        quality_std: (N,) float64, standard deviation between raters, or NaN.
        correspondence: (N,) float64, mean opinion score of correspondence to the prompt, or NaN.
        correspondence_std: (N,) float64, standard deviation between raters, or NaN.
        groups: group of each image that a split must keep on one side; by default the prompts.

    Example:
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from aigiqa_reward.datasets import ScoredImages
        >>> images = ScoredImages(
        ...     names=("a", "b"),
        ...     paths=(Path("a.png"), Path("b.png")),
        ...     prompts=("a red fox", "a red fox"),
        ...     generators=("sdxl", "flux"),
        ...     quality=np.array([3.1, 4.2]),
        ...     quality_std=np.full(2, np.nan),
        ...     correspondence=np.full(2, np.nan),
        ...     correspondence_std=np.full(2, np.nan),
        ... )
        >>> images.has_quality, images.has_correspondence, images.subset([1]).names
        (True, False, ('b',))
    """

    names: tuple[str, ...]
    paths: tuple[Path, ...]
    prompts: tuple[str, ...]
    generators: tuple[str, ...]
    quality: np.ndarray
    quality_std: np.ndarray
    correspondence: np.ndarray
    correspondence_std: np.ndarray
    groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_lengths(self)

    def __len__(self) -> int:
        """Number of images N."""
        return len(self.names)

    @property
    def has_quality(self) -> bool:
        """Whether any image has a quality score."""
        return bool(np.any(~np.isnan(self.quality)))

    @property
    def has_correspondence(self) -> bool:
        """Whether any image has a correspondence score."""
        return bool(np.any(~np.isnan(self.correspondence)))

    def subset(self, rows: np.ndarray | Sequence[int] | Sequence[bool]) -> ScoredImages:
        """Select images by a boolean mask (N,), or by row numbers in the order wanted."""
        return _subset(self, rows)


@dataclass(frozen=True, kw_only=True, eq=False)
class PreferencePairs:
    """N choices of people between two images of one prompt. Row i is choice i; ties are left out.

    Attributes:
        prompts: prompt that both images were made from, length N.
        better: file of the preferred image.
        worse: file of the other.
        groups: group of each pair that a split must keep on one side; by default the prompts.

    Example:
        >>> from pathlib import Path
        >>> from aigiqa_reward.datasets import PreferencePairs
        >>> pairs = PreferencePairs(prompts=("a red fox",), better=(Path("a.png"),), worse=(Path("b.png"),))
        >>> pairs.groups, len(pairs.subset([0]).prompts)
        (('a red fox',), 1)
    """

    prompts: tuple[str, ...]
    better: tuple[Path, ...]
    worse: tuple[Path, ...]
    groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_lengths(self)
        for row, (better, worse) in enumerate(zip(self.better, self.worse, strict=True)):
            if better == worse:
                raise ValueError(f"better, worse: expected two images, got {str(better)!r} twice at row {row}")

    def __len__(self) -> int:
        """Number of pairs N."""
        return len(self.prompts)

    def subset(self, rows: np.ndarray | Sequence[int] | Sequence[bool]) -> PreferencePairs:
        """Select pairs by a boolean mask (N,), or by row numbers in the order wanted."""
        return _subset(self, rows)


_Table = TypeVar("_Table", ScoredImages, PreferencePairs)


def _check_lengths(table: ScoredImages | PreferencePairs) -> None:
    if not table.groups:
        object.__setattr__(table, "groups", table.prompts)
    for field in fields(table):
        value = getattr(table, field.name)
        if len(value) != len(table) or (isinstance(value, np.ndarray) and value.ndim != 1):
            raise ValueError(f"{field.name}: expected {len(table)} entries, one per row, got shape {np.shape(value)}")


def _subset(table: _Table, rows: np.ndarray | Sequence[int] | Sequence[bool]) -> _Table:
    index, count = np.asarray(rows), len(table)
    if index.dtype == bool and index.shape == (count,):
        index = np.flatnonzero(index)
    elif index.size == 0:
        index = np.zeros(0, dtype=np.int64)
    elif index.ndim != 1 or index.dtype.kind not in "iu" or index.min() < -count or index.max() >= count:
        raise ValueError(
            f"rows: expected a boolean mask of shape ({count},) or row numbers below {count}, got {index.dtype} of "
            f"shape {index.shape}"
        )
    values = {field.name: getattr(table, field.name) for field in fields(table)}
    return replace(
        table,
        **{n: v[index] if isinstance(v, np.ndarray) else tuple(v[i] for i in index) for n, v in values.items()},
    )


# --------------------------------------------------------------------------------------------- rows of a table


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a table, its cells as text.

    Attributes:
        table: file of the table.
        line: number of the row's last line in the file, or of its row in a sheet; the first is 1.
        cells: text of each column; a blank cell is "".
    """

    table: Path
    line: int
    cells: Mapping[str, str]

    def __getitem__(self, column: str) -> str:
        return self.cells[column]

    def number(self, column: str) -> float:
        """Return the cell as a finite number."""
        value = number_or_nan(self[column])
        if not math.isfinite(value):
            raise self.error(
                f"expected a finite number in column {column}, got {self[column]!r}; correct the cell or remove the row"
            )
        return value

    def text(self, column: str) -> str:
        """Return the cell, which must not be blank."""
        if not self[column].strip():
            raise self.error(f"expected a text in column {column}, got a blank cell; fill it or remove the row")
        return self[column]

    def error(self, message: str) -> ValueError:
        """Make an error that names the file and the line."""
        return ValueError(f"{self.table}, line {self.line}: {message}")


def number_or_nan(text: str) -> float:
    """Return the number in a cell, or NaN; underscores, which Python allows within one, are no part of a number."""
    try:
        return math.nan if "_" in text else float(text)
    except ValueError:
        return math.nan


def find_table(folder: Path, name: str, expected: str, remedy: str = "") -> Path:
    """Return the file `name` in a benchmark's folder, which should hold what `expected` says."""
    table = folder / name
    if not table.is_file():
        raise ValueError(f"folder: expected {expected} in {str(folder)!r}, but there is no {name}{remedy}")
    return table


def read_csv(
    table: Path, columns: Sequence[str], *, expected: str = "the published columns", header: Sequence[str] | None = None
) -> list[Row]:
    """Read the rows of a CSV file in UTF-8, with or without a byte-order mark.

    Args:
        table: file to read.
        columns: required columns; others are kept as well.
        expected: description of the columns for the error.
        header: column names of a file whose first line does not hold them.
    """
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, fieldnames=header, restval="")
            _require_columns(table, columns, reader.fieldnames or (), expected)
            rows = [Row(table=table, line=reader.line_num, cells=cells) for cells in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table}: expected a CSV file in UTF-8, got {error}; save it as such") from error
    for row in rows:
        extra: Any = row.cells.get(None)  # pyright: ignore[reportArgumentType, reportCallIssue]
        if extra is not None:
            raise row.error(
                f"expected {len(row.cells) - 1} cells, got {len(row.cells) - 1 + len(extra)}; "
                "put a text that holds a comma in double quotes"
            )
    return _not_empty(table, rows)


def read_xlsx(table: Path, columns: Sequence[str]) -> list[Row]:
    """Read the rows of the first sheet of an .xlsx file, whose first row names the columns."""
    header, *lines = read_sheet(table) or [[]]
    _require_columns(table, columns, header, "the published columns")
    rows = [
        Row(table=table, line=line, cells=dict(zip(header, cells, strict=True)))
        for line, cells in enumerate(lines, start=2)
    ]
    return _not_empty(table, rows)


def read_sheet(table: Path) -> list[list[str]]:
    """Read the cells of the first sheet of an .xlsx file as text, row by row; a blank cell is ""."""
    pandas = extra_data("pandas", f"reading {table.name}")
    extra_data("openpyxl", f"reading {table.name}")
    try:
        data = io.BytesIO(read_regular(table, most=MAX_SHEET_BYTES))
        sheet = pandas.read_excel(
            data, header=None, nrows=MAX_SHEET_ROWS, dtype=object, keep_default_na=False, engine="openpyxl"
        )
    except Exception as error:  # openpyxl lets through what zipfile and its XML parser raise
        raise ValueError(f"{table}: expected an .xlsx sheet, got {type(error).__name__}: {error}") from error
    return [[str(cell) for cell in cells] for cells in sheet.itertuples(index=False)]


def extra_data(module: str, purpose: str) -> Any:
    """Import a module of the extra `data`."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'{purpose} needs {module}; pip install "aigiqa-reward[data]"') from error


def _require_columns(table: Path, columns: Sequence[str], header: Sequence[str], expected: str) -> None:
    if twice := sorted({column for column in columns if list(header).count(column) > 1}):
        raise ValueError(f"{table}: expected each column once, got {', '.join(twice)} several times; remove the others")
    missing = [column for column in columns if column not in header]
    if missing:
        raise ValueError(
            f"{table}: no column {', '.join(missing)}; expected {expected} "
            f"{', '.join(columns)}, got {', '.join(filter(None, header)) or 'an empty file'}"
        )


def _not_empty(table: Path, rows: list[Row]) -> list[Row]:
    if not rows:
        raise ValueError(f"{table}: expected a row per image, got the header alone")
    return rows


# --------------------------------------------------------------------------------------------- images of a table


def scored_images(
    rows: Sequence[Row],
    folder: Path,
    *,
    name: str = "name",
    prompt: str = "prompt",
    scores: Mapping[str, str],
    generators: Sequence[str],
    groups: Sequence[str] = (),
    argument: str = "folder",
    remedy: str = "put the published images there, or list only those present",
) -> ScoredImages:
    """Build scored images from the rows of a table; no image is opened.

    Args:
        rows: rows of the table, one per image.
        folder: folder that the image paths are relative to.
        name: column of the images' paths, none of which may be repeated.
        prompt: column of the prompts.
        scores: column of each score by its field of `ScoredImages`; a score without a column is NaN.
        generators: generator of each image.
        groups: group of each image; empty for the prompts.
        argument: argument to name where images are absent.
        remedy: what to do about it.
    """
    refuse_repeats(rows, name)
    names = tuple(row[name] for row in rows)
    paths = tuple(folder / image for image in names)
    refuse_absent(paths, rows[0].table.name, argument=argument, remedy=remedy)
    columns = {
        field: np.array([row.number(scores[field]) for row in rows]) if field in scores else np.full(len(rows), np.nan)
        for field in _SCORES
    }
    prompts = tuple(row[prompt] for row in rows)
    return ScoredImages(
        names=names, paths=paths, prompts=prompts, generators=tuple(generators), groups=tuple(groups), **columns
    )


def generators_of(rows: Sequence[Row], column: str, name: re.Pattern[str], form: str) -> list[str]:
    """Return the group `generator` of each row's image name, which must match `name`."""
    generators = []
    for row in rows:
        match = name.fullmatch(row[column])
        if match is None:
            raise row.error(f"expected a name of the form {form}, got {row[column]!r}")
        generators.append(match["generator"])
    return generators


def refuse_repeats(rows: Sequence[Row], column: str) -> None:
    """Raise an error if two rows have the same cell."""
    seen: set[str] = set()
    for row in rows:
        if row[column] in seen:
            raise row.error(f"{row[column]!r} is listed twice; keep one of the two")
        seen.add(row[column])


def image_folder(folder: Path, *names: str) -> Path:
    """Return the first of the folders that exists, or else the first of the names."""
    return next((folder / name for name in names if (folder / name).is_dir()), folder / names[0])


def refuse_absent(paths: Sequence[Path], listed_by: str, *, argument: str, remedy: str) -> None:
    """Raise an error if images are not there, with their number and the first of them."""
    absent = [path for path in paths if not _is_file(path)]
    if absent:
        raise ValueError(
            f"{argument}: {len(absent)} of the {len(paths)} images that {listed_by} lists are absent, the first "
            f"{str(absent[0])!r}; {remedy}"
        )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name that is too long
        return False
