"""Find images in folders, globs, tables and tars, local or at any URL of fsspec, and stream their bytes by shard."""

from __future__ import annotations

import json
import posixpath
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import fsspec
from fsspec.core import url_to_fs

from aigiqa_reward.datasets.base import PROMPTS, extra_data, require_columns
from aigiqa_reward.utils.io import image_endings, parse_json

if TYPE_CHECKING:
    from aigiqa_reward.images import PromptSource

FILES_PER_SHARD = 1000
"""Single files that one task reads in order, and rows of one file of results."""

_TABLES = (".parquet", ".tar", ".tar.gz", ".tgz", ".jsonl")
_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes")
_PATH_COLUMNS = ("path", "image_path", "file_name", "filename", "file", "url", "image_url")
_PROMPT_COLUMNS = tuple(name for group in PROMPTS for name in group)
_STAMPS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")
_TEXTS = (".txt", ".caption", ".prompt")  # members of a WebDataset that are the prompt
_REMEDY = "name the columns with --image-column and --prompt-column"
_DAMAGE = (tarfile.TarError, EOFError, zlib.error)
_AT_ONCE = 32  # footers that are read at a time


class Item(NamedTuple):
    """An image file's content, or the error why it could not be read."""

    path: str
    prompt: str | None
    data: bytes = b""
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Files:
    """Single image files, as (path, prompt)."""

    entries: tuple[tuple[str, str | None], ...]

    @property
    def rows(self) -> int:
        """Number of images."""
        return len(self.entries)

    def read(self) -> Iterator[Item]:
        """Yield the images in order."""
        return (_read_file(path, prompt) for path, prompt in self.entries)


@dataclass(frozen=True, kw_only=True)
class RowGroup:
    """A row group of a Parquet file, whose first row is row `first` of the file; columns that it lacks are None."""

    url: str
    group: int
    first: int
    rows: int
    image: str
    path: str | None
    prompt: str | None

    def read(self) -> Iterator[Item]:
        """Yield the images in order."""
        parquet = extra_data("pyarrow.parquet", f"reading {self.url}")
        names = [name for name in dict.fromkeys((self.image, self.path, self.prompt)) if name]
        with _open(self.url) as opened:
            batches = parquet.ParquetFile(opened).iter_batches(64, row_groups=[self.group], columns=names)
            rows = (cells for batch in batches for cells in batch.to_pylist())
            for row, cells in enumerate(rows, self.first):
                yield self._item(cells, row)

    def _item(self, cells: dict[str, Any], row: int) -> Item:
        image, prompt = cells[self.image], cells.get(self.prompt or "")
        named, prompt = cells.get(self.path or ""), None if prompt is None else str(prompt)
        if isinstance(image, dict):  # as the datasets of Hugging Face
            named, image = named or image.get("path"), image["bytes"] or image.get("path")
        path = str(named) if isinstance(image, bytes) and named else f"{self.url}::{row}"
        if isinstance(image, str):
            return _read_file(_beside(self.url, image), prompt)
        return Item(path, prompt, image or b"", None if image else f"{path}: no image in column {self.image}")


@dataclass(frozen=True, kw_only=True)
class Tar:
    """A WebDataset: images, and beside them prompts as NAME.txt or in NAME.json."""

    url: str
    size: int
    prompt: str | None
    rows: int | None = None

    def read(self) -> Iterator[Item]:
        """Yield the images in order; what follows damaged bytes is lost, with an error."""
        key, images, prompt = "", list[Item](), None
        try:
            with _open(self.url) as opened, tarfile.open(fileobj=opened, mode="r|*") as tar:
                for member in tar:
                    name = posixpath.basename(member.name)
                    if not member.isfile() or name.startswith("."):
                        continue
                    if (found := posixpath.join(posixpath.dirname(member.name), name.split(".")[0])) != key:
                        yield from (image._replace(prompt=prompt) for image in images)
                        key, images, prompt = found, [], None
                    ending = posixpath.splitext(name)[1].lower()
                    if ending in image_endings():
                        images.append(Item(f"{self.url}::{member.name}", None, tar.extractfile(member).read()))  # pyright: ignore[reportOptionalMemberAccess]
                    elif ending in (*_TEXTS, ".json"):
                        prompt = self._text(ending, tar.extractfile(member).read()) or prompt  # pyright: ignore[reportOptionalMemberAccess]
        except _DAMAGE as error:
            images.append(
                Item(self.url, None, error=f"{self.url}: cannot be read further, it may be damaged ({error})")
            )
        yield from (image._replace(prompt=prompt) for image in images)

    def _text(self, ending: str, data: bytes) -> str | None:
        try:
            if ending != ".json":
                return None if self.prompt else data.decode("utf-8").strip()
            cells = json.loads(data)
            name = self.prompt or next((name for name in _PROMPT_COLUMNS if name in cells), "")
            return None if cells.get(name) is None else str(cells[name])
        except (ValueError, AttributeError):
            return None


