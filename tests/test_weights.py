from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from aigiqa_reward.utils.weights import WeightsError, load_strictly, read_weights, sha256, write_weights


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 2)


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "body.weight": torch.randn(8, 3, 3, 3, generator=generator) * torch.logspace(-3, 2, 8).view(-1, 1, 1, 1),
        "head.bias": torch.randn(5, generator=generator),
        "steps": torch.tensor(7),
        "double": torch.rand(4, dtype=torch.float64, generator=generator),
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def test_tensors_come_back_as_they_were(path, tensors):
    write_weights(path, tensors)
    back = read_weights(path)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)


def test_int8_is_within_half_a_step_of_each_rows_scale(path, tensors):
    write_weights(path, tensors, dtype=torch.float16, to_int8=lambda name, tensor: tensor.ndim > 1)
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("body.weight").dtype == torch.int8
        assert file.get_tensor("head.bias").dtype == torch.float16
    back = read_weights(path)
    assert back.keys() == tensors.keys()
    original, restored = tensors["body.weight"].numpy(), back["body.weight"].numpy()
    scale = np.abs(original).reshape(8, -1).max(axis=1) / 127
    error = np.abs(original - restored).reshape(8, -1).max(axis=1)
    assert (error <= scale * (0.5 + 1e-4)).all()
    assert (error > 0).all()  # it was quantized
    # the largest weight of a row is kept, so that small rows are as exact as large ones
    np.testing.assert_allclose(np.abs(restored).reshape(8, -1).max(axis=1), scale * 127, rtol=1e-6)


def test_rows_of_zeros_and_views_survive(path):
    tensor, zeros = torch.arange(12.0).view(3, 4), torch.tensor([[0.0, 0.0], [1.0, -2.0]])
    write_weights(path, {"a": tensor.T, "b": tensor[:, 1], "c": zeros}, to_int8=lambda name, tensor: name == "c")
    back = read_weights(path)
    assert torch.equal(back["a"], tensor.T)
    assert torch.equal(back["b"], tensor[:, 1])
    torch.testing.assert_close(back["c"], zeros, atol=0.01, rtol=0)


def test_lossless_storage_is_equal_and_small(path):
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    write_weights(path, {"tower": random(300, 8, 5)}, to_int8=lambda name, tensor: True)
    tensors = {
        "tower": read_weights(path)["tower"], "half": random(40, 40).half().float(), "trained": random(40, 40),
        "bias": random(40), "zeros": torch.zeros(3, 4),
        "mixed": torch.cat([read_weights(path)["tower"][:2].flatten(1), torch.zeros(1, 40), random(1, 40)]),
        "none": torch.zeros(0, 4), "double": random(4, 4).double(), "count": torch.tensor(3),
    }  # fmt: skip
    write_weights(path, tensors, lossless=True)
    again = read_weights(path)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    assert {name: tensor.dtype for name, tensor in again.items()} == {n: t.dtype for n, t in tensors.items()}
    stored = {name: tensor.dtype for name, tensor in load_file(path).items()}
    expected = {"tower": torch.int8, "half": torch.float16, "trained": torch.float32, "mixed": torch.float32}
    assert {name: stored[name] for name in expected} == expected


def test_one_altered_byte_is_refused(path, tensors):
    write_weights(path, tensors)
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert sha256(path) == expected
    assert read_weights(path, expected_sha256=expected).keys() == tensors.keys()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(WeightsError, match=rf"model\.safetensors was altered.*sha256 {expected[:12]}.*reinstall"):
        read_weights(path, expected_sha256=expected)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(WeightsError, match=r"cannot read .*absent\.safetensors: No such file"):
        read_weights(tmp_path / "absent.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(WeightsError, match=r"cannot read .*folder\.safetensors"):
        read_weights(tmp_path / "folder.safetensors")


@pytest.mark.parametrize("storage", [{}, {"dtype": torch.float16}, {"to_int8": lambda name, tensor: tensor.ndim > 1}])
def test_weights_that_are_not_finite_are_refused(path, tensors, storage):
    tensors["body.weight"][2, 0, 0, 0] = float("nan")
    write_weights(path, tensors, **storage)
    with pytest.raises(WeightsError, match=r"NaN or infinite values in 'body\.weight'"):
        read_weights(path)


def altered(**changes: Tensor | None) -> dict[str, Tensor]:
    state = dict(Small().state_dict())
    for name, tensor in changes.items():
        if tensor is None:
            del state[name]
        else:
            state[name] = tensor
    return state


MISFITS = {
    "missing": (altered(**{"head.bias": None}), r"1 missing \(first: head\.bias\)"),
    "unknown": (altered(tail=torch.zeros(1)), r"1 unknown \(first: tail\)"),
    "shape": (altered(**{"head.weight": torch.zeros(2, 9)}), r"head\.weight has shape \(2, 9\), expected \(2, 8\)"),
    "broadcastable": (altered(**{"head.bias": torch.zeros(1)}), r"head\.bias has shape \(1,\), expected \(2,\)"),
    "kind": (altered(**{"head.bias": torch.zeros(2, dtype=torch.int64)}), r"head\.bias is torch\.int64"),
    "nothing": ({}, "9 missing"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(name):
    tensors, message = MISFITS[name]
    module = Small()
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    with pytest.raises(WeightsError, match=rf"heads\.safetensors does not fit Small: .*{message}"):
        load_strictly(module, tensors, source="heads.safetensors")
    assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F32", "shape": [10**9, 10**3], "data_offsets": [0, 4 * 10**12]}},
        2**30 * 10,
    ],
)
def test_headers_that_claim_huge_tensors_are_refused(path, header):
    text = json.dumps(header).encode()
    length = header if isinstance(header, int) else len(text)
    path.write_bytes(struct.pack("<Q", length) + text + b"\0" * 4)
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        read_weights(path)


def test_pipes_are_refused_and_links_followed(path, tmp_path):
    write_weights(tmp_path / "real.safetensors", {"a": torch.ones(2)})
    path.symlink_to(tmp_path / "real.safetensors")  # as the Hub's cache has them
    assert read_weights(path).keys() == {"a"}
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(WeightsError, match="symbolic links"):
        read_weights(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(WeightsError, match="not a regular file"):
        read_weights(path)
