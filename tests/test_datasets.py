from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from scipy.io import savemat

from aigiqa_reward import datasets
from aigiqa_reward.datasets import SOURCES, PreferencePairs, ScoredImages, read_aigciqa2023, read_data, read_imagereward

Rows = list[dict[str, Any]]


def touch(folder: Path, names: list[str]) -> None:
    files = [folder / name for name in names if len(name) < 200]
    for parent in {file.parent for file in files} | {folder}:
        parent.mkdir(parents=True, exist_ok=True)
    for file in files:
        file.touch()


def write_csv(file: Path, rows: Rows) -> Path:
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return file


def agiqa3k_rows() -> Rows:
    prompts = ["a cat", 'statue of a man, "marble"', "a tray of sushi"]
    return [
        {
            "name": f"{generator}_{index:03d}.jpg",
            "prompt": prompt,
            "style": "anime" if index else "",
            "mos_quality": index + 0.25 * place,
            "std_quality": 0.5,
            "mos_align": 4 - index - 0.25 * place,
            "std_align": 0.75,
        }
        for index, prompt in enumerate(prompts)
        for place, generator in enumerate(("sd1.5_highcorr", "AttnGAN_normal", "DALLE2_normal"))
    ]


def write_agiqa3k(folder: Path, rows: Rows) -> Path:
    touch(folder / "images", [row["name"] for row in rows])
    write_csv(folder / "data.csv", rows)
    return folder


def agiqa1k_rows() -> Rows:
    rows: Rows = []
    pairs = product(enumerate(["cat", "teddy bear"]), enumerate(["using CD", "wearing hat"]))
    kinds = list(product(enumerate(["city", "wild"]), enumerate(["anime style", "realistic style"])))
    for ((a, main), (b, second)), ((c, place), (d, style)) in product(pairs, kinds):
        prompt = f"{main}, {second}, {place}, {style}"
        for name in (f"deepai_{a}_{b}_{c}_{d}.jpg", f"dreamStudio_{a}_{1 - b}_{c}_{d}.jpg"):
            rows.append({"Image": name, "Prompt": prompt, "MOS": len(rows) / 8})
    return rows


def write_agiqa1k(folder: Path, rows: Rows, images: str = "file") -> Path:
    touch(folder / images, [row["Image"] for row in rows])
    pandas.DataFrame(rows).to_excel(folder / "AIGC_MOS_Zscore.xlsx", index=False)
    return folder


def aigiqa20k_rows() -> Rows:
    names = ["DALLE2_0000.png", "LCM_SD1.5_0007.png", "DALLE2_0003.png"]
    prompts = ["a cat, digital art", 'the word "dog"', "a red fox"]
    return [{"name": n, "prompt": p, "mos": s} for n, p, s in zip(names, prompts, (3.5, 0.25, 1), strict=True)]


def write_aigiqa20k(folder: Path, rows: Rows) -> Path:
    touch(folder / "train", [row["name"] for row in rows])
    write_csv(folder / "info_train.csv", rows)
    return folder


def table_rows() -> Rows:
    return [
        {"path": f"a/{n}.png", "prompt": "a cat, asleep", "quality": n, "correspondence": 1e2, "group": f"g{n % 2}"}
        for n in range(4)
    ]


def write_table(folder: Path, rows: Rows) -> Path:
    touch(folder, [row["path"] for row in rows if not row["path"].startswith("/")])
    return write_csv(folder / "scores.csv", rows)


def imagereward_rows() -> Rows:
    rng = np.random.default_rng(0)
    rows: Rows = []
    for number, images in enumerate(rng.integers(2, 6, 6)):
        generations = [f"part-{number:06d}/{image}.webp" for image in range(images)]
        ranking = rng.integers(1, 5, images).tolist()
        rows.append(
            {"id": f"{number}-1", "prompt": f"prompt {number % 3}", "generations": generations, "ranking": ranking}
        )
    rows[0]["ranking"][:2] = [2, 1]
    return rows


