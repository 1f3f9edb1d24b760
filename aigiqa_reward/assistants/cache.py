"""What assistants answered before, by content: the same question about the same pixels is asked of a model once."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from aigiqa_reward.utils.io import parse_json, read_regular, write_atomically

Content: TypeAlias = Tensor | str
"""What an assistant is asked about: one image (3, H, W), or one text."""

Value = TypeVar("Value")


class DamagedEntry(ValueError):
    """A file that is not the whole entry its name promises; the message says in what."""


@dataclass(frozen=True, kw_only=True)
class Form(Generic[Value]):
    """One kind of answer as bytes.

    Attributes:
        suffix: of the file's name, with its dot.
        pack: (key, value) to the bytes of a file.
        unpack: (key, bytes) to the value; raises DamagedEntry.
    """

    suffix: str
    pack: Callable[[str, Value], bytes]
    unpack: Callable[[str, bytes], Value]


def key_of(identity: str, content: Content) -> str:
    """The hexadecimal SHA-256 of who is asked (identity) and what about.

    An image counts with its shape and its values as float32, a text with its UTF-8 bytes.
    """
    if isinstance(content, str):
        about: dict[str, Any] = {"content": "text"}
        data: Any = content.encode("utf-8", "surrogatepass")
    else:
        about = {"content": "image", "shape": list(content.shape), "dtype": "float32"}
        data = content.detach().to("cpu", torch.float32).contiguous().numpy().data
    head = json.dumps({"identity": identity, **about}, sort_keys=True)
    digest = hashlib.sha256(head.encode("utf-8") + b"\0")
    digest.update(data)
    return digest.hexdigest()


def _hash_of_tensor(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _hash_of_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _pack_tensor(key: str, value: Tensor) -> bytes:
    tensor = value.detach().cpu().contiguous()
    return save({"value": tensor}, metadata={"key": key, "sha256": _hash_of_tensor(tensor)})


def _unpack_tensor(key: str, data: bytes) -> Tensor:
    try:
        tensors = load(data)
    except (SafetensorError, RuntimeError, KeyError) as error:  # sizes that overflow, types that torch does not have
        raise DamagedEntry(f"not a whole safetensors file ({error})") from error
    length = int.from_bytes(data[:8], "little")  # of the JSON header, which `load` found valid
    told = parse_json(data[8 : 8 + length]).get("__metadata__") or {}
    if tensors.keys() != {"value"}:
        raise DamagedEntry(f"expected one tensor 'value', got {sorted(tensors)}")
    _compare(told, key, _hash_of_tensor(tensors["value"]))
    return tensors["value"]


def _pack_text(key: str, value: str) -> bytes:
    entry = {"key": key, "sha256": _hash_of_text(value), "value": value}
    return json.dumps(entry, indent=1).encode("utf-8")


def _unpack_text(key: str, data: bytes) -> str:
    try:
        entry = parse_json(data)
    except ValueError as error:  # also for bytes that are not UTF-8
        raise DamagedEntry(f"not whole JSON ({error})") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("value"), str):
        raise DamagedEntry("expected a JSON object with a text 'value'")
    _compare(entry, key, _hash_of_text(entry["value"]))
    return entry["value"]


def _compare(told: dict[str, Any], key: str, sha256: str) -> None:
    if told.get("key") != key:
        raise DamagedEntry("it carries another entry's key")
    if told.get("sha256") != sha256:
        raise DamagedEntry("its value was altered")


TENSOR: Form[Tensor] = Form(suffix=".safetensors", pack=_pack_tensor, unpack=_unpack_tensor)
"""A tensor of any shape and dtype."""

TEXT: Form[str] = Form(suffix=".json", pack=_pack_text, unpack=_unpack_text)
"""A text."""


MAX_BYTES = 20_000_000_000
"""Default bound. Chosen here: the masks of about 75,000 images, or millions of descriptions, on a part of one disk."""

_AFTER_EVICTION = 0.9
"""Share of the bound that is left after old entries were removed, so that not every later answer removes some."""

_BETWEEN_LOOKS = 0.05
"""Share of the bound that a process writes before it looks again how large the folder is, which others fill too."""

_STALE_SECONDS = 3600
"""Age at which an unfinished temporary file is taken for one of a killed process; writing an entry takes far less."""

_ENTRY = re.compile(r"[0-9a-f]{64}\.(safetensors|json)")
_TEMPORARY = re.compile(r"\.[0-9a-f]{64}\.(safetensors|json)\..+")  # as `write_atomically` names them


@dataclass(frozen=True, kw_only=True)
class _File:
    path: Path
    size: int
    last_used: float


def default_folder() -> Path:
    """`aigiqa-reward/assistants` in XDG_CACHE_HOME, or in ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "aigiqa-reward" / "assistants"


