"""What assistants answered before, by content: the same question about the same pixels is asked of a model once."""

from __future__ import annotations

import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from aigiqa_reward.assistants._entries import Content, DamagedEntry, Form, Value, key_of
from aigiqa_reward.reading import read_regular
from aigiqa_reward.weights import write_atomically

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
