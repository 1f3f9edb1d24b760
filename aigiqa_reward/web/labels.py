"""Labels of several raters, each on disk before the next one is asked for: SQLite with a write-ahead log."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections import defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from aigiqa_reward.datasets import PreferencePairs
from aigiqa_reward.datasets.pairs import write_pairs_table
from aigiqa_reward.evaluation import krippendorff_alpha
from aigiqa_reward.utils.io import csv_text, write_atomically

Choice = Literal["first", "second", "tie", "bad"]
Table = Literal["choices", "ratings"]

RATINGS_FILE = "ratings.csv"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS choices (
    id INTEGER PRIMARY KEY, time REAL NOT NULL, rater TEXT NOT NULL,
    prompt TEXT NOT NULL, first TEXT NOT NULL, second TEXT NOT NULL,
    choice TEXT NOT NULL CHECK (choice IN ('first', 'second', 'tie', 'bad')),
    UNIQUE (rater, prompt, first, second));
CREATE TABLE IF NOT EXISTS ratings (
    id INTEGER PRIMARY KEY, time REAL NOT NULL, rater TEXT NOT NULL,
    prompt TEXT NOT NULL, path TEXT NOT NULL,
    quality REAL NOT NULL CHECK (quality BETWEEN 1 AND 5),
    correspondence REAL CHECK (correspondence BETWEEN 1 AND 5),
    UNIQUE (rater, prompt, path));
"""
_UNIT = {"choices": ("prompt", "first", "second"), "ratings": ("prompt", "path")}


@dataclass(frozen=True, order=True)
class Pair:
    """Two images of one prompt, `first` the one whose path sorts first."""

    prompt: str
    first: str
    second: str


class Labels:
    """Choices between pairs, and ratings of images, in one file.

    Every method may be called from any thread. A label is on disk when its method returns, and a rater has one per pair
    or image: a repeated one is ignored.

    Args:
        file: SQLite database, made if it is not there.
    """

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file = file
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(file, check_same_thread=False, timeout=30)
        try:
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._connection.executescript(_SCHEMA)
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{file}: expected a database of labels ({error}); move it away") from error

    def _run(self, query: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        with self._lock, self._connection:
            return self._connection.execute(query, values).fetchall()

    def choose(self, rater: str, pair: Pair, choice: Choice) -> None:
        """Keep a choice."""
        row = (time.time(), rater, pair.prompt, pair.first, pair.second, choice)
        columns = "time, rater, prompt, first, second, choice"
        self._run(f"INSERT OR IGNORE INTO choices ({columns}) VALUES (?, ?, ?, ?, ?, ?)", row)

    def rate(self, rater: str, prompt: str, path: str, quality: float, correspondence: float | None) -> None:
        """Keep a rating, of 1 to 5; `correspondence` is None without a prompt."""
        row = (time.time(), rater, prompt, path, quality, correspondence)
        columns = "time, rater, prompt, path, quality, correspondence"
        self._run(f"INSERT OR IGNORE INTO ratings ({columns}) VALUES (?, ?, ?, ?, ?, ?)", row)

    def undo(self, rater: str, table: Table) -> tuple[str, ...] | None:
        """Remove a rater's last label, and return its pair or image, prompt first."""
        last = f"SELECT MAX(id) FROM {table} WHERE rater = ?"
        found = self._run(f"DELETE FROM {table} WHERE id = ({last}) RETURNING {', '.join(_UNIT[table])}", (rater,))
        return found[0] if found else None

    def done(self, rater: str, table: Table) -> set[tuple[str, ...]]:
        """Return the pairs or images that a rater has labeled, prompt first."""
        return set(self._run(f"SELECT {', '.join(_UNIT[table])} FROM {table} WHERE rater = ?", (rater,)))

    def choices(self) -> list[tuple[str, Pair, Choice]]:
        """Return rater, pair and choice of all choices, the oldest first."""
        rows = self._run("SELECT rater, prompt, first, second, choice FROM choices ORDER BY id")
        return [(rater, Pair(prompt, first, second), choice) for rater, prompt, first, second, choice in rows]

    def pairs(self) -> PreferencePairs | None:
        """Return the choices that prefer an image of a prompt; None if there is none."""
        choices = self.choices()
        decided = [(pair, choice) for _, pair, choice in choices if choice in ("first", "second") and pair.prompt]
        if not decided:
            return None
        ordered = [(p.first, p.second) if choice == "first" else (p.second, p.first) for p, choice in decided]
        better, worse = (tuple(map(Path, side)) for side in zip(*ordered, strict=True))
        return PreferencePairs(prompts=tuple(pair.prompt for pair, _ in decided), better=better, worse=worse)

    def alphas(self) -> dict[str, float]:
        """Return Krippendorff's alpha of choices (nominal) and of ratings (interval); nan where nobody overlaps."""
        choices: dict[Hashable, list[Any]] = defaultdict(list)
        for _, pair, choice in self.choices():
            choices[pair].append(choice)
        found = {"choices": krippendorff_alpha(choices.values())}
        for aspect in ("quality", "correspondence"):
            rated: dict[Hashable, list[Any]] = defaultdict(list)
            for *image, value in self._run(f"SELECT prompt, path, {aspect} FROM ratings WHERE {aspect} NOT NULL"):
                rated[tuple(image)].append(value)
            found[aspect] = krippendorff_alpha(rated.values(), level="interval")
        return found

    def counts(self) -> Mapping[str, tuple[int, int]]:
        """Return the numbers of choices and of ratings by rater."""
        rows = self._run(
            "SELECT rater, SUM(kind = 'c'), SUM(kind = 'r') FROM (SELECT rater, 'c' AS kind FROM choices "
            "UNION ALL SELECT rater, 'r' FROM ratings) GROUP BY rater ORDER BY rater"
        )
        return {rater: (choices, ratings) for rater, choices, ratings in rows}

    def export(self, folder: Path) -> list[Path]:
        """Write `pairs.parquet` and `ratings.csv` (means over raters) into a folder, as far as there are labels.

        The first is read by `train --data pairs:FOLDER`, `evaluate --pairs pairs:FOLDER` and `finetune dpo --pairs`,
        the second by `train --data csv:FILE`.
        """
        written, pairs = [], self.pairs()
        if pairs is not None:
            rows = zip(pairs.prompts, map(str, pairs.better), map(str, pairs.worse), strict=True)
            written.append(write_pairs_table(folder, rows))
        means = (
            "SELECT path, prompt, AVG(quality), AVG(correspondence) FROM ratings WHERE prompt != '' "
            "GROUP BY path, prompt"
        )
        if rated := self._run(means):
            text = csv_text([("path", "prompt", "quality", "correspondence"), *rated])
            write_atomically(folder / RATINGS_FILE, text.encode())
            written.append(folder / RATINGS_FILE)
        return written


def pair_of(prompt: str, images: tuple[str, str]) -> Pair:
    """Make a pair of two paths."""
    first, second = sorted(map(os.fspath, images))
    return Pair(prompt, first, second)