def write_imagereward(folder: Path, rows: Rows, images: str = "images", name: str = "train") -> Path:
    touch(folder / images, [str(image) for row in rows for image in row.get("generations") or []])
    (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder / f"{name}.json"


def hpdv2_rows() -> Rows:
    """Entries of test.json as HPSv2's README describes them."""
    rng = np.random.default_rng(1)
    rows: Rows = []
    for number in range(4):
        images = [f"{number:06d}{image:02d}.jpg" for image in range(4)]
        raw = [{"rank": rng.permutation(4).tolist(), "user_hash": f"u{user}"} for user in range(3)]
        rows.append({
            "prompt": f"prompt {number % 3}", "image_path": images, "rank": rng.permutation(4).tolist(),
            "raw_annotations": raw,
        })  # fmt: skip
    rows[1]["rank"] = [0, 1, 1, 3]
    return rows


def write_hpdv2(folder: Path, rows: Rows, name: str = "test") -> Path:
    images = [image for row in rows for image in row.get("image_path", row.get("file_path")) or []]
    touch(folder / name, [str(image) for image in images])
    (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder / f"{name}.json"


def genai_bench_rows() -> Rows:
    """The first two entries of the published genai_image.json for three of the six models, and one that ties."""
    rated = [
        ("A baker pulling freshly baked bread out of an oven in a bakery.", [5, 5, 5], [3, 3, 3], [3, 3, 2]),
        ("A photographer capturing a fleeting moment in a vibrant city street.", [4, 5, 5], [4, 5, 5], [5, 4, 5]),
        ("A mirror is speaking in a dimly lit room.", [2, 1, 1], [2, 2, 1], [3, 1, 1]),
    ]
    models = ("DALLE_3", "Midjourney_6", "SDXL_Base")
    return [
        {"id": f"{n:05d}", "prompt": prompt, "prompt in Chinese": "", "models": dict(zip(models, ratings, strict=True))}
        for n, (prompt, *ratings) in enumerate(rated)
    ]


def write_genai_bench(folder: Path, rows: Rows) -> Path:
    touch(folder, [])
    for row in rows:
        for model in row.get("models") or ():
            touch(folder / model, [f"{row['id']}.jpeg"])
    (folder / "genai_image.json").write_text(json.dumps({row["id"]: row for row in rows}), encoding="utf-8")
    return folder


def pickapic_rows(start: int = 0, count: int = 12) -> Rows:
    rows = []
    for number in range(start, start + count):
        first, second = [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)][number % 3]
        images = {"jpg_0": f"{number} {first}".encode(), "jpg_1": f"{number} {second}".encode()}
        labels = {"label_0": first, "label_1": second, "ranking_id": 1000 + number, "model_0": "a"}
        rows.append({"caption": f"prompt {number % 4}", **images, **labels})
    return rows


def write_pickapic(folder: Path, rows: Rows, name: str = "train") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=5)
    return file


@dataclass(frozen=True)
class Layout:
    rows: Callable[[], Rows]
    write: Callable[[Path, Rows], Path]
    entries: int
    groups: int
    column: str
    faults: dict[str, tuple[str, Any]]


