"""Readers of scored images, held against tables that these tests write in the published layouts."""

from __future__ import annotations

import csv
import io
import sys
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from PIL import Image
from scipy.io import savemat

from aigiqa_reward.datasets import read_agiqa1k, read_aigciqa2023, read_aigiqa20k

MODELS = ["Controlnet", "DALLE", "Glide", "Lafite", "stable-diffusion", "Unidiffuser"]


def image_bytes(format: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, format=format)
    return buffer.getvalue()


def write_images(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = image_bytes("PNG")
    for name in names:
        (folder / name).write_bytes(content)


def write_csv(file: Path, rows: list[list[Any]]) -> Path:
    with file.open("w", newline="", encoding="utf-8") as opened:
        csv.writer(opened).writerows(rows)
    return file


# --------------------------------------------------------------------------------------------- AGIQA-1K


def agiqa1k_rows() -> list[list[Any]]:
    """Two mains, two seconds, two places, two styles; dreamStudio counts its seconds in another order."""
    rows: list[list[Any]] = []
    for (a, main), (b, second) in product(enumerate(["cat", "teddy bear"]), enumerate(["using CD", "wearing hat"])):
        for (c, place), (d, style) in product(
            enumerate(["city", "wild"]), enumerate(["anime style", "realistic style"])
        ):
            prompt = f"{main}, {second}, {place}, {style}"
            rows.append([f"deepai_{a}_{b}_{c}_{d}.jpg", prompt, len(rows) / 8])
            rows.append([f"dreamStudio_{a}_{1 - b}_{c}_{d}.jpg", prompt, len(rows) / 8])
    return rows


def write_agiqa1k(folder: Path, rows: list[list[Any]], images: str = "file") -> Path:
    write_images(folder / images, [row[0] for row in rows if str(row[0]).endswith(".jpg")])
    table = pandas.DataFrame(rows, columns=pandas.Index(["Image", "Prompt", "MOS"]))
    table.to_excel(folder / "AIGC_MOS_Zscore.xlsx", index=False)
    return folder


@pytest.mark.parametrize("images", ["file", "images"])
def test_agiqa1k_is_grouped_by_object_pair_and_has_no_correspondence(tmp_path: Path, images: str) -> None:
    rows = agiqa1k_rows()
    data = read_agiqa1k(write_agiqa1k(tmp_path, rows, images))
    assert data.names == tuple(row[0] for row in rows)
    assert data.prompts == tuple(row[1] for row in rows)
    assert data.quality.tolist() == [row[2] for row in rows]
    assert data.generators == ("deepai", "dreamStudio") * 16
    assert all(path == tmp_path / images / name for path, name in zip(data.paths, data.names, strict=True))
    # By the words of the prompt, whatever numbers the generators gave them.
    assert Counter(data.groups) == dict.fromkeys(
        ["cat, using CD", "cat, wearing hat", "teddy bear, using CD", "teddy bear, wearing hat"], 8
    )
    for group, prompt in zip(data.groups, data.prompts, strict=True):
        assert prompt.startswith(f"{group}, ")
    assert data.has_quality
    assert not data.has_correspondence
    for absent in (data.quality_std, data.correspondence, data.correspondence_std):
        assert absent.dtype == np.float64
        assert np.isnan(absent).all()


def test_agiqa1k_leaves_out_the_one_name_that_was_published_twice(tmp_path: Path) -> None:
    rows = agiqa1k_rows()
    known = [["dreamStudio_8_9_1_1.jpg", "alien, wearing shirt, wild, realistic style", score] for score in (0.4, 2.1)]
    assert read_agiqa1k(write_agiqa1k(tmp_path / "two", [*rows, *known])).names == tuple(row[0] for row in rows)
    assert len(read_agiqa1k(write_agiqa1k(tmp_path / "one", [*rows, known[0]]))) == len(rows) + 1
    with pytest.raises(ValueError, match=r"line 34: 'deepai_0_0_0_0\.jpg' is listed twice"):
        read_agiqa1k(write_agiqa1k(tmp_path / "other", [*rows, rows[0]]))


def test_agiqa1k_does_not_take_the_other_table(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no AIGC_MOS_Zscore\.xlsx$"):
        read_agiqa1k(tmp_path)
    write_csv(tmp_path / "AIGC_all.csv", [["Image", "Score"], ["deepai_0_0_0_0.jpg", 2.5]])
    with pytest.raises(ValueError, match=r"AIGC_all\.csv holds other scores .* take AIGC_MOS_Zscore\.xlsx from"):
        read_agiqa1k(tmp_path)


@pytest.mark.parametrize(
    ("column", "cell", "message"),
    [
        (0, "midjourney_0_0_0_0.jpg", r"line 4: expected a name .*deepai or dreamStudio"),
        (0, "../deepai_0_0_0_0.jpg", r"line 4: expected a name"),
        (1, "cat, using CD, city", r"line 4: expected a prompt of the form 'object, object, place, style'"),
        (2, "good", r"line 4: expected a finite number in column MOS, got 'good'"),
        (2, None, r"line 4: expected a finite number in column MOS, got ''"),
    ],
)
def test_agiqa1k_places_a_wrong_cell(tmp_path: Path, column: int, cell: Any, message: str) -> None:
    rows = agiqa1k_rows()
    rows[2][column] = cell
    (tmp_path / "file").mkdir()
    if column == 0:
        write_images(tmp_path / "file", [cell])
    with pytest.raises(ValueError, match=message):
        read_agiqa1k(write_agiqa1k(tmp_path, rows))


def test_agiqa1k_of_another_form_is_refused(tmp_path: Path) -> None:
    table = write_agiqa1k(tmp_path, agiqa1k_rows()) / "AIGC_MOS_Zscore.xlsx"
    (tmp_path / "file" / "deepai_0_1_1_0.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 of the 32 images that AIGC_MOS_Zscore\.xlsx lists are absent"):
        read_agiqa1k(tmp_path)
    pandas.read_excel(table).drop(columns="MOS").to_excel(table, index=False)
    with pytest.raises(ValueError, match=r"no column MOS; .* got Image, Prompt"):
        read_agiqa1k(tmp_path)
    pandas.DataFrame().to_excel(table, index=False)
    with pytest.raises(ValueError, match="an empty file"):
        read_agiqa1k(tmp_path)
    table.write_bytes(b"Image,Prompt,MOS")
    with pytest.raises(ValueError, match=r"expected an \.xlsx sheet, got BadZipFile"):
        read_agiqa1k(tmp_path)


@pytest.mark.parametrize("module", ["pandas", "openpyxl"])
def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    write_agiqa1k(tmp_path, agiqa1k_rows())
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'needs {module}; pip install "aigiqa-reward\[data\]"'):
        read_agiqa1k(tmp_path)


# --------------------------------------------------------------------------------------------- AIGCIQA2023


def write_scores(file: Path, array: Any, key: str = "MOSz") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    savemat(file, {key: array})


def write_prompts(folder: Path, prompts: list[str]) -> None:
    rows = [["Basic", "Animals", prompt] for prompt in prompts]
    pandas.DataFrame(rows).to_excel(folder / "AIGCIQA2023_Prompts.xlsx", index=False, header=False)


@pytest.fixture(scope="module")
def shared_aigciqa2023(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aigciqa2023")
    write_images(folder / "allimg", [f"{i}.png" for i in range(2400)])
    return folder


@pytest.fixture
def aigciqa2023(tmp_path: Path, shared_aigciqa2023: Path) -> Path:
    """Score k of image i is k + i / 2400."""
    for k in (1, 2, 3):
        write_scores(tmp_path / f"DATA/MOS/mosz{k}.mat", k + np.arange(2400)[:, None] / 2400)
    (tmp_path / "Image").symlink_to(shared_aigciqa2023, target_is_directory=True)
    write_prompts(tmp_path, [f"prompt {p}" for p in range(100)])
    return tmp_path


def test_aigciqa2023_finds_prompt_and_generator_of_each_image(aigciqa2023: Path) -> None:
    data = read_aigciqa2023(aigciqa2023)
    assert len(data) == 2400
    for m, p, k in product(range(6), range(100), range(1, 5)):
        i = 400 * m + 4 * p + (k - 1)
        assert (data.names[i], data.generators[i], data.prompts[i]) == (f"{i}.png", MODELS[m], f"prompt {p}")
    assert data.paths[1234] == aigciqa2023 / "Image" / "allimg" / "1234.png"
    assert data.groups == data.prompts
    assert data.quality.tolist() == [1 + i / 2400 for i in range(2400)]
    assert data.correspondence.tolist() == [3 + i / 2400 for i in range(2400)]
    assert np.isnan(data.quality_std).all()
    assert read_aigciqa2023(aigciqa2023, perspective="authenticity").quality.tolist() == [
        2 + i / 2400 for i in range(2400)
    ]


def test_aigciqa2023_has_deviations_where_a_copy_has_them(aigciqa2023: Path) -> None:
    for k in (1, 2, 3):
        write_scores(aigciqa2023 / f"DATA/STD/SD{k}.mat", np.full((2400, 1), float(k)), "SD")
    for perspective, deviation in (("quality", 1.0), ("authenticity", 2.0)):
        data = read_aigciqa2023(aigciqa2023, perspective=perspective)  # pyright: ignore[reportArgumentType]
        assert (set(data.quality_std), set(data.correspondence_std)) == ({deviation}, {3.0})
    (aigciqa2023 / "DATA/STD/SD3.mat").unlink()
    with pytest.raises(ValueError, match=r"no DATA/STD/SD3\.mat"):
        read_aigciqa2023(aigciqa2023)


AIGCIQA2023_FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no scores": (lambda f: (f / "DATA/MOS/mosz3.mat").unlink(), r"folder: .*no DATA/MOS/mosz3\.mat"),
    "no MATLAB": (lambda f: (f / "DATA/MOS/mosz1.mat").write_text("1 2 3"), r"mosz1\.mat: expected a MATLAB file"),
    "key": (lambda f: write_scores(f / "DATA/MOS/mosz1.mat", np.ones((2400, 1)), "MOS"), "an array MOSz, got MOS"),
    "shape": (lambda f: write_scores(f / "DATA/MOS/mosz1.mat", np.ones((2399, 1))), r"\(2400, 1\).*\(2399, 1\)"),
    "NaN": (lambda f: write_scores(f / "DATA/MOS/mosz1.mat", np.full((2400, 1), np.nan)), "finite.* for image 0"),
    "no prompts": (lambda f: (f / "AIGCIQA2023_Prompts.xlsx").unlink(), r"Prompts\.xlsx; take it from"),
    "99 prompts": (lambda f: write_prompts(f, [str(p) for p in range(99)]), "expected 100 rows .* got 99 rows of 3"),
    "same": (lambda f: write_prompts(f, [str(p % 99) for p in range(100)]), "line 100: .* that of line 1 again"),
    "blank": (lambda f: write_prompts(f, [str(p or "") for p in range(100)]), "line 1: .* got a blank cell"),
    "no image": (lambda f: (f / "Image").unlink(), "2400 of the 2400 images .* absent"),
}


@pytest.mark.parametrize("fault", AIGCIQA2023_FAULTS)
def test_aigciqa2023_of_another_form_is_refused(aigciqa2023: Path, fault: str) -> None:
    spoil, message = AIGCIQA2023_FAULTS[fault]
    spoil(aigciqa2023)
    with pytest.raises(ValueError, match=message):
        read_aigciqa2023(aigciqa2023)


def test_aigciqa2023_has_two_perspectives_for_quality(aigciqa2023: Path) -> None:
    with pytest.raises(ValueError, match=r"perspective: .*got 'correspondence'"):
        read_aigciqa2023(aigciqa2023, perspective="correspondence")  # pyright: ignore[reportArgumentType]


# --------------------------------------------------------------------------------------------- AIGIQA-20K

ROWS_20K = [["DALLE2_0000.png", "a cat, digital art", 3.5], ["LCM_SD1.5_0007.png", 'the word "dog"', 0.25]]


@pytest.mark.parametrize("header", [True, False])
def test_aigiqa20k_with_and_without_a_header(tmp_path: Path, header: bool) -> None:
    write_images(tmp_path / "train", [row[0] for row in ROWS_20K])
    write_csv(tmp_path / "info_train.csv", [["name", "prompt", "mos"]] * header + ROWS_20K)
    data = read_aigiqa20k(tmp_path)
    assert data.names == ("DALLE2_0000.png", "LCM_SD1.5_0007.png")
    assert data.prompts == data.groups == ("a cat, digital art", 'the word "dog"')
    assert data.generators == ("DALLE2", "LCM_SD1.5")
    assert data.quality.tolist() == [3.5, 0.25]
    assert not data.has_correspondence
    line = len(ROWS_20K) + header + 1
    write_csv(
        tmp_path / "info_train.csv", [["name", "prompt", "mos"]] * header + ROWS_20K + [["DALLE2_0000.png", "", 1]]
    )
    with pytest.raises(ValueError, match=f"line {line}: .*twice"):
        read_aigiqa20k(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no column name, prompt, mos; .*an empty file"),
        (b"name,prompt\n", "no column mos"),
        (b"DALLE2_0000.png,a cat\n", "no column name, prompt, mos"),
        (b"DALLE2_0000.png,a cat,fine\n", "no column name, prompt, mos"),
        (b"name,prompt,mos\n", "the header alone"),
        (b"name,prompt,mos\nDALLE2_0000.png,a cat,fine\n", r"line 2: .*column mos, got 'fine'"),
        (b"name,prompt,mos\nDALLE2_0000.png,a cat, sitting,1\n", r"line 2: expected 3 cells, got 4; .*double quotes"),
        (b"name,prompt,mos\nDALLE2_0000.png,caf\xe9,1\n", "CSV file in UTF-8"),
        (b"name,prompt,mos\nDALLE2.png,a cat,1\n", r"line 2: expected a name .*index"),
        (b"name,prompt,mos\nDALLE2_0001.png,a cat,1\n", "1 of the 1 images .*absent"),
    ],
)
def test_aigiqa20k_of_another_form_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=r"no info_train\.csv"):
        read_aigiqa20k(tmp_path)
    write_images(tmp_path / "train", ["DALLE2_0000.png"])
    (tmp_path / "info_train.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_aigiqa20k(tmp_path)
