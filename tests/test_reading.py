"""Reading what anybody may have written: JSON that is nested too deep, pipes and devices in the place of files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from aigiqa_reward.cli.evaluation_files import read_predicted, read_unreadable
from aigiqa_reward.cli.inputs import CommandError, read_text
from aigiqa_reward.cli.prompts import read_prompts
from aigiqa_reward.datasets import read_imagereward
from aigiqa_reward.encoders.blip import BLIPConfig, _tokenizer
from aigiqa_reward.encoders.open_clip import OpenCLIPConfig, OpenCLIPEncoder
from aigiqa_reward.evaluation import ProtocolReport
from aigiqa_reward.finetuning import checkpoints as finetuning
from aigiqa_reward.models.cpa_iqa import Preferences
from aigiqa_reward.rewards.saved import load_reward
from aigiqa_reward.training import checkpoints as training
from aigiqa_reward.utils.io import parse_json, read_arrays, read_json, read_regular

DEEP = "[" * 100_000


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])


READERS: dict[str, Callable[[Path], object]] = {
    "config.json": lambda file: load_reward(file.parent),
    "p.jsonl": lambda file: read_prompts(file, "--prompts"),
    "train.json": read_imagereward,
    "r.json": ProtocolReport.load,
    "p.json": Preferences.load,
    "epoch/state.json": lambda file: training.load_checkpoint(file.parent, optimizer(), {}),
    "checkpoint-1/state.json": lambda file: finetuning.load_checkpoint(file.parent, None),  # pyright: ignore[reportArgumentType]
    "unreadable.json": read_unreadable,
    "open_clip_config.json": lambda file: OpenCLIPEncoder(OpenCLIPConfig(architecture=f"local-dir:{file.parent}")),
}
OTHERS: dict[str, Callable[[Path], object]] = {
    "prompts.txt": lambda file: read_text(file, "--prompts"),
    "seed0.npz": lambda file: read_predicted(file, 3),
    "tokenizer.json": lambda file: _tokenizer(BLIPConfig(path_or_id=str(file.parent))),
}
"""Of files that are no JSON, or are none to us."""


@pytest.mark.parametrize("text", ['{"a": [1, 2.5, null, "é"]}', "3", '"\\u2028"'])
def test_json_is_json(text: str) -> None:
    assert parse_json(text) == parse_json(text.encode()) == json.loads(text)


@pytest.mark.parametrize("text", [DEEP, '{"a":' * 100_000, "[1,", b"\xff\xfe\xff", "9" * 5000])
def test_what_is_none_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


@pytest.mark.parametrize("name", READERS)
def test_readers_refuse_json_that_is_nested_too_deep(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(DEEP)
    with pytest.raises((ValueError, CommandError), match="nested too deep") as caught:
        READERS[name](file)
    assert Path(name).parts[0] in str(caught.value)


@pytest.mark.parametrize("name", [*READERS, *OTHERS])
def test_readers_refuse_what_never_ends(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.symlink_to("/dev/zero")
    with pytest.raises((ValueError, CommandError)) as caught:
        (READERS | OTHERS)[name](file)
    assert Path(name).parts[0] in str(caught.value)


def test_texts_of_the_command_line_may_come_from_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(pipe.write_bytes, b"\xef\xbb\xbfa fox\r\na hen\n")
        assert read_prompts(pipe, "--prompts") == ["a fox", "a hen"]


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


def test_json_and_arrays_are_read_up_to_a_size(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1, 2]")
    assert read_json(tmp_path / "a.json", most=6) == [1, 2]
    with pytest.raises(OSError, match=r"6 bytes, expected at most 5.*a\.json"):
        read_json(tmp_path / "a.json", most=5)
    np.savez_compressed(tmp_path / "a.npz", rows=np.zeros(1000))
    assert read_arrays(tmp_path / "a.npz", most=9000)["rows"].tolist() == [0.0] * 1000
    with pytest.raises(ValueError, match=r"unpacks to 8,\d\d\d bytes, expected at most 8,000"):
        read_arrays(tmp_path / "a.npz", most=8000)
    np.savez(tmp_path / "b.npz", rows=np.array([{"pickled": 1}]))
    with pytest.raises(ValueError, match="allow_pickle"):
        read_arrays(tmp_path / "b.npz", most=9000)
