"""Answers of assistants in a folder, one file each, so that a model is asked about the same content once."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from aigiqa_reward.utils.io import parse_json, read_regular, write_atomically

Content: TypeAlias = Tensor | str  # one image (3, H, W), or one text
Value = TypeVar("Value", Tensor, str)  # an answer

MAX_BYTES = 20_000_000_000  # the masks of about 75,000 images, or millions of descriptions

_ENTRY = re.compile(r"[0-9a-f]{64}\.(safetensors|json)")


def key_of(identity: str, content: Content) -> str:
    """Return the SHA-256 of who is asked and what about: an image's shape and float32 values, or a text's bytes."""
    if isinstance(content, str):
        about: dict[str, Any] = {"content": "text"}
        data: Any = content.encode("utf-8", "surrogatepass")
    else:
        about = {"content": "image", "shape": list(content.shape), "dtype": "float32"}
        data = content.detach().to("cpu", torch.float32).contiguous().numpy().data
    digest = hashlib.sha256(json.dumps({"identity": identity, **about}, sort_keys=True).encode() + b"\0")
    digest.update(data)
    return digest.hexdigest()


class AssistantCache:
    """A folder of assistants' answers, tensors as safetensors and texts as JSON; several processes may share it.

    A damaged file is computed again. Where the folder cannot be written, answers are computed and not kept.

    Args:
        folder: made when the first answer is stored; None for `aigiqa-reward/assistants` in XDG_CACHE_HOME or ~/.cache.
        max_bytes: size beyond which the oldest answers are deleted, checked once per twentieth of it written.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, *, max_bytes: int = MAX_BYTES) -> None:
        if max_bytes <= 0:
            raise ValueError(f"max_bytes: expected a positive number, got {max_bytes}; for no cache pass cache=None")
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self.folder = Path(home, "aigiqa-reward", "assistants") if folder is None else Path(folder)
        self.max_bytes = max_bytes
        self._unchecked = max_bytes  # bytes written since the folder's size was last looked at

    def get_or_compute(
        self,
        identity: str,
        contents: Sequence[Content],
        compute: Callable[[list[int]], Iterable[Value]],
        *,
        form: type[Value],
    ) -> list[Value]:
        """Return the answer to each row, from the folder where it is known; equal rows share one object.

        Args:
            identity: what determines an answer besides the content: kind, model, revision, settings.
            contents: N images (3, H, W) or texts.
            compute: called at most once, with the numbers of the unknown rows in ascending order (of equal rows, the
                first); returns or yields their answers, each of which is stored as it arrives.
            form: Tensor or str.
        """
        keys = [key_of(identity, content) for content in contents]
        known: dict[str, Value] = {}
        missing: dict[str, int] = {}
        for row, key in enumerate(keys):
            if key not in known and key not in missing:
                if (value := self._read(key, form)) is None:
                    missing[key] = row
                else:
                    known[key] = value
        if missing:
            for key, value in zip(missing, compute(list(missing.values())), strict=True):
                known[key] = value
                self._write(key, value)
        return [known[key] for key in keys]

    def _read(self, key: str, form: type[Value]) -> Value | None:
        path = self.folder / f"{key}{'.safetensors' if form is Tensor else '.json'}"
        try:
            data = read_regular(path, most=MAX_BYTES)
            value = load(data)["value"] if form is Tensor else parse_json(data)
            if isinstance(value, form):
                return value
            raise ValueError(f"holds no {form.__name__}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            message = f"cache of assistants: {path} is damaged ({error}); its answer is computed again"
            warnings.warn(message, UserWarning, stacklevel=5)
            return None

    def _write(self, key: str, value: Tensor | str) -> None:
        if isinstance(value, Tensor):
            name, data = f"{key}.safetensors", save({"value": value.detach().cpu().contiguous()})
        else:
            name, data = f"{key}.json", json.dumps(value).encode()
        if len(data) > self.max_bytes:
            return
        try:
            write_atomically(self.folder / name, data)
        except OSError as error:
            warnings.warn(
                f"cache of assistants: cannot write into {self.folder} ({error.strerror}); answers are computed and "
                "not kept. Pass another folder, or set XDG_CACHE_HOME",
                UserWarning,
                stacklevel=5,
            )
        self._unchecked += len(data)
        if self._unchecked > self.max_bytes / 20:
            self._delete_oldest()
            self._unchecked = 0

    def _delete_oldest(self) -> None:
        """Delete the oldest answers beyond the bound; other files in the folder are left alone."""
        entries: list[tuple[float, int, Path]] = []
        for path in self.folder.glob("*"):
            if _ENTRY.fullmatch(path.name):
                with suppress(OSError):  # deleted by another process
                    status = path.stat()
                    entries.append((status.st_mtime, status.st_size, path))
        size = sum(entry[1] for entry in entries)
        for _, bytes_, path in sorted(entries):
            if size <= self.max_bytes:
                break
            with suppress(OSError):
                path.unlink(missing_ok=True)
            size -= bytes_
