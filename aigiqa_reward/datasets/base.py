"""Tables of human scores and preferences, and what their readers share: rows, images and errors with file and line."""

from __future__ import annotations

import csv
import difflib
import importlib
import io
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from aigiqa_reward.utils.checks import how_to_install
from aigiqa_reward.utils.io import MAX_BYTES, PROMPTS, parse_json, read_regular

MAX_SHEET_BYTES, MAX_SHEET_ROWS = 20_000_000, 100_000
"""Bounds of an .xlsx file and of its rows; the benchmarks' sheets have 1,080 rows at most."""

_SYNTAX = (".yaml", ".yml", ".toml", ".xml", ".html")
"""Endings of files whose lines are no texts."""

_NEAR = 0.8
"""Similarity of two names, from 0 to 1, from which one of them is taken for a misspelling."""


class _Table:
    """What both tables share: as many entries per field as rows, prompts as default groups, and subsets.

    Spaces around a prompt are dropped, and two spellings of a group are one group.
    """

    prompts: tuple[str, ...]
    groups: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(prompt.strip() for prompt in self.prompts))
        object.__setattr__(self, "groups", tuple(map(text_key, self.groups or self.prompts)))
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
            if path_key(better) == path_key(worse):
                raise ValueError(f"better, worse: expected two images, got {str(better)!r} twice at row {row}")


@dataclass(frozen=True)
class Row:
    """One row of a table: its file, its line there (the first is 1), and the texts and numbers of each column.

    Columns that the table names several times are `repeated` and cannot be used; `unit` is what `line` counts.
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
            got = f"{self.cells[column]!r}; correct the cell or remove the row"
            raise self.error(f"expected a finite number in column {column}, got {got}")
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
    found = named or find_column(rows, PROMPTS, remedy) or "prompt"
    expected = "the column" if named else "a column caption, text or"
    require_columns(rows[0].table, [found], columns_of(rows), expected, remedy)
    return found


def require_columns(
    table: Path, columns: Sequence[str], header: Sequence[str], expected: str, remedy: str, optional: Sequence[str] = ()
) -> None:
    """Raise an error that names the columns that are not there, and optional ones whose names are misspelled."""
    absent = [column for column in (*columns, *optional) if column not in header]
    others = [name for name in header if name not in (*columns, *optional)]
    close = {column: _nearest(column, others) for column in absent}
    if missing := [column for column in absent if column in columns or close[column]]:
        meant = "".join(f"; is {close[column]!r} meant?" for column in missing if close[column])
        raise ValueError(
            f"{table}: no column {', '.join(missing)}; expected {expected} {', '.join(columns)}, got "
            f"{', '.join(filter(None, header)) or 'an empty file'}{meant or ';'} {remedy}"
        )


def _nearest(name: str, names: Sequence[str]) -> str | None:
    spelled = {other.casefold(): other for other in names}
    return next((spelled[close] for close in difflib.get_close_matches(name.casefold(), spelled, 1, _NEAR)), None)


def path_key(path: str | os.PathLike[str]) -> str:
    """Return what all spellings of a path have in common: `./0.png` is `0.png`."""
    return os.path.normcase(unicodedata.normalize("NFC", os.path.normpath(path)))


def text_key(text: str) -> str:
    """Return what all spellings of a prompt or a group have in common: "a fox " is "a fox"."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def find_table(folder: Path, name: str, expected: str, remedy: str = "") -> Path:
    """Return the file `name` in a benchmark's folder, which should hold what `expected` says."""
    if not (table := folder / name).is_file():
        raise ValueError(f"folder: expected {expected} in {str(folder)!r}, but there is no {name}{remedy}")
    return table


def read_rows(table: Path, *, plain: bool = False) -> list[Row]:
    """Read a table by its ending: .tsv, .json, .jsonl, .parquet, .xlsx; a file of another ending as CSV.

    With `plain`, only .csv is read as CSV, and each line of the others is a text in the column prompt. JSON is a list
    of objects or of such texts, an object that holds one list, or an object of objects.
    """
    ending = table.suffix.lower()
    if ending == ".parquet":
        rows = _parquet_rows(table)
    elif ending == ".xlsx":
        rows = read_xlsx(table, ())
    elif ending in (".json", ".jsonl", ".ndjson"):
        rows = _json_rows(table, "entry" if ending == ".json" else "line")
    elif plain and ending in _SYNTAX:
        raise ValueError(f"{table}: expected one text per line or a table; if each line is a text, rename it to .txt")
    elif plain and ending not in (".csv", ".tsv", ".tab"):
        rows = [Row(table, n, {"prompt": line}) for n, line in enumerate(_lines(table), start=1)]
        header = [cell.strip(' "').casefold() for cell in re.split("[,\t]", rows[0].cells["prompt"])]
        if not set(PROMPTS[0]).isdisjoint(header):
            raise rows[0].error("expected a text, got the header of a table; save it as .csv or .tsv")
    else:
        delimiter = "\t" if ending in (".tsv", ".tab") else ","
        _, rows = _separated(table, delimiter=delimiter, strict=True, skipinitialspace=True)
    return _not_empty(table, rows)


def read_csv(
    table: Path, columns: Sequence[str], *, expected: str = "the published columns", header: Sequence[str] | None = None
) -> list[Row]:
    """Read the rows of a CSV file in UTF-8, with these columns at least; `header` names those of a file without one."""
    found, rows = _separated(table, header)
    require_columns(table, columns, found, expected, "rename them so")
    return _not_empty(table, rows)