NUMBER = "a finite number in column"
LAYOUTS = {
    "agiqa3k": Layout(agiqa3k_rows, write_agiqa3k, 9, 3, "std_align", {
        **{f"line 4: .*{NUMBER} mos_align, got '{cell}'": ("mos_align", cell) for cell in ("", "nan", "3_5")},
        r"line 4: expected a name of the form \{generator\}_\{index\}": ("name", "../sd1.5_normal_000.jpg"),
    }),
    "agiqa1k": Layout(agiqa1k_rows, write_agiqa1k, 32, 4, "MOS", {
        r"line 4: expected a name .*deepai or dreamStudio": ("Image", "midjourney_0_0_0_0.jpg"),
        r"line 4: expected a prompt of the form 'object, object, place, style'": ("Prompt", "cat, using CD, city"),
        rf"line 4: .*{NUMBER} MOS, got ''": ("MOS", None),
    }),
    "aigiqa20k": Layout(aigiqa20k_rows, write_aigiqa20k, 3, 3, "mos", {
        "line 4: expected a name .*index": ("name", "DALLE2.png"),
    }),
    "csv": Layout(table_rows, write_table, 4, 2, "prompt", {
        rf"scores\.csv, line 4: .*{NUMBER} quality, got 'inf'": ("quality", "inf"),
        "line 4: expected a text in column prompt": ("prompt", " "),
        r"file: 1 of the 4 images that scores\.csv lists are absent": ("path", "/none/x.png"),
        r"file: 1 of the 4 images .* are absent": ("path", "a" * 300 + ".png"),
    }),
    "imagereward": Layout(
        imagereward_rows, write_imagereward,
        sum(a != b for row in imagereward_rows() for n, a in enumerate(row["ranking"]) for b in row["ranking"][:n]),
        3, "ranking", {
            r"entry 3 \(id '2-1'\): expected one rank per image": ("ranking", [1]),
            "entry 3 .*prompt to be a text, got None": ("prompt", None),
            "entry 3 .*ranking to be a list of numbers, got .*True": ("ranking", [True, 2]),
            "entry 3 .*generations to be a list of image paths": ("generations", [7, "a"]),
            r"entry 3 .*expected at most 100 images, got 101": ("generations", [f"{n}.png" for n in range(101)]),
        },
    ),
    "hpdv2": Layout(hpdv2_rows, write_hpdv2, 4 * 6 - 1, 3, "rank", {
        "entry 3: expected one rank per image": ("rank", [1]),
        "entry 3: expected rank to be a list of numbers, got None": ("rank", None),
        "entry 3: expected image_path to be a list of image paths": ("image_path", [7, "a"]),
        "entry 3: 'a.jpg' is listed twice": ("image_path", ["a.jpg", "a.jpg", "b.jpg", "c.jpg"]),
    }),
    "genai_bench": Layout(genai_bench_rows, write_genai_bench, 3 + 0 + 2, 2, "models", {
        "entry '00002': expected the fields prompt and models": ("models", {"DALLE_3": [], "SDXL_Base": [1, 2, 3]}),
        "entry '00002': .*got .*None": ("prompt", None),
    }),
    "pickapic": Layout(pickapic_rows, write_pickapic, 8, 4, "jpg_1", {
        r"row 2 \(the first is 0\): expected label_0 and label_1 .* got 0.7 and 0.5": ("label_0", 0.7),
        "row 2 .*ranking_id to be a number from 0, got None": ("ranking_id", None),
        "row 2 .*column caption, got None": ("caption", None),
    }),
}  # fmt: skip
BY_NAME = pytest.mark.parametrize("name", LAYOUTS)
FAULTS = [(name, message, *cell) for name, layout in LAYOUTS.items() for message, cell in layout.faults.items()]


