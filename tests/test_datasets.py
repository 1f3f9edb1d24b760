from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import spearmanr

from aigiqa_reward.datasets import ScoredImages, group_folds, group_split, read_agiqa3k
from aigiqa_reward.evaluation import group_mean_predictor, selection_gain, srcc

COLUMNS = ["name", "prompt", "adj1", "adj2", "style", "mos_quality", "std_quality", "mos_align", "std_align"]
REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "agiqa3k"
GENERATORS = ("sd1.5_highcorr", "AttnGAN_normal", "DALLE2_normal")


def make_rows() -> list[dict[str, str]]:
    """Three prompts (one with a comma and a quote) by three generators; scores state their place."""
    prompts = ["a cat", 'statue of a man, "marble"', "a tray of sushi"]
    return [
        {
            "name": f"{generator}_{index:03d}.jpg",
            "prompt": prompt,
            "adj1": "",
            "adj2": "",
            "style": "anime" if index else "",
            "mos_quality": str(index + 0.25 * place),
            "std_quality": "0.5",
            "mos_align": str(4 - index - 0.25 * place),
            "std_align": "0.75",
        }
        for index, prompt in enumerate(prompts)
        for place, generator in enumerate(GENERATORS)
    ]


def write(folder: Path, rows: list[dict[str, str]], columns: list[str] = COLUMNS) -> Path:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with (folder / "data.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        Image.new("RGB", (16, 16)).save(folder / "images" / Path(row["name"]).name, format="JPEG")
    return folder


def test_reads_the_published_layout(tmp_path: Path) -> None:
    rows = make_rows()
    data = read_agiqa3k(write(tmp_path, rows))
    assert len(data) == 9
    assert data.names == tuple(row["name"] for row in rows)
    assert data.prompts == tuple(row["prompt"] for row in rows)
    assert data.generators == GENERATORS * 3
    assert all(path.is_file() and path.name == name for path, name in zip(data.paths, data.names, strict=True))
    for field, column in (
        ("quality", "mos_quality"),
        ("quality_std", "std_quality"),
        ("correspondence", "mos_align"),
        ("correspondence_std", "std_align"),
    ):
        values = getattr(data, field)
        assert values.dtype == np.float64
        assert values.tolist() == [float(row[column]) for row in rows]


def test_reads_a_byte_order_mark_and_a_text_path(tmp_path: Path) -> None:
    folder = write(tmp_path, make_rows())
    table = folder / "data.csv"
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())
    assert len(read_agiqa3k(str(folder))) == 9


def test_subset_keeps_rows_together(tmp_path: Path) -> None:
    data = read_agiqa3k(write(tmp_path, make_rows()))
    mask = np.array(data.prompts) == "a cat"
    for part in (data.subset(mask), data.subset(mask.tolist()), data.subset(np.flatnonzero(mask))):
        assert len(part) == 3
        assert set(part.prompts) == {"a cat"}
        assert part.quality.tolist() == data.quality[mask].tolist()
    swapped = data.subset([8, 0])
    assert swapped.names == (data.names[8], data.names[0])
    assert swapped.paths == (data.paths[8], data.paths[0])
    assert swapped.correspondence_std.shape == (2,)
    assert len(data.subset([])) == 0
    for wrong in (np.ones(4, dtype=bool), np.array([9]), np.array([0.5])):
        with pytest.raises(ValueError, match="rows"):
            data.subset(wrong)


def test_unequal_lengths_are_refused() -> None:
    two = np.zeros(2)
    with pytest.raises(ValueError, match="correspondence_std"):
        ScoredImages(
            names=("a", "b"),
            paths=(Path("a"), Path("b")),
            prompts=("p", "p"),
            generators=("g", "g"),
            quality=two,
            quality_std=two,
            correspondence=two,
            correspondence_std=np.zeros(3),
        )


def test_missing_table_and_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"folder.*data\.csv"):
        read_agiqa3k(tmp_path)
    rows = make_rows()
    folder = write(tmp_path, rows)
    for row in (rows[7], rows[3]):
        (folder / "images" / row["name"]).unlink()
    with pytest.raises(ValueError, match=f"2 of the 9 images.*first.*{rows[3]['name']}"):
        read_agiqa3k(folder)


@pytest.mark.parametrize("column", ["name", "prompt", "mos_quality", "std_align"])
def test_missing_column_is_named(tmp_path: Path, column: str) -> None:
    folder = write(tmp_path, make_rows(), [name for name in COLUMNS if name != column])
    with pytest.raises(ValueError, match=f"no column {column};"):
        read_agiqa3k(folder)


@pytest.mark.parametrize("cell", ["", "good", "nan", "inf", "1,5"])
def test_cell_that_is_no_number_is_placed(tmp_path: Path, cell: str) -> None:
    rows = make_rows()
    rows[4]["mos_align"] = cell
    with pytest.raises(ValueError, match=r"line 6: .*mos_align"):
        read_agiqa3k(write(tmp_path, rows))


def test_short_rows_and_empty_tables_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, make_rows())
    with (folder / "data.csv").open("a") as file:
        file.write("AttnGAN_normal_000.jpg,a cat\n")
    with pytest.raises(ValueError, match="line 11"):
        read_agiqa3k(folder)
    with pytest.raises(ValueError, match="header alone"):
        read_agiqa3k(write(tmp_path / "header", []))
    (folder / "data.csv").write_text("")
    with pytest.raises(ValueError, match="an empty file"):
        read_agiqa3k(folder)


