"""What the readers share: rows of published tables, and errors that say in which file and line to look."""

from __future__ import annotations

import csv
import importlib
import math
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

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
