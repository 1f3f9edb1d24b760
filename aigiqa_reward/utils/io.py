"""Read files of unknown origin within bounds, and write files atomically."""

from __future__ import annotations

import errno
import io
import json
import os
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

MAX_BYTES = 200_000_000
"""Largest JSON or text that is read: chosen here, above what a run over half a million prompts notes; parsed, it still
fits the memory of a small machine."""


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, is not UTF-8, or is nested deeper than can be read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def read_json(path: str | os.PathLike[str], *, most: int = MAX_BYTES) -> Any:
    """The value of a JSON file, which is regular and of a bounded size.

    Args:
        path: the file.
        most: bytes that it may hold.

    Raises:
        OSError: as of `read_regular`.
        ValueError: as of `parse_json`.

    Example:
        >>> from pathlib import Path
        >>> from aigiqa_reward.utils.io import read_json
        >>> _ = Path("note.json").write_text('{"seed": 3}')
        >>> read_json("note.json")
        {'seed': 3}
    """
    return parse_json(read_regular(path, most=most))


def read_regular(path: str | os.PathLike[str], *, most: int) -> bytes:
    """The content of a regular file, which a symbolic link may lead to.

    A pipe or a device in the place of a file, for which reading would wait or never end, is refused.

    Args:
        path: the file.
        most: bytes that it may hold.

    Raises:
        OSError: it is not there, is no regular file, holds more, or cannot be read; with `strerror`.
    """
    file = Path(path)
    size = file.stat().st_size
    if file.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
    if not file.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(file))
    if size > most:
        raise OSError(errno.EFBIG, f"{size:,} bytes, expected at most {most:,}", str(file))
    return file.read_bytes()


def read_arrays(path: str | os.PathLike[str], *, most: int) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by name; nothing in it is unpickled.

    Args:
        path: the file.
        most: bytes that it may unpack to, as it says of itself; no more of a part is read than it says.

    Raises:
        OSError: as of `read_regular`.
        ValueError: it is no such file, is damaged, or unpacks to more.
    """
    import numpy as np

    data = io.BytesIO(read_regular(path, most=most))
    try:
        with zipfile.ZipFile(data) as archive:
            unpacked = sum(part.file_size for part in archive.infolist())
        if unpacked > most:
            raise ValueError(f"it unpacks to {unpacked:,} bytes, expected at most {most:,}")
        with np.load(data, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # numpy lets through what zipfile, zlib and its own header parser raise
        raise ValueError(str(error) or type(error).__name__) from error


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that readers see the old content or the new one, never a part."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