Shard: TypeAlias = Files | RowGroup | Tar


def find_shards(
    inputs: Sequence[str],
    *,
    recursive: bool = False,
    image_column: str | None = None,
    prompt_column: str | None = None,
    prompts_from: PromptSource | None = None,
) -> tuple[list[Shard], list[Any]]:
    """Return the shards of folders, globs, files and URLs, and what identifies their content, as JSON.

    Args:
        inputs: folders or globs of images and of the tables below; image files; Parquet files, with a column of image
            bytes or of paths; WebDataset tars; JSON Lines of paths.
        recursive: whether to look into subfolders.
        image_column: column of the images in tables; by default found by its name.
        prompt_column: column of the prompts in tables; by default found by its name, None where there is none.
        prompts_from: where each image's own prompt will be read, if it is not in tables or tars.

    Raises:
        ValueError: nothing is there, a place cannot be reached, a column is missing, or prompts are not at
            `prompts_from`.
    """
    shards, identity, images = list[Shard](), list[Any](), list[tuple[str, str | None]]()
    parquet = list[str]()
    for given in inputs:
        for url, info in _listed(given, recursive):
            if url != given and posixpath.basename(url) == "metadata.jsonl":
                continue  # a sidecar, which names the images beside it
            identity.append([url, info.get("size"), str(next((info[n] for n in _STAMPS if info.get(n)), ""))])
            if url.lower().endswith(".parquet"):
                parquet.append(url)
            elif url.lower().endswith(".jsonl"):
                images += _jsonl(url, image_column, prompt_column)
            elif url.lower().endswith(_TABLES):
                shards.append(Tar(url=url, size=info.get("size") or 0, prompt=prompt_column))
            else:
                images.append((url, None))
    for start in range(0, len(images), FILES_PER_SHARD):
        shards.append(Files(entries=tuple(images[start : start + FILES_PER_SHARD])))
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for groups in pool.map(lambda url: _row_groups(url, image_column, prompt_column), parquet):
            shards += groups
    if not any(shard.rows != 0 for shard in shards):
        kinds = "images, .parquet, .tar or .jsonl files"
        below = "" if recursive else "; --recursive looks into subfolders as well"
        raise ValueError(f"images: expected {kinds} with at least one row, got none in {', '.join(inputs)}{below}")
    if prompts_from is not None:
        _check_prompts_from(shards, prompts_from)
    return shards, identity


def _check_prompts_from(shards: Sequence[Shard], place: PromptSource) -> None:
    """Refuse prompts that tables have as well, and sidecars of what is no local file."""
    for shard in shards:
        entries = shard.entries if isinstance(shard, Files) else [(shard.url, shard.prompt)]
        if named := next((path for path, prompt in entries if prompt is not None), None):
            raise ValueError(f"prompts_from: a table gives the prompts of {named} already; leave it out")
        far = next((path for path, _ in entries if not isinstance(shard, Files) or "://" in path), None)
        if far is not None and place != "embedded":
            text = f"{place!r} looks beside local image files, got {far}"
            raise ValueError(f"prompts_from: {text}; use 'embedded', or leave it out for prompts in tables and tars")


