from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aigiqa_reward.assistants import AssistantCache
from aigiqa_reward.assistants.cache import TENSOR, TEXT, key_of


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


class Asked:
    """Gives each row a value made from its number, and keeps which rows it was asked for."""

    def __init__(self, contents: list[str]) -> None:
        self.contents = contents
        self.calls: list[list[int]] = []

    def texts(self, rows: list[int]) -> list[str]:
        self.calls.append(rows)
        return [self.contents[row].upper() for row in rows]

    def tensors(self, rows: list[int]) -> Iterable[Tensor]:
        self.calls.append(rows)
        return (torch.tensor([float(len(self.contents[row])), -0.0]) for row in rows)


@pytest.fixture
def cache(tmp_path: Path) -> AssistantCache:
    return AssistantCache(tmp_path / "cache")


# --------------------------------------------------------------------------------------------- keys


def test_a_key_is_told_by_identity_and_content():
    image = torch.rand(3, 16, 24)
    keys = [
        key_of("a", image),
        key_of("b", image),
        key_of("a", image + 1e-6),
        key_of("a", image.reshape(3, 24, 16)),
        key_of("a", image.flip(0)),
        key_of("a", "text"),
        key_of("b", "text"),
        key_of("a", "text "),
        key_of('a", "content": "text', ""),
        key_of("a", "\ud800"),
    ]
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 64 and int(key, 16) >= 0 for key in keys)


def test_a_key_sees_values_and_not_how_they_are_stored():
    image = torch.rand(3, 16, 24).half()
    channels_last = image[None].contiguous(memory_format=torch.channels_last)[0]
    assert key_of("a", image) == key_of("a", image.float()) == key_of("a", image.double()) == key_of("a", channels_last)
    assert key_of("a", image) == key_of("a", image.float().requires_grad_())


def test_the_default_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert AssistantCache().folder == tmp_path / "aigiqa-reward" / "assistants"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert AssistantCache().folder == Path.home() / ".cache" / "aigiqa-reward" / "assistants"
    assert not files(tmp_path)


@pytest.mark.parametrize("size", [0, -1])
def test_a_bound_that_holds_nothing_is_refused(tmp_path, size):
    with pytest.raises(ValueError, match=f"max_bytes: expected a positive number of bytes, got {size}.*cache=None"):
        AssistantCache(tmp_path, max_bytes=size)


# --------------------------------------------------------------------------------------------- rows


def test_only_missing_rows_are_computed_in_one_call_and_order_is_kept(cache):
    first = Asked(["b", "d"])
    assert cache.get_or_compute("x", first.contents, first.texts, form=TEXT) == ["B", "D"]
    second = Asked(["a", "b", "c", "a", "d", "e"])
    assert cache.get_or_compute("x", second.contents, second.texts, form=TEXT) == ["A", "B", "C", "A", "D", "E"]
    assert second.calls == [[0, 2, 5]]  # equal rows once
    third = Asked(second.contents)
    again = AssistantCache(cache.folder).get_or_compute("x", third.contents, third.texts, form=TEXT)
    assert again == ["A", "B", "C", "A", "D", "E"]
    assert third.calls == []


