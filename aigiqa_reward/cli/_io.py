"""Files that the commands read and write: images and their prompts, YAML with options, results."""

from __future__ import annotations

import contextlib
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

from aigiqa_reward.cli._console import CommandError, first_process, progress, say
from aigiqa_reward.utils.checks import lone_surrogate
from aigiqa_reward.utils.io import image_endings, write_atomically

if TYPE_CHECKING:
    from PIL import Image

    from aigiqa_reward.datasets.base import Row
    from aigiqa_reward.images import PromptSource

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
"""A name on the Hub, owner/name."""

_KEYS = (("path",), ("name",), ("file_name", "filename"))
"""Names of a table's column of images, in any case; later ones count where none of the earlier ones is there."""

_NAME_IT = "name the column with --prompt-column"

_EMPTY_PROMPT = "the prompt is empty: correspondence to nothing has no meaning"


# --------------------------------------------------------------------------------------------- images


@dataclass(frozen=True, kw_only=True)
class Source:
    """One image to score.

    Attributes:
        path: as it was given, or the folder as it was given and the file's place in it.
        prompt: its prompt; None without prompts.
        raw_prompt: what the prompt was read from, where it is one of --prompts-from.
        error: reason why it cannot be scored, if that is known already.
    """

    path: str
    prompt: str | None = None
    raw_prompt: str | None = None
    error: str | None = None


def find_images(given: Sequence[str], *, recursive: bool, sidecars: bool = False) -> list[str]:
    """Return paths of images in the order given, each folder replaced by its image files, sorted.

    A note counts and names the other files of the folders by ending, without `sidecars` that are read for prompts.
    """
    paths: list[str] = []
    others = defaultdict[str, list[str]](list)
    for place in given:
        if not place:
            raise CommandError("got an empty path; check the variable that it came from", argument="images")
        if not os.path.isdir(place):  # noqa: PTH112  (never raises)
            paths.append(place)
            continue
        for path in _files_in(place, recursive):
            if (ending := path.suffix.lower()) in image_endings():
                paths.append(str(path))
            elif not sidecars or (ending not in (".txt", ".caption") and path.name != "metadata.jsonl"):
                others[ending].append(path.name)
    kinds = [
        f"{ending or 'without one'} ({len(names)}: {names[0]}{', ...' * (len(names) > 1)})"
        for ending, names in others.items()
    ]
    left = f"files left out by their ending: {', '.join(kinds)}"
    if not paths:
        remedy = f"; {left}; convert images that Pillow cannot read to PNG" if kinds else ""
        below = "" if recursive else "; --recursive looks into subfolders as well"
        raise CommandError(f"no images in {', '.join(given)}{remedy}{below}", argument="images")
    if kinds:
        say("note", left)
    return paths


def _files_in(folder: str, recursive: bool) -> list[Path]:
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
            found += (Path(parent, name) for name in visible)
            places = [os.path.join(parent, name) for name in subfolders]  # noqa: PTH118
            waiting += filter(os.path.islink, places)  # which os.walk leaves out
    except OSError as error:
        raise CommandError(f"cannot read the folder {error.filename}: {error.strerror}", argument="images") from error
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


# --------------------------------------------------------------------------------------------- prompts of images


