"""What the readers share: rows of published tables, and errors that say in which file and line to look."""

from __future__ import annotations

import csv
import importlib
import math
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredImages:
    """N images with their human scores, in the benchmark's own units, higher is better. Row i is image i.

    Attributes:
        names: the benchmark's name of each image, length N.
        paths: its file.
        prompts: the prompt it was made from.
        generators: the generator, and variant, that made it.
        quality: (N,) float64, mean opinion score of perceptual quality.
        quality_std: (N,) float64, deviation between raters.
        correspondence: (N,) float64, mean opinion score of correspondence to the prompt.
        correspondence_std: (N,) float64, deviation between raters.
        groups: what a split must keep on one side; left out or None, the prompts.

    A benchmark that did not publish a score holds NaN in its place.

    Raises:
        ValueError: unequal lengths.

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
        _groups_or_prompts(self)
        for field in fields(self):
            value = getattr(self, field.name)
            if len(value) != len(self.names) or (isinstance(value, np.ndarray) and value.ndim != 1):
                raise ValueError(
                    f"{field.name}: expected {len(self.names)} entries, one an image, got shape {np.shape(value)}"
                )

    def __len__(self) -> int:
        """Number of images N."""
        return len(self.names)

    @property
    def has_quality(self) -> bool:
        """Whether any image has a score of quality."""
        return bool(np.any(~np.isnan(self.quality)))

    @property
    def has_correspondence(self) -> bool:
        """Whether any image has a score of correspondence."""
        return bool(np.any(~np.isnan(self.correspondence)))

    def subset(self, rows: np.ndarray | Sequence[int] | Sequence[bool]) -> ScoredImages:
        """The images that `rows` names: a boolean mask (N,), or row numbers in the order wanted.

        Raises:
            ValueError: a mask of another length, or row numbers that do not exist.
        """
        index = _row_numbers(rows, len(self))
        return ScoredImages(
            names=tuple(self.names[i] for i in index),
            paths=tuple(self.paths[i] for i in index),
            prompts=tuple(self.prompts[i] for i in index),
            generators=tuple(self.generators[i] for i in index),
            quality=self.quality[index],
            quality_std=self.quality_std[index],
            correspondence=self.correspondence[index],
            correspondence_std=self.correspondence_std[index],
            groups=tuple(self.groups[i] for i in index),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class PreferencePairs:
    """N choices of people between two images of one prompt. Row i is choice i; ties are left out.

    Attributes:
        prompts: the prompt that both images were made from, length N.
        better: the file of the image that was preferred.
        worse: the file of the other.
        groups: what a split must keep on one side; left out or None, the prompts.

    Raises:
        ValueError: unequal lengths, or an image preferred to itself.

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
        _groups_or_prompts(self)
        for field in fields(self):
            value = getattr(self, field.name)
            if len(value) != len(self.prompts):
                raise ValueError(f"{field.name}: expected {len(self.prompts)} entries, one a pair, got {len(value)}")
        for row, (better, worse) in enumerate(zip(self.better, self.worse, strict=True)):
            if better == worse:
                raise ValueError(f"better, worse: expected two images, got {str(better)!r} twice at row {row}")

    def __len__(self) -> int:
        """Number of pairs N."""
        return len(self.prompts)

    def subset(self, rows: np.ndarray | Sequence[int] | Sequence[bool]) -> PreferencePairs:
        """The pairs that `rows` names: a boolean mask (N,), or row numbers in the order wanted.

        Raises:
            ValueError: a mask of another length, or row numbers that do not exist.
        """
        index = _row_numbers(rows, len(self))
        return PreferencePairs(
            prompts=tuple(self.prompts[i] for i in index),
            better=tuple(self.better[i] for i in index),
            worse=tuple(self.worse[i] for i in index),
            groups=tuple(self.groups[i] for i in index),
        )


def _groups_or_prompts(table: ScoredImages | PreferencePairs) -> None:
    if not table.groups:
        object.__setattr__(table, "groups", table.prompts)


