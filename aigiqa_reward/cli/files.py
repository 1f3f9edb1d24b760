"""Files that the commands write: results, copies of ranked images, winners. Nothing is replaced by accident."""

from __future__ import annotations

import dataclasses
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from aigiqa_reward.cli.inputs import CommandError
from aigiqa_reward.cli.output import Format, Row, render, scored

if TYPE_CHECKING:
    from aigiqa_reward.sampling import BestOfNOutput

RANKING = re.compile(r"ranking\.jsonl")
"""What `copy_ranked` writes under a name of its own."""

CANDIDATES = re.compile(r"results\.jsonl|\d{3,}_seed-?\d+\.png")
"""What `write_candidates` writes."""


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
    from aigiqa_reward.weights import write_atomically

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


def copy_ranked(rows: Sequence[Row], folder: Path, *, originals: Sequence[str], overwrite: bool) -> None:
    """Copy the images of a ranking into a folder as 001_NAME, 002_NAME, ..., and write its ranking.jsonl.

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
    copies = [folder / f"{place:03d}_{source.name}" for place, source in enumerate(sources, start=1)]
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
    write(folder / "ranking.jsonl", render(rows, Format.JSONL).encode())


def write_candidates(output: BestOfNOutput, prompt: str, folder: Path, *, overwrite: bool) -> list[Row]:
    """Write the winners of a best-of-n run as RANK_seedSEED.png, and results.jsonl with all candidates in their order.

    With `overwrite`, winners of an earlier run are removed from the folder, whatever their number.

    Returns:
        The winners, best first, by the paths they were written to.
    """
    if overwrite and folder.is_dir():
        for file in folder.iterdir():
            if CANDIDATES.fullmatch(file.name):
                file.unlink()
    known = output.all_correspondence or [None] * len(output.all_seeds)
    rows: dict[int, Row] = {}
    for seed, total, quality, correspondence in zip(
        output.all_seeds, output.all_scores, output.all_quality, known, strict=True
    ):
        reason = output.dropped.get(seed)
        failed = Row(key=seed, prompt=prompt, error=reason)
        rows[seed] = scored(seed, prompt, total, quality, correspondence) if reason is None else failed
    winners = []
    for place, (seed, image) in enumerate(zip(output.seeds, output.images, strict=True), start=1):
        file, data = folder / f"{place:03d}_seed{seed}.png", io.BytesIO()
        image.save(data, format="PNG")
        write(file, data.getvalue())
        winners.append(dataclasses.replace(rows[seed], key=str(file)))
    write(folder / "results.jsonl", render(list(rows.values()), Format.JSONL).encode())
    return winners
