"""Rows of tables in CSV, TSV, JSON, JSON Lines, Parquet and xlsx, their columns, and keys to match rows by."""

from __future__ import annotations

import csv
import difflib
import importlib
import io
import math
import os
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aigiqa_reward.utils.io import MAX_BYTES, parse_json, read_regular

MAX_SHEET_BYTES, MAX_SHEET_ROWS = 20_000_000, 100_000
"""Bounds of an .xlsx file and of its rows; the benchmarks' sheets have 1,080 rows at most."""

MAX_PARQUET_ROWS = 5_000_000
"""Most rows of a Parquet file that is read as a whole; DiffusionDB has 2 million prompts."""

TABLES = (".csv", ".tsv", ".tab", ".json", ".jsonl", ".ndjson", ".parquet", ".xlsx")
"""Endings of the files that `read_rows` reads, in lower case."""

PROMPTS = (("prompt", "prompts"), ("caption", "captions", "text", "texts"))
"""Names of the column of prompts, in any case; later ones count where none of the earlier ones is there."""

_NEAR = 0.8
"""Similarity of two names, from 0 to 1, from which one of them is taken for a misspelling."""


# --------------------------------------------------------------------------------------------- keys


def path_key(path: str | os.PathLike[str]) -> str:
    """Return what all spellings of a path have in common: `./0.png` is `0.png`."""
    return os.path.normcase(unicodedata.normalize("NFC", os.path.normpath(path)))


def text_key(text: str) -> str:
    """Return what all spellings of a prompt or a group have in common: "a fox " is "a fox"."""
    return " ".join(unicodedata.normalize("NFC", text).split())


# --------------------------------------------------------------------------------------------- rows and columns


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        table: its file.
        line: its line there, or its number among the entries of a JSON or the rows of a Parquet file; the first is 1.
        cells: its texts and numbers by column.
        repeated: columns that the table names several times, which cannot be used.
        unit: what `line` counts.
    """

    table: Path
    line: int
    cells: Mapping[str, Any]
    repeated: Collection[str] = ()
    unit: str = "line"

    def __getitem__(self, column: str) -> str:
        """Return the text in a cell; "" for null."""
        value = self._cell(column)
        if not isinstance(value, str | None):
            raise self.error(f"expected a text in column {column}, got {value!r:.80}")
        return value or ""

    def number(self, column: str) -> float:
        """Return the cell as a finite number."""
        value = number_or_nan(self._cell(column))
        if not math.isfinite(value):
            raise self.error(
                f"expected a finite number in column {column}, got {self.cells[column]!r}; correct the cell or remove "
                "the row"
            )
        return value

    def error(self, message: str) -> ValueError:
        """Make an error that names the file and the line."""
        return ValueError(f"{self.table}, {self.unit} {self.line}: {message}")

    def _cell(self, column: str) -> Any:
        if column in self.repeated:
            raise ValueError(f"{self.table}: expected each column once, got {column} several times; remove the others")
        if column not in self.cells:
            raise self.error(f"expected {column}, got {', '.join(self.cells) or 'nothing'}; add it")
        return self.cells[column]


def number_or_nan(cell: Any) -> float:
    """Return the number in a cell, or NaN; underscores, which Python allows within one, are no part of a number."""
    try:
        return math.nan if isinstance(cell, bool) or "_" in str(cell) else float(cell)
    except (ValueError, TypeError, OverflowError):
        return math.nan


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Return the names of all columns; objects of JSON may have different ones."""
    return list(dict.fromkeys(name for row in rows for name in row.cells))


def find_column(rows: Sequence[Row], names: Iterable[Sequence[str]], remedy: str) -> str | None:
    """Return the column with a name of the first group that is there, in any case; an error if there are several."""
    for group in names:
        found = [name for name in columns_of(rows) if name.casefold() in group]
        if len(found) > 1:
            raise ValueError(f"{rows[0].table}: expected one column {group[0]}, got {', '.join(found)}; {remedy}")
        if found:
            return found[0]
    return None