def _row_numbers(rows: np.ndarray | Sequence[int] | Sequence[bool], count: int) -> np.ndarray:
    """A mask or row numbers as row numbers of a table of `count` rows."""
    index = np.asarray(rows)
    if index.dtype == bool:
        if index.shape != (count,):
            raise ValueError(f"rows: expected a mask of shape ({count},), got {index.shape}")
        return np.flatnonzero(index)
    if index.size == 0:
        return np.zeros(0, dtype=np.int64)
    if index.ndim != 1 or index.dtype.kind not in "iu":
        raise ValueError(f"rows: expected a boolean mask or row numbers, got {index.dtype} of shape {index.shape}")
    if index.min() < -count or index.max() >= count:
        raise ValueError(f"rows: expected numbers below {count}, got {int(index.min())} to {int(index.max())}")
    return index


_SHEET_BYTES, _SHEET_ROWS, _SHEET_COLUMNS = 100_000_000, 100_000, 256
"""Most that an .xlsx file unpacks to, and its sheet holds: chosen here; the benchmarks' tables have 1,080 rows."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a table, its cells as text.

    Attributes:
        table: the file.
        line: the number of the row's last line in the file, or of its row in a sheet; the first is 1.
        cells: the text of each column; a blank cell is "".
    """

    table: Path
    line: int
    cells: Mapping[str, str]

    def __getitem__(self, column: str) -> str:
        return self.cells[column]

    def number(self, column: str) -> float:
        """The cell as a finite number.

        Raises:
            ValueError: the cell is none.
        """
        value = number_or_nan(self[column])
        if not math.isfinite(value):
            raise self.error(
                f"expected a finite number in column {column}, got {self[column]!r}; correct the cell or remove the row"
            )
        return value

    def text(self, column: str) -> str:
        """The cell, which must not be blank.

        Raises:
            ValueError: the cell is blank.
        """
        if not self[column].strip():
            raise self.error(f"expected a text in column {column}, got a blank cell; fill it or remove the row")
        return self[column]

    def error(self, message: str) -> ValueError:
        """An error that says where this row is."""
        return ValueError(f"{self.table}, line {self.line}: {message}")


def number_or_nan(text: str) -> float:
    """The number that a cell holds, or NaN; underscores, which Python allows within one, are none."""
    try:
        return math.nan if "_" in text else float(text)
    except ValueError:
        return math.nan


def find_table(folder: Path, name: str, expected: str, remedy: str = "") -> Path:
    """The file `name` in a benchmark's folder.

    Raises:
        ValueError: it is not there; says what was expected in the folder and adds the remedy.
    """
    table = folder / name
    if not table.is_file():
        raise ValueError(f"folder: expected {expected} in {str(folder)!r}, but there is no {name}{remedy}")
    return table