@BY_NAME
def test_every_row_is_read_with_its_files_and_groups(tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    path = layout.write(tmp_path, layout.rows())
    data = read_data(f"{name}:{path}")
    assert (len(data), len(set(data.groups))) == (layout.entries, layout.groups)
    files = data.paths if isinstance(data, ScoredImages) else (*data.better, *data.worse)
    assert all(file.is_file() for file in files)
    assert SOURCES[name].reader(str(path)).prompts == data.prompts  # pyright: ignore[reportArgumentType]


@BY_NAME
def test_missing_tables_columns_and_images_and_repeated_rows_are_named(tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    rows = layout.rows()

    def refused(message: str, path: Path) -> None:
        with pytest.raises(ValueError, match=message):
            read_data(f"{name}:{path}")

    refused(r"(folder|path|file): expected .*nowhere", tmp_path / "nowhere")
    without = [{k: v for k, v in row.items() if k != layout.column} for row in rows]
    message = rf"no column {layout.column}|expected the fields .*{layout.column}"
    refused(message, layout.write(tmp_path / "column", without))
    place = f"(line {len(rows) + 2}|entry {len(rows) + 1}|row {len(rows)})"
    if name not in ("hpdv2", "genai_bench"):  # no identity of entries, and a key of an object
        refused(rf"{place}\b.*(twice|as well)", layout.write(tmp_path / "twice", [*rows, rows[0]]))
    if name != "pickapic":
        path = layout.write(tmp_path, rows)
        data = read_data(f"{name}:{path}")
        file = (data.paths if isinstance(data, ScoredImages) else data.better)[0]
        file.unlink()
        refused(rf"1 of the \d+ images .* absent, the first '.*{file.name}'; ", path)


@pytest.mark.parametrize(("name", "message", "column", "cell"), FAULTS)
def test_a_wrong_cell_is_placed(tmp_path: Path, name: str, message: str, column: str, cell: object) -> None:
    layout = LAYOUTS[name]
    rows = layout.rows()
    rows[2][column] = cell
    with pytest.raises(ValueError, match=message):
        read_data(f"{name}:{layout.write(tmp_path, rows)}")


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("agiqa3k", "data.csv", b"name,prompt,mos_quality,std_quality,mos_align,std_align\n", "the header alone"),
        ("csv", "scores.csv", b"path,prompt\na/1.png,p\n", "no column quality or correspondence; .*got path, prompt"),
        ("csv", "scores.csv", b"path,prompt,quality,path\na/1.png,p,1,b\n", "each column once, got path several times"),
        ("aigiqa20k", "info_train.csv", b"name,prompt,mos\nDALLE2_0000.png,a, b,1\n", "line 2: .* 3 cells, got 4"),
        ("aigiqa20k", "info_train.csv", b"name,prompt,mos\nDALLE2_0000.png,caf\xe9,1\n", "csv is not UTF-8"),
        ("agiqa1k", "AIGC_MOS_Zscore.xlsx", b"Image,Prompt,MOS", r"expected an \.xlsx sheet, got BadZipFile"),
        ("imagereward", "train.json", b"[{]", r"train\.json: expected JSON in UTF-8"),
        ("imagereward", "train.json", b'{"a": 1}', r"expected a list of entries \{id, prompt, .* got dict"),
        ("hpdv2", "test.json", b"[3]", "entry 1: expected the fields prompt, image_path, rank, got int"),
        ("genai_bench", "genai_image.json", b"[]", "entry 'none': expected the fields prompt and models, .* got "),
        ("pickapic", "train.parquet", b"no parquet", r"train\.parquet: expected a whole parquet file"),
    ],
)  # fmt: skip
def test_a_file_of_another_form_is_named(tmp_path: Path, name: str, file: str, content: bytes, message: str) -> None:
    path = LAYOUTS[name].write(tmp_path, LAYOUTS[name].rows())
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_data(f"{name}:{path}")


@pytest.mark.parametrize(("name", "module"), [("agiqa1k", "openpyxl"), ("pickapic", "pyarrow.parquet")])
def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str) -> None:
    path = LAYOUTS[name].write(tmp_path, LAYOUTS[name].rows())
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'needs {module}; pip install "\.\[data\]"'):
        read_data(f"{name}:{path}")


def test_agiqa3k_has_both_scores_and_their_deviations(tmp_path: Path) -> None:
    rows = agiqa3k_rows()
    table = write_agiqa3k(tmp_path, rows) / "data.csv"
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())  # a byte-order mark
    data = datasets.read_agiqa3k(tmp_path)
    assert data.names == tuple(path.name for path in data.paths) == tuple(row["name"] for row in rows)
    assert data.prompts == data.groups == tuple(row["prompt"] for row in rows)
    assert data.generators == ("sd1.5_highcorr", "AttnGAN_normal", "DALLE2_normal") * 3
    for aspect, column in (("quality", "quality"), ("correspondence", "align")):
        for field, kind in ((aspect, "mos"), (f"{aspect}_std", "std")):
            values = getattr(data, field)
            assert values.dtype == np.float64
            assert values.tolist() == [row[f"{kind}_{column}"] for row in rows]