def prompt_column(rows: Sequence[Row], named: str | None = None, remedy: str = "rename the column of prompts") -> str:
    """Return the column of prompts: the one `named`, or the one whose name is in `PROMPTS`."""
    found = find_column(rows, PROMPTS, remedy) if named is None else named
    expected = "a column caption, text or" if named is None else "the column"
    require_columns(rows[0].table, [found or "prompt"], columns_of(rows), expected, remedy if named is None else "")
    return str(found)


def require_columns(
    table: Path, columns: Sequence[str], header: Sequence[str], expected: str, remedy: str = ""
) -> None:
    """Raise an error that names the absent columns, and the nearest name of those that are there."""
    if missing := [column for column in columns if column not in header]:
        close = _nearest(missing[0], header)
        remedy = f"did you mean {close!r}? {remedy[:1].upper()}{remedy[1:]}".strip() if close else remedy
        raise ValueError(
            f"{table}: no column {', '.join(missing)}; expected {expected} {', '.join(columns)}, got "
            f"{', '.join(filter(None, header)) or 'an empty file'}{f'; {remedy}' if remedy else ''}"
        )


def refuse_misspelled(table: Path, columns: Sequence[str], header: Sequence[str]) -> None:
    """Raise an error if an optional column is not there, but another one has nearly its name."""
    for column in columns:
        others = [name for name in header if name not in columns]
        if column not in header and (close := _nearest(column, others)):
            raise ValueError(
                f"{table}: the column {close!r} is not used, and its name is close to {column}; rename it to {column}, "
                "or remove it"
            )


def _nearest(name: str, names: Sequence[str]) -> str | None:
    spelled = {other.casefold(): other for other in names}
    return next((spelled[close] for close in difflib.get_close_matches(name.casefold(), spelled, 1, _NEAR)), None)


# --------------------------------------------------------------------------------------------- reading


def read_rows(table: Path) -> list[Row]:
    """Read the rows of a table in the form that its ending says, of which `TABLES` has all; others are read as CSV.

    JSON is a list of objects or of texts, which become the column prompt; or an object that holds one such list, has a
    list per column, or an object per row. An OSError or a ValueError where it cannot be read.
    """
    ending = table.suffix.lower()
    if ending == ".parquet":
        rows = _parquet_rows(table)
    elif ending == ".xlsx":
        rows = read_xlsx(table, ())
    elif ending == ".json":
        entries = enumerate(_entries(table, _parsed(str(table), _text(table, "JSON"))), start=1)
        rows = [_json_row(table, number, entry, "entry") for number, entry in entries]
    elif ending in (".jsonl", ".ndjson"):
        lines = enumerate(io.StringIO(_text(table, "JSON Lines"), newline=None), start=1)
        filled = ((number, line) for number, line in lines if line.strip())
        rows = [_json_row(table, number, _parsed(f"{table}, line {number}", line), "line") for number, line in filled]
    else:
        _, rows = _separated(table, "\t" if ending in (".tsv", ".tab") else ",")
    return _not_empty(table, rows)


def read_csv(
    table: Path, columns: Sequence[str], *, expected: str = "the published columns", header: Sequence[str] | None = None
) -> list[Row]:
    """Read the rows of a CSV file in UTF-8, with these columns at least; `header` names those of a file without one."""
    found, rows = _separated(table, ",", header=header, strict=False)
    require_columns(table, columns, found, expected)
    return _not_empty(table, rows)


def read_xlsx(table: Path, columns: Sequence[str]) -> list[Row]:
    """Read the rows of the first sheet of an .xlsx file, whose first row names the columns."""
    header, *lines = read_sheet(table) or [[]]
    require_columns(table, columns, header, "the published columns")
    repeated = _repeated(header)
    return _not_empty(
        table, [Row(table, n, dict(zip(header, cells, strict=True)), repeated) for n, cells in enumerate(lines, 2)]
    )


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
        raise ImportError(f'{purpose} needs {module}; pip install "aigiqa-reward[data]"') from error


