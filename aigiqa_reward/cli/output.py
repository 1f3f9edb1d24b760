"""What the command line prints: results on stdout, everything else on stderr."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:
    from aigiqa_reward.models.base import ModelSpec

_STDERR = Console(stderr=True, highlight=False)
_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}
_WIDE = 100_000
"""Width in characters of a table that goes into a file or a pipe: chosen here, so that nothing is folded or cut."""


class Format(StrEnum):
    """How results are printed."""

    TABLE = "table"
    JSONL = "jsonl"
    CSV = "csv"


class ListFormat(StrEnum):
    """How the list of rewards is printed."""

    TABLE = "table"
    JSONL = "jsonl"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One image's result.

    Attributes:
        key: its path, or its seed.
        prompt: its prompt, if it has one.
        total: the number to rank by, higher is better; None with an error.
        quality: perceptual quality; None with an error.
        correspondence: correspondence to the prompt; None with an error or without a prompt.
        error: why there are no scores.
    """

    key: str | int
    prompt: str | None
    total: float | None = None
    quality: float | None = None
    correspondence: float | None = None
    error: str | None = None

    def record(self) -> dict[str, Any]:
        """The object that stands for it in JSON, and its columns in CSV."""
        key = "seed" if isinstance(self.key, int) else "path"
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {key: fields.pop("key"), **fields}


def scored(key: str | int, prompt: str | None, total: float, quality: float, correspondence: float | None) -> Row:
    """A row of these scores, or one with an error if they are not numbers that could be ranked."""
    if not all(math.isfinite(score) for score in (total, quality, correspondence or 0.0)):
        return Row(key=key, prompt=prompt, error=f"the reward gave {total} (quality {quality})")
    return Row(key=key, prompt=prompt, total=total, quality=quality, correspondence=correspondence)


# --------------------------------------------------------------------------------------------- stderr


def say(kind: str, message: object) -> None:
    """Print one line `kind: message` on stderr, whatever characters the message holds."""
    line = Text.assemble((f"{kind}:", _STYLES[kind]), " ", printable(str(message)))
    _STDERR.print(line, soft_wrap=True)


def printable(text: str) -> str:
    """The text with line breaks, control sequences and bytes that are no characters shown as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, if that is a terminal; yields the function that says how many are done."""
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not sys.stderr.isatty()
    with Progress(*columns, console=_STDERR, transient=True, redirect_stdout=False, disable=hidden) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.update(task, completed=done)


# --------------------------------------------------------------------------------------------- results


def render(rows: Sequence[Row], form: Format, *, numbered: bool = False, terminal: bool = False) -> str:
    """Results as text; `numbered` puts each row's place before it in a table, for a ranking."""
    if form is Format.JSONL:
        return jsonl(row.record() for row in rows)
    if form is Format.CSV:
        text = io.StringIO()
        writer = csv.DictWriter(
            text, ["path", "prompt", "total", "quality", "correspondence", "error"], lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(row.record() for row in rows)
        return text.getvalue()
    shown = ["total", "quality"]
    shown += [name for name in ("correspondence", "error") if any(getattr(row, name) is not None for row in rows)]
    columns = [Column("#", justify="right")] if numbered else []
    columns += [Column("image", overflow="fold")]
    columns += [
        Column(name, overflow="fold" if name == "error" else "ellipsis", no_wrap=name != "error") for name in shown
    ]
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for place, row in enumerate(rows, start=1):
        number = [Text("" if row.error else str(place))] if numbered else []
        scores = [_cell(getattr(row, name)) for name in shown if name != "error"]
        reason = [_cell((row.error or "").removeprefix(f"{row.key}: "))] if "error" in shown else []
        table.add_row(*number, _cell(row.key), *scores, *reason)
    return _drawn(table, terminal)


def render_specs(specs: Sequence[ModelSpec], form: ListFormat, *, terminal: bool = False) -> str:
    """The zoo's entries as text."""
    if form is ListFormat.JSONL:
        return jsonl(dataclasses.asdict(spec) for spec in specs)
    table = Table(Column("reward", no_wrap=True), Column("", no_wrap=True), Column("", overflow="fold"))
    table.box, table.show_header, table.pad_edge = box.SIMPLE_HEAD, False, False
    for spec in specs:
        size = f", {spec.megabytes:.1f} MB" if spec.megabytes else ""
        about = {
            "title": spec.title,
            "paper": spec.paper,
            "license": spec.license,
            "scale": spec.scale,
            "differentiable": f"{'yes' if spec.differentiable else 'no'}: {spec.gradient_path}",
            "needs prompt": "yes" if spec.needs_prompt else "no (without one: quality alone)",
            "input size": spec.input_size,
            "weights": f"{spec.weights}{size}",
        }
        for i, (name, value) in enumerate(about.items()):
            table.add_row(Text(spec.name if i == 0 else "", style="bold"), Text(name), Text(value))
        table.add_section()
    return _drawn(table, terminal)


def render_scenarios(rows: Mapping[str, Mapping[str, float]], form: ListFormat, *, terminal: bool = False) -> str:
    """Scenarios and their weights by component as text."""
    if form is ListFormat.JSONL:
        return jsonl({"scenario": name, **weights} for name, weights in rows.items())
    components = list(next(iter(rows.values())))
    table = Table(Column("scenario"), *(Column(name, justify="right") for name in components))
    table.box, table.pad_edge = box.SIMPLE_HEAD, False
    for name, weights in rows.items():
        table.add_row(_cell(name), *map(_cell, weights.values()))
    return _drawn(table, terminal)


_LINE_BREAKS = str.maketrans({"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})
"""Characters that JSON may hold unescaped, but at which some readers of lines break."""


def jsonl(records: Iterator[dict[str, Any]]) -> str:
    """One JSON object a line; never NaN, always valid UTF-8."""
    return "".join(_json(record) + "\n" for record in records)


def _json(record: dict[str, Any]) -> str:
    line = json.dumps(record, ensure_ascii=False, allow_nan=False)
    if line.isascii():
        return line
    try:
        line.encode()
    except UnicodeEncodeError:  # a file name that is not UTF-8
        return json.dumps(record, allow_nan=False)
    return line.translate(_LINE_BREAKS)


def _cell(value: float | str | None) -> Text:
    return Text(f"{value:.4f}" if isinstance(value, float) else printable(str("" if value is None else value)))


def _drawn(table: Table, terminal: bool) -> str:
    width = shutil.get_terminal_size().columns if terminal else _WIDE
    text = io.StringIO()
    Console(file=text, width=width, force_terminal=terminal, highlight=False).print(table)
    lines = "\n".join(line.rstrip() for line in text.getvalue().split("\n"))
    return lines.strip("\n") + "\n"


def emit(text: str) -> None:
    """Print a result on stdout, as UTF-8 bytes; a reader that has gone away, such as `head`, ends it silently."""
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(encoded(text))
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # the interpreter flushes once more at its end


def encoded(text: str) -> bytes:
    """UTF-8; a file name that is not shows its bytes as escapes."""
    return text.encode("utf-8", "backslashreplace")
