"""Files that the commands read and write: images and their prompts, YAML with options, results."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
import stat
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aigiqa_reward.cli._console import CommandError, first_process, say
from aigiqa_reward.utils.io import MAX_BYTES, parse_json, write_atomically

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".tga"}
)
"""Files of a folder that count as its images, in lower case: the formats that generators and cameras write."""

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
"""A name on the Hub, owner/name."""

_EMPTY_PROMPT = "the prompt is empty: correspondence to nothing has no meaning"


# --------------------------------------------------------------------------------------------- images


@dataclass(frozen=True, kw_only=True)
class Source:
    """One image to score.

    Attributes:
        path: as it was given, or the folder as it was given and the file's place in it.
        prompt: its prompt; None without prompts.
        error: reason why it cannot be scored, if that is known already.
    """

    path: str
    prompt: str | None = None
    error: str | None = None


def find_images(given: Sequence[str], *, recursive: bool) -> list[str]:
    """Return paths of images in the order given, each folder replaced by its image files, sorted."""
    paths: list[str] = []
    for place in given:
        if not place:
            raise CommandError("got an empty path; check the variable that it came from", argument="images")
        paths += _images_in(place, recursive) if os.path.isdir(place) else [place]  # noqa: PTH112  (never raises)
    if not paths:
        below = "" if recursive else "; --recursive looks into subfolders as well"
        raise CommandError(f"no images in {', '.join(given)}{below}", argument="images")
    return paths


def _images_in(folder: str, recursive: bool) -> list[str]:
    """Follow links to folders after all others; read each real folder once."""
    found: list[Path] = []
    seen: set[str] = set()
    waiting = [folder]
    try:
        for parent, subfolders, names in (step for place in waiting for step in os.walk(place, onerror=_raise)):
            subfolders[:] = sorted(name for name in subfolders if recursive and not name.startswith("."))
            if (real := os.path.realpath(parent)) in seen:
                subfolders.clear()
                continue
            seen.add(real)
            visible = (name for name in names if not name.startswith("."))
            found += (Path(parent, name) for name in visible if Path(name).suffix.lower() in IMAGE_SUFFIXES)
            places = [os.path.join(parent, name) for name in subfolders]  # noqa: PTH118
            waiting += filter(os.path.islink, places)  # which os.walk leaves out
    except OSError as error:
        raise CommandError(f"cannot read the folder {error.filename}: {error.strerror}", argument="images") from error
    return [str(path) for path in sorted(found)]


def _raise(error: OSError) -> None:
    raise error


# --------------------------------------------------------------------------------------------- prompts of images


def attach_prompts(paths: Sequence[str], prompts: Sequence[str], file: Path | None) -> list[Source]:
    """Give every image its prompt, of --prompt (none, one for all, or one per image) or of the file of --prompts.

    An image whose prompt is empty, missing in the file or ambiguous becomes a Source with an error.
    """
    if prompts and file is not None:
        raise CommandError("--prompt, --prompts: expected one of them, got both")
    if any(not prompt.strip() for prompt in prompts):
        raise CommandError("expected a text, got an empty one; leave it out for quality alone", argument="prompt")
    if len(prompts) > 1 and len(prompts) != len(paths):
        raise CommandError(
            f"expected one prompt for all images or one for each of the {len(paths)}, got {len(prompts)}",
            argument="prompt",
        )
    if file is None:
        texts = [None] * len(paths) if not prompts else list(prompts) * (len(paths) if len(prompts) == 1 else 1)
        return [Source(path=path, prompt=text) for path, text in zip(paths, texts, strict=True)]
    text = read_text(file, "prompts")
    suffix = file.suffix.lower()
    if suffix in (".jsonl", ".ndjson", ".csv"):
        rows = _csv_rows(file, text) if suffix == ".csv" else _jsonl_rows(file, text)
        return _looked_up(paths, file, rows)
    lines = text.removesuffix("\n").split("\n") if text else []
    if len(lines) != len(paths):
        raise CommandError(
            f"expected one line for each of the {len(paths)} images, got {len(lines)} lines in {file}; a .jsonl or .csv"
            " file gives prompts by path or file name",
            argument="prompts",
        )
    return [
        Source(path=path, prompt=line) if line.strip() else Source(path=path, error=_EMPTY_PROMPT)
        for path, line in zip(paths, lines, strict=True)
    ]


def _looked_up(paths: Sequence[str], file: Path, rows: Iterable[tuple[str, str]]) -> list[Source]:
    """Look images up by path, relative to the working directory or to the file's folder, or else by file name."""
    by_path, by_name = defaultdict[str, set[str]](set), defaultdict[str, set[str]](set)
    for key, prompt in rows:
        for path in {_absolute(key), _absolute(file.parent / key)}:
            by_path[path].add(prompt)
        by_name[Path(key).name].add(prompt)
    sharing = Counter(Path(image).name for image in {_absolute(path) for path in paths})
    sources = []
    for path in paths:
        name = Path(path).name
        found = by_path.get(_absolute(path)) or (by_name.get(name, set()) if sharing[name] == 1 else set())
        prompt = next(iter(found)) if len(found) == 1 else ""
        error = _EMPTY_PROMPT if found else f"no prompt for it in {file}"
        error = f"more than one prompt for it in {file}" if len(found) > 1 else error
        sources.append(Source(path=path, prompt=prompt) if prompt.strip() else Source(path=path, error=error))
    if not any(source.prompt for source in sources):
        raise CommandError(
            f"none of the {len(paths)} images has a prompt in {file}; its paths or names must be those of the images, "
            f"such as {paths[0]} (a name that several images share needs paths)",
            argument="prompts",
        )
    return sources


