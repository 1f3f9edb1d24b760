"""Output of the commands: results on stdout, everything else on stderr."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from aigiqa_reward.utils.io import csv_text
from aigiqa_reward.utils.memory import keep_memory

Format = Literal["table", "jsonl", "csv"]

_STDERR = Console(stderr=True, highlight=False)
_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}
_WIDE = 100_000
"""Width in characters of a table that goes into a file or a pipe, so that nothing is folded or cut."""

_LISTED = 10  # unreadable images
_PRINTED = 60  # seconds between lines of progress where stderr is no terminal


class CommandError(Exception):
    """Ends a command with a line `error: ...`.

    Args:
        message: what is wrong, and the remedy.
        argument: name of the option that is wrong, as the command calls it.
        status: exit status: 2 for wrong usage, 1 for what failed on the way, 130 for an interruption.
    """

    def __init__(self, message: str, argument: str | None = None, *, status: int = 2) -> None:
        super().__init__(message)
        self.argument = argument
        self.status = status


def first_process() -> bool:
    """Whether this process prints for all of them (torchrun)."""
    return os.environ.get("RANK", "0") == "0"


# --------------------------------------------------------------------------------------------- the process


def prepare_process() -> None:
    """Let SIGTERM, a closing terminal and Ctrl-Break do what Ctrl-C does; lose messages where stderr is gone."""
    for name in {"SIGTERM", "SIGHUP", "SIGBREAK"} & vars(signal).keys():
        with suppress(ValueError):  # not in the main thread
            if signal.getsignal(getattr(signal, name)) is signal.SIG_DFL:  # not under nohup
                signal.signal(getattr(signal, name), signal.default_int_handler)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # diffusers loads it where it is installed
    keep_memory()
    while (spare := os.open(os.devnull, os.O_RDWR)) < 3:  # no file may take the number of a closed stream
        pass
    os.close(spare)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    if sys.stderr is sys.__stderr__:
        buffer = sys.stderr.buffer if sys.stderr else open(os.devnull, "wb")  # noqa: PTH123, SIM115
        encoding = getattr(sys.stderr, "encoding", "utf-8")
        sys.stderr = _Messages(buffer, encoding, "backslashreplace", line_buffering=True)


class _Messages(io.TextIOWrapper):
    """A text stream that loses what cannot be written, as in a terminal that is gone."""

    def write(self, text: str, /) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


# --------------------------------------------------------------------------------------------- stderr


def say(kind: str, message: object) -> None:
    """Print one line `kind: message` on stderr, whatever characters the message holds."""
    line = Text.assemble((f"{kind}:", _STYLES[kind]), " ", printable(str(message)))
    _STDERR.print(line, soft_wrap=True)


def printable(text: str) -> str:
    """Return the text with line breaks, control sequences and undecodable bytes as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def report_unreadable(entries: Sequence[tuple[str, str]], place: object) -> None:
    """Print which images were left out, and why; `place` lists all of them."""
    for path, reason in entries[:_LISTED]:
        say("error", reason if reason.startswith(f"{path}: ") else f"{path}: {reason}")
    if entries:
        rest = f"; the others are listed in {place}" if len(entries) > _LISTED else ""
        some = (
            "1 image could not be read and was"
            if len(entries) == 1
            else f"{len(entries)} images could not be read and were"
        )
        say("error", f"{some} left out{rest}")


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr, if that is a terminal; yield the function that sets how many are done."""
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not sys.stderr.isatty()
    with Progress(*columns, console=_STDERR, transient=True, redirect_stdout=False, disable=hidden) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.update(task, completed=done)


@contextmanager
def progress_text() -> Iterator[Callable[[str], None]]:
    """Show a line of text on stderr that changes in a terminal and, elsewhere, is printed once per minute."""
    hidden, printed = not sys.stderr.isatty(), time.monotonic()
    with Progress(TextColumn("{task.description}"), console=_STDERR, transient=True, disable=hidden) as bar:
        task = bar.add_task("")

        def show(text: str) -> None:
            nonlocal printed
            bar.update(task, description=text)
            if hidden and time.monotonic() - printed > _PRINTED:
                printed = time.monotonic()
                say("note", text)

        yield show


# --------------------------------------------------------------------------------------------- results


@dataclass(frozen=True, kw_only=True)
class Row:
    """One image's result.

    Attributes:
        key: path or seed.
        prompt: its prompt, if it has one.
        raw_prompt: what the file says, where the prompt was read from it.
        total: number to rank by, higher is better; None with an error.
        quality: perceptual quality.
        correspondence: correspondence to the prompt; None without a prompt.
        members: scores of each of several rewards, as `NAME.total`.
        error: reason for having no scores.
    """

    key: str | int
    prompt: str | None
    raw_prompt: str | None = None
    total: float | None = None
    quality: float | None = None
    correspondence: float | None = None
    members: Mapping[str, float | None] = field(default_factory=dict)
    error: str | None = None

    def record(self) -> dict[str, Any]:
        """Return the row's JSON object, whose keys are the columns in CSV."""
        scores = {"total": self.total, "quality": self.quality, "correspondence": self.correspondence}
        key = "seed" if isinstance(self.key, int) else "path"
        raw = {} if self.raw_prompt is None else {"raw_prompt": self.raw_prompt}
        return {key: self.key, "prompt": self.prompt, **raw, **scores, **self.members, "error": self.error}


