"""Reading files of unknown origin: JSON nested too deep, pipes and devices in the place of files; writing anywhere."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aigiqa_reward.report import write_page
from aigiqa_reward.training.store import _ArrayWriter
from aigiqa_reward.utils.io import fit_name, parse_json, read_arrays, read_json, read_regular, write_atomically


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


def write_longer_arrays(file: Path) -> None:
    writer = _ArrayWriter(file.parent, 2, 10**6)
    writer.write([0], {"crops": torch.ones(1, 2, 3)})
    writer.write([1], {"crops": torch.ones(1, 4, 3)})
    assert writer.arrays["crops"][:, :, 0].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


WRITERS = [lambda file: write_atomically(file, b"new"), lambda file: write_page([], file), write_longer_arrays]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="shows which files are open on Linux only")
@pytest.mark.parametrize("write", WRITERS)
def test_a_file_is_closed_before_it_is_renamed(
    write: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, renamed = os.replace, []

    def checked(source: Any, target: Any) -> None:
        opened = [os.path.realpath(file) for file in Path("/proc/self/fd").iterdir()]
        held = [*opened, Path("/proc/self/maps").read_text()]
        renamed.append(not any(str(place) in name for place in (source, target) for name in held))
        replace(source, target)

    monkeypatch.setattr(os, "replace", checked)
    write(tmp_path / "page.html")
    assert renamed and all(renamed)


@pytest.mark.parametrize("mask", [0o077, 0o027, 0o002])
def test_the_mode_is_the_umasks_or_that_of_the_file_replaced(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        (tmp_path / "plain").write_bytes(b"")
        (tmp_path / "private").touch(0o600)
        for name in ("new", "private"):
            write_atomically(tmp_path / name, b"1")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"plain": 0o666 & ~mask, "new": 0o666 & ~mask, "private": 0o600}


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    target, link, second = tmp_path / "other" / "target", tmp_path / "link", tmp_path / "second"
    link.symlink_to("other/target")
    second.symlink_to("link")
    for place, data in ((second, b"1"), (link, b"2"), (target, b"3")):
        write_atomically(place, data)
        assert link.is_symlink() and second.is_symlink() and target.read_bytes() == second.read_bytes() == data
    assert {path.name for path in tmp_path.rglob("*")} == {"other", "target", "link", "second"}


@pytest.mark.parametrize("name", ["x" * 255, "寿" * 85, "a"])
def test_any_name_that_a_file_can_have_is_written(tmp_path: Path, name: str) -> None:
    for number in range(2):
        write_atomically(tmp_path / name, bytes([number]))
        assert (tmp_path / name).read_bytes() == bytes([number])
    (tmp_path / fit_name(f"001_{name}.png")).touch()
    assert fit_name(f"001_{name}.png").startswith(f"001_{name[0]}")
    assert fit_name(f"001_{name}.png").endswith(f"{name[0]}.png")


REFUSALS = [("chmod", errno.EPERM), ("fsync", errno.EINVAL), ("replace", errno.EBUSY), ("open", errno.EACCES)]


@pytest.mark.parametrize(("call", "number"), [*REFUSALS, ("fsync", errno.ENOSPC), ("fsync", None)])
def test_a_file_is_written_without_what_is_refused_and_else_keeps_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int | None
) -> None:
    def refused(*arguments: Any, **more: Any) -> None:
        raise OSError(number, os.strerror(number)) if number else KeyboardInterrupt

    file = tmp_path / "new folder" / "file"
    write_atomically(file, b"old")
    monkeypatch.setattr(os, call, refused)
    with nullcontext() if (call, number) in REFUSALS else pytest.raises((OSError, KeyboardInterrupt)):
        write_atomically(file, b"new")
    content = b"new" if (call, number) in REFUSALS else b"old"
    assert [(path.name, path.read_bytes()) for path in file.parent.iterdir()] == [("file", content)]