def test_agiqa1k_is_grouped_by_object_pair_and_has_no_correspondence(tmp_path: Path) -> None:
    rows = agiqa1k_rows()
    data = datasets.read_agiqa1k(write_agiqa1k(tmp_path, rows, "images"))
    assert data.quality.tolist() == [row["MOS"] for row in rows]
    assert data.generators == ("deepai", "dreamStudio") * 16
    assert data.paths[0] == tmp_path / "images" / data.names[0]
    assert all(prompt.startswith(f"{group}, ") for group, prompt in zip(data.groups, data.prompts, strict=True))
    assert all(np.isnan(absent).all() for absent in (data.quality_std, data.correspondence, data.correspondence_std))


def test_agiqa1k_leaves_out_the_one_name_that_was_published_twice(tmp_path: Path) -> None:
    rows, prompt = agiqa1k_rows(), "alien, wearing shirt, wild, realistic style"
    known = [{"Image": "dreamStudio_8_9_1_1.jpg", "Prompt": prompt, "MOS": score} for score in (0.4, 2.1)]
    assert len(datasets.read_agiqa1k(write_agiqa1k(tmp_path / "two", [*rows, *known]))) == len(rows)
    assert len(datasets.read_agiqa1k(write_agiqa1k(tmp_path / "one", [*rows, known[0]]))) == len(rows) + 1
    (tmp_path / "AIGC_all.csv").touch()
    with pytest.raises(ValueError, match=r"AIGC_all\.csv holds other scores .* take AIGC_MOS_Zscore\.xlsx from"):
        datasets.read_agiqa1k(tmp_path)


def test_aigiqa20k_may_lack_its_header(tmp_path: Path) -> None:
    rows = aigiqa20k_rows()
    file = write_aigiqa20k(tmp_path, rows) / "info_train.csv"
    data = datasets.read_aigiqa20k(tmp_path)
    assert data.quality.tolist() == [3.5, 0.25, 1]
    assert data.generators == ("DALLE2", "LCM_SD1.5", "DALLE2") and not data.has_correspondence
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    assert datasets.read_aigiqa20k(tmp_path).names == data.names


def test_a_table_may_lack_a_score_and_what_is_optional(tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if k not in ("quality", "group")} for row in table_rows()]
    rows[0]["path"] = str(tmp_path / "elsewhere.png")
    (tmp_path / "elsewhere.png").touch()
    data = datasets.read_table(write_table(tmp_path, rows))
    assert not data.has_quality and data.correspondence.tolist() == [row["correspondence"] for row in rows]
    assert data.generators == ("unknown",) * 4 and data.groups == data.prompts
    assert data.paths[:2] == (tmp_path / "elsewhere.png", tmp_path / "a" / "1.png")


MODELS = ["Controlnet", "DALLE", "Glide", "Lafite", "stable-diffusion", "Unidiffuser"]


def write_scores(file: Path, array: Any, key: str = "MOSz") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    savemat(file, {key: array})


def write_prompts(folder: Path, prompts: list[str]) -> None:
    rows = [["Basic", "Animals", prompt] for prompt in prompts]
    pandas.DataFrame(rows).to_excel(folder / "AIGCIQA2023_Prompts.xlsx", index=False, header=False)


