"""Readers of preferences, held against files that these tests write in the published layouts."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from aigiqa_reward.datasets import read_imagereward, read_pickapic

# --------------------------------------------------------------------------------------------- ImageReward


def entries(seed: int = 0, count: int = 6) -> list[dict[str, Any]]:
    """Entries with 2 to 5 images and ranks from 1 to 4, some shared; every third prompt is the same."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        images = int(rng.integers(2, 6))
        made.append(
            {
                "id": f"{number:06d}-0001",
                "prompt": f"prompt {number % 3}",
                "generations": [f"part-{number:06d}/images/0001/{image}.webp" for image in range(images)],
                "ranking": rng.integers(1, 5, images).tolist(),
            }
        )
    made[0]["ranking"][:2] = [2, 1]
    return made


def write_json(folder: Path, made: Any, name: str = "train", images: str = "images") -> Path:
    file = folder / f"{name}.json"
    for entry in made if isinstance(made, list) else []:
        for image in entry.get("generations") or []:
            path = folder / images / str(image)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4)).save(path, format="WEBP")
    file.write_text(json.dumps(made), encoding="utf-8")
    return file


@pytest.mark.parametrize("seed", range(4))
def test_imagereward_gives_every_pair_of_different_ranks_once(tmp_path: Path, seed: int) -> None:
    made = entries(seed)
    pairs = read_imagereward(write_json(tmp_path, made))
    rank = {tmp_path / "images" / i: r for e in made for i, r in zip(e["generations"], e["ranking"], strict=True)}
    prompt = {tmp_path / "images" / i: e["prompt"] for e in made for i in e["generations"]}
    expected = {
        frozenset({a, b}) for a in rank for b in rank if a.parent == b.parent and rank[a] != rank[b]
    }  # a folder holds one entry
    got = [frozenset(images) for images in zip(pairs.better, pairs.worse, strict=True)]
    assert len(got) == len(expected)
    assert set(got) == expected
    for text, better, worse in zip(pairs.prompts, pairs.better, pairs.worse, strict=True):
        assert rank[better] < rank[worse]
        assert prompt[better] == prompt[worse] == text
    assert pairs.groups == pairs.prompts


def test_imagereward_finds_its_images(tmp_path: Path) -> None:
    file = write_json(tmp_path, entries())
    assert read_imagereward(tmp_path).better == read_imagereward(str(file)).better
    test = write_json(tmp_path, entries(), "test", "test_images")
    assert read_imagereward(test).better[0].is_relative_to(tmp_path / "test_images")
    (tmp_path / "far").mkdir()
    far = write_json(tmp_path / "far", entries(), images="../elsewhere")
    with pytest.raises(ValueError, match=r"images: \d+ of the \d+ images that train\.json lists are absent"):
        read_imagereward(far)
    assert len(read_imagereward(far, images=tmp_path / "elsewhere")) == len(read_imagereward(file))


IMAGEREWARD_FAULTS: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], str]] = {
    "no list": (lambda e: {"entries": e}, r"train\.json: expected a list of entries \{id, prompt, .* got dict"),
    "nothing": (lambda e: [], "expected a list of entries"),
    "field": (lambda e: e[3].pop("ranking"), "entry 4: expected the fields .*, got id, prompt, generations$"),
    "id": (lambda e: e[3].update(id="000001-0001"), "entry 4: the id '000001-0001' is that of entry 2 as well"),
    "count": (lambda e: e[3]["ranking"].append(1), r"entry 4 \(id '000003-0001'\): expected one rank an image"),
    "prompt": (lambda e: e[3].update(prompt=None), "entry 4 .*expected prompt to be a text, got None"),
    "rank": (lambda e: e[3]["ranking"].__setitem__(0, "1"), "entry 4 .*ranking to be a list of numbers, got '1'"),
    "truth": (lambda e: e[3]["ranking"].__setitem__(0, True), "ranking to be a list of numbers, got True"),
    "ranking": (lambda e: e[3].update(ranking=1), "entry 4 .*expected ranking to be a list of numbers, got 1"),
    "image": (lambda e: e[3]["generations"].__setitem__(0, 7), "generations to be a list of image paths, got 7"),
    "twice": (
        lambda e: e[0]["generations"].__setitem__(1, e[0]["generations"][0]),
        r"entry 1 .*0\.webp' is listed twice",
    ),
    "ties": (lambda e: [x.update(ranking=[1] * len(x["ranking"])) for x in e] and e, "different ranks in at least"),
}


@pytest.mark.parametrize("fault", IMAGEREWARD_FAULTS)
def test_imagereward_of_another_form_is_refused(tmp_path: Path, fault: str) -> None:
    spoil, message = IMAGEREWARD_FAULTS[fault]
    made: Any = entries()
    result = spoil(made)
    if fault in ("no list", "nothing"):
        made = result
    with pytest.raises(ValueError, match=message):
        read_imagereward(write_json(tmp_path, made))


def test_imagereward_that_is_no_file_or_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path: expected ImageReward's JSON file, or a folder that holds train\.json"):
        read_imagereward(tmp_path)
    (tmp_path / "train.json").write_bytes(b"[{]")
    with pytest.raises(ValueError, match=r"train\.json: expected JSON in UTF-8"):
        read_imagereward(tmp_path)


# --------------------------------------------------------------------------------------------- Pick-a-Pic

LABELS = [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)]


def jpeg(color: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, format="JPEG")
    return buffer.getvalue()