def attach_prompts(
    paths: Sequence[str],
    prompts: Sequence[str],
    file: Path | None,
    column: str | None = None,
    place: PromptSource | None = None,
) -> list[Source]:
    """Give every image its prompt, of --prompt (none, one for all, or one per image), --prompts or --prompts-from.

    An image whose prompt is empty, missing in the file or ambiguous becomes a Source with an error.
    """
    _check_given(prompts, file, column)
    if place is not None:
        if prompts or file is not None:
            given = "--prompt" if prompts else "--prompts"
            raise CommandError(f"expected one source of prompts, got {given} as well", argument="prompts_from")
        with progress("reading prompts", len(paths)) as show:
            sources = []
            for path in paths:
                sources.append(_own_prompt(path, place))
                show(len(sources))
            return sources
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
    with _reading(file, "prompts"):
        from aigiqa_reward.datasets.base import find_column, prompt_column, read_rows

        rows = read_rows(file, plain=True)
        column = prompt_column(rows, column, _NAME_IT)
        key = find_column(rows, _KEYS, "keep one of them") or _column_of_names(rows, paths, column)
        texts = [row[column].strip() for row in rows]
        if key is not None:
            if unnamed := next((row for row in rows if not row[key]), None):
                raise unnamed.error(f"no {key}")
            return _looked_up(paths, file, [(row[key], text) for row, text in zip(rows, texts, strict=True)])
    if len(texts) != len(paths):
        raise CommandError(
            f"expected one line for each of the {len(paths)} images, got {len(texts)} lines in {file}; in a table "
            "that gives prompts by path or file name, expected the columns path,prompt or name,prompt",
            argument="prompts",
        )
    return [
        Source(path=path, prompt=text) if text else Source(path=path, error=_EMPTY_PROMPT)
        for path, text in zip(paths, texts, strict=True)
    ]


def _own_prompt(path: str, place: PromptSource) -> Source:
    """An image with the prompt that is in it or beside it."""
    from aigiqa_reward.images.metadata import ImageError, find_prompt

    try:
        found = find_prompt(path, place)
    except ImageError as error:
        return Source(path=path, error=str(error))
    return Source(path=path, prompt=found.text, raw_prompt=found.raw)


def _column_of_names(rows: Sequence[Row], paths: Sequence[str], prompts: str) -> str | None:
    """The column, of whatever name, that holds the name of an image, beside that of the prompts."""
    names = {Path(path).name for path in paths}
    cells = ((name, cell) for row in rows for name, cell in row.cells.items() if isinstance(cell, str))
    return next((name for name, cell in cells if name != prompts and Path(cell).name in names), None)


def _looked_up(paths: Sequence[str], file: Path, rows: Iterable[tuple[str, str]]) -> list[Source]:
    """Look images up by path, relative to the working directory or to the file's folder, or else by file name."""
    from aigiqa_reward.datasets.base import path_key

    by_path, by_name = defaultdict[str, set[str]](set), defaultdict[str, set[str]](set)
    for key, prompt in rows:
        for path in {path_key(Path(key).absolute()), path_key((file.parent / key).absolute())}:
            by_path[path].add(prompt)
        by_name[path_key(Path(key).name)].add(prompt)
    whole = [path_key(Path(path).absolute()) for path in paths]
    sharing = Counter(Path(path).name for path in set(whole))
    sources = []
    for path, image in zip(paths, whole, strict=True):
        name = Path(image).name
        found = by_path.get(image) or (by_name.get(name, set()) if sharing[name] == 1 else set())
        prompt = next(iter(found)) if len(found) == 1 else ""
        error = _EMPTY_PROMPT if found else f"no prompt for it in {file}"
        error = f"more than one prompt for it in {file}" if len(found) > 1 else error
        sources.append(Source(path=path, prompt=prompt) if prompt else Source(path=path, error=error))
    if not any(source.prompt for source in sources):
        raise CommandError(
            f"none of the {len(paths)} images has a prompt in {file}; its paths or names must be those of the images, "
            f"such as {paths[0]} (a name that several images share needs paths)",
            argument="prompts",
        )
    return sources


# --------------------------------------------------------------------------------------------- prompts to sample from


def gather_prompts(given: Sequence[str], file: Path | None, column: str | None = None) -> list[str]:
    """Return the prompts of --prompt or of --prompts, of which exactly one must be given."""
    if not given and file is None:
        raise CommandError("--prompt, --prompts: expected one of them, got none")
    _check_given(given, file, column)
    return [checked_prompt(text) for text in given] if file is None else read_prompts(file, "prompts", column)