def _listed(given: str, recursive: bool) -> list[tuple[str, dict[str, Any]]]:
    """The files of one input, absolute or with their protocol, with what the file system knows of each."""
    try:
        fs, root = url_to_fs(given)
        if fs.isdir(root):
            found, named = fs.find(root, maxdepth=None if recursive else 1, detail=True), False
        elif fs.exists(root):
            found, named = {root: fs.info(root)}, True
        else:
            found, named = fs.glob(root, detail=True) if any(c in root for c in "*?[") else {}, False
            if not found:
                raise FileNotFoundError("no such file or folder")
    except Exception as error:  # each file system raises its own
        reason = str(error) or type(error).__name__
        raise ValueError(f"images: cannot read {given}: {reason}") from error
    local = "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))
    wanted = (*image_endings(), *_TABLES)
    return [
        (path if local else fs.unstrip_protocol(path), info)
        for path, info in sorted(found.items())
        if info["type"] != "directory"
        and (named or (path.lower().endswith(wanted) and not posixpath.basename(path).startswith(".")))
    ]


def _jsonl(url: str, image_column: str | None, prompt_column: str | None) -> list[tuple[str, str | None]]:
    entries = []
    with _reading(url), _open(url) as opened:
        for number, line in enumerate(opened, 1):
            if not line.strip():
                continue
            cells = parse_json(line)
            if not isinstance(cells, dict):
                raise ValueError(f"line {number}: expected an object with a path, got {type(cells).__name__}")
            image = _column(url, list(cells), image_column, (*_PATH_COLUMNS, *_IMAGE_COLUMNS))
            prompt = _column(url, list(cells), prompt_column, _PROMPT_COLUMNS, optional=True)
            text = cells[prompt] if prompt else None
            entries.append((_beside(url, str(cells[image])), None if text is None else str(text)))
    return entries


def _row_groups(url: str, image_column: str | None, prompt_column: str | None) -> list[RowGroup]:
    parquet = extra_data("pyarrow.parquet", f"reading {url}")
    with _reading(url), _open(url) as opened:
        file = parquet.ParquetFile(opened)
        names, metadata = file.schema_arrow.names, file.metadata
        image = _column(url, names, image_column, (*_IMAGE_COLUMNS, *_PATH_COLUMNS))
        path = _column(url, names, None, _PATH_COLUMNS, optional=True)
        prompt = _column(url, names, prompt_column, _PROMPT_COLUMNS, optional=prompt_column is None)
    groups, first = [], 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        columns = {"image": str(image), "path": path, "prompt": prompt}
        groups.append(RowGroup(url=url, group=group, first=first, rows=rows, **columns))
        first += rows
    return groups


class _reading:
    """Make a ValueError that names the table of what reading it raises."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, ImportError):
            text = str(error)
            raise ValueError(f"images: {text if self.url in text else f'cannot read {self.url}: {text}'}") from error


def _column(
    url: str, header: Sequence[str], given: str | None, usual: Sequence[str], *, optional: bool = False
) -> str | None:
    """The column of that name, else the first whose name is usual; None where there is none and it is optional."""
    found = given or next((name for usually in usual for name in header if name.casefold() == usually), None)
    if found not in header and not (optional and given is None):
        expected = "the column" if given else "a column of images, such as"
        require_columns(Path(url), [found or usual[0]], header, expected, _REMEDY)
    return found


def _beside(table: str, path: str) -> str:
    """A path in a table, relative to the table's folder."""
    return path if "://" in path or Path(path).is_absolute() else posixpath.join(posixpath.dirname(table), path)


def _open(url: str) -> Any:
    return fsspec.open(url, "rb")


def _read_file(path: str, prompt: str | None) -> Item:
    try:
        with _open(path) as opened:
            return Item(path, prompt, opened.read())
    except FileNotFoundError:
        return Item(path, prompt, error=f"{path}: no such file")
    except Exception as error:  # each file system raises its own
        return Item(path, prompt, error=f"{path}: cannot be read ({error})")
