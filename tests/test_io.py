"""Reading files of unknown origin: JSON nested too deep, pipes and devices in the place of files; atomic writes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from aigiqa_reward.utils.io import parse_json, read_arrays, read_json, read_regular, write_atomically


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[1,", b"\xff\xfe\xff", "9" * 5000])
def test_what_is_no_json_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path: Path) -> None:
    file, pipe, link = tmp_path / "file", tmp_path / "pipe", tmp_path / "link"
    file.write_bytes(b"12345")
    link.symlink_to(file)
    os.mkfifo(pipe)
    assert read_regular(file, most=5) == read_regular(link, most=5) == b"12345"
    with pytest.raises(OSError, match="5 bytes, expected at most 4"):
        read_regular(file, most=4)
    for place, reason in (
        (pipe, "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path, "not a regular"),
    ):
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


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "new" / "a.txt"
    write_atomically(file, b"old")

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(file, b"new")
    assert [(path.name, path.read_bytes()) for path in file.parent.iterdir()] == [("a.txt", b"old")]