def _absolute(path: str | Path) -> str:
    return os.path.normpath(Path(path).absolute())


def _jsonl_rows(file: Path, text: str) -> Iterator[tuple[str, str]]:
    for number, row in _json_lines(file, text, "prompts"):
        key = row.get("path", row.get("name")) if isinstance(row, dict) else None
        prompt = (row.get("prompt") or "") if isinstance(row, dict) else None
        if not key or not isinstance(key, str) or not isinstance(prompt, str):
            expected = 'expected {"path": "...", "prompt": "..."}'
            raise CommandError(f"{file}, line {number}: {expected}, got {str(row)[:80]}", argument="prompts")
        yield key, prompt


def _csv_rows(file: Path, text: str) -> Iterator[tuple[str, str]]:
    reader = csv.DictReader(io.StringIO(text), strict=True)
    try:
        header = reader.fieldnames or []
        column = next((name for name in ("path", "name") if name in header), None)
        if column is None or "prompt" not in header:
            raise CommandError(
                f"{file}: expected the columns path,prompt or name,prompt in the first line, got "
                f"{','.join(header) or 'none'}",
                argument="prompts",
            )
        for row in reader:
            if None in row or not row[column]:
                problem = "more cells than columns; quote texts with commas" if None in row else f"no {column}"
                raise CommandError(f"{file}, line {reader.line_num}: {problem}", argument="prompts")
            yield row[column], row["prompt"] or ""
    except csv.Error as error:
        raise CommandError(f"{file}, line {reader.line_num}: not CSV ({error})", argument="prompts") from error


# --------------------------------------------------------------------------------------------- prompts to sample from


def gather_prompts(given: Sequence[str], file: Path | None) -> list[str]:
    """Return the prompts of --prompt or of --prompts, of which exactly one must be given."""
    if bool(given) == (file is not None):
        raise CommandError(f"--prompt, --prompts: expected one of them, got {'both' if given else 'none'}")
    return [checked_prompt(text) for text in given] if file is None else read_prompts(file, "prompts")


def checked_prompt(text: str) -> str:
    """Return a prompt of --prompt; refuse blank ones and undecodable bytes."""
    if not text.strip() or text.encode(errors="ignore").decode() != text:
        raise CommandError(f"expected a text, got {text!r}", argument="prompt")
    return text


def read_prompts(file: Path, argument: str) -> list[str]:
    """Return the prompts of a file: one per line, or of JSON Lines; blank ones are left out."""
    text = read_text(file, argument)
    if file.suffix.lower() in (".jsonl", ".ndjson"):
        found = list(_prompts_of_json(file, text, argument))
    else:
        found = text.removesuffix("\n").split("\n")
    prompts = [text.strip() for text in found if text.strip()]
    if not prompts:
        raise CommandError(f"{file} holds no prompt; write one per line", argument=argument)
    blank = len(found) - len(prompts)
    if blank and first_process():
        say("note", f"{blank} blank {'line' if blank == 1 else 'lines'} of {file} left out")
    return prompts


