"""Reader of Pick-a-Pic in its published parquet layout.

Source: Y. Kirstain et al., "Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation", NeurIPS
2023, arXiv 2305.01569; https://huggingface.co/datasets/yuvalkirstain/pickapic_v1.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aigiqa_reward.datasets.base import PreferencePairs, extra_data

_IMAGES = ("jpg_0", "jpg_1")
_LIGHT = ("caption", "label_0", "label_1", "ranking_id")
_JUDGED = "has_label"
_LABELS = ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5))
_ROWS_AT_ONCE, _ROWS_OF_TEXT = 32, 4096
"""Rows of images (about 10 MB) and of texts in memory; version 1 has 204 GB in 616,259 rows of two images."""

_SHARD = re.compile(r"(?P<part>.+)-\d{5}-of-\d{5}.*\.parquet")


class _Choice(NamedTuple):
    """Row of a file whose people chose one of its two images, 0 or 1."""

    row: int
    caption: str
    ranking: int
    chosen: int

    def image(self, folder: Path, which: int) -> Path:
        return folder / f"{self.ranking}_{which}.jpg"


def read_pickapic(path: str | os.PathLike[str], *, images_to: str | os.PathLike[str] | None = None) -> PreferencePairs:
    """Read the choices, and write their images out once, because in the parquet file they are bytes.

    The images of a choice become `{ranking_id}_0.jpg` and `{ranking_id}_1.jpg`, as published; files that are already
    there are kept. A tie (both labels 0.5) gives no pair, nor does a row whose `has_label`, where the column is there,
    is false (our inference: nobody judged it). The group of a pair is its caption.

    Args:
        path: parquet file, or a folder of the files of one part (train, validation, ...). Columns: caption, jpg_0,
            jpg_1 (bytes), label_0, label_1 (1 chosen, 0 not, 0.5 tie), ranking_id.
        images_to: folder for the images. None: beside the parquet file, `{its name}_images`; in the folder of several
            files, `images`.

    Example:
        >>> import io
        >>> import pandas
        >>> from PIL import Image
        >>> from aigiqa_reward.datasets import read_pickapic
        >>> file = io.BytesIO()
        >>> Image.new("RGB", (64, 64)).save(file, format="JPEG")
        >>> row = {"caption": "a red fox", "jpg_0": file.getvalue(), "jpg_1": file.getvalue()}
        >>> choice = {"label_0": 1.0, "label_1": 0.0, "ranking_id": 7}
        >>> pandas.DataFrame([row | choice]).to_parquet("train.parquet")
        >>> pairs = read_pickapic("train.parquet")
        >>> pairs.better[0].name, pairs.worse[0].name
        ('7_0.jpg', '7_1.jpg')
    """
    source = Path(path)
    beside = source / "images" if source.is_dir() else source.with_name(f"{source.stem}_images")
    folder = beside if images_to is None else Path(images_to)
    places: dict[int, str] = {}
    choices: list[_Choice] = []
    for file in _parquet_files(source):
        found = list(_read_choices(file, places))
        _write_images(file, found, folder)
        choices += found
    if not choices:
        raise ValueError(f"path: expected at least one choice in {str(source)!r}, got ties alone or no row")
    return PreferencePairs(
        prompts=tuple(choice.caption for choice in choices),
        better=tuple(choice.image(folder, choice.chosen) for choice in choices),
        worse=tuple(choice.image(folder, 1 - choice.chosen) for choice in choices),
    )


def _parquet_files(source: Path) -> list[Path]:
    files = sorted(source.glob("*.parquet")) if source.is_dir() else [source]
    if not files or not files[0].is_file():
        raise ValueError(f"path: expected a parquet file of Pick-a-Pic, or a folder of them, found none at {source!s}")
    parts = {match["part"] for match in map(_SHARD.fullmatch, (file.name for file in files)) if match}
    if len(parts) > 1:
        raise ValueError(
            f"path: expected the files of one part, got those of {', '.join(sorted(parts))} in {str(source)!r}; "
            "put each part in a separate folder"
        )
    return files


def _rows(file: Path, columns: Sequence[str], at_once: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the cells of each row, reading some rows at a time."""
    parquet = extra_data("pyarrow.parquet", f"reading {file.name}")
    number = 0
    try:
        with parquet.ParquetFile(file) as opened:
            names = opened.schema_arrow.names
            if missing := [column for column in (*_LIGHT, *_IMAGES) if column not in names]:
                raise ValueError(f"no column {', '.join(missing)} in {', '.join(names)}")
            for batch in opened.iter_batches(at_once, columns=list(columns)):
                for row in batch.to_pylist():
                    yield number, row
                    number += 1
    except Exception as error:  # pyarrow has many kinds for damaged files
        expected = f"a whole parquet file with the columns {', '.join((*_LIGHT, *_IMAGES))}"
        raise ValueError(f"{file}: expected {expected}, got {error}; download it again") from error


def _read_choices(file: Path, places: dict[int, str]) -> Iterator[_Choice]:
    """Yield the rows that state a choice; `places` gathers the place of each ranking_id."""
    for number, row in _rows(file, (*_LIGHT, _JUDGED), _ROWS_OF_TEXT):
        where = f"{file}, row {number} (the first is 0)"
        ranking, caption = row["ranking_id"], row["caption"]
        if not isinstance(ranking, int) or ranking < 0:
            raise ValueError(f"{where}: expected ranking_id to be a number from 0, got {ranking!r}")
        if ranking in places:
            raise ValueError(f"{where}: ranking_id {ranking} is that of {places[ranking]} as well; keep one of the two")
        places[ranking] = where
        if not row.get(_JUDGED, True):
            continue
        labels = (row["label_0"], row["label_1"])
        if labels not in _LABELS:
            raise ValueError(
                f"{where}: expected label_0 and label_1 to be 1 and 0, 0 and 1, or 0.5 twice, got "
                f"{labels[0]} and {labels[1]}; remove the row"
            )
        if not isinstance(caption, str):
            raise ValueError(f"{where}: expected a text in column caption, got {caption!r}; remove the row")
        if labels[0] != labels[1]:
            yield _Choice(row=number, caption=caption, ranking=ranking, chosen=labels.index(1.0))


def _write_images(file: Path, choices: list[_Choice], folder: Path) -> None:
    """Write the images that are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    absent = {c.row: c for c in choices if not all(c.image(folder, which).is_file() for which in (0, 1))}
    for number, row in _rows(file, _IMAGES, _ROWS_AT_ONCE) if absent else ():
        if number not in absent:
            continue
        for which, column in enumerate(_IMAGES):
            if not isinstance(row[column], bytes) or not row[column]:
                raise ValueError(
                    f"{file}, row {number} (the first is 0): expected the bytes of an image in column {column}, got "
                    f"{row[column]!r:.50}; remove the row"
                )
            target = absent[number].image(folder, which)
            part = target.with_name(f".{target.name}.{os.getpid()}.part")
            part.write_bytes(row[column])
            part.replace(target)
