"""Files that the commands read and write: images and their prompts, YAML with options, results."""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aigiqa_reward.cli._console import CommandError, first_process, say
from aigiqa_reward.utils.io import MAX_BYTES, write_atomically

if TYPE_CHECKING:
    from PIL import Image

_NO_PICTURES = frozenset({"BUFR", "GRIB", "HDF5", "MPEG", "EPS", "WMF"})
"""Formats that Pillow knows by name only, or draws with other programs."""

_PLAIN_LISTS = (".yaml", ".yml", ".toml", ".xml", ".html")
"""Endings of files of texts with a syntax that is not read: their lines are no prompts."""

_LISTED = 5  # endings that were left out

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
        error: reason why it cannot be scored, if that is known already.
    """

    path: str
    prompt: str | None = None
    error: str | None = None


def find_images(given: Sequence[str], *, recursive: bool) -> list[str]:
    """Return paths of images in the order given, each folder replaced by its image files, sorted.

    A note counts and names the endings of a folder's other files.
    """
    paths: list[str] = []
    others = defaultdict[str, list[str]](list)
    for place in given:
        if not place:
            raise CommandError("got an empty path; check the variable that it came from", argument="images")
        paths += _images_in(place, recursive, others) if os.path.isdir(place) else [place]  # noqa: PTH112  (never raises)
    left = ""
    if others:
        sizes = sorted(others.items(), key=lambda each: -len(each[1]))
        named = [f"{len(names)} {ending or 'without one'} ({min(names)})" for ending, names in sizes[:_LISTED]]
        more = f" and {len(sizes) - _LISTED} more endings" if len(sizes) > _LISTED else ""
        count = sum(map(len, others.values()))
        left = f"{count} {'file' if count == 1 else 'files'} left out by ending: {', '.join(named)}{more}"
        left += "; convert images that Pillow cannot read to PNG"
    if not paths:
        below = "" if recursive else "; --recursive looks into subfolders as well"
        raise CommandError(f"no images in {', '.join(given)}{left and f'; {left}'}{below}", argument="images")
    if left:
        say("note", left)
    return paths


def _images_in(folder: str, recursive: bool, others: dict[str, list[str]]) -> list[str]:
    """The images of a folder, sorted; its other files are added to `others` by ending."""
    found: list[Path] = []
    endings = image_endings()
    try:
        for parent, subfolders, names in os.walk(folder, onerror=_raise):
            for path in (Path(parent, name) for name in names if not name.startswith(".")):
                if path.suffix.lower() in endings:
                    found.append(path)
                else:
                    others[path.suffix.lower()].append(path.name)
            subfolders[:] = [name for name in subfolders if recursive and not name.startswith(".")]
    except OSError as error:
        raise CommandError(f"cannot read the folder {error.filename}: {error.strerror}", argument="images") from error
    return [str(path) for path in sorted(found)]


def image_endings() -> set[str]:
    """Return the endings of the files of a folder that count as its images, in lower case: those that Pillow reads."""
    from PIL import Image

    known = Image.registered_extensions()  # MPO, of phones, is opened as JPEG
    return {end for end, form in known.items() if form in Image.OPEN.keys() - _NO_PICTURES or form == "MPO"}


def _raise(error: OSError) -> None:
    raise error


# --------------------------------------------------------------------------------------------- prompts of images


def attach_prompts(
    paths: Sequence[str], prompts: Sequence[str], file: Path | None, column: str | None = None
) -> list[Source]:
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
    _check_column(file, column)
    if file is None:
        texts = [None] * len(paths) if not prompts else list(prompts) * (len(paths) if len(prompts) == 1 else 1)
        return [Source(path=path, prompt=text) for path, text in zip(paths, texts, strict=True)]
    if is_table(file):
        keys, texts = _keyed_prompts(file, column, {Path(path).name for path in paths})
        if keys is not None:
            return _looked_up(paths, file, zip(keys, texts, strict=True))
        kind, rule = "row", "expected the columns path,prompt or name,prompt, or one row"
    else:
        texts, kind, rule = _lines(file, "prompts"), "line", "expected one line"
    if len(texts) != len(paths):
        remedy = "; a table, such as a .csv, gives prompts by path or file name" if kind == "line" else ""
        raise CommandError(
            f"{rule} for each of the {len(paths)} images, got {len(texts)} {kind}s in {file}{remedy}",
            argument="prompts",
        )
    return [
        Source(path=path, prompt=text) if text.strip() else Source(path=path, error=_EMPTY_PROMPT)
        for path, text in zip(paths, texts, strict=True)
    ]


def _keyed_prompts(file: Path, column: str | None, names: Collection[str]) -> tuple[list[str] | None, list[str]]:
    """The images' paths or names, None without any, and the prompts of a table; `names` are those of the images."""
    from aigiqa_reward.datasets.rows import columns_of, find_column, prompt_column, read_rows

    with _reading(file, "prompts"):
        rows = read_rows(file)
        prompts = prompt_column(rows, column, _NAME_IT)
        key = find_column(rows, _KEYS, "keep one of them")
        if key is None:  # a column of another name that holds an image's
            cells = ((name, row.cells.get(name)) for row in rows for name in columns_of(rows[:1]))
            key = next((name for name, cell in cells if isinstance(cell, str) and Path(cell).name in names), None)
        for row in rows if key is not None else ():
            if not row[key]:
                raise row.error(f"no {key}")
        return None if key is None else [row[key] for row in rows], [row[prompts].strip() for row in rows]


