"""Small files that stand for huge tables, and cells that could be read in two ways: refused before memory is taken."""

from __future__ import annotations

import io
import json
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pytest
from hostile import MEMORY, SECONDS, peak, png_that_claims
from PIL import Image
from scipy.io import savemat

from aigiqa_reward.cli.config_file import _entries
from aigiqa_reward.cli.inputs import CommandError
from aigiqa_reward.cli.notes import check_arguments
from aigiqa_reward.datasets import base as _rows
from aigiqa_reward.datasets import read_agiqa1k, read_aigiqa20k, read_imagereward, read_table
from aigiqa_reward.datasets.aigciqa2023 import _read_array
from aigiqa_reward.evaluation import Predictions, predictions
from aigiqa_reward.models.cpa_iqa import Preferences
from aigiqa_reward.sampling.batch_run import ResultsFolder


def refused(read: Callable[[], Any], reason: str, error: type[Exception] = ValueError) -> None:
    spent, held = resource.getrusage(resource.RUSAGE_SELF).ru_utime, peak()
    with pytest.raises(error, match=reason):
        read()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - spent < SECONDS
    assert peak() - held < MEMORY / 4


def rezipped(file: Path, name: str, data: bytes) -> None:
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)


@pytest.mark.parametrize("cell", ["XFD2", "A1048576", "XFD1048576"])
def test_a_sheet_with_one_cell_far_out(tmp_path: Path, cell: str) -> None:
    book = openpyxl.Workbook()
    book.active["A1"], book.active[cell] = "Image", 1  # pyright: ignore[reportOptionalSubscript]
    book.save(tmp_path / "AIGC_MOS_Zscore.xlsx")
    refused(lambda: read_agiqa1k(tmp_path), r"AIGC_MOS_Zscore\.xlsx: .*more than 100,000 rows or 256 columns")


def test_a_sheet_that_unpacks_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "AIGC_MOS_Zscore.xlsx"
    openpyxl.Workbook().save(file)
    rezipped(file, "xl/more.xml", b"\0" * 1_000_000)
    monkeypatch.setattr(_rows, "_SHEET_BYTES", 1_000_000)
    refused(lambda: read_agiqa1k(tmp_path), r"AIGC_MOS_Zscore\.xlsx: .*unpacks to 1,\d\d\d,\d\d\d bytes")


def saved_predictions(file: Path, **changes: Any) -> Path:
    numbers, names = np.linspace(0, 1, 3), np.array(["a", "b", "c"])
    columns = ("target_quality", "target_correspondence", "predicted_quality", "predicted_correspondence")
    fields = {"format": np.asarray(1), "folds": np.arange(3), **dict.fromkeys(columns, numbers)}
    np.savez_compressed(file, **fields | dict.fromkeys(("names", "prompts", "generators"), names) | changes)
    return file


def test_predictions_that_unpack_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = saved_predictions(tmp_path / "p.npz")
    assert len(Predictions.load(file)) == 3
    rezipped(file, "bomb.npy", b"\0" * 1_000_000)
    monkeypatch.setattr(predictions, "MAX_BYTES", 1_000_000)
    refused(lambda: Predictions.load(file), r"p\.npz.*unpacks to 1,\d\d\d,\d\d\d bytes")


@pytest.mark.parametrize(
    "changes",
    [
        {"names": np.array("abc")},
        {"names": np.arange(3)},
        {"format": np.ones(3)},
        {"format": np.array("one")},
        {"folds": np.array([None] * 3)},
        {"predicted_quality": np.array([1, np.nan, 2])},
    ],
)
def test_predictions_of_other_kinds(tmp_path: Path, changes: dict[str, Any]) -> None:
    refused(lambda: Predictions.load(saved_predictions(tmp_path / "p.npz", **changes)), r"p\.npz")


def test_predictions_that_claim_a_huge_array(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**13,)})
    file = saved_predictions(tmp_path / "p.npz")
    rezipped(file, "predicted_uncertainty.npy", header.getvalue())
    refused(lambda: Predictions.load(file), r"p\.npz")


def test_predictions_whose_compressed_bytes_are_damaged(tmp_path: Path) -> None:
    file = saved_predictions(tmp_path / "p.npz")
    with zipfile.ZipFile(file) as archive:
        place = archive.getinfo("names.npy").header_offset + 30 + len("names.npy") + 20
    data = bytearray(file.read_bytes())
    data[place : place + 40] = b"\xff" * 40
    file.write_bytes(data)
    refused(lambda: Predictions.load(file), r"p\.npz")


def test_an_entry_of_very_many_images(tmp_path: Path) -> None:
    names = [f"{n}.png" for n in range(50_000)]
    entry = {"id": 1, "prompt": "p", "generations": names, "ranking": list(range(len(names)))}
    (tmp_path / "train.json").write_text(json.dumps([entry]))
    refused(lambda: read_imagereward(tmp_path), r"train\.json, entry 1 .*at most 100 images, got 50000")


@pytest.mark.parametrize("shape", [(2400, 2), (1200, 1), (40_000_000, 1)])
def test_arrays_of_another_shape(tmp_path: Path, shape: tuple[int, int]) -> None:
    folder = tmp_path / "DATA" / "MOS"
    folder.mkdir(parents=True)
    savemat(folder / "mosz1.mat", {"MOSz": np.zeros(shape, dtype=np.int8)}, do_compression=True)
    refused(lambda: _read_array(tmp_path, "DATA/MOS/mosz1.mat", "MOSz"), r"mosz1\.mat: expected MOSz to hold")


# --------------------------------------------------------------------------------------------- texts