def read_xlsx(table: Path, columns: Sequence[str]) -> list[Row]:
    """Read the rows of the first sheet of an .xlsx file, whose first row names the columns."""
    header, *lines = read_sheet(table) or [[]]
    require_columns(table, columns, header, "the published columns", "take the published file")
    return _not_empty(table, _rows_of(table, header, enumerate(lines, start=2)))


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
        raise ImportError(f"{purpose} needs {module}; {how_to_install('data')}") from error


def read_text(file: Path) -> str:
    """Return a text in UTF-8 of bounded size; an OSError or a ValueError else."""
    with file.open("rb") as opened:  # the size of a pipe, such as <(...), is not known before
        data = opened.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{file} holds more than {MAX_BYTES:,} bytes; split it")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason}); save it in UTF-8") from error


def _lines(file: Path) -> list[str]:
    text = io.StringIO(read_text(file), newline=None).getvalue()  # with Unix line ends
    return text.removesuffix("\n").split("\n")


def _separated(table: Path, header: Sequence[str] | None = None, **dialect: Any) -> tuple[Sequence[str], list[Row]]:
    """Return header and rows of a CSV or TSV file; quotes may be plain characters in TSV, as in PartiPrompts.tsv."""
    reader = csv.reader(io.StringIO(read_text(table), newline=""), **dialect)
    try:
        lines = [(reader.line_num, cells) for cells in reader if cells]
    except csv.Error as error:
        if dialect.get("delimiter") == "\t" and "quoting" not in dialect:
            return _separated(table, **dialect, quoting=csv.QUOTE_NONE)
        remedy = "double the quotes within a quoted text"
        raise ValueError(f"{table}, line {reader.line_num}: not CSV ({error}); {remedy}") from error
    if header is None:
        header = [name.strip() for name in lines.pop(0)[1]] if lines else ()
    return header, _rows_of(table, header, lines)


def _rows_of(
    table: Path, header: Sequence[str], lines: Iterable[tuple[int, Sequence[Any]]], unit: str = "line"
) -> list[Row]:
    repeated = {name for name, count in Counter(header).items() if count > 1}
    rows = []
    for line, cells in lines:
        blank = [""] * (len(header) - len(cells))
        row = Row(table, line, dict(zip(header, [*cells, *blank], strict=False)), repeated, unit)
        if len(cells) > len(header):
            raise row.error(
                f"more cells than columns: expected {len(header)} cells, got {len(cells)}; put a text that holds a "
                "comma in double quotes"
            )
        rows.append(row)
    return rows


def _json_rows(table: Path, unit: str) -> list[Row]:
    """Return the rows of a JSON value, or of one per line."""
    texts = [read_text(table)] if unit == "entry" else _lines(table)
    place, values = str(table), []
    try:
        for line, text in enumerate(texts, start=1):
            place = str(table) if unit == "entry" else f"{table}, line {line}"
            values += [(line, parse_json(text))] if text.strip() else []
    except ValueError as error:
        raise ValueError(f"{place}: not JSON ({error})") from error
    if unit == "entry" and values:
        found = values[0][1]
        if isinstance(found, dict):
            lists, objects = ([each for each in found.values() if isinstance(each, kind)] for kind in (list, dict))
            found = lists[0] if len(lists) == 1 else objects or [found]
        values = list(enumerate(found if isinstance(found, list) else [found], start=1))
    rows = [Row(table, n, {"prompt": value} if isinstance(value, str) else value, unit=unit) for n, value in values]
    if wrong := next((row for row in rows if not isinstance(row.cells, dict)), None):
        raise wrong.error(f'expected a text or an object {{"prompt": "..."}}, got {wrong.cells!r:.80}')
    return rows


def _parquet_rows(table: Path) -> list[Row]:
    """Return the rows with the columns that hold texts or numbers, so without images."""
    parquet, types = (extra_data(module, f"reading {table.name}") for module in ("pyarrow.parquet", "pyarrow.types"))
    table.stat()  # an error with `strerror` for a file that is not there
    try:
        with parquet.ParquetFile(table) as file:
            schema = file.schema_arrow
            names = [c.name for c in schema if not (types.is_nested(c.type) or types.is_binary(c.type))]
            columns = [column.to_pylist() for column in file.read(names).columns]
    except Exception as error:  # pyarrow has many kinds for damaged files
        raise ValueError(f"{table}: expected a whole Parquet file, got {error}") from error
    return _rows_of(table, names, enumerate(zip(*columns, strict=True), start=1), "row")


def _not_empty(table: Path, rows: list[Row]) -> list[Row]:
    if not rows:
        raise ValueError(f"{table}: expected at least one row, got none or the header alone")
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
    refuse_repeats(rows, name, folder)
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


def refuse_repeats(rows: Sequence[Row], column: str, folder: Path = Path()) -> None:
    """Raise an error if two rows have the same path in a folder, however it is spelled."""
    seen: dict[str, Row] = {}
    for row in rows:
        first = seen.setdefault(path_key((folder / row[column]).absolute()), row)
        if first is not row:
            listed = f"{first[column]!r} of {first.unit} {first.line}"
            raise row.error(f"{row[column]!r} is listed twice, first as {listed}; keep one of the two")


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
