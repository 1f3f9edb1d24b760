"""Reader of Pick-a-Pic in its published parquet layout.

Source: Y. Kirstain et al., "Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation", NeurIPS
2023, arXiv 2305.01569; https://huggingface.co/datasets/yuvalkirstain/pickapic_v1.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aigiqa_reward.datasets.base import PreferencePairs, extra_data

_IMAGES = ("jpg_0", "jpg_1")
_LIGHT = ("caption", "label_0", "label_1", "ranking_id")
_JUDGED = "has_label"
_LABELS = ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5))
_ROWS_AT_ONCE = 32
"""Rows of images held in memory: chosen here; about 10 MB, as version 1 has 204 GB in 616,259 rows of two images."""

_ROWS_OF_TEXT = 4096
"""Rows of prompts and labels held in memory: chosen here, since a small file may say one long text in all its rows."""

_SHARD = re.compile(r"(?P<part>.+)-\d{5}-of-\d{5}.*\.parquet")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Choice:
    """Row `row` of a file: which of its two images, 0 or 1, was chosen."""

    row: int
    caption: str
    ranking: int
    chosen: int

    def image(self, folder: Path, which: int) -> Path:
        return folder / f"{self.ranking}_{which}.jpg"


def read_pickapic(path: str | os.PathLike[str], *, images_to: str | os.PathLike[str] | None = None) -> PreferencePairs:
    """Read the choices, and write their images out once, because in the parquet file they are bytes.

    The images of a choice become `{ranking_id}_0.jpg` and `{ranking_id}_1.jpg`, their bytes as published. A file
    that is already there is kept, so that a second call reads no image, and each appears whole or not at all. A tie
    (both labels 0.5) gives no pair, and its images are not written; nor does a row whose `has_label`, where the
    column is there, is false (our inference: nobody judged it). The group of a pair is its caption.

    Args:
        path: a parquet file, or a folder of the files of one part (train, validation, ...). Columns: caption, jpg_0,
            jpg_1 (bytes), label_0, label_1 (1 chosen, 0 not, 0.5 tie), ranking_id.
        images_to: the folder for the images, of one release of the data only; made if absent. None: beside the
            parquet file, `{its name}_images`; in the folder of several files, `images`.

    Returns:
        The pairs in the order of the files, by name, and of their rows.

    Raises:
        ImportError: the extra `data` is not installed.
        ValueError: no such file; a file of another form; a column or image is missing, a ranking_id is repeated, or
            labels are not a choice; files of several parts; or no row states a choice.

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
    files = _parquet_files(source)
    beside = source / "images" if source.is_dir() else source.with_name(f"{source.stem}_images")
    folder = beside if images_to is None else Path(images_to)
    folder.mkdir(parents=True, exist_ok=True)
    places: dict[int, str] = {}
    choices: list[_Choice] = []
    for file in files:
        with _open(file) as parquet:
            found = list(_read_choices(parquet, file, places))
            _write_images(parquet, file, found, folder)
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
            "put each part in a folder of its own, or training would see the test"
        )
    return files


def _open(file: Path) -> Any:
    """The parquet file, its columns checked."""
    parquet = extra_data("pyarrow.parquet", f"reading {file.name}")
    types = extra_data("pyarrow.types", f"reading {file.name}")
    try:
        opened = parquet.ParquetFile(file)
    except Exception as error:  # pyarrow has many kinds for what is damaged
        raise ValueError(f"{file}: expected a parquet file, got {error}; download it again") from error
    schema = opened.schema_arrow
    missing = [column for column in (*_LIGHT, *_IMAGES) if column not in schema.names]
    if missing:
        opened.close()
        raise ValueError(
            f"{file}: no column {', '.join(missing)}; expected the published columns "
            f"{', '.join((*_LIGHT, *_IMAGES))}, got {', '.join(schema.names)}"
        )
    if len(set(schema.names)) < len(schema.names):
        opened.close()
        raise ValueError(f"{file}: expected each column once, got {', '.join(schema.names)}")
    for column in _IMAGES:
        kind = schema.field(column).type
        if not (types.is_binary(kind) or types.is_large_binary(kind)):
            opened.close()
            raise ValueError(f"{file}: expected the bytes of images in column {column}, got {kind}")
    return opened


def _read_choices(parquet: Any, file: Path, places: dict[int, str]) -> Iterator[_Choice]:
    """The rows that state a choice; `places` gathers where each ranking_id was met."""
    judged = [_JUDGED] if _JUDGED in parquet.schema_arrow.names else []
    number = -1
    for batch in _batches(parquet, file, _ROWS_OF_TEXT, columns=[*_LIGHT, *judged]):
        for row in batch.to_pylist():
            number += 1
            where = f"{file}, row {number} (the first is 0)"
            ranking, caption = row["ranking_id"], row["caption"]
            if not isinstance(ranking, int) or ranking < 0:
                raise ValueError(f"{where}: expected ranking_id to be a number from 0, got {ranking!r}")
            if ranking in places:
                raise ValueError(
                    f"{where}: the ranking_id {ranking} is that of {places[ranking]} as well; keep one of the two"
                )
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


def _batches(parquet: Any, file: Path, rows: int, **chosen: Any) -> Iterator[Any]:
    batches = parquet.iter_batches(rows, **chosen)
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:  # pyarrow has many kinds for pages that are damaged
            raise ValueError(f"{file}: expected a whole parquet file, got {error}; download it again") from error
        if batch is None:
            return
        yield batch


def _write_images(parquet: Any, file: Path, choices: list[_Choice], folder: Path) -> None:
    """Write the images that are not there yet, holding the bytes of a few rows at a time."""
    absent = {
        choice.row: choice
        for choice in choices
        if not all(choice.image(folder, which).is_file() for which in range(len(_IMAGES)))
    }
    start = 0
    for group in range(parquet.num_row_groups):
        end = start + parquet.metadata.row_group(group).num_rows
        if any(row in absent for row in range(start, end)):
            number = start
            for batch in _batches(parquet, file, _ROWS_AT_ONCE, row_groups=[group], columns=list(_IMAGES)):
                for place in range(batch.num_rows):
                    choice = absent.get(number + place)
                    if choice is not None:
                        _write_both(batch, place, choice, file, folder)
                number += batch.num_rows
        start = end


def _write_both(batch: Any, place: int, choice: _Choice, file: Path, folder: Path) -> None:
    for which, column in enumerate(_IMAGES):
        content = batch.column(column)[place].as_py()
        if not content:
            raise ValueError(
                f"{file}, row {choice.row} (the first is 0): expected the bytes of an image in column {column}, got "
                "none; remove the row"
            )
        target = choice.image(folder, which)
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            part.write_bytes(content)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