@pytest.mark.parametrize("name", ["../sd1.5_normal_000.jpg", "sd1.5.jpg", "_000.jpg", "a_1.png"])
def test_names_of_another_form_are_refused(tmp_path: Path, name: str) -> None:
    rows = make_rows()
    rows[2]["name"] = name
    with pytest.raises(ValueError, match=r"line 4: .*generator"):
        read_agiqa3k(write(tmp_path, rows))


def test_repeated_names_are_refused(tmp_path: Path) -> None:
    rows = make_rows()
    with pytest.raises(ValueError, match=r"line 11: .*twice"):
        read_agiqa3k(write(tmp_path, [*rows, rows[0]]))


def unbalanced_groups(seed: int, count: int = 60) -> np.ndarray:
    rng = np.random.default_rng(seed)
    groups = np.repeat([f"prompt {i}" for i in range(count)], rng.integers(5, 11, size=count))
    return rng.permutation(groups)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("folds", [2, 5, 7])
def test_folds_keep_groups_whole_and_are_balanced(seed: int, folds: int) -> None:
    groups = unbalanced_groups(seed)
    fold = group_folds(groups, folds, seed)
    assert fold.shape == groups.shape
    assert set(fold.tolist()) == set(range(folds))
    assert len(set(zip(groups.tolist(), fold.tolist(), strict=True))) == len(set(groups.tolist()))
    sizes = np.bincount(fold)
    assert sizes.max() - sizes.min() <= max(Counter(groups.tolist()).values())


def test_folds_depend_on_the_seed_and_not_on_the_order() -> None:
    groups = unbalanced_groups(0)
    fold = group_folds(groups, 5, 3)
    assert np.array_equal(fold, group_folds(groups.tolist(), 5, 3))
    order = np.random.default_rng(1).permutation(len(groups))
    assert np.array_equal(fold[order], group_folds(groups[order], 5, 3))
    assert not np.array_equal(fold, group_folds(groups, 5, 4))


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.99])
def test_split_draws_whole_groups(fraction: float) -> None:
    groups = unbalanced_groups(1)
    drawn = group_split(groups, fraction, 0)
    inside, outside = set(groups[drawn].tolist()), set(groups[~drawn].tolist())
    assert drawn.dtype == bool
    assert not inside & outside
    assert len(inside) == min(max(1, round(fraction * 60)), 59)
    assert np.array_equal(drawn, group_split(groups, fraction, 0))
    assert not np.array_equal(drawn, group_split(groups, fraction, 1))


def test_impossible_splits_are_refused() -> None:
    for folds in (0, 1, 3):
        with pytest.raises(ValueError, match="folds: expected from 2 to 2"):
            group_folds(["a", "b"], folds, 0)
    with pytest.raises(ValueError, match="groups"):
        group_folds([], 2, 0)
    for fraction in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match="fraction"):
            group_split(["a", "b"], fraction, 0)
    with pytest.raises(ValueError, match="at least two"):
        group_split(["a", "a"], 0.5, 0)


@pytest.mark.skipif(
    not (REAL / "data.csv").is_file(), reason="AGIQA-3K is not at ../shared/data/agiqa3k beside the checkout"
)
def test_real_benchmark_and_its_generator_control() -> None:
    data = read_agiqa3k(REAL)
    assert (len(data), len(set(data.prompts)), len(set(data.generators))) == (2385, 240, 10)
    # Counted again from the file, with loops and scipy.
    with (REAL / "data.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for column, target in (("mos_quality", data.quality), ("mos_align", data.correspondence)):
        scores: dict[str, list[float]] = {}
        for row in rows:
            scores.setdefault(row["name"].rsplit("_", 1)[0], []).append(float(row[column]))
        means = {generator: sum(values) / len(values) for generator, values in scores.items()}
        picked = possible = 0.0
        for prompt in {row["prompt"] for row in rows}:
            images = [(means[r["name"].rsplit("_", 1)[0]], float(r[column])) for r in rows if r["prompt"] == prompt]
            mean = sum(score for _, score in images) / len(images)
            picked += max(images)[1] - mean
            possible += max(score for _, score in images) - mean
        predicted = group_mean_predictor(target, data.generators, data.generators)
        looked_up = [means[row["name"].rsplit("_", 1)[0]] for row in rows]
        expected = spearmanr(looked_up, [float(row[column]) for row in rows])[0]
        assert srcc(predicted, target) == pytest.approx(expected, abs=1e-9)
        assert selection_gain(predicted, target, data.prompts) == pytest.approx(picked / possible, abs=1e-9)


@pytest.mark.skipif(
    not (REAL / "data.csv").is_file(), reason="AGIQA-3K is not at ../shared/data/agiqa3k beside the checkout"
)
def test_knowing_the_generator_is_most_of_choosing_but_not_within_a_generator() -> None:
    data = read_agiqa3k(REAL)
    predicted = group_mean_predictor(data.quality, data.generators, data.generators)
    variants = np.array([name.startswith("sd1.5") for name in data.generators])
    prompts = np.array(data.prompts)
    assert selection_gain(predicted, data.quality, prompts) == pytest.approx(0.90, abs=0.02)
    assert abs(selection_gain(predicted[variants], data.quality[variants], prompts[variants])) < 0.2
