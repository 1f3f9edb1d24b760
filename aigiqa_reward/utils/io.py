"""Read files of unknown origin within bounds, and write files atomically."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import secrets
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import numpy as np

MAX_BYTES = 200_000_000
"""Largest JSON or text file that is read."""

PROMPTS = (("prompt", "prompts"), ("caption", "captions", "text", "texts"))
"""Names of the column of prompts, in any case; later ones count where none of the earlier ones is there."""


def parse_json(text: str | bytes) -> Any:
    """Parse JSON; a ValueError also where it is nested too deep, or an object has one key twice."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice!r} is given twice")
    return found


def read_json(path: str | os.PathLike[str], *, most: int = MAX_BYTES) -> Any:
    """Read a regular JSON file of at most `most` bytes; an OSError or ValueError otherwise.

    Example:
        >>> from pathlib import Path
        >>> from aigiqa_reward.utils.io import read_json
        >>> _ = Path("note.json").write_text('{"seed": 3}')
        >>> read_json("note.json")
        {'seed': 3}
    """
    return parse_json(read_regular(path, most=most))


def read_regular(path: str | os.PathLike[str], *, most: int) -> bytes:
    """Read a regular file, so no endless pipe, of at most `most` bytes; an OSError with `strerror` else."""
    file = Path(path)
    size = file.stat().st_size
    if not file.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(file))
    if size > most:
        raise OSError(errno.EFBIG, f"{size:,} bytes, expected at most {most:,}", str(file))
    return file.read_bytes()


def read_arrays(path: str | os.PathLike[str], *, most: int) -> dict[str, np.ndarray]:
    """Read an .npz file's arrays of at most `most` bytes by name, without pickles; an OSError or ValueError else."""
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


_NO_PICTURES = frozenset({"BUFR", "GRIB", "HDF5", "MPEG", "EPS", "WMF"})
"""Formats that Pillow knows by name only, or draws with other programs."""


@cache
def image_endings() -> set[str]:
    """Return the endings of files that count as images, in lower case: those that Pillow reads."""
    from PIL import Image

    known = Image.registered_extensions()  # MPO, of phones, is opened as JPEG
    return {end for end, form in known.items() if form in Image.OPEN.keys() - _NO_PICTURES or form == "MPO"}


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Return rows as CSV with Unix line ends, a cell with any line end in quotes."""
    lines = []
    for row in rows:
        line = io.StringIO(newline="")
        csv.writer(line).writerow(row)  # quotes the characters of its line end, which is CR LF
        lines.append(line.getvalue().removesuffix("\r\n") + "\n")
    return "".join(lines)


_REFUSED = {errno.EACCES, errno.EBUSY, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM, errno.EXDEV}
"""Errors of mounted or locked files and of simple file systems, where a file is not replaced but written in place."""


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file, and its folder if missing, so that readers see the old content or the new one, never a part."""
    try:
        with replacement(path) as file:
            file.write(data)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        Path(path).write_bytes(data)


@contextmanager
def replacement(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file that takes the place of another on leaving the context without an error, and make its folder.

    It is closed before it is renamed, as Windows requires. A link is followed. The mode is that of the file replaced,
    or the umask's; nothing calls chmod, which some file systems refuse.
    """
    target = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)  # noqa: PTH114  (never raises)
    target.parent.mkdir(parents=True, exist_ok=True)
    mode = target.stat().st_mode & 0o777 if target.exists() else 0o666
    temporary = target.with_name(f".{secrets.token_hex(4)}.part")  # not longer than a name may be, as the target is
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def fit_name(name: str) -> str:
    """Return a file name of at most 255 bytes, as file systems take: a longer one is cut before its last 8 letters."""
    start, end = name[:-8], name[-8:]
    while len(os.fsencode(start + end)) > 255:
        start = start[:-1]
    return start + end
