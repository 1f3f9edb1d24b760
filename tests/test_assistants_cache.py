from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from aigiqa_reward.assistants import AssistantCache
from aigiqa_reward.assistants.cache import key_of


class Asked:
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


def test_a_key_depends_on_identity_and_values_and_not_on_how_they_are_stored():
    image = torch.rand(3, 16, 24).half()
    others = [image + 1e-3, image.reshape(3, 24, 16), image.flip(0), "text", "text ", "\ud800"]
    keys = [key_of("a", image), key_of("b", image), key_of("b", "text"), *(key_of("a", other) for other in others)]
    assert len(set(keys)) == len(keys)
    channels_last = image[None].contiguous(memory_format=torch.channels_last)[0]
    for same in (image.float(), image.double(), channels_last, image.float().requires_grad_()):
        assert key_of("a", same) == keys[0]
    head = json.dumps({"content": "text", "identity": "x"}).encode()
    assert key_of("x", "cat") == hashlib.sha256(head + b"\0" + b"cat").hexdigest()


def test_only_missing_rows_are_computed_in_one_call_and_order_is_kept(cache):
    first = Asked(["b", "d"])
    assert cache.get_or_compute("x", first.contents, first.texts, form=str) == ["B", "D"]
    second = Asked(["a", "b", "c", "a", "d", "e"])
    assert cache.get_or_compute("x", second.contents, second.texts, form=str) == ["A", "B", "C", "A", "D", "E"]
    assert second.calls == [[0, 2, 5]]  # equal rows once
    third = Asked(second.contents)
    AssistantCache(cache.folder).get_or_compute("x", third.contents, third.texts, form=str)
    assert third.calls == []
    cache.get_or_compute("y", third.contents, third.texts, form=str)
    assert third.calls == [[0, 1, 2, 4, 5]]  # another identity is another answer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_tensors_come_back_bit_by_bit_from_a_safetensors_file(cache, dtype):
    value = (torch.randn(2, 3, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)
    fresh = cache.get_or_compute("x", ["a", "b"], lambda rows: [value.T, value[0, 0]], form=Tensor)
    known = cache.get_or_compute("x", ["a", "b"], lambda rows: pytest.fail("asked again"), form=Tensor)
    for one, other, original in zip(fresh, known, [value.T, value[0, 0]], strict=True):
        assert other.dtype == dtype
        assert torch.equal(one, original) and torch.equal(other, original)
    assert torch.equal(load_file(cache.folder / f"{key_of('x', 'a')}.safetensors")["value"], value.T)


@pytest.mark.parametrize("text", ["", "a\nb", 'é "quoted" 猫', "\ud800 alone", "\u2028\x00"])
def test_any_text_comes_back_from_a_json_file(cache, text):
    cache.get_or_compute("x", [text], lambda rows: [text], form=str)
    assert cache.get_or_compute("x", [text], lambda rows: pytest.fail("asked again"), form=str) == [text]
    assert json.loads((cache.folder / f"{key_of('x', text)}.json").read_text()) == text


def test_rows_given_before_an_interruption_are_kept(cache):
    def interrupted(rows: list[int]) -> Iterable[str]:
        yield "A"
        yield "B"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.get_or_compute("x", ["a", "b", "c"], interrupted, form=str)
    asked = Asked(["a", "b", "c"])
    assert cache.get_or_compute("x", asked.contents, asked.texts, form=str) == ["A", "B", "C"]
    assert asked.calls == [[2]]


DAMAGE = {
    "empty": lambda data: b"",
    "cut at the end": lambda data: data[:-1],
    "JSON of another form": lambda data: b"[1, 2]",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("form", [Tensor, str], ids=["tensor", "text"])
def test_a_damaged_entry_is_computed_again_with_a_warning_and_rewritten(cache, damage, form):
    asked = Asked(["some text", "more text"])
    compute = asked.tensors if form is Tensor else asked.texts
    before = cache.get_or_compute("x", asked.contents, compute, form=form)
    [path] = [path for path in cache.folder.iterdir() if path.name.startswith(key_of("x", "more text"))]
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.warns(UserWarning, match=r"(?s)cache of assistants: .*is damaged .*computed again"):
        after = cache.get_or_compute("x", asked.contents, compute, form=form)
    assert asked.calls == [[0, 1], [1]]
    assert [str(value) for value in after] == [str(value) for value in before]
    cache.get_or_compute("x", asked.contents, lambda rows: pytest.fail("asked again"), form=form)


def test_the_oldest_entries_are_deleted_and_nothing_else(tmp_path):
    foreign = [tmp_path / "notes.txt", tmp_path / "model.safetensors"]
    for path in foreign:
        path.write_bytes(b"x" * 200_000)
    contents = [str(number) for number in range(12)]
    cache = AssistantCache(tmp_path, max_bytes=100_000)

    def value(rows: list[int]) -> list[Tensor]:
        return [torch.full((2500,), float(row)) for row in rows]  # 10 kB each, and a head

    cache.get_or_compute("x", contents[:9], value, form=Tensor)
    for age, text in enumerate(contents[:9]):
        os.utime(tmp_path / f"{key_of('x', text)}.safetensors", (time.time() - 1000 + age,) * 2)
    AssistantCache(tmp_path, max_bytes=100_000).get_or_compute("x", contents[9:], value, form=Tensor)
    kept = [text for text in contents if (tmp_path / f"{key_of('x', text)}.safetensors").exists()]
    assert kept == contents[3:]  # nine of them fill the bound
    assert all(path.exists() for path in foreign)


def test_a_bound_that_holds_nothing_is_refused_and_an_answer_beyond_it_is_not_kept(tmp_path):
    with pytest.raises(ValueError, match=r"max_bytes: expected a positive number, got 0.*cache=None"):
        AssistantCache(tmp_path, max_bytes=0)
    cache = AssistantCache(tmp_path, max_bytes=1000)
    cache.get_or_compute("x", ["a"], lambda rows: ["small"], form=str)
    assert cache.get_or_compute("x", ["b"], lambda rows: ["b" * 2000], form=str) == ["b" * 2000]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_warned_of(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    cache = AssistantCache(tmp_path / "file" / "cache")
    asked = Asked(["a", "b"])
    with pytest.warns(UserWarning, match=r"(?s)cannot write into .*computed and not kept.*XDG_CACHE_HOME"):
        assert cache.get_or_compute("x", asked.contents, asked.texts, form=str) == ["A", "B"]
    assert asked.calls == [[0, 1]]


def test_several_writers_share_a_folder(tmp_path):
    contents = [str(number) for number in range(40)]

    def turns(_writer: int) -> None:
        cache = AssistantCache(tmp_path, max_bytes=300_000)
        for turn in range(4):
            values = cache.get_or_compute(
                f"turn {turn}", contents, lambda rows: [torch.full((2000,), float(row)) for row in rows], form=Tensor
            )
            assert all(value.shape == (2000,) and bool((value == row).all()) for row, value in enumerate(values)), turn

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(turns, range(3)))
    assert 0 < sum(path.stat().st_size for path in tmp_path.iterdir()) <= 345_000  # a twentieth more for each writer
    assert all(load_file(path)["value"].shape == (2000,) for path in tmp_path.iterdir()), "whole, and no temporary file"