def checked_prompt(text: str) -> str:
    """Return a prompt of --prompt; refuse blank ones and undecodable bytes."""
    if not text.strip():
        raise CommandError(f"expected a text, got {text!r}", argument="prompt")
    if fault := lone_surrogate(text):
        raise CommandError(f"{text!r} {fault}", argument="prompt")
    return text


def read_prompts(file: Path, argument: str, column: str | None = None) -> list[str]:
    """Return the prompts of a text with one per line, or of the column of a table; blank ones are left out."""
    with _reading(file, argument):
        from aigiqa_reward.datasets.base import columns_of, prompt_column, read_rows

        rows = read_rows(file, plain=True)
        if argument != "prompts" and column not in columns_of(rows):
            column = None  # that of --prompts, which need not be in another file
        column = prompt_column(rows, column, _NAME_IT)
        found = [row[column] for row in rows]
        for row in rows:
            if fault := lone_surrogate(row[column]):
                raise row.error(f"{row[column]!r:.80} {fault}")
    prompts = [text.strip() for text in found if text.strip()]
    if not prompts:
        raise CommandError(f"{file} holds no prompt; write one per line", argument=argument)
    blank = len(found) - len(prompts)
    if blank and first_process():
        say("note", f"{blank} blank {'line' if blank == 1 else 'lines'} of {file} left out")
    return prompts


def _check_given(prompts: Sequence[str], file: Path | None, column: str | None) -> None:
    if prompts and file is not None:
        raise CommandError("--prompt, --prompts: expected one of them, got both")
    if column is not None and file is None:
        raise CommandError("names a column of the table of --prompts, which is missing", argument="prompt_column")


@contextlib.contextmanager
def _reading(file: Path, argument: str) -> Iterator[None]:
    """Make errors of the command of what reading a table raises."""
    try:
        yield
    except OSError as error:
        raise CommandError(f"cannot read {file}: {error.strerror or error}", argument=argument) from error
    except (ValueError, ImportError) as error:
        raise CommandError(str(error), argument=argument) from error


def read_yaml(file: Path) -> dict[str, Any]:
    """Return the lines 'option: value' of a YAML file; values are texts or lists of texts, None for `~`."""
    import yaml

    from aigiqa_reward.datasets.base import read_text

    with _reading(file, "config"):
        text = read_text(file)
    try:
        loader = yaml.BaseLoader(text)
        node = loader.get_single_node()
        found = loader.construct_document(node) if node is not None else None
        names = Counter(key.value for key, _ in node.value) if isinstance(node, yaml.MappingNode) else Counter()
    except RecursionError as error:
        raise CommandError(f"{file} is nested too deep; expected lines 'option: value'", argument="config") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise CommandError(f"{file} is not YAML: {' '.join(str(error).split())}", argument="config") from error
    if not isinstance(found, dict):
        raise CommandError(f"{file}: expected lines 'option: value', got {type(found).__name__}", argument="config")
    for name, value in found.items():
        if names[name] > 1:
            raise CommandError(f"{file}: {name} is given twice", argument="config")
        parts = value if isinstance(value, list) else [value]
        if not isinstance(name, str) or not all(isinstance(part, str) for part in parts):
            raise CommandError(f"{file}: {name}: expected a value or a list of values", argument="config")
    return {name: None if value in ("", "~", "null") else value for name, value in found.items()}


# --------------------------------------------------------------------------------------------- output


def check_output(file: Path | None, argument: str = "output") -> None:
    """Refuse a folder, a device, a name that no file can have or a closed stdout, before anything is computed."""
    if file is None and sys.__stdout__ is None:
        raise CommandError("expected a file, as stdout is closed", argument=argument)
    try:
        usable = file is None or stat.S_ISREG(file.stat().st_mode)
    except FileNotFoundError:  # also a link that leads nowhere yet
        usable = True
    except OSError as error:
        raise CommandError(f"cannot write {file}: {error.strerror}", argument=argument) from error
    if not usable:
        raise CommandError(f"expected a file, or - for stdout, got {file}", argument=argument)


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
