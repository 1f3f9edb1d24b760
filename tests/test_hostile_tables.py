"""Small files that claim huge tables or were damaged: refused before memory is taken."""

from __future__ import annotations

import io
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pytest
from hostile import MEMORY, SECONDS, peak
from scipy.io import savemat

from aigiqa_reward.datasets import read_agiqa1k
from aigiqa_reward.datasets.aigciqa2023 import _read_array
from aigiqa_reward.utils.io import read_arrays

pytestmark = pytest.mark.slow


def refused(read: Callable[[], Any], reason: str) -> None:
    spent, held = resource.getrusage(resource.RUSAGE_SELF).ru_utime, peak()
    with pytest.raises(ValueError, match=reason):
        read()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - spent < SECONDS
    assert peak() - held < MEMORY / 4


@pytest.mark.parametrize("cell", ["XFD2", "A1048576", "XFD1048576"])
def test_a_sheet_with_one_cell_far_out(tmp_path: Path, cell: str) -> None:
    book = openpyxl.Workbook()
    book.active["A1"], book.active[cell] = "Image", 1  # pyright: ignore[reportOptionalSubscript]
    book.save(tmp_path / "AIGC_MOS_Zscore.xlsx")
    refused(lambda: read_agiqa1k(tmp_path), r"AIGC_MOS_Zscore\.xlsx: no column Prompt, MOS")


def saved_arrays(file: Path) -> Path:
    np.savez_compressed(file, a=np.linspace(0, 1, 3), names=np.array(["a", "b"]))
    return file


def test_arrays_that_claim_too_much(tmp_path: Path) -> None:
    file = saved_arrays(tmp_path / "p.npz")
    assert set(read_arrays(file, most=10_000)) == {"a", "names"}
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**13,)})
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("claims.npy", header.getvalue())
    refused(lambda: read_arrays(file, most=10_000), ".")


def test_arrays_whose_compressed_bytes_are_damaged(tmp_path: Path) -> None:
    file = saved_arrays(tmp_path / "p.npz")
    with zipfile.ZipFile(file) as archive:
        place = archive.getinfo("names.npy").header_offset + 30 + len("names.npy") + 20
    data = bytearray(file.read_bytes())
    data[place : place + 40] = b"\xff" * 40
    file.write_bytes(data)
    refused(lambda: read_arrays(file, most=10_000), ".")


@pytest.mark.parametrize("shape", [(2400, 2), (1200, 1), (40_000_000, 1)])
def test_scores_of_another_shape(tmp_path: Path, shape: tuple[int, int]) -> None:
    folder = tmp_path / "DATA" / "MOS"
    folder.mkdir(parents=True)
    savemat(folder / "mosz1.mat", {"MOSz": np.zeros(shape, dtype=np.int8)}, do_compression=True)
    refused(lambda: _read_array(tmp_path, "DATA/MOS/mosz1.mat", "MOSz"), r"mosz1\.mat: expected an array MOSz")