def read_csv(
    table: Path, columns: Sequence[str], *, expected: str = "the published columns", header: Sequence[str] | None = None
) -> list[Row]:
    """The rows of a CSV file in UTF-8, with or without a byte-order mark.

    Args:
        table: the file.
        columns: that must be there; others are kept as well.
        expected: what the columns are, for the error.
        header: names of the columns of a file that does not begin with them.

    Raises:
        ValueError: a column is missing, there is no row, a row has too many cells, or the file is no such text.
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
    """The rows of the first sheet of an .xlsx file, whose first row names the columns.

    Raises:
        ImportError: the extra `data` is not installed.
        ValueError: a column is missing, there is no row, or the file is no such sheet.
    """
    header, *lines = read_sheet(table) or [[]]
    _require_columns(table, columns, header, "the published columns")
    rows = [
        Row(table=table, line=line, cells=dict(zip(header, cells, strict=True)))
        for line, cells in enumerate(lines, start=2)
    ]
    return _not_empty(table, rows)


def read_sheet(table: Path) -> list[list[str]]:
    """The cells of the first sheet of an .xlsx file as text, row by row, all rows equally long; a blank cell is "".

    Raises:
        ImportError: the extra `data` is not installed.
        ValueError: the file is no such sheet.
    """
    pandas = extra_data("pandas", f"reading {table.name}")
    openpyxl = extra_data("openpyxl", f"reading {table.name}")
    try:
        _refuse_bombs(table, openpyxl)
        sheet = pandas.read_excel(table, header=None, dtype=object, keep_default_na=False, engine="openpyxl")
    except Exception as error:  # openpyxl lets through what zipfile and its XML parser raise
        raise ValueError(f"{table}: expected an .xlsx sheet, got {type(error).__name__}: {error}") from error
    return [[str(cell) for cell in cells] for cells in sheet.itertuples(index=False)]


def _refuse_bombs(table: Path, openpyxl: Any) -> None:
    """Look at a sheet's size before it is read as a whole, since one cell far out makes a table of all before it.

    Raises:
        ValueError: it unpacks to more bytes, or has more rows or columns, than any benchmark's table.
    """
    with zipfile.ZipFile(table) as archive:
        unpacked = sum(part.file_size for part in archive.infolist())  # no more of a part is ever read than it says
    if unpacked > _SHEET_BYTES:
        raise ValueError(f"a file that unpacks to {unpacked:,} bytes; expected at most {_SHEET_BYTES:,}")
    book = openpyxl.load_workbook(table, read_only=True, data_only=True)
    try:
        for number, row in enumerate(book.worksheets[0].iter_rows(values_only=True), start=1):
            if number > _SHEET_ROWS or len(row) > _SHEET_COLUMNS:
                raise ValueError(f"a sheet of more than {_SHEET_ROWS:,} rows or {_SHEET_COLUMNS} columns")
    finally:
        book.close()


def extra_data(module: str, purpose: str) -> Any:
    """A module of the extra `data`.

    Raises:
        ImportError: it is not installed; says what brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'{purpose} needs {module}; pip install "aigiqa-reward[data]"') from error


def generators_of(rows: Sequence[Row], column: str, name: re.Pattern[str], form: str) -> tuple[str, ...]:
    """The group `generator` of each row's image name.

    Raises:
        ValueError: a name does not match; says the form it should have.
    """
    generators = []
    for row in rows:
        match = name.fullmatch(row[column])
        if match is None:
            raise row.error(f"expected a name of the form {form}, got {row[column]!r}")
        generators.append(match["generator"])
    return tuple(generators)


def refuse_repeats(rows: Sequence[Row], column: str) -> None:
    """Check that no two rows have the same cell.

    Raises:
        ValueError: two have.
    """
    seen: set[str] = set()
    for row in rows:
        if row[column] in seen:
            raise row.error(f"{row[column]!r} is listed twice; keep one of the two")
        seen.add(row[column])


def image_folder(folder: Path, *names: str) -> Path:
    """The first of the folders that is there, or else the first of the names."""
    return next((folder / name for name in names if (folder / name).is_dir()), folder / names[0])


def refuse_absent(
    paths: Sequence[Path],
    listed_by: str,
    argument: str = "folder",
    remedy: str = "put the published images there, or list only those present",
) -> None:
    """Check that all images are files.

    Raises:
        ValueError: some are not; says how many and names the first.
    """
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


def numbers(rows: Sequence[Row], column: str) -> np.ndarray:
    """A column as (N,) float64.

    Raises:
        ValueError: a cell is not a finite number.
    """
    return np.array([row.number(column) for row in rows], dtype=np.float64)


def unpublished(count: int) -> np.ndarray:
    """(N,) NaN, in place of a score that the benchmark does not have."""
    return np.full(count, np.nan)


def _require_columns(table: Path, columns: Sequence[str], header: Sequence[str], expected: str) -> None:
    if twice := sorted({column for column in columns if list(header).count(column) > 1}):
        raise ValueError(f"{table}: expected each column once, got {', '.join(twice)} several times; remove the others")
    missing = [column for column in columns if column not in header]
    if missing:
        raise ValueError(
            f"{table}: no column {', '.join(missing)}; expected {expected} "
            f"{', '.join(columns)}, got {', '.join(header) or 'an empty file'}"
        )


def _not_empty(table: Path, rows: list[Row]) -> list[Row]:
    if not rows:
        raise ValueError(f"{table}: expected a row per image, got the header alone")
    return rows
