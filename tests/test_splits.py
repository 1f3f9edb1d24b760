from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aigiqa_reward.datasets import PreferencePairs, ScoredImages, Split, group_folds, group_split, split_rows


def images(seed: int = 0, prompts: int = 50) -> ScoredImages:
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat(np.arange(prompts), rng.integers(1, 9, prompts)))
    count = len(groups)
    return ScoredImages(
        names=tuple(f"{i}.png" for i in range(count)),
        paths=tuple(Path(f"{i}.png") for i in range(count)),
        prompts=tuple(f"prompt {group}" for group in groups),
        generators=("g",) * count,
        **dict.fromkeys(("quality", "quality_std", "correspondence", "correspondence_std"), np.zeros(count)),
    )


def parts(split: Split) -> tuple[list[int], list[int], list[int]]:
    return split.train.tolist(), split.validation.tolist(), split.test.tolist()


def groups_of(data: ScoredImages, split: Split) -> list[set[str]]:
    assert sorted(np.concatenate(parts(split)).tolist()) == list(range(len(data)))
    assert all(part == sorted(part) for part in parts(split))
    return [{data.groups[row] for row in part} for part in parts(split)]


@pytest.mark.parametrize("seed", range(3))
def test_groups_stay_whole(seed: int) -> None:
    data = images(seed)
    train, validation, test = groups_of(data, split_rows(data, seed=seed))
    assert not (train & validation or train & test or validation & test)
    # 20 % of 50 prompts, then 10 % of the 40 that remain.
    assert (len(train), len(validation), len(test)) == (36, 4, 10)
    assert all(parts(split_rows(images(prompts=3), seed=seed))), "the smallest split has every part"


def test_a_split_is_a_function_of_groups_and_seed() -> None:
    data = images()
    assert parts(split_rows(data, seed=3)) == parts(split_rows(data, seed=3))
    shuffled = data.subset(np.random.default_rng(1).permutation(len(data)))
    for before, after in zip(parts(split_rows(data, seed=3)), parts(split_rows(shuffled, seed=3)), strict=True):
        assert {data.names[row] for row in before} == {shuffled.names[row] for row in after}
    data, times = images(prompts=20), Counter()
    for seed in range(300):
        times.update(groups_of(data, split_rows(data, seed=seed))[2])
    # A binomial of 300 draws at 0.2 has mean 60 and deviation 6.9.
    assert 60 - 5 * 7 < min(times.values()) <= max(times.values()) < 60 + 5 * 7


def test_single_images_are_split_without_regard_to_groups() -> None:
    data = images()
    split = split_rows(data, mode="random_image", seed=0)
    train, _, test = groups_of(data, split)
    assert len(split.test) == round(0.2 * len(data))
    assert len(split.validation) == round(0.1 * (len(data) - len(split.test)))
    assert len(train & test) > 20


def test_pairs_are_split_by_group() -> None:
    data = images()
    pairs = PreferencePairs(prompts=data.prompts, better=data.paths, worse=tuple(Path(f"w{n}") for n in data.names))
    assert parts(split_rows(pairs, seed=2)) == parts(split_rows(data, seed=2))
    with pytest.raises(ValueError, match="mode: 'csv' lists images by name, and pairs have none"):
        split_rows(pairs, mode="csv", seed=2, file="split.csv")


def write(file: Path, rows: list[tuple[str, str]], columns: tuple[str, str] = ("name", "split")) -> Path:
    with file.open("w", newline="", encoding="utf-8") as opened:
        csv.writer(opened).writerows([columns, *rows])
    return file


@pytest.mark.parametrize("validation", ["validation", "val"])
def test_a_file_assigns_the_parts(tmp_path: Path, validation: str) -> None:
    data = images(prompts=5)
    wanted = [("train", validation, "test")[i % 3] for i in range(len(data))]
    rows = [*zip(data.names, wanted, strict=True), ("another.png", "test")]
    split = split_rows(data, mode="csv", seed=0, file=write(tmp_path / "split.csv", rows[::-1]))
    assert parts(split) == tuple(list(range(part, len(data), 3)) for part in range(3))


