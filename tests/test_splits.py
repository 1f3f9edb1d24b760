"""What trains, what chooses an epoch and what is reported: no group on two sides, and the same for the same seed."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from aigiqa_reward.datasets import PreferencePairs, ScoredImages, Split, split_rows


def images(seed: int = 0, prompts: int = 50) -> ScoredImages:
    """Each prompt has 1 to 8 images, in a random order."""
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat(np.arange(prompts), rng.integers(1, 9, prompts)))
    count = len(groups)
    score = np.zeros(count)
    return ScoredImages(
        names=tuple(f"{i}.png" for i in range(count)),
        paths=tuple(Path(f"{i}.png") for i in range(count)),
        prompts=tuple(f"prompt {group}" for group in groups),
        generators=("g",) * count,
        quality=score,
        quality_std=score,
        correspondence=score,
        correspondence_std=score,
    )


def parts(split: Split) -> tuple[list[int], list[int], list[int]]:
    return split.train.tolist(), split.validation.tolist(), split.test.tolist()


def assert_covers(split: Split, count: int) -> None:
    rows = np.concatenate([split.train, split.validation, split.test])
    assert sorted(rows.tolist()) == list(range(count))
    for part in parts(split):
        assert part == sorted(part)


@pytest.mark.parametrize("seed", range(5))
def test_groups_stay_whole(seed: int) -> None:
    data = images(seed)
    split = split_rows(data, seed=seed)
    assert_covers(split, len(data))
    train, validation, test = ({data.groups[row] for row in part} for part in parts(split))
    assert not (train & validation or train & test or validation & test)
    # 20 % of 50 prompts, then 10 % of the 40 that remain.
    assert (len(train), len(validation), len(test)) == (36, 4, 10)


def test_a_split_is_a_function_of_groups_and_seed() -> None:
    data = images()
    assert parts(split_rows(data, seed=3)) == parts(split_rows(data, seed=3))
    tests = {tuple(split_rows(data, seed=seed).test) for seed in range(10)}
    assert len(tests) == 10
    order = np.random.default_rng(1).permutation(len(data))
    shuffled = data.subset(order)
    for before, after in zip(parts(split_rows(data, seed=3)), parts(split_rows(shuffled, seed=3)), strict=True):
        assert {data.names[row] for row in before} == {shuffled.names[row] for row in after}


def test_every_group_is_reported_about_equally_often() -> None:
    data = images(prompts=20)
    times = dict.fromkeys(data.groups, 0)
    for seed in range(300):
        for group in {data.groups[row] for row in split_rows(data, seed=seed).test}:
            times[group] += 1
    # A binomial of 300 draws at 0.2 has mean 60 and deviation 6.9.
    assert 60 - 5 * 7 < min(times.values()) <= max(times.values()) < 60 + 5 * 7


def test_single_images_are_split_without_regard_to_groups() -> None:
    data = images()
    split = split_rows(data, mode="random_image", seed=0)
    assert_covers(split, len(data))
    assert len(split.test) == round(0.2 * len(data))
    assert len(split.validation) == round(0.1 * (len(data) - len(split.test)))
    shared = {data.groups[row] for row in split.train} & {data.groups[row] for row in split.test}
    assert len(shared) > 20


def test_pairs_are_split_by_group() -> None:
    data = images()
    pairs = PreferencePairs(prompts=data.prompts, better=data.paths, worse=tuple(Path(f"w{n}") for n in data.names))
    assert parts(split_rows(pairs, seed=2)) == parts(split_rows(data, seed=2))
    assert_covers(split_rows(pairs, mode="random_image", seed=2), len(pairs))
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
    data = images()
    held = {f"prompt {p}" for p in range(10)}
    rows = [(n, "test" if g in held else "train") for n, g in zip(data.names, data.groups, strict=True)]
    file = write(tmp_path / "split.csv", rows)
    split = split_rows(data, mode="csv", seed=0, file=file)
    assert_covers(split, len(data))
    train, validation, test = ({data.groups[row] for row in part} for part in parts(split))
    assert test == held
    assert not train & validation
    assert len(validation) == 4
    assert parts(split) == parts(split_rows(data, mode="csv", seed=0, file=str(file)))
    assert parts(split) != parts(split_rows(data, mode="csv", seed=1, file=file))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the header alone"),
        ([("0.png", "train")], r"split\.csv: expected a row for every image, got none for 2 of 3, the first '1\.png'"),
        ([("0.png", "train"), ("0.png", "test")], r"line 3: '0\.png' is listed twice"),
        ([("0.png", "train"), ("1.png", "dev")], r"line 3: expected split to be train, .* got 'dev'"),
        ([("0.png", "train"), ("1.png", "train"), ("2.png", "val")], "in both train and test, got none in test"),
        ([("0.png", "test"), ("1.png", "test"), ("2.png", "val")], "got none in train"),
        ([("0.png", "train"), ("1.png", "test"), ("2.png", "test")], "validation rows, or train rows of two groups"),
    ],
)
def test_a_faulty_file_is_refused(tmp_path: Path, rows: list[tuple[str, str]], message: str) -> None:
    data = images().subset([0, 1, 2])
    with pytest.raises(ValueError, match=message):
        split_rows(data, mode="csv", seed=0, file=write(tmp_path / "split.csv", rows))


def test_a_file_of_another_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="file: expected a CSV file with the columns name and split, found none"):
        split_rows(images(), mode="csv", seed=0, file=tmp_path / "split.csv")
    with pytest.raises(ValueError, match="no column split; expected the columns name, split, got name, part"):
        split_rows(
            images(), mode="csv", seed=0, file=write(tmp_path / "split.csv", [("0.png", "test")], ("name", "part"))
        )


def test_arguments_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mode: expected one of group, random_image, csv, got 'prompt'"):
        split_rows(images(), mode="prompt", seed=0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="file: expected the table of parts with mode 'csv', got none"):
        split_rows(images(), mode="csv", seed=0)
    with pytest.raises(ValueError, match=r"file: expected none with mode 'group', got '.*split\.csv'"):
        split_rows(images(), seed=0, file=tmp_path / "split.csv")
    with pytest.raises(ValueError, match="images: expected at least 3 groups, one a part, got 2"):
        split_rows(images(prompts=2), seed=0)
    with pytest.raises(ValueError, match="images: expected at least 3 rows, one a part, got 0"):
        split_rows(images().subset([]), mode="random_image", seed=0)


def test_the_smallest_split_has_every_part() -> None:
    data = images(prompts=3)
    assert all(parts(split_rows(data, seed=0)))


def test_a_split_shares_no_row() -> None:
    rows = np.arange(4)
    with pytest.raises(ValueError, match="expected no row twice, got 1, the first 2"):
        Split(train=rows[:3], validation=rows[2:], test=rows[:0])
    with pytest.raises(ValueError, match="validation: expected row numbers from 0, got bool"):
        Split(train=rows[:3], validation=rows > 2, test=rows[:0])
    with pytest.raises(ValueError, match="test: expected row numbers from 0"):
        Split(train=rows, validation=rows[:0], test=np.array([-1]))