def choices(start: int, count: int) -> list[dict[str, Any]]:
    """Rows whose chosen image is brighter; the second of three chosen, and every third a tie."""
    rows = []
    for number in range(start, start + count):
        label = LABELS[number % 3]
        rows.append(
            {
                "caption": f"prompt {number % 4}",
                "jpg_0": jpeg((int(label[0] * 200), number % 256, 0)),
                "jpg_1": jpeg((int(label[1] * 200), number % 256, 0)),
                "label_0": label[0],
                "label_1": label[1],
                "ranking_id": 1000 + number,
                "model_0": "a",
            }
        )
    return rows


def write_parquet(file: Path, rows: list[dict[str, Any]], rows_a_group: int = 3) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=rows_a_group)
    return file


def redness(path: Path) -> int:
    with Image.open(path) as image:
        return np.asarray(image)[..., 0].mean().item()


def test_pickapic_writes_images_and_leaves_ties_out(tmp_path: Path) -> None:
    rows = choices(0, 100)
    pairs = read_pickapic(
        write_parquet(tmp_path / "train.parquet", rows, rows_a_group=70), images_to=tmp_path / "images"
    )
    judged = [row for row in rows if row["label_0"] != 0.5]
    assert pairs.prompts == pairs.groups == tuple(row["caption"] for row in judged)
    for row, better, worse in zip(judged, pairs.better, pairs.worse, strict=True):
        chosen = int(row["label_1"] == 1.0)
        assert better.read_bytes() == row[f"jpg_{chosen}"]
        assert worse.read_bytes() == row[f"jpg_{1 - chosen}"]
        assert redness(better) > 150 > 50 > redness(worse)
    assert sorted((tmp_path / "images").iterdir()) == sorted({*pairs.better, *pairs.worse})


def test_pickapic_reads_images_once_and_restores_what_is_lost(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "train.parquet", choices(0, 12))
    first = read_pickapic(file)
    assert first.better[0].parent == tmp_path / "train_images"
    paths = (*first.better, *first.worse)
    content = {path: path.read_bytes() for path in paths}
    lost, kept = first.worse[5], first.better[0]
    lost.unlink()
    kept.write_bytes(b"kept")
    again = read_pickapic(file)
    assert (again.better, again.worse) == (first.better, first.worse)
    assert lost.read_bytes() == content[lost]
    assert kept.read_bytes() == b"kept"


def test_pickapic_reads_a_folder_of_one_part(tmp_path: Path) -> None:
    for shard in range(3):
        write_parquet(tmp_path / f"train-0000{shard}-of-00003-0a1b.parquet", choices(4 * shard, 4))
    pairs = read_pickapic(tmp_path)
    assert pairs.prompts == tuple(f"prompt {n % 4}" for n in range(12) if n % 3 != 2)
    assert pairs.better[0].parent == tmp_path / "images"
    write_parquet(tmp_path / "test_unique-00000-of-00001-0a1b.parquet", choices(50, 3))
    with pytest.raises(ValueError, match=r"the files of one part, got those of test_unique, train"):
        read_pickapic(tmp_path)


def test_pickapic_leaves_out_what_nobody_judged(tmp_path: Path) -> None:
    rows = [{**row, "has_label": row["ranking_id"] != 1003} for row in choices(0, 6)]
    pairs = read_pickapic(write_parquet(tmp_path / "a.parquet", rows))
    assert [path.name for path in pairs.better] == ["1000_0.jpg", "1001_1.jpg", "1004_1.jpg"]


PICKAPIC_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "label": ({"label_0": 0.7}, r"a\.parquet, row 4 \(the first is 0\): expected label_0 and label_1 .* got 0.7 and 1"),
    "no label": ({"label_0": None}, "row 4 .*got None and 1"),
    "both": ({"label_0": 1.0}, "row 4 .*got 1.0 and 1.0"),
    "id": ({"ranking_id": 1001}, "row 4 .*the ranking_id 1001 is that of .*row 1 .*as well"),
    "no id": ({"ranking_id": None}, "row 4 .*ranking_id to be a number from 0, got None"),
    "caption": ({"caption": None}, "row 4 .*column caption, got None"),
    "image": ({"jpg_1": None}, "row 4 .*bytes of an image in column jpg_1, got none"),
    "bytes": ({"jpg_0": b""}, "row 4 .*bytes of an image in column jpg_0, got none"),
}


@pytest.mark.parametrize("fault", PICKAPIC_FAULTS)
def test_pickapic_places_a_wrong_cell(tmp_path: Path, fault: str) -> None:
    cells, message = PICKAPIC_FAULTS[fault]
    rows = choices(0, 6)
    rows[4].update(cells)
    with pytest.raises(ValueError, match=message):
        read_pickapic(write_parquet(tmp_path / "a.parquet", rows))
    assert not list(tmp_path.rglob("*.part"))


def test_pickapic_of_another_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="path: expected a parquet file of Pick-a-Pic, or a folder of them"):
        read_pickapic(tmp_path)
    file = tmp_path / "a.parquet"
    write_parquet(file, [{k: v for k, v in row.items() if k != "jpg_1"} for row in choices(0, 3)])
    with pytest.raises(ValueError, match=r"a\.parquet: no column jpg_1; .*got caption, jpg_0"):
        read_pickapic(file)
    write_parquet(file, [{**row, "jpg_0": "http://"} for row in choices(0, 3)])
    with pytest.raises(ValueError, match="the bytes of images in column jpg_0, got string"):
        read_pickapic(file)
    write_parquet(file, choices(2, 1))
    with pytest.raises(ValueError, match="at least one choice"):
        read_pickapic(file)
    file.write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: expected a parquet file"):
        read_pickapic(file)


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_parquet(tmp_path / "a.parquet", choices(0, 3))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r'needs pyarrow\.parquet; pip install "aigiqa-reward\[data\]"'):
        read_pickapic(file)