def test_a_column_that_is_there_twice(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path,prompt,quality,path\na.png,p,1,b.png\n")
    refused(lambda: read_table(tmp_path / "t.csv"), r"t\.csv: expected each column once, got path several times")


@pytest.mark.parametrize("cell", ["3_5", "1_0.0", "inf", "nan", "1e999", "", "0x10"])
def test_cells_that_python_alone_takes_for_numbers(tmp_path: Path, cell: str) -> None:
    (tmp_path / "t.csv").write_text(f"path,prompt,quality\na.png,p,{cell}\n")
    (tmp_path / "a.png").touch()
    refused(lambda: read_table(tmp_path / "t.csv"), r"t\.csv, line 2: expected a finite number")


@pytest.mark.parametrize(
    "name", ["a" * 300 + ".png", "../none.png", "two\nlines.png", "nul\0.png", "/none/x.png", "-rf"]
)
def test_paths_of_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "t.csv").write_text(f'path,prompt,quality\n"{name}",p,1\n')
    refused(lambda: read_table(tmp_path / "t.csv"), r"t\.csv lists are absent")


def test_a_cell_beyond_what_csv_reads(tmp_path: Path) -> None:
    (tmp_path / "info_train.csv").write_text("x" * 200_000)
    refused(lambda: read_aigiqa20k(tmp_path), r"info_train\.csv: expected a CSV file")


@pytest.mark.parametrize("rows", [{"s": [1, 2]}, {"s": [0, 0, 0, 0, float("nan")]}, {"s": 3}, {"s": [10**400] * 5}])
def test_preferences_name_their_file(tmp_path: Path, rows: dict[str, Any]) -> None:
    (tmp_path / "p.json").write_text(json.dumps(rows))
    refused(lambda: Preferences.load(tmp_path / "p.json"), r"p\.json")


def test_options_that_are_nested_too_deep(tmp_path: Path) -> None:
    (tmp_path / "o.yaml").write_text("[" * 5_000)
    refused(lambda: _entries(tmp_path / "o.yaml"), r"o\.yaml is nested too deep", CommandError)


def test_a_note_that_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "arguments.json").write_text("[1]")
    (tmp_path / "started").touch()
    refused(lambda: check_arguments(tmp_path, tmp_path / "started", {}, "--out"), r"arguments\.json", CommandError)


# --------------------------------------------------------------------------------------------- results of best of N

FORMAT = "aigiqa-reward best of n for many prompts, version 1"
ROW = {"seed": 3, "total": 1.0, "quality": 1.0, "correspondence": None, "error": None, "rank": 1, "image": "x"}
RECORD = {"prompt": "p", "finished": True, "error": None, "denoiser_calls": 1, "candidates": [ROW], "previews": {}}


def results(folder: Path, record: Any) -> ResultsFolder:
    (folder / "prompts").mkdir()
    (folder / "settings.json").write_text(json.dumps({"format": FORMAT, "settings": {}, "prompts": ["p"]}))
    (folder / "prompts" / "00000.json").write_text(json.dumps(record))
    return ResultsFolder.open(folder)


@pytest.mark.parametrize(
    "record",
    [
        {**RECORD, "candidates": [{**ROW, "seed": "../../../escaped"}]},
        {**RECORD, "candidates": [{**ROW, "seed": "<script>alert(1)</script>"}]},
        {**RECORD, "candidates": [{**ROW, "seed": 10**300}]},
        {**RECORD, "candidates": [{**ROW, "seed": True}]},
        {**RECORD, "candidates": [{**ROW, "total": "high"}]},
        {**RECORD, "candidates": [{**ROW, "total": float("nan")}]},
        {**RECORD, "candidates": [{**ROW, "quality": 10**400}]},
        {**RECORD, "candidates": [{**ROW, "more": [float("inf")]}]},
        {**RECORD, "candidates": [{"seed": 1}]},
        {**RECORD, "candidates": "many"},
        {**RECORD, "candidates": [None]},
        {**RECORD, "previews": {"x": []}},
        {**RECORD, "previews": {"9" * 5000: []}},
        {**RECORD, "previews": {"3": [{"step": 1}]}},
        {**RECORD, "error": ["e"]},
        [RECORD],
    ],
)
def test_a_record_that_we_did_not_write_counts_as_none(tmp_path: Path, record: Any) -> None:
    found = results(tmp_path, record)
    assert found.read(0) is None
    assert not found.finished(0)
    assert found.failures() == {}
    found.prepare({}, overwrite=False)
    assert (tmp_path / "results.jsonl").read_text() == ""


@pytest.mark.parametrize("file", ["images/00000_seed3.png", "noises/00000.safetensors"])
@pytest.mark.parametrize("data", [png_that_claims(60_000, 60_000), png_that_claims(12_000, 12_000), b"{}", None])
def test_winners_that_cannot_be_read_count_as_none(tmp_path: Path, file: str, data: bytes | None) -> None:
    found = results(tmp_path, RECORD)
    for folder in ("images", "noises"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (16, 16)).save(found.image_file(0, 3))
    assert [result.index for result in found] == [0]
    (tmp_path / file).unlink(missing_ok=True)
    if data is None:
        (tmp_path / file).symlink_to("/dev/zero")
    else:
        (tmp_path / file).write_bytes(data)
    assert found.read(0) is None
    assert list(found) == []


@pytest.mark.parametrize(
    "note", [{"format": FORMAT}, {"format": FORMAT, "settings": {}, "prompts": 3}, [], {"format": 1}]
)
def test_settings_that_we_did_not_write_are_refused(tmp_path: Path, note: Any) -> None:
    (tmp_path / "settings.json").write_text(json.dumps(note))
    refused(lambda: ResultsFolder.open(tmp_path), "expected a folder that best_of_each wrote")
