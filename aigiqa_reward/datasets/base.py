"""Tables of human scores and preferences, and what their readers share: rows, images and errors with file and line."""

from __future__ import annotations

import csv
import importlib
import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from aigiqa_reward.utils.io import read_regular

MAX_SHEET_BYTES, MAX_SHEET_ROWS = 20_000_000, 100_000
"""Bounds of an .xlsx file and of its rows; the benchmarks' sheets have 1,080 rows at most."""

_EXTRA = "\0"
"""Key of the cells beyond the header's."""


class _Table:
    """What both tables share: as many entries per field as rows, prompts as default groups, and subsets."""

    prompts: tuple[str, ...]
    groups: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.groups:
            object.__setattr__(self, "groups", self.prompts)
        for name, value in vars(self).items():
            if len(value) != len(self) or (isinstance(value, np.ndarray) and value.ndim != 1):
                raise ValueError(f"{name}: expected {len(self)} entries, one per row, got shape {np.shape(value)}")

    def __len__(self) -> int:
        """Number of rows N."""
        return len(self.prompts)

    def subset(self, rows: np.ndarray | Sequence[int] | Sequence[bool]) -> Self:
        """Select rows by a boolean mask (N,), or by row numbers in the order wanted."""
        index, count = np.asarray(rows), len(self)
        if index.dtype == bool and index.shape == (count,):
            index = np.flatnonzero(index)
        elif index.size == 0:
            index = np.zeros(0, dtype=np.int64)
        elif index.ndim != 1 or index.dtype.kind not in "iu" or index.min() < -count or index.max() >= count:
            raise ValueError(
                f"rows: expected a boolean mask of shape ({count},) or row numbers below {count}, got {index.dtype} of "
                f"shape {index.shape}"
            )
        values: dict[str, Any] = {
            name: value[index] if isinstance(value, np.ndarray) else tuple(value[i] for i in index)
            for name, value in vars(self).items()
        }
        return replace(self, **values)  # pyright: ignore[reportArgumentType, reportReturnType, reportCallIssue]


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredImages(_Table):
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
        >>> unknown = np.full(2, np.nan)
        >>> images = ScoredImages(
        ...     names=("a", "b"),
        ...     paths=(Path("a.png"), Path("b.png")),
        ...     prompts=("a red fox", "a red fox"),
        ...     generators=("sdxl", "flux"),
        ...     quality=np.array([3.1, 4.2]),
        ...     quality_std=unknown,
        ...     correspondence=unknown,
        ...     correspondence_std=unknown,
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

    @property
    def has_quality(self) -> bool:
        """Whether any image has a quality score."""
        return not np.isnan(self.quality).all()

    @property
    def has_correspondence(self) -> bool:
        """Whether any image has a correspondence score."""
        return not np.isnan(self.correspondence).all()


@dataclass(frozen=True, kw_only=True, eq=False)
class PreferencePairs(_Table):
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
        super().__post_init__()
        for row, (better, worse) in enumerate(zip(self.better, self.worse, strict=True)):
            if better == worse:
                raise ValueError(f"better, worse: expected two images, got {str(better)!r} twice at row {row}")


@dataclass(frozen=True)
class Row:
    """One row of a table: its file, its line there (the first is 1), and the text of each column."""

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
    if not (table := folder / name).is_file():
        raise ValueError(f"folder: expected {expected} in {str(folder)!r}, but there is no {name}{remedy}")
    return table


def read_csv(
    table: Path, columns: Sequence[str], *, expected: str = "the published columns", header: Sequence[str] | None = None
) -> list[Row]:
    """Read the rows of a CSV file in UTF-8, with these columns at least; `header` names those of a file without one."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, fieldnames=header, restval="", restkey=_EXTRA)
            _require_columns(table, columns, reader.fieldnames or (), expected)
            rows = [Row(table, reader.line_num, cells) for cells in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table}: expected a CSV file in UTF-8, got {error}; save it as such") from error
    for row in rows:
        if extra := row.cells.get(_EXTRA):
            named = len(row.cells) - 1
            raise row.error(
                f"expected {named} cells, got {named + len(extra)}; put a text that holds a comma in double quotes"
            )
    return _not_empty(table, rows)


def read_xlsx(table: Path, columns: Sequence[str]) -> list[Row]:
    """Read the rows of the first sheet of an .xlsx file, whose first row names the columns."""
    header, *lines = read_sheet(table) or [[]]
    _require_columns(table, columns, header, "the published columns")
    return _not_empty(table, [Row(table, n, dict(zip(header, cells, strict=True))) for n, cells in enumerate(lines, 2)])


def read_sheet(table: Path) -> list[list[str]]:
    """Read the cells of the first sheet of an .xlsx file as text, row by row; a blank cell is ""."""
    pandas, _ = (extra_data(module, f"reading {table.name}") for module in ("pandas", "openpyxl"))
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
        raise ImportError(
            f'{purpose} needs {module}; pip install ".[data]" (in a checkout of aigiqa-reward)'
        ) from error


def _require_columns(table: Path, columns: Sequence[str], header: Sequence[str], expected: str) -> None:
    if twice := sorted({column for column in columns if list(header).count(column) > 1}):
        raise ValueError(f"{table}: expected each column once, got {', '.join(twice)} several times; remove the others")
    if missing := [column for column in columns if column not in header]:
        raise ValueError(
            f"{table}: no column {', '.join(missing)}; expected {expected} "
            f"{', '.join(columns)}, got {', '.join(filter(None, header)) or 'an empty file'}"
        )


def _not_empty(table: Path, rows: list[Row]) -> list[Row]:
    if not rows:
        raise ValueError(f"{table}: expected a row per image, got the header alone")
    return rows


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
        field.name: np.array([row.number(scores[field.name]) if field.name in scores else np.nan for row in rows])
        for field in fields(ScoredImages)
        if field.type == "np.ndarray"
    }
    prompts = tuple(row[prompt] for row in rows)
    return ScoredImages(
        names=names, paths=paths, prompts=prompts, generators=tuple(generators), groups=tuple(groups), **columns
    )


def generators_of(rows: Sequence[Row], column: str, name: re.Pattern[str], form: str) -> list[str]:
    """Return the first group of `name` in each row's image name, which must match it."""
    matches = [name.fullmatch(row[column]) for row in rows]
    for row, match in zip(rows, matches, strict=True):
        if match is None:
            raise row.error(f"expected a name of the form {form}, got {row[column]!r}")
    return [match[1] for match in matches if match]


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
    if absent := [path for path in paths if not os.path.isfile(path)]:  # noqa: PTH113 (False for a too long name)
        raise ValueError(
            f"{argument}: {len(absent)} of the {len(paths)} images that {listed_by} lists are absent, the first "
            f"{str(absent[0])!r}; {remedy}"
        )
