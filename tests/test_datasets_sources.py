"""A table of one's own, data by name, and what every reader returns."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aigiqa_reward.datasets import SOURCES, PreferencePairs, ScoredImages, read_data, read_table

FULL = [
    ["path", "prompt", "quality", "correspondence", "generator", "group", "note"],
    ["a/0.png", "a cat, asleep", "0.5", "70", "ours", "animals", ""],
    ["1.png", "a dog", "-1", "1e2", "theirs", "animals", "dark"],
]


def write_table(folder: Path, rows: list[list[str]]) -> Path:
    for row in rows[1:]:
        file = folder / row[0]
        file.parent.mkdir(parents=True, exist_ok=True)
        if row[0].endswith(".png"):
            Image.new("RGB", (4, 4)).save(file)
    with (folder / "scores.csv").open("w", newline="", encoding="utf-8") as opened:
        csv.writer(opened).writerows(rows)
    return folder / "scores.csv"


def without(rows: list[list[str]], *columns: str) -> list[list[str]]:
    kept = [place for place, column in enumerate(rows[0]) if column not in columns]
    return [[row[place] for place in kept] for row in rows]


def test_a_table_of_ones_own(tmp_path: Path) -> None:
    data = read_table(write_table(tmp_path, FULL))
    assert data.names == ("a/0.png", "1.png")
    assert data.paths == (tmp_path / "a" / "0.png", tmp_path / "1.png")
    assert data.prompts == ("a cat, asleep", "a dog")
    assert data.quality.tolist() == [0.5, -1.0]
    assert data.correspondence.tolist() == [70.0, 100.0]
    assert data.generators == ("ours", "theirs")
    assert data.groups == ("animals", "animals")


@pytest.mark.parametrize(("absent", "present"), [("quality", "correspondence"), ("correspondence", "quality")])
def test_a_table_may_lack_a_score_and_what_is_optional(tmp_path: Path, absent: str, present: str) -> None:
    data = read_table(write_table(tmp_path, without(FULL, absent, "generator", "group")))
    assert np.isnan(getattr(data, absent)).all()
    assert not getattr(data, f"has_{absent}")
    assert getattr(data, f"has_{present}")
    assert data.generators == ("unknown", "unknown")
    assert data.groups == data.prompts


def test_a_table_takes_absolute_paths(tmp_path: Path) -> None:
    image = tmp_path / "elsewhere" / "0.png"
    write_table(image.parent, [["path"], ["0.png"]])
    rows = [["path", "prompt", "quality"], [str(image), "a cat", "1"]]
    (tmp_path / "table").mkdir()
    assert read_table(write_table(tmp_path / "table", rows)).paths == (image,)


def changed(row: int, column: str, cell: str) -> list[list[str]]:
    rows = [list(cells) for cells in FULL]
    rows[row][rows[0].index(column)] = cell
    return rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (without(FULL, "prompt"), "no column prompt; expected the columns path, prompt, got path, quality"),
        (without(FULL, "quality", "correspondence"), "no column quality or correspondence; .*got path, prompt, gen"),
        (FULL[:1], "the header alone"),
        (changed(2, "quality", "good"), r"scores\.csv, line 3: .*column quality, got 'good'"),
        (changed(2, "correspondence", ""), r"line 3: .*column correspondence, got ''"),
        (changed(1, "prompt", " "), r"line 2: expected a text in column prompt"),
        (changed(1, "group", ""), r"line 2: expected a text in column group"),
        (changed(2, "path", "a/0.png"), r"line 3: 'a/0\.png' is listed twice"),
        (changed(2, "path", "2.jpg"), r"file: 1 of the 2 images that scores\.csv lists are absent, .*2\.jpg"),
    ],
)
def test_a_faulty_table_is_refused(tmp_path: Path, rows: list[list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_table(write_table(tmp_path, rows))


def test_an_absent_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="file: expected a CSV file with the columns path, prompt"):
        read_table(tmp_path)


# --------------------------------------------------------------------------------------------- by name


def test_every_public_reader_has_a_name() -> None:
    from aigiqa_reward import datasets

    readers = {getattr(datasets, name) for name in datasets.__all__ if name.startswith("read_")} - {read_data}
    assert {source.reader for source in SOURCES.values()} == readers
    assert list(SOURCES) == ["agiqa3k", "agiqa1k", "aigciqa2023", "aigiqa20k", "imagereward", "pickapic", "csv"]


def test_data_is_read_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = write_table(tmp_path, FULL)
    assert read_data(f"csv:{table}").prompts == read_table(table).prompts
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(read_data("csv:~/scores.csv")) == 2
    (tmp_path / "a:b").mkdir()
    assert len(read_data(f"csv:{write_table(tmp_path / 'a:b', FULL)}")) == 2


@pytest.mark.parametrize("name", SOURCES)
def test_a_reader_is_told_where_nothing_is(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"nowhere"):
        read_data(f"{name}:{tmp_path / 'nowhere'}")


@pytest.mark.parametrize("source", ["agiqa-3k:data", "AGIQA3K:data", "agiqa_3k:data", "agiqa3:data", "agiqa3"])
def test_the_name_probably_meant_is_told(source: str) -> None:
    with pytest.raises(ValueError, match="did you mean 'agiqa3k'") as error:
        read_data(source)
    assert all(f"{name}:PATH" in str(error.value) for name in SOURCES)


def test_a_name_like_no_other_gets_the_list() -> None:
    with pytest.raises(ValueError, match=r"no data is called 'xyz'\. Write one of agiqa3k:PATH") as error:
        read_data("xyz:data")
    assert "did you mean" not in str(error.value)


def test_the_form_is_explained(tmp_path: Path) -> None:
    for source in ("agiqa3k", "agiqa3k:", "agiqa3k: "):
        with pytest.raises(ValueError, match=r"expected agiqa3k:PATH, got .*; PATH is the folder that holds data\.csv"):
            read_data(source)
    for source in (str(tmp_path), "data/agiqa3k", "~/agiqa3k", "scores.csv"):
        with pytest.raises(ValueError, match=r"expected NAME:PATH, got the path .*; write one of agiqa3k:PATH"):
            read_data(source)


# --------------------------------------------------------------------------------------------- what is returned


def scored(count: int, **changes: object) -> ScoredImages:
    given = {
        "names": tuple(str(i) for i in range(count)),
        "paths": tuple(Path(str(i)) for i in range(count)),
        "prompts": tuple(f"prompt {i % 2}" for i in range(count)),
        "generators": ("g",) * count,
        **dict.fromkeys(("quality", "quality_std", "correspondence", "correspondence_std"), np.zeros(count)),
    }
    return ScoredImages(**{**given, **changes})  # pyright: ignore[reportArgumentType]


def test_groups_are_the_prompts_unless_they_are_given() -> None:
    assert scored(4).groups == scored(4, groups=None).groups == scored(4).prompts
    data = scored(4, groups=("a", "b", "c", "a"))
    assert data.groups == ("a", "b", "c", "a")
    assert data.subset([3, 1]).groups == ("a", "b")
    assert len(data.subset([])) == 0
    with pytest.raises(ValueError, match="groups: expected 4 entries"):
        scored(4, groups=("a",))


def test_which_scores_there_are() -> None:
    some = np.array([np.nan, 1.0])
    assert scored(2).has_quality
    assert scored(2, correspondence=some).has_correspondence
    assert not scored(2, correspondence=np.full(2, np.nan)).has_correspondence
    assert not scored(2, quality=np.full(2, np.nan)).has_quality
    assert not scored(2, correspondence=some).subset([0]).has_correspondence


def test_pairs_keep_their_rows_together() -> None:
    better = tuple(Path(f"{i}a") for i in range(3))
    worse = tuple(Path(f"{i}b") for i in range(3))
    pairs = PreferencePairs(prompts=("x", "y", "x"), better=better, worse=worse)
    assert pairs.groups == ("x", "y", "x")
    for rows in ([2, 0], np.array([2, 0])):
        part = pairs.subset(rows)
        assert (part.prompts, part.better, part.worse) == (("x", "x"), (better[2], better[0]), (worse[2], worse[0]))
    assert pairs.subset([False, True, False]).better == better[1:2]
    with pytest.raises(ValueError, match="rows"):
        pairs.subset([3])
    with pytest.raises(ValueError, match="worse: expected 3 entries, one a pair, got 2"):
        PreferencePairs(prompts=("x", "y", "x"), better=better, worse=worse[:2])
    with pytest.raises(ValueError, match="expected two images, got '2a' twice at row 2"):
        PreferencePairs(prompts=("x", "y", "x"), better=better, worse=(*worse[:2], better[2]))
