"""What the command line is given: images in files and folders, and their prompts. Imports nothing heavy."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aigiqa_reward.utils.io import MAX_BYTES, parse_json

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".tga"}
)
"""Files of a folder that count as its images, in lower case: the formats that generators and cameras write."""

EMPTY_PROMPT = "the prompt is empty: correspondence to nothing has no meaning"


class CommandError(Exception):
    """Ends a command with a line `error: ...` and an exit status: 2 for wrong usage, 1 for what failed on the way."""

    def __init__(self, message: str, *, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Source:
    """One image to score.

    Attributes:
        path: as it was given, or the folder as it was given and the file's place in it.
        prompt: its prompt; None without prompts.
        error: why it cannot be scored, if that is known already.
    """

    path: str
    prompt: str | None = None
    error: str | None = None


def find_images(given: Sequence[str], *, recursive: bool) -> list[str]:
    """Paths of images in the order given, each folder replaced by its image files, sorted.

    Raises:
        CommandError: no images at all, an empty path, or a folder that cannot be read.
    """
    paths: list[str] = []
    for place in given:
        if not place:
            raise CommandError("IMAGES: got an empty path; check the variable that it came from")
        paths += _images_in(Path(place), recursive) if _is_folder(place) else [place]
    if not paths:
        where = f" in {', '.join(given)} (expected {', '.join(sorted(IMAGE_SUFFIXES))})" if given else ""
        below = "" if recursive or not given else "; --recursive looks into subfolders as well"
        raise CommandError(f"IMAGES: no images{where}; pass image files, or folders that hold some{below}")
    return paths


def _is_folder(place: str) -> bool:
    try:
        return Path(place).is_dir()
    except OSError:  # such as a name that is too long; reading it as an image says what is wrong
        return False


def _images_in(folder: Path, recursive: bool) -> list[str]:
    found: list[Path] = []
    try:
        for parent, subfolders, names in os.walk(folder, onerror=_raise):
            visible = (name for name in names if not name.startswith("."))
            found += (Path(parent, name) for name in visible if Path(name).suffix.lower() in IMAGE_SUFFIXES)
            subfolders[:] = [name for name in subfolders if recursive and not name.startswith(".")]
    except OSError as error:
        raise CommandError(f"IMAGES: cannot read the folder {error.filename}: {error.strerror}") from error
    return [str(path) for path in sorted(found)]


def _raise(error: OSError) -> None:
    raise error


# --------------------------------------------------------------------------------------------- prompts


def attach_prompts(paths: Sequence[str], prompt: str | None, prompts_file: Path | None) -> list[Source]:
    """Give every image its prompt, if there are prompts.

    An image whose prompt is empty, missing in the file or ambiguous becomes a Source with an error.

    Raises:
        CommandError: both kinds of prompts, a blank `prompt`, or a file that cannot be used.
    """
    if prompt is not None and prompts_file is not None:
        raise CommandError("--prompt, --prompts-file: expected one of them, got both")
    if prompt is not None and not prompt.strip():
        raise CommandError("--prompt: expected a text, got an empty one; leave it out for quality alone")
    if prompts_file is None:
        return [Source(path=path, prompt=prompt) for path in paths]
    text = read_text(prompts_file, "--prompts-file")
    suffix = prompts_file.suffix.lower()
    if suffix in (".jsonl", ".ndjson", ".csv"):
        rows = _csv_rows(prompts_file, text) if suffix == ".csv" else _jsonl_rows(prompts_file, text)
        return _looked_up(paths, _PromptTable(prompts_file, rows))
    lines = text.removesuffix("\n").split("\n") if text else []
    if len(lines) != len(paths):
        raise CommandError(
            f"--prompts-file: expected one line for each of the {len(paths)} images, got {len(lines)} lines in "
            f"{prompts_file}; a .jsonl or .csv file gives prompts by path or file name"
        )
    return [
        Source(path=path, prompt=line) if line.strip() else Source(path=path, error=EMPTY_PROMPT)
        for path, line in zip(paths, lines, strict=True)
    ]


def _looked_up(paths: Sequence[str], table: _PromptTable) -> list[Source]:
    images = {path: _absolute(path) for path in paths}
    sharing = Counter(Path(image).name for image in set(images.values()))
    sources = []
    for path in paths:
        prompts = table.prompts(images[path], only_one_of_its_name=sharing[Path(path).name] == 1)
        if not prompts:
            error = f"no prompt for it in {table.file}"
        elif len(prompts) > 1:
            error = f"more than one prompt for it in {table.file}"
        else:
            error = None if next(iter(prompts)).strip() else EMPTY_PROMPT
        sources.append(Source(path=path, prompt=None if error else next(iter(prompts)), error=error))
    if not any(source.prompt for source in sources):
        raise CommandError(
            f"--prompts-file: none of the {len(paths)} images has a prompt in {table.file}; its paths or names must "
            f"be those of the images, such as {paths[0]} (a name that several images share needs paths)"
        )
    return sources


class _PromptTable:
    """Prompts by path (relative to the working directory or to the file's folder) and by file name."""

    def __init__(self, file: Path, rows: Iterable[tuple[str, str]]) -> None:
        self.file = file
        self._by_path: dict[str, set[str]] = {}
        self._by_name: dict[str, set[str]] = {}
        for key, prompt in rows:
            for path in {_absolute(key), _absolute(file.parent / key)}:
                self._by_path.setdefault(path, set()).add(prompt)
            self._by_name.setdefault(Path(key).name, set()).add(prompt)

    def prompts(self, image: str, *, only_one_of_its_name: bool) -> set[str]:
        """Every prompt that may be meant for this absolute path: one if all is well."""
        if image in self._by_path:
            return self._by_path[image]
        return self._by_name.get(Path(image).name, set()) if only_one_of_its_name else set()


def _absolute(path: str | Path) -> str:
    return os.path.normpath(Path(path).absolute())


def read_text(file: Path, option: str) -> str:
    """The text of a file that was given to an option.

    Raises:
        CommandError: it cannot be read, or is no UTF-8.
    """
    try:
        with file.open("rb") as opened:  # of a pipe, as <(...) is one, no size is known before
            data = opened.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise CommandError(f"{option}: {file} holds more than {MAX_BYTES:,} bytes; give it in parts")
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise CommandError(f"{option}: cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CommandError(f"{option}: {file} is not UTF-8 text ({error.reason})") from error


def _jsonl_rows(file: Path, text: str) -> Iterable[tuple[str, str]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row: Any = parse_json(line)
        except ValueError as error:
            raise CommandError(f"--prompts-file: {file}, line {number}: not JSON ({error})") from error
        key = row.get("path", row.get("name")) if isinstance(row, dict) else None
        prompt = (row.get("prompt") or "") if isinstance(row, dict) else None
        if not key or not isinstance(key, str) or not isinstance(prompt, str):
            raise CommandError(
                f'--prompts-file: {file}, line {number}: expected {{"path": "...", "prompt": "..."}}, got {line[:80]}'
            )
        yield key, prompt


def _csv_rows(file: Path, text: str) -> Iterable[tuple[str, str]]:
    reader = csv.DictReader(io.StringIO(text), strict=True)
    try:
        header = reader.fieldnames or []
        column = next((name for name in ("path", "name") if name in header), None)
        if column is None or "prompt" not in header:
            raise CommandError(
                f"--prompts-file: {file}: expected the columns path,prompt or name,prompt in the first line, got "
                f"{','.join(header) or 'none'}"
            )
        for row in reader:
            if None in row or not row[column]:
                problem = "more cells than columns; quote texts with commas" if None in row else f"no {column}"
                raise CommandError(f"--prompts-file: {file}, line {reader.line_num}: {problem}")
            yield row[column], row["prompt"] or ""
    except csv.Error as error:
        raise CommandError(f"--prompts-file: {file}, line {reader.line_num}: not CSV ({error})") from error