def test_a_file_without_validation_gives_up_groups_of_its_train_part(tmp_path: Path) -> None:
    data, held = images(), {f"prompt {p}" for p in range(10)}
    rows = [(n, "test" if g in held else "train") for n, g in zip(data.names, data.groups, strict=True)]
    file = write(tmp_path / "split.csv", rows)
    train, validation, test = groups_of(data, split_rows(data, mode="csv", seed=0, file=file))
    assert (test, len(validation), train & validation) == (held, 4, set())
    found = [parts(split_rows(data, mode="csv", seed=seed, file=str(file))) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the header alone"),
        ([("0.png", "train")], r"split\.csv: expected a row for every image, got none for 2 of 3, the first '1\.png'"),
        ([("0.png", "train"), ("0.png", "test")], r"line 3: '0\.png' is listed twice"),
        ([("0.png", "train"), ("1.png", "dev")], r"line 3: expected split to be train, .* got 'dev'"),
        ([("0.png", "train"), ("1.png", "train"), ("2.png", "val")], "in both train and test, got 2 and 0"),
        ([("0.png", "train"), ("1.png", "test"), ("2.png", "test")], "validation rows, or train rows of two groups"),
    ],
)
def test_a_faulty_file_is_refused(tmp_path: Path, rows: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_rows(images().subset([0, 1, 2]), mode="csv", seed=0, file=write(tmp_path / "split.csv", rows))


def test_arguments_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    absent, other = tmp_path / "no.csv", write(tmp_path / "split.csv", [("0.png", "test")], ("name", "part"))
    data = images()
    refusals: list[tuple[Any, dict[str, Any], str]] = [
        (data, {"mode": "prompt"}, "mode: expected one of group, random_image, csv, got 'prompt'"),
        (data, {"mode": "csv"}, "file: expected the table of parts with mode 'csv', got none"),
        (data, {"file": absent}, r"file: expected none with mode 'group', got '.*no\.csv'"),
        (data, {"mode": "csv", "file": absent}, r"file: expected a CSV file .*, found none"),
        (data, {"mode": "csv", "file": other}, "no column split; expected the columns name, split, got name, part"),
        (images(prompts=2), {}, "images: expected at least 3 groups, one per part, got 2"),
    ]
    for table, arguments, message in refusals:
        with pytest.raises(ValueError, match=message):
            split_rows(table, seed=0, **arguments)


def test_a_split_shares_no_row() -> None:
    rows = np.arange(4)
    with pytest.raises(ValueError, match="expected no row twice, got row 2 again"):
        Split(train=rows[:3], validation=rows[2:], test=rows[:0])
    with pytest.raises(ValueError, match="test: expected row numbers from 0"):
        Split(train=rows, validation=rows[:0], test=np.array([-1]))


def unbalanced_groups(seed: int, count: int = 60) -> np.ndarray:
    rng = np.random.default_rng(seed)
    groups = np.repeat([f"prompt {i}" for i in range(count)], rng.integers(5, 11, size=count))
    return rng.permutation(groups)


@pytest.mark.parametrize(("seed", "folds"), [(0, 2), (1, 5), (2, 7)])
def test_folds_keep_groups_whole_are_balanced_and_depend_on_the_seed_alone(seed: int, folds: int) -> None:
    groups = unbalanced_groups(seed)
    fold = group_folds(groups, folds, seed)
    assert set(fold.tolist()) == set(range(folds))
    assert len(set(zip(groups.tolist(), fold.tolist(), strict=True))) == len(set(groups.tolist()))
    sizes = np.bincount(fold)
    assert sizes.max() - sizes.min() <= max(Counter(groups.tolist()).values())
    order = np.random.default_rng(1).permutation(len(groups))
    assert np.array_equal(fold[order], group_folds(groups[order].tolist(), folds, seed))
    assert not np.array_equal(fold, group_folds(groups, folds, seed + 1))


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.99])
def test_a_fraction_draws_whole_groups(fraction: float) -> None:
    groups = unbalanced_groups(1)
    drawn = group_split(groups, fraction, 0)
    inside, outside = set(groups[drawn].tolist()), set(groups[~drawn].tolist())
    assert not inside & outside
    assert len(inside) == min(max(1, round(fraction * 60)), 59)
    assert np.array_equal(drawn, group_split(groups, fraction, 0))
    assert not np.array_equal(drawn, group_split(groups, fraction, 1))


def test_impossible_folds_and_fractions_are_refused() -> None:
    for folds in (1, 3):
        with pytest.raises(ValueError, match="folds: expected from 2 to 2"):
            group_folds(["a", "b"], folds, 0)
    with pytest.raises(ValueError, match="fraction"):
        group_split(["a", "b"], 1.0, 0)
    with pytest.raises(ValueError, match="at least two"):
        group_split(["a", "a"], 0.5, 0)