@pytest.fixture(scope="module")
def whole_aigciqa2023(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aigciqa2023")
    for k in (1, 2, 3):
        write_scores(folder / f"own/DATA/MOS/mosz{k}.mat", k + np.arange(2400)[:, None] / 2400)
        write_scores(folder / f"own/DATA/STD/SD{k}.mat", np.full((2400, 1), float(k)), "SD")
    touch(folder / "Image" / "allimg", [f"{i}.png" for i in range(2400)])
    write_prompts(folder / "own", [f"prompt {p}" for p in range(100)])
    return folder


@pytest.fixture
def aigciqa2023(tmp_path: Path, whole_aigciqa2023: Path) -> Path:
    shutil.copytree(whole_aigciqa2023 / "own", tmp_path / "data")
    (tmp_path / "data" / "Image").symlink_to(whole_aigciqa2023 / "Image", target_is_directory=True)
    return tmp_path / "data"


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
    other = read_aigciqa2023(aigciqa2023, perspective="authenticity")
    assert other.quality.tolist() == [2 + i / 2400 for i in range(2400)]
    assert [set(x.quality_std) | set(x.correspondence_std) for x in (data, other)] == [{1.0, 3.0}, {2.0, 3.0}]
    with pytest.raises(ValueError, match=r"perspective: .*got 'correspondence'"):
        read_aigciqa2023(aigciqa2023, perspective="correspondence")  # pyright: ignore[reportArgumentType]


AIGCIQA2023_FAULTS: dict[str, Callable[[Path], Any]] = {
    r"folder: .*no DATA/MOS/mosz3\.mat": lambda f: (f / "DATA/MOS/mosz3.mat").unlink(),
    r"mosz1\.mat: expected a MATLAB file": lambda f: (f / "DATA/MOS/mosz1.mat").write_text("1 2 3"),
    r"\(2400, 1\) numbers": lambda f: write_scores(f / "DATA/MOS/mosz1.mat", np.ones((2399, 1))),
    "finite.* for image 0": lambda f: write_scores(f / "DATA/MOS/mosz1.mat", np.full((2400, 1), np.nan)),
    r"Prompts\.xlsx; take it from": lambda f: (f / "AIGCIQA2023_Prompts.xlsx").unlink(),
    "expected 100 rows .* got 99 rows of 3": lambda f: write_prompts(f, [str(p) for p in range(99)]),
    "line 100: .* new prompt .* got '0'": lambda f: write_prompts(f, [str(p % 99) for p in range(100)]),
    "2400 of the 2400 images .* absent": lambda f: (f / "Image").unlink(),
}


@pytest.mark.parametrize("message", AIGCIQA2023_FAULTS)
def test_aigciqa2023_of_another_form_is_refused(aigciqa2023: Path, message: str) -> None:
    AIGCIQA2023_FAULTS[message](aigciqa2023)
    with pytest.raises(ValueError, match=message):
        read_aigciqa2023(aigciqa2023)


def test_imagereward_gives_every_pair_of_different_ranks_once(tmp_path: Path) -> None:
    rows = imagereward_rows()
    pairs = read_imagereward(write_imagereward(tmp_path, rows))
    rank = {tmp_path / "images" / i: r for e in rows for i, r in zip(e["generations"], e["ranking"], strict=True)}
    prompt = {tmp_path / "images" / i: e["prompt"] for e in rows for i in e["generations"]}
    expected = {frozenset({a, b}) for a in rank for b in rank if a.parent == b.parent and rank[a] != rank[b]}
    got = [frozenset(images) for images in zip(pairs.better, pairs.worse, strict=True)]
    assert (len(got), set(got)) == (len(expected), expected)
    for text, better, worse in zip(pairs.prompts, pairs.better, pairs.worse, strict=True):
        assert rank[better] < rank[worse] and prompt[better] == prompt[worse] == text


def test_imagereward_finds_its_images(tmp_path: Path) -> None:
    file = write_imagereward(tmp_path, imagereward_rows())
    assert read_imagereward(tmp_path).better == read_imagereward(file).better
    test = write_imagereward(tmp_path, imagereward_rows(), "test_images", "test")
    assert read_imagereward(test).better[0].is_relative_to(tmp_path / "test_images")
    (tmp_path / "far").mkdir()
    far = write_imagereward(tmp_path / "far", imagereward_rows(), images="../elsewhere")
    assert len(read_imagereward(far, images=tmp_path / "elsewhere")) == len(read_imagereward(file))
    ties = [{**row, "ranking": [1] * len(row["ranking"])} for row in imagereward_rows()]
    with pytest.raises(ValueError, match="different ranks in at least one entry"):
        read_imagereward(write_imagereward(tmp_path, ties))


def test_hpdv2_prefers_the_lower_rank_and_the_chosen_image(tmp_path: Path) -> None:
    rows = hpdv2_rows()
    pairs = datasets.read_hpdv2(write_hpdv2(tmp_path, rows))
    ranks = {tmp_path / "test" / i: r for row in rows for i, r in zip(row["image_path"], row["rank"], strict=True)}
    assert all(ranks[a] < ranks[b] for a, b in zip(pairs.better, pairs.worse, strict=True))
    assert datasets.read_hpdv2(tmp_path).better == pairs.better
    chosen = [
        {"prompt": "a", "file_path": ["1.jpg", "2.jpg"], "human_preference": [0, 1]},
        {"prompt": "b", "file_path": ["3.jpg", "4.jpg"], "human_preference": [1, 0]},
    ]
    pairs = datasets.read_hpdv2(write_hpdv2(tmp_path, chosen, "train"))
    assert [path.name for path in pairs.better] == ["2.jpg", "3.jpg"]
    assert pairs.better[0].parent == tmp_path / "train"


def test_genai_bench_prefers_the_higher_mean_rating(tmp_path: Path) -> None:
    pairs = datasets.read_genai_bench(write_genai_bench(tmp_path, genai_bench_rows()))
    found = [(a.parent.name, b.parent.name, a.stem) for a, b in zip(pairs.better, pairs.worse, strict=True)]
    assert found == [
        ("DALLE_3", "Midjourney_6", "00000"),
        ("DALLE_3", "SDXL_Base", "00000"),
        ("Midjourney_6", "SDXL_Base", "00000"),
        ("Midjourney_6", "DALLE_3", "00002"),
        ("SDXL_Base", "DALLE_3", "00002"),
    ]


def test_pickapic_writes_the_images_of_its_choices_once(tmp_path: Path) -> None:
    rows = [{**row, "has_label": row["ranking_id"] != 1003} for row in pickapic_rows(count=70)]
    file = write_pickapic(tmp_path, rows)
    pairs = datasets.read_pickapic(file)
    judged = [row for row in rows if row["label_0"] != 0.5 and row["has_label"]]
    assert pairs.prompts == pairs.groups == tuple(row["caption"] for row in judged)
    for row, better, worse in zip(judged, pairs.better, pairs.worse, strict=True):
        chosen = int(row["label_1"] == 1.0)
        assert (better.read_bytes(), worse.read_bytes()) == (row[f"jpg_{chosen}"], row[f"jpg_{1 - chosen}"])
    assert sorted((tmp_path / "train_images").iterdir()) == sorted({*pairs.better, *pairs.worse})
    lost, kept = pairs.worse[5], pairs.better[0]
    content = lost.read_bytes()
    lost.unlink()
    kept.write_bytes(b"kept")
    assert datasets.read_pickapic(file).better == pairs.better
    assert (lost.read_bytes(), kept.read_bytes()) == (content, b"kept")


def test_pickapic_reads_a_folder_of_one_part(tmp_path: Path) -> None:
    for shard in range(3):
        write_pickapic(tmp_path, pickapic_rows(4 * shard, 4), f"train-0000{shard}-of-00003-0a1b")
    pairs = datasets.read_pickapic(tmp_path, images_to=tmp_path / "to")
    assert pairs.prompts == tuple(f"prompt {n % 4}" for n in range(12) if n % 3 != 2)
    assert pairs.better[0].parent == tmp_path / "to"
    write_pickapic(tmp_path, pickapic_rows(50, 3), "test_unique-00000-of-00001-0a1b")
    with pytest.raises(ValueError, match=r"the files of one part, got those of test_unique, train"):
        datasets.read_pickapic(tmp_path)


def test_pickapic_needs_the_bytes_of_an_image(tmp_path: Path) -> None:
    rows = pickapic_rows()
    rows[4]["jpg_1"] = None
    with pytest.raises(ValueError, match=r"row 4 .*bytes of an image in column jpg_1, got "):
        datasets.read_pickapic(write_pickapic(tmp_path, rows))
    with pytest.raises(ValueError, match="at least one choice"):
        datasets.read_pickapic(write_pickapic(tmp_path / "tie", pickapic_rows(2, 1)))


def test_every_public_reader_has_a_name() -> None:
    readers = {getattr(datasets, name) for name in datasets.__all__ if name.startswith("read_")} - {read_data}
    assert {source.reader for source in SOURCES.values()} == readers
    assert list(SOURCES) == [
        "agiqa3k",
        "agiqa1k",
        "aigciqa2023",
        "aigiqa20k",
        "imagereward",
        "hpdv2",
        "pickapic",
        "genai_bench",
        "pairs",
        "csv",
    ]


def test_a_path_may_hold_a_colon_or_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_table(tmp_path, table_rows())
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(read_data("csv:~/scores.csv")) == 4
    (tmp_path / "a:b").mkdir()
    assert len(read_data(f"csv:{write_table(tmp_path / 'a:b', table_rows())}")) == 4


@pytest.mark.parametrize(
    ("source", "message"),
    [
        *((name, "did you mean 'agiqa3k'") for name in ("agiqa-3k:data", "AGIQA3K:data", "agiqa3")),
        ("xyz:data", r"no data is called 'xyz'\. Write one of agiqa3k:PATH"),
        ("agiqa3k: ", "expected agiqa3k:PATH, got .*; PATH is the folder"),
        *((name, "expected NAME:PATH, got the path .*; write one of") for name in ("data/a", "scores.csv")),
    ],
)
def test_a_source_of_another_form_is_explained(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_data(source)


def scored(count: int, **changes: object) -> ScoredImages:
    given = {
        "names": tuple(str(i) for i in range(count)),
        "paths": tuple(Path(str(i)) for i in range(count)),
        "prompts": tuple(f"prompt {i % 2}" for i in range(count)),
        "generators": ("g",) * count,
        **dict.fromkeys(("quality", "quality_std", "correspondence", "correspondence_std"), np.arange(1.0 * count)),
    }
    return ScoredImages(**{**given, **changes})  # pyright: ignore[reportArgumentType]


def pairs(**changes: object) -> PreferencePairs:
    better, worse = (tuple(Path(f"{i}{side}") for i in range(3)) for side in "ab")
    given = {"prompts": ("x", "y", "x"), "better": better, "worse": worse, **changes}
    return PreferencePairs(**given)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("rows", [[2, 0], np.array([2, 0]), [False, True, False], np.array([True, False, True]), []])
def test_a_subset_keeps_rows_together(rows: Any) -> None:
    index = np.arange(3)[np.asarray(rows, dtype=None if len(rows) else int)].tolist()
    for data in (scored(3, groups=("a", "b", "c")), pairs()):
        part = data.subset(rows)
        assert len(part) == len(index)
        for name in vars(data):
            assert list(getattr(part, name)) == [getattr(data, name)[i] for i in index]


def test_tables_check_their_fields() -> None:
    for data, rows in product((scored(3), pairs()), (np.ones(4, dtype=bool), np.array([9]), np.array([[0]]))):
        with pytest.raises(ValueError, match="rows: expected a boolean mask"):
            data.subset(rows)
    assert scored(4).groups == scored(4, groups=None).groups == scored(4).prompts
    some, none = np.array([np.nan, 1.0]), np.full(2, np.nan)
    assert scored(2, correspondence=some).has_correspondence
    assert not scored(2, quality=none).has_quality
    with pytest.raises(ValueError, match="correspondence_std: expected 4 entries"):
        scored(4, correspondence_std=np.zeros(3))
    with pytest.raises(ValueError, match="expected two images, got '2a' twice at row 2"):
        pairs(worse=(Path("0b"), Path("1b"), Path("2a")))