def test_another_identity_is_another_answer(cache):
    asked = Asked(["a"])
    cache.get_or_compute("x", asked.contents, asked.texts, form=TEXT)
    cache.get_or_compute("y", asked.contents, asked.texts, form=TEXT)
    assert asked.calls == [[0], [0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_tensors_come_back_bit_by_bit(cache, dtype):
    value = (torch.randn(2, 3, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)
    fresh = cache.get_or_compute("x", ["a", "b"], lambda rows: [value.T, value[0, 0]], form=TENSOR)
    known = cache.get_or_compute("x", ["a", "b"], lambda rows: pytest.fail("asked again"), form=TENSOR)
    for one, other, original in zip(fresh, known, [value.T, value[0, 0]], strict=True):
        assert other.dtype == dtype
        assert other.shape == original.shape
        assert torch.equal(one, original)
        assert torch.equal(other, original)


@pytest.mark.parametrize("text", ["", "a\nb", 'é "quoted" 猫', "\ud800 alone", "\u2028\x00"])
def test_any_text_comes_back(cache, text):
    cache.get_or_compute("x", [text], lambda rows: [text], form=TEXT)
    assert cache.get_or_compute("x", [text], lambda rows: pytest.fail("asked again"), form=TEXT) == [text]


def test_entries_are_safetensors_and_json(cache):
    cache.get_or_compute("x", ["a"], lambda rows: [torch.arange(3.0)], form=TENSOR)
    cache.get_or_compute("x", ["b"], lambda rows: ["text"], form=TEXT)
    by_suffix = {path.suffix: path for path in files(cache.folder)}
    assert load_file(by_suffix[".safetensors"])["value"].tolist() == [0, 1, 2]
    assert json.loads(by_suffix[".json"].read_text())["value"] == "text"


def test_rows_given_before_an_interruption_are_kept(cache):
    def interrupted(rows: list[int]) -> Iterable[str]:
        yield "A"
        yield "B"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.get_or_compute("x", ["a", "b", "c"], interrupted, form=TEXT)
    asked = Asked(["a", "b", "c"])
    assert cache.get_or_compute("x", asked.contents, asked.texts, form=TEXT) == ["A", "B", "C"]
    assert asked.calls == [[2]]


# --------------------------------------------------------------------------------------------- damage


def truncated(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])


def altered(path: Path, place: float) -> None:
    data = bytearray(path.read_bytes())
    index = min(int(place * len(data)), len(data) - 2)
    data[index] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "cut in the head": lambda path: truncated(path, 0.1),
    "cut in half": lambda path: truncated(path, 0.5),
    "cut at the end": lambda path: truncated(path, 0.99),
    "a flipped bit": lambda path: altered(path, 0.97),
    "no such format": lambda path: path.write_bytes(b"\x80\x04pickled"),
    "JSON of another form": lambda path: path.write_text("[1, 2]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("form", [TENSOR, TEXT], ids=["tensor", "text"])
def test_a_damaged_entry_is_computed_again_with_a_warning_and_rewritten(cache, damage, form):
    asked = Asked(["some text", "more text"])
    compute = asked.tensors if form is TENSOR else asked.texts
    before = cache.get_or_compute("x", asked.contents, compute, form=form)
    [path] = [path for path in files(cache.folder) if path.name.startswith(key_of("x", "more text"))]
    DAMAGE[damage](path)
    with pytest.warns(UserWarning, match=r"(?s)cache of assistants: .*is damaged: .*computed again and rewritten"):
        after = cache.get_or_compute("x", asked.contents, compute, form=form)
    assert asked.calls == [[0, 1], [1]]
    assert [str(value) for value in after] == [str(value) for value in before]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.get_or_compute("x", asked.contents, lambda rows: pytest.fail("asked again"), form=form)


def test_a_whole_entry_under_another_name_is_not_believed(cache):
    asked = Asked(["a", "b"])
    cache.get_or_compute("x", asked.contents, asked.tensors, form=TENSOR)
    path = {text: cache.folder / key_of("x", text)[:2] / f"{key_of('x', text)}.safetensors" for text in "ab"}
    path["b"].write_bytes(path["a"].read_bytes())
    with pytest.warns(UserWarning, match="another entry's key"):
        cache.get_or_compute("x", asked.contents, asked.tensors, form=TENSOR)
    save_file({"value": torch.zeros(2)}, path["a"])  # a safetensors file of someone else's
    with pytest.warns(UserWarning, match="another entry's key"):
        AssistantCache(cache.folder).get_or_compute("x", asked.contents, asked.tensors, form=TENSOR)
    assert asked.calls == [[0, 1], [1], [0]]


def test_many_damaged_entries_are_warned_of_once(cache):
    asked = Asked([str(number) for number in range(5)])
    cache.get_or_compute("x", asked.contents, asked.texts, form=TEXT)
    for path in files(cache.folder):
        truncated(path, 0.5)
    with pytest.warns(UserWarning) as warned:
        cache.get_or_compute("x", asked.contents, asked.texts, form=TEXT)
    assert len(warned) == 1
    assert asked.calls[1] == [0, 1, 2, 3, 4]


def test_what_a_killed_writer_left_is_no_entry_and_goes_in_time(cache):
    asked = Asked(["a"])
    key = key_of("x", "a")
    partial = cache.folder / key[:2] / f".{key}.json.k2j4h5"
    partial.parent.mkdir(parents=True)
    partial.write_text('{"key"')
    fresh = partial.with_name(f".{key}.json.another")
    fresh.write_text('{"key"')
    os.utime(partial, (time.time() - 7200,) * 2)
    assert cache.get_or_compute("x", ["a"], asked.texts, form=TEXT) == ["A"]
    assert asked.calls == [[0]]
    assert not partial.exists()  # a process looks what can go when it has written its first entry
    assert fresh.exists()  # perhaps still being written
    assert cache.get_or_compute("x", ["a"], lambda rows: pytest.fail("asked again"), form=TEXT) == ["A"]


# --------------------------------------------------------------------------------------------- several processes

WRITER = """
import sys, time
from pathlib import Path
import torch
from aigiqa_reward.assistants.cache import TENSOR
from aigiqa_reward.assistants.cache import AssistantCache

folder = Path(sys.argv[1])
print("ready", flush=True)
while not (folder / "start").exists():
    time.sleep(0.001)
for name, max_bytes in (("roomy", 10**9), ("evicting", 300_000)):
    cache, contents = AssistantCache(folder / name, max_bytes=max_bytes), [str(number) for number in range(40)]
    for turn in range(4):
        values = cache.get_or_compute(
            f"turn {turn}", contents, lambda rows: [torch.full((2000,), float(row)) for row in rows], form=TENSOR
        )
        assert all(bool((value == row).all()) and value.shape == (2000,) for row, value in enumerate(values)), turn
"""


def test_two_processes_share_a_folder(tmp_path):
    command = [sys.executable, "-W", "error::UserWarning", "-c", WRITER, str(tmp_path)]
    place = {"cwd": Path(__file__).parents[1], "text": True}
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **place) for _ in range(2)]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n", writer.communicate()[1]
    (tmp_path / "start").touch()
    for writer in writers:
        _, errors = writer.communicate(timeout=60)
        assert writer.returncode == 0, errors
    roomy, evicting = files(tmp_path / "roomy"), files(tmp_path / "evicting")
    assert len(roomy) == 160
    assert 0 < sum(path.stat().st_size for path in evicting) <= 330_000  # a twentieth more for each process
    for path in (*roomy, *evicting):  # every file is whole, and is what its name says; no temporary one is left
        assert TENSOR.unpack(path.stem, path.read_bytes()).shape == (2000,)


# --------------------------------------------------------------------------------------------- size


def test_entries_not_used_for_longest_are_removed(tmp_path):
    contents = [str(number) for number in range(10)]
    cache = AssistantCache(tmp_path, max_bytes=100_000)
    compute = Asked(contents)

    def value(rows: list[int]) -> list[Tensor]:
        compute.calls.append(rows)
        return [torch.full((2500,), float(row)) for row in rows]  # 10 kB each, and a head

    cache.get_or_compute("x", contents[:8], value, form=TENSOR)
    for age, text in enumerate(contents[:8]):
        key = key_of("x", text)
        os.utime(tmp_path / key[:2] / f"{key}.safetensors", (time.time() - 1000 + age,) * 2)
    cache.get_or_compute("x", contents[:1], value, form=TENSOR)  # the oldest is used now
    cache.get_or_compute("x", contents[8:], value, form=TENSOR)
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 100_000
    cache.get_or_compute("x", contents, value, form=TENSOR)
    assert compute.calls[-1][0] == 1  # and not 0
    assert not {0, 8, 9} & set(compute.calls[-1])


def test_what_other_processes_write_counts_too(tmp_path):
    caches = [AssistantCache(tmp_path, max_bytes=100_000) for _ in range(4)]  # as many processes have
    for number in range(150):
        cache = caches[number % 4]
        cache.get_or_compute("x", [str(number)], lambda rows: ["y" * 1000], form=TEXT)
        assert sum(path.stat().st_size for path in files(tmp_path)) <= 125_000  # a twentieth more for each


def test_what_is_not_the_caches_own_is_left_alone(tmp_path):
    (tmp_path / "ab").mkdir()
    foreign = [tmp_path / "notes.txt", tmp_path / "ab" / "photo.png", tmp_path / "ab" / "model.safetensors"]
    for path in foreign:
        path.write_bytes(b"x" * 5000)
    cache = AssistantCache(tmp_path, max_bytes=1000)
    for number in range(10):
        cache.get_or_compute("x", [str(number)], lambda rows: ["y" * 300], form=TEXT)
    assert all(path.exists() for path in foreign)
    assert 1 <= len(files(tmp_path)) - 3 <= 2


def test_an_answer_larger_than_the_bound_is_not_kept_and_removes_nothing(tmp_path):
    cache = AssistantCache(tmp_path, max_bytes=1000)
    cache.get_or_compute("x", ["a"], lambda rows: ["small"], form=TEXT)
    assert cache.get_or_compute("x", ["b"], lambda rows: ["b" * 2000], form=TEXT) == ["b" * 2000]
    assert len(files(tmp_path)) == 1


# --------------------------------------------------------------------------------------------- folders


def test_a_folder_that_cannot_be_written_is_warned_of_once(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    cache = AssistantCache(tmp_path / "file" / "cache")
    asked = Asked(["a", "b"])
    with pytest.warns(UserWarning, match=r"(?s)cannot write into .*computed and not kept.*XDG_CACHE_HOME") as warned:
        assert cache.get_or_compute("x", asked.contents, asked.texts, form=TEXT) == ["A", "B"]
        assert cache.get_or_compute("x", asked.contents, asked.texts, form=TEXT) == ["A", "B"]
    assert len(warned) == 1
    assert asked.calls == [[0, 1], [0, 1]]


@pytest.mark.skipif(os.geteuid() == 0, reason="a superuser may write anywhere")
def test_a_folder_shared_for_reading_is_read(tmp_path):
    asked = Asked(["a", "b"])
    AssistantCache(tmp_path).get_or_compute("x", ["a"], asked.texts, form=TEXT)
    for path in [tmp_path, *tmp_path.iterdir()]:
        path.chmod(0o555)
    try:
        with pytest.warns(UserWarning, match="cannot write"):
            assert AssistantCache(tmp_path).get_or_compute("x", ["a", "b"], asked.texts, form=TEXT) == ["A", "B"]
    finally:
        for path in [tmp_path, *tmp_path.iterdir()]:
            path.chmod(0o755)
    assert asked.calls == [[0], [1]]


def test_an_entry_that_is_a_folder_is_computed_around(cache):
    key = key_of("x", "a")
    (cache.folder / key[:2] / f"{key}.json").mkdir(parents=True)
    asked = Asked(["a"])
    with pytest.warns(UserWarning, match="cannot read"), pytest.warns(UserWarning, match="cannot write"):
        assert cache.get_or_compute("x", ["a"], asked.texts, form=TEXT) == ["A"]


def test_the_key_is_a_sha256_anyone_can_make_again():
    head = json.dumps({"content": "text", "identity": "x"}).encode()
    assert key_of("x", "cat") == hashlib.sha256(head + b"\0" + b"cat").hexdigest()
