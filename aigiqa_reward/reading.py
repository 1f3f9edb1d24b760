"""Reading files that anybody may have written: JSON of bounded depth, regular files of bounded size."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, is not UTF-8, or is nested deeper than can be read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


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
