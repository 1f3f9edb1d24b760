"""Reading what anybody may have written: JSON that is nested too deep, pipes and devices in the place of files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from aigiqa_reward.cli.inputs import CommandError
from aigiqa_reward.cli.prompts import read_prompts
from aigiqa_reward.datasets import read_imagereward
from aigiqa_reward.evaluation import ProtocolReport
from aigiqa_reward.models.scenarios import Preferences
from aigiqa_reward.reading import parse_json, read_regular
from aigiqa_reward.zoo import load_reward

DEEP = "[" * 100_000


def saved_reward(folder: Path) -> None:
    (folder / "config.json").write_text(DEEP)
    load_reward(folder)


def prompts(folder: Path) -> None:
    (folder / "p.jsonl").write_text(DEEP)
    read_prompts(folder / "p.jsonl", "--prompts")


def written(name: str, read: Callable[[Path], object]) -> Callable[[Path], None]:
    def reader(folder: Path) -> None:
        (folder / name).write_text(DEEP)
        read(folder / name)

    return reader


READERS = {
    "config.json": saved_reward,
    "p.jsonl": prompts,
    "train.json": written("train.json", read_imagereward),
    "r.json": written("r.json", ProtocolReport.load),
    "p.json": written("p.json", Preferences.load),
}


@pytest.mark.parametrize("text", ['{"a": [1, 2.5, null, "é"]}', "3", '"\\u2028"'])
def test_json_is_json(text: str) -> None:
    assert parse_json(text) == parse_json(text.encode()) == json.loads(text)


@pytest.mark.parametrize("text", [DEEP, '{"a":' * 100_000, "[1,", b"\xff\xfe\xff", "9" * 5000])
def test_what_is_none_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


@pytest.mark.parametrize("name", READERS)
def test_readers_refuse_json_that_is_nested_too_deep(name: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, CommandError), match="nested too deep") as caught:
        READERS[name](tmp_path)
    assert name in str(caught.value)


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path: Path) -> None:
    file, pipe, link = tmp_path / "file", tmp_path / "pipe", tmp_path / "link"
    file.write_bytes(b"12345")
    link.symlink_to(file)
    os.mkfifo(pipe)
    assert read_regular(file, most=5) == read_regular(link, most=5) == b"12345"
    with pytest.raises(OSError, match="5 bytes, expected at most 4"):
        read_regular(file, most=4)
    for place, reason in ((pipe, "not a regular file"), (Path("/dev/zero"), "not a regular file"), (tmp_path, "Is a")):
        with pytest.raises(OSError, match=reason):
            read_regular(place, most=100)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "none", most=100)
