"""Files that the commands write: results, copies of ranked images. Nothing is replaced by accident."""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from aigiqa_reward.cli.inputs import CommandError
from aigiqa_reward.cli.output import Format, Row, render, scored
from aigiqa_reward.utils.io import MAX_BYTES, parse_json, read_regular

if TYPE_CHECKING:
    from PIL import Image

    from aigiqa_reward.sampling import BestOfNOutput

RANKING = re.compile(r"ranking\.jsonl")
"""What `copy_ranked` writes under a name of its own."""


def check_output(file: Path | None) -> None:
    """Refuse a file that could not be written, before anything is computed.

    Raises:
        CommandError: a folder, a device, or a place without permission.
    """
    if file is None:
        return
    try:
        if file.exists() and not file.is_file():
            raise CommandError(f"--output: expected a file, got {file}; leave the option out to print on stdout")
        if file.parent.is_dir() and not os.access(file.parent, os.W_OK):
            raise CommandError(f"--output: no permission to write in {file.parent}")
    except OSError as error:
        raise CommandError(f"--output: cannot write {file}: {error.strerror}") from error


def write(file: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all.

    Raises:
        CommandError: it cannot be written.
    """
    from aigiqa_reward.utils.io import write_atomically

    try:
        write_atomically(file, data)
    except OSError as error:
        raise CommandError(f"cannot write {file}: {error.strerror}") from error


def check_folder(folder: Path | None, ours: re.Pattern[str], *, option: str, overwrite: bool) -> None:
    """Refuse a folder that holds results of an earlier run, before anything is computed.

    Args:
        folder: need not exist.
        ours: names of such results.
        option: which option named the folder.
        overwrite: allow it nevertheless.

    Raises:
        CommandError: it holds some, or cannot be read as a folder.
    """
    if folder is None or not os.path.lexists(folder):
        return
    try:
        earlier = [file.name for file in folder.iterdir() if ours.fullmatch(file.name)]
    except OSError as error:
        raise CommandError(f"{option}: expected a folder, got {folder} ({error.strerror})") from error
    if earlier and not overwrite:
        raise CommandError(f"{option}: {folder} holds the {min(earlier)} of an earlier run; --overwrite replaces it")


def check_writable(folder: Path, *, option: str) -> None:
    """Refuse a folder that files cannot be written to, before anything is computed.

    It is tried for real; what that takes is removed again.

    Args:
        folder: need not exist.
        option: which option named the folder.

    Raises:
        CommandError: it is no folder, or cannot be created or written to.
    """
    created: list[Path] = []
    try:
        if os.path.lexists(folder) and not folder.is_dir():
            raise CommandError(f"{option}: expected a folder, got the file {folder}")
        created += [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CommandError(f"{option}: cannot write in {folder}: {error.strerror}") from error
    finally:
        for place in created:
            with contextlib.suppress(OSError):
                place.rmdir()


def copy_ranked(rows: Sequence[Row], folder: Path, *, originals: Sequence[str], overwrite: bool) -> None:
    """Copy the images of a ranking into a folder as 001_NAME, 002_NAME, ..., and write its ranking.jsonl.

    Copies that an earlier ranking.jsonl in the folder lists are removed with `overwrite`, so that the folder holds one
    ranking; all other files stay.

    Args:
        rows: the ranking; rows with an error are not copied.
        folder: created if it does not exist.
        originals: paths of all images that took part, none of which is ever overwritten.
        overwrite: replace other files of the same names.

    Raises:
        CommandError: a file would be overwritten that must not be, and nothing is copied; or one cannot be read or
            written.
    """
    sources = [Path(str(row.key)) for row in rows if row.error is None]
    copies = [folder / name for name in _names(sources)]
    kept = {os.path.realpath(path) for path in originals}
    for copy in copies:
        if os.path.realpath(copy) in kept:
            raise CommandError(f"--copy-to: {copy} is itself one of the images ranked; choose another folder")
        if os.path.lexists(copy) and not overwrite:
            raise CommandError(f"--copy-to: {copy} exists; --overwrite replaces files of the same names")
    for source, copy in zip(sources, copies, strict=True):
        try:
            data = source.read_bytes()
        except OSError as error:
            raise CommandError(f"cannot copy {source}: {error.strerror}", status=1) from error
        write(copy, data)
    for earlier in sorted(_copies_of(folder) - {copy.name for copy in copies}):
        if os.path.realpath(folder / earlier) not in kept:
            _remove(folder / earlier)
    write(folder / "ranking.jsonl", render(rows, Format.JSONL).encode())


def _names(sources: Sequence[Path]) -> list[str]:
    """What the copies of a ranking's images are called, best first."""
    return [f"{place:03d}_{source.name}" for place, source in enumerate(sources, start=1)]


def _copies_of(folder: Path) -> set[str]:
    """Names of the copies in a folder that its ranking.jsonl lists; none where it is not one of ours."""
    try:
        lines = read_regular(folder / "ranking.jsonl", most=MAX_BYTES).decode("utf-8").splitlines()
        ranked = [Path(row["path"]) for row in map(parse_json, lines) if row["error"] is None]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return set(_names(ranked)) & {entry.name for entry in folder.iterdir()}


def _remove(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise CommandError(f"--copy-to: cannot remove {file} of the earlier ranking: {error.strerror}") from error


def candidate_rows(output: BestOfNOutput, prompt: str) -> list[Row]:
    """All candidates in their order, by seed; those that were dropped have an error."""
    known = output.all_correspondence or [None] * len(output.all_seeds)
    scores = zip(output.all_seeds, output.all_scores, output.all_quality, known, strict=True)
    return [
        Row(key=seed, prompt=prompt, error=output.dropped[seed])
        if seed in output.dropped
        else scored(seed, prompt, total, quality, correspondence)
        for seed, total, quality, correspondence in scores
    ]


def png(image: Image.Image, *, software: str | None = None) -> bytes:
    """The image as a PNG file, without loss; `software` is noted in it as what made it."""
    from PIL.PngImagePlugin import PngInfo

    data, notes = io.BytesIO(), PngInfo()
    if software is not None:
        notes.add_text("Software", software)
    image.save(data, format="PNG", pnginfo=notes)
    return data.getvalue()