def _text(table: Path, form: str) -> str:
    try:
        return read_regular(table, most=MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{table}: expected a {form} file in UTF-8, got {error}; save it as such") from error


def _separated(
    table: Path,
    delimiter: str,
    *,
    header: Sequence[str] | None = None,
    strict: bool = True,
    quoting: Any = csv.QUOTE_MINIMAL,
) -> tuple[Sequence[str], list[Row]]:
    """Return header and rows of a CSV or TSV file; `strict` refuses a cell with text after its closing quote.

    In a TSV file that has such a cell, quotes are characters of the texts, as in PartiPrompts.tsv.
    """
    text = io.StringIO(_text(table, "CSV"), newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=strict, skipinitialspace=strict, quoting=quoting)
    try:
        lines = [(reader.line_num, cells) for cells in reader if cells]
    except csv.Error as error:
        if delimiter == "\t" and quoting != csv.QUOTE_NONE:
            return _separated(table, delimiter, quoting=csv.QUOTE_NONE)
        remedy = "double the quotes within a quoted text"
        raise ValueError(f"{table}, line {reader.line_num}: not CSV ({error}); {remedy}") from error
    if header is None:
        header = [name.strip() for name in lines.pop(0)[1]] if lines else ()
    repeated = _repeated(header)
    rows = []
    for line, cells in lines:
        row = Row(table, line, dict(zip(header, cells + [""] * (len(header) - len(cells)), strict=False)), repeated)
        if len(cells) > len(header):
            raise row.error(
                f"more cells than columns: expected {len(header)} cells, got {len(cells)}; put a text that holds a "
                "comma in double quotes"
            )
        rows.append(row)
    return header, rows


def _parsed(place: str, text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{place}: not JSON ({error})") from error


def _entries(table: Path, value: Any) -> list[Any]:
    """Return the list of rows that a JSON value holds."""
    if isinstance(value, dict):
        columns = [list(cells.values()) if isinstance(cells, dict) else cells for cells in value.values()]
        lists = [cells for cells in value.values() if isinstance(cells, list)]
        if len(lists) == 1:
            return lists[0]
        if any(name.casefold() in names for name in value for names in PROMPTS):
            if all(isinstance(cells, list) for cells in columns) and len(set(map(len, columns))) == 1:
                return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
        elif value and all(isinstance(cells, dict) for cells in value.values()):
            return list(value.values())
    if not isinstance(value, list):
        raise ValueError(f'{table}: expected a list of texts or of objects {{"prompt": "..."}}, got {value!r:.80}')
    return value


def _json_row(table: Path, number: int, entry: Any, unit: str) -> Row:
    row = Row(table, number, {"prompt": entry} if isinstance(entry, str) else entry, unit=unit)
    if not isinstance(row.cells, dict):
        raise row.error(f'expected a text or an object {{"prompt": "..."}}, got {entry!r:.80}')
    return row


def _parquet_rows(table: Path) -> list[Row]:
    """Return the rows with the columns that hold texts or numbers, so without images."""
    parquet, types = (extra_data(module, f"reading {table.name}") for module in ("pyarrow.parquet", "pyarrow.types"))
    table.stat()  # an error with `strerror` for a file that is not there
    try:
        with parquet.ParquetFile(table) as file:
            if file.metadata.num_rows > MAX_PARQUET_ROWS:
                raise ValueError(f"{file.metadata.num_rows:,} rows, of which {MAX_PARQUET_ROWS:,} are read at most")
            schema = file.schema_arrow
            heavy = {c.name for c in schema if types.is_nested(c.type) or types.is_binary(c.type)}
            found = file.read([name for name in schema.names if name not in heavy]).to_pylist()
    except Exception as error:  # pyarrow has many kinds for damaged files
        raise ValueError(f"{table}: expected a whole Parquet file, got {error}") from error
    repeated = _repeated(schema.names)
    return [Row(table, number, cells, repeated, "row") for number, cells in enumerate(found, start=1)]


def _repeated(header: Sequence[str]) -> frozenset[str]:
    return frozenset(name for name, count in Counter(header).items() if count > 1)


def _not_empty(table: Path, rows: list[Row]) -> list[Row]:
    if not rows:
        raise ValueError(f"{table}: expected at least one row, got none or the header alone")
    return rows