def _looked_up(paths: Sequence[str], file: Path, rows: Iterable[tuple[str, str]]) -> list[Source]:
    """Look images up by path, relative to the working directory or to the file's folder, or else by file name."""
    from aigiqa_reward.datasets.rows import path_key

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
    if bool(given) == (file is not None):
        raise CommandError(f"--prompt, --prompts: expected one of them, got {'both' if given else 'none'}")
    _check_column(file, column)
    return [checked_prompt(text) for text in given] if file is None else read_prompts(file, "prompts", column)


def checked_prompt(text: str) -> str:
    """Return a prompt of --prompt; refuse blank ones and undecodable bytes."""
    if not text.strip() or text.encode(errors="ignore").decode() != text:
        raise CommandError(f"expected a text, got {text!r}", argument="prompt")
    return text


def read_prompts(file: Path, argument: str, column: str | None = None) -> list[str]:
    """Return the prompts of a text with one per line, or of the column of a table; blank ones are left out."""
    if is_table(file):
        from aigiqa_reward.datasets.rows import prompt_column, read_rows

        with _reading(file, argument):
            rows = read_rows(file)
            column = prompt_column(rows, column, _NAME_IT)
            found = [row[column] for row in rows]
            for row in rows:
                if row[column].encode(errors="ignore").decode() != row[column]:
                    raise row.error(f"expected a text, got {row[column]!r:.80}")
    else:
        found = _lines(file, argument)
    prompts = [text.strip() for text in found if text.strip()]
    if not prompts:
        raise CommandError(f"{file} holds no prompt; write one per line", argument=argument)
    blank = len(found) - len(prompts)
    if blank and first_process():
        say("note", f"{blank} blank {'line' if blank == 1 else 'lines'} of {file} left out")
    return prompts


def is_table(file: Path) -> bool:
    """Whether a file of prompts is read as a table; others are read line by line."""
    from aigiqa_reward.datasets.rows import TABLES

    return file.suffix.lower() in TABLES


def _check_column(file: Path | None, column: str | None) -> None:
    """Refuse --prompt-column where it has nothing to name."""
    if column is not None and (file is None or not is_table(file)):
        got = "got none" if file is None else f"got the text {file}"
        raise CommandError(f"names a column of the table of --prompts, {got}; leave it out", argument="prompt_column")


@contextlib.contextmanager
def _reading(file: Path, argument: str) -> Iterator[None]:
    """Make errors of the command of what reading a table raises."""
    try:
        yield
    except OSError as error:
        raise CommandError(f"cannot read {file}: {error.strerror or error}", argument=argument) from error
    except (ValueError, ImportError) as error:
        raise CommandError(str(error), argument=argument) from error


def _lines(file: Path, argument: str) -> list[str]:
    if file.suffix.lower() in _PLAIN_LISTS:
        text = f"expected one prompt per line or a table, got {file}; if each line is a prompt, rename it to .txt"
        raise CommandError(text, argument=argument)
    text = read_text(file, argument)
    return text.removesuffix("\n").split("\n") if text else []


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
        loader = yaml.BaseLoader(read_text(file, "config"))
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


def check_output(file: Path | None) -> None:
    """Refuse a folder or device as --output, before anything is computed."""
    if file is not None and os.path.lexists(file) and not file.is_file():
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