class AssistantCache:
    """Answers of assistants in a folder, addressed by who was asked and what about.

    Several processes may share a folder: an entry appears whole or not at all, two that compute the same answer both
    write it, and one that another process removed is computed again. A file that is not a whole entry counts as
    missing. Where the folder cannot be written, answers are computed and not kept.

    Args:
        folder: made when the first answer is stored; None for `default_folder()`.
        max_bytes: size at which the entries that were not used for longest are removed, down to nine tenths of it.

    Raises:
        ValueError: if `max_bytes` is not positive.

    Example:
        >>> from aigiqa_reward.assistants import AssistantCache, AttributesConfig, LLMAttributes
        >>> cache = AssistantCache("answers/", max_bytes=10**9)
        >>> reader = LLMAttributes(AttributesConfig(path_or_id="Qwen/Qwen2.5-0.5B-Instruct"), cache=cache)
        >>> cache.folder.exists()  # made with the first answer
        False
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, *, max_bytes: int = MAX_BYTES) -> None:
        if max_bytes <= 0:
            raise ValueError(
                f"max_bytes: expected a positive number of bytes, got {max_bytes}; for no cache at all, give the "
                "assistant cache=None"
            )
        self.folder = Path(folder) if folder is not None else default_folder()
        self.max_bytes = max_bytes
        self._room = 0.0  # bytes to write before the folder's size is looked at
        self._writable = True
        self._warned: set[str] = set()

    def get_or_compute(
        self,
        identity: str,
        contents: Sequence[Content],
        compute: Callable[[list[int]], Iterable[Value]],
        *,
        form: Form[Value],
    ) -> list[Value]:
        """The answer to each row, from the folder where it is known.

        Args:
            identity: what determines an answer besides the content: kind, model, revision, settings.
            contents: N images (3, H, W) or texts.
            compute: called at most once, with the unknown rows' numbers in ascending order (of equal rows, the
                first); gives their answers in that order. Each is stored as it arrives, so that an interruption
                loses only what was not yet given.
            form: TENSOR or TEXT.

        Returns:
            N answers in the rows' order; equal rows share one object.

        Warns:
            UserWarning: once each, of damaged entries and of a folder that cannot be read or written.
        """
        keys = [key_of(identity, content) for content in contents]
        known: dict[str, Value] = {}
        missing: dict[str, int] = {}
        for row, key in enumerate(keys):
            if key not in known and key not in missing and not self._read(key, form, known):
                missing[key] = row
        if missing:
            for key, value in zip(missing, compute(list(missing.values())), strict=True):
                self._write(key, form, value)
                known[key] = value
        return [known[key] for key in keys]

    def _path(self, key: str, suffix: str) -> Path:
        return self.folder / key[:2] / f"{key}{suffix}"

    def _read(self, key: str, form: Form[Value], known: dict[str, Value]) -> bool:
        """Put an entry among the known ones; False if there is none."""
        path = self._path(key, form.suffix)
        try:
            known[key] = form.unpack(key, read_regular(path, most=MAX_BYTES))
        except (FileNotFoundError, NotADirectoryError):
            return False
        except DamagedEntry as error:
            self._warn(
                "damaged", f"{path} is damaged: {error}; it is computed again and rewritten, as are any others like it"
            )
            return False
        except OSError as error:
            self._warn("unreadable", f"cannot read {path} ({error.strerror}); its answer is computed again")
            return False
        with suppress(OSError):
            os.utime(path)  # marks it as used now; not allowed in a folder shared for reading
        return True

    def _write(self, key: str, form: Form[Value], value: Value) -> None:
        if not self._writable:
            return
        data = form.pack(key, value)
        if len(data) > self.max_bytes:
            return
        try:
            write_atomically(self._path(key, form.suffix), data)
            self._room -= len(data)
            if self._room < 0:
                self._tidy()
        except OSError as error:
            self._writable = False
            self._warn(
                "unwritable",
                f"cannot write into {self.folder} ({error.strerror}); answers are computed and not kept. Pass "
                "AssistantCache(folder) with a folder that can be written, or set XDG_CACHE_HOME",
            )

    def _files(self) -> Iterator[_File]:
        """Every entry, and the temporary files of writers; nothing else that may lie in the folder."""
        for path in self.folder.glob("[0-9a-f][0-9a-f]/*"):
            if _ENTRY.fullmatch(path.name) or _TEMPORARY.fullmatch(path.name):
                with suppress(FileNotFoundError):  # removed by another process
                    status = path.stat()
                    yield _File(path=path, size=status.st_size, last_used=status.st_mtime)

    def _tidy(self) -> None:
        """Remove what killed writers left and, above the bound, the entries not used for longest, never the latest."""
        entries = []
        for file in self._files():
            if _ENTRY.fullmatch(file.path.name):
                entries.append(file)
            elif file.last_used < time.time() - _STALE_SECONDS:
                _remove(file)
        size = sum(file.size for file in entries)
        if size > self.max_bytes:
            entries.sort(key=lambda file: file.last_used)
            for file in entries[:-1]:
                if size <= _AFTER_EVICTION * self.max_bytes:
                    break
                _remove(file)
                size -= file.size
        self._room = min(_BETWEEN_LOOKS * self.max_bytes, self.max_bytes - size)

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"cache of assistants: {message}", UserWarning, stacklevel=6)


def _remove(file: _File) -> None:
    with suppress(OSError):  # gone already, or held open by a reader where the system forbids its removal
        file.path.unlink()