def render(rows: Sequence[Row], form: Format, *, numbered: bool = False, terminal: bool = False) -> str:
    """Return results as text; `numbered` puts each row's rank before it in a table."""
    records = [row.record() for row in rows]
    if form == "jsonl":
        return jsonl(records)
    members = list(dict.fromkeys(name for row in rows for name in row.members))
    if form == "csv":
        raw = ["raw_prompt"] if any(row.raw_prompt is not None for row in rows) else []
        names = ["path", "prompt", *raw, "total", "quality", "correspondence", *members, "error"]
        return csv_text([names, *([record.get(name) for name in names] for record in records)])
    aspects = ("quality", "correspondence", *members)
    scores = ["total", *(name for name in aspects if any(row.get(name) is not None for row in records))]
    failed = any(row.error is not None for row in rows)
    columns = [Column("#", justify="right")] if numbered else []
    columns += [Column("image", overflow="fold"), *(Column(name, no_wrap=True) for name in scores)]
    columns += [Column("error", overflow="fold")] if failed else []
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for place, (row, record) in enumerate(zip(rows, records, strict=True), start=1):
        cells: list[Any] = [row.key, *(record.get(name) for name in scores)]
        cells = ["" if row.error else str(place), *cells] if numbered else cells
        cells += [(row.error or "").removeprefix(f"{row.key}: ")] if failed else []
        table.add_row(*map(cell, cells))
    return drawn(table, terminal=terminal)


_LINE_BREAKS = str.maketrans({"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})
"""Characters that JSON may hold unescaped, but at which some readers of lines break."""


def jsonl(records: Iterable[Mapping[str, Any]]) -> str:
    """Return one JSON object per line, without NaN, as valid UTF-8."""
    return "".join(_json(record) + "\n" for record in records)


def _json(record: Mapping[str, Any]) -> str:
    line = json.dumps(record, ensure_ascii=False, allow_nan=False)
    try:
        line.encode()
    except UnicodeEncodeError:  # a file name that is not UTF-8
        return json.dumps(record, allow_nan=False)
    return line.translate(_LINE_BREAKS)


def cell(value: float | str | None) -> Text:
    """Return a table's cell: numbers with four decimals, text without control sequences."""
    return Text(f"{value:.4f}" if isinstance(value, float) else printable(str("" if value is None else value)))


def drawn(table: Table, *, terminal: bool) -> str:
    """Return a table as text, as wide as the terminal or as its content."""
    width = shutil.get_terminal_size().columns if terminal else _WIDE
    text = io.StringIO()
    Console(file=text, width=width, force_terminal=terminal, highlight=False).print(table)
    lines = "\n".join(line.rstrip() for line in text.getvalue().split("\n"))
    return lines.strip("\n") + "\n"


def emit(text: str, *, saved: bool = False) -> None:
    """Print a result on stdout as UTF-8, as far as the reader of a pipe takes it; any other loss is an error.

    It is none where the result is `saved` in files as well.
    """
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(encoded(text))
        sys.stdout.buffer.flush()
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # the interpreter flushes once more at its end
        if not saved and not isinstance(error, BrokenPipeError):
            raise CommandError(f"cannot write the result to stdout: {error.strerror}", status=1) from error


def encoded(text: str) -> bytes:
    """Return UTF-8; bytes of a file name that are not UTF-8 become escapes."""
    return text.encode("utf-8", "backslashreplace")