def _prompts_of_json(file: Path, text: str, argument: str) -> Iterator[str]:
    for number, row in _json_lines(file, text, argument):
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(prompt, str) or prompt.encode(errors="ignore").decode() != prompt:
            expected = 'expected {"prompt": "..."}'
            raise CommandError(f"{file}, line {number}: {expected}, got {str(row)[:80]}", argument=argument)
        yield prompt


def _json_lines(file: Path, text: str, argument: str) -> Iterator[tuple[int, Any]]:
    """Numbers from 1 and values of the lines that are not blank."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, parse_json(line)
            except ValueError as error:
                raise CommandError(f"{file}, line {number}: not JSON ({error})", argument=argument) from error


def read_text(file: Path, argument: str) -> str:
    """Return the text of a file that was given to an option, with Unix line ends."""
    try:
        with file.open("rb") as opened:  # the size of a pipe, such as <(...), is not known before
            data = opened.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise CommandError(f"{file} holds more than {MAX_BYTES:,} bytes; split it", argument=argument)
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise CommandError(f"cannot read {file}: {error.strerror}", argument=argument) from error
    except UnicodeDecodeError as error:
        raise CommandError(f"{file} is not UTF-8 text ({error.reason})", argument=argument) from error


def read_yaml(file: Path) -> dict[str, Any]:
    """Return the lines 'option: value' of a YAML file; values are texts or lists of texts, None for `~`."""
    import yaml

    try:
        found = yaml.load(read_text(file, "config"), Loader=yaml.BaseLoader)
    except RecursionError as error:
        raise CommandError(f"{file} is nested too deep; expected lines 'option: value'", argument="config") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise CommandError(f"{file} is not YAML: {' '.join(str(error).split())}", argument="config") from error
    if not isinstance(found, dict):
        raise CommandError(f"{file}: expected lines 'option: value', got {type(found).__name__}", argument="config")
    for name, value in found.items():
        parts = value if isinstance(value, list) else [value]
        if not isinstance(name, str) or not all(isinstance(part, str) for part in parts):
            raise CommandError(f"{file}: {name}: expected a value or a list of values", argument="config")
    return {name: None if value in ("", "~", "null") else value for name, value in found.items()}


# --------------------------------------------------------------------------------------------- output


def check_output(file: Path | None) -> None:
    """Refuse a folder, a device, a name that no file can have or a closed stdout, before anything is computed."""
    if file is None and sys.__stdout__ is None:
        raise CommandError("expected a file, as stdout is closed", argument="output")
    try:
        usable = file is None or stat.S_ISREG(file.stat().st_mode)
    except FileNotFoundError:  # also a link that leads nowhere yet
        usable = True
    except OSError as error:
        raise CommandError(f"cannot write {file}: {error.strerror}", argument="output") from error
    if not usable:
        raise CommandError(f"expected a file, or - for stdout, got {file}", argument="output")


def check_writable(folder: Path) -> None:
    """Refuse an --output-dir that files cannot be written to, before anything is computed.

    A file is written to it for a test; what that takes is removed again.
    """
    created: list[Path] = []
    try:
        if os.path.lexists(folder) and not folder.is_dir():
            raise CommandError(f"expected a folder, got the file {folder}", argument="output_dir")
        created += [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CommandError(f"cannot write in {folder}: {error.strerror}", argument="output_dir") from error
    finally:
        for place in created:
            with contextlib.suppress(OSError):
                place.rmdir()


def write(file: Path, data: bytes) -> None:
    """Write a file atomically."""
    try:
        write_atomically(file, data)
    except OSError as error:
        raise CommandError(f"cannot write {file}: {error.strerror}") from error


def png(image: Image.Image) -> bytes:
    """Return the image as a PNG file."""
    data = io.BytesIO()
    image.save(data, format="PNG")
    return data.getvalue()
