"""Weight files: safetensors only, checked by hash, loaded strictly, never unpickled.

Frozen towers are stored as int8 with one scale per row (`name` and `name.row_scale`), a quarter of float32; weights
that were trained here are stored as float16. Both are read as float32.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from aigiqa_reward.utils.io import read_regular, write_atomically

ASSETS = Path(__file__).parent.parent / "assets"
"""Folder of the embedded checkpoints."""

_SCALE = ".row_scale"

MAX_WEIGHT_BYTES = 16_000_000_000
"""Largest weight file that is read: more than any tower in use."""

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_STORED = (torch.float64, torch.float32, torch.float16, torch.bfloat16, *_INTEGERS)


class WeightsError(ValueError):
    """A checkpoint that is missing, damaged, altered, or made for another model."""


def sha256(path: str | os.PathLike[str]) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_weights(
    path: str | os.PathLike[str], *, expected_sha256: str | None = None, most_bytes: int = MAX_WEIGHT_BYTES
) -> dict[str, Tensor]:
    """Read a safetensors file's tensors, floating ones as float32 (float64 if stored so); a WeightsError otherwise.

    Args:
        path: the file.
        expected_sha256: the only accepted hash; None accepts any.
        most_bytes: largest accepted size.
    """
    file = Path(path)
    if file.suffix != ".safetensors":
        raise WeightsError(
            f"weights: expected a .safetensors file, got {file.name!r}; pickled checkpoints are never opened: "
            "convert it with safetensors.torch.save_file"
        )
    data = read_checked(file, expected_sha256=expected_sha256, most_bytes=most_bytes)
    try:
        stored = load(data)
    except (KeyError, SafetensorError, RuntimeError) as error:  # types that torch lacks, sizes that overflow
        raise WeightsError(f"weights: {file} is not a whole safetensors file ({error})") from error
    scales = {name + _SCALE for name in stored}
    return {name: _restored(name, stored, file) for name in stored if name not in scales}


def read_checked(
    path: str | os.PathLike[str], *, expected_sha256: str | None, most_bytes: int = MAX_WEIGHT_BYTES
) -> bytes:
    """Read a file's bytes; a WeightsError if it is missing, not a regular file, too large, or of another hash."""
    try:
        data = read_regular(path, most=most_bytes)
    except OSError as error:
        raise WeightsError(f"weights: cannot read {path}: {error.strerror}") from error
    if expected_sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != expected_sha256:
        raise WeightsError(
            f"weights: {path} was altered or damaged: expected sha256 {expected_sha256[:12]}..., got {found[:12]}...; "
            "reinstall the package (pip install --force-reinstall aigiqa-reward)"
        )
    return data


def _restored(name: str, stored: Mapping[str, Tensor], file: Path) -> Tensor:
    tensor = stored[name]
    if tensor.dtype not in _STORED:
        raise WeightsError(f"weights: {file} holds {tensor.dtype} numbers in {name!r}, which no model here has")
    if name + _SCALE in stored:
        scale = stored[name + _SCALE]
        if tensor.ndim < 1 or scale.shape != tensor.shape[:1] or not scale.is_floating_point():
            shape = tuple(scale.shape)
            raise WeightsError(f"weights: {file} holds scales of shape {shape} for {name!r}; expected one per row")
        tensor = tensor.float() * scale.view(-1, *[1] * (tensor.ndim - 1))
    elif tensor.dtype in (torch.float16, torch.bfloat16):
        tensor = tensor.float()
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise WeightsError(f"weights: {file} holds NaN or infinite values in {name!r}")
    return tensor


def write_weights(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    to_int8: Callable[[str, Tensor], bool] = lambda name, tensor: False,
    lossless: bool = False,
) -> None:
    """Write tensors to a safetensors file atomically.

    Args:
        path: the file.
        tensors: by name.
        dtype: stored type of floating tensors; None keeps each one's.
        to_int8: whether a tensor is stored as int8 with one scale per row.
        lossless: whether float32 is stored as float16 or int8 where `read_weights` gives back equal tensors.
    """
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if to_int8(name, tensor):
            scale = tensor.float().flatten(1).abs().amax(dim=1).clamp_min(1e-12) / 127
            rows = scale.view(-1, *[1] * (tensor.ndim - 1))
            stored[name] = (tensor.float() / rows).round().to(torch.int8)
            stored[name + _SCALE] = scale
        elif lossless and tensor.dtype == torch.float32:
            stored |= {name + suffix: part for suffix, part in _smallest(tensor).items()}
        else:
            stored[name] = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
    write_atomically(path, save(stored))


def _smallest(tensor: Tensor) -> dict[str, Tensor]:
    """The smallest form of a float32 tensor that `_restored` makes equal again, by the suffix of the name."""
    half = tensor.half()
    if torch.equal(half.float(), tensor):
        return {"": half}
    if tensor.ndim < 2 or tensor.numel() == 0:
        return {"": tensor}
    rows = tensor.flatten(1)
    greatest = rows.abs().amax(dim=1)
    found, integers = torch.zeros_like(greatest), torch.zeros_like(rows)
    scale = torch.nextafter(greatest / 127, torch.zeros_like(greatest))  # the division rounds: try its neighbors too
    for _ in range(3):
        trial = (rows / scale[:, None].clamp_min(1e-30)).round()
        fits = (trial * scale[:, None] == rows).all(dim=1) & (trial.abs() <= 127).all(dim=1)
        found, integers = torch.where(fits, scale, found), torch.where(fits[:, None], trial, integers)
        scale = torch.nextafter(scale, torch.full_like(scale, torch.inf))
    if not torch.equal(integers * found[:, None], rows):
        return {"": tensor}
    return {"": integers.view_as(tensor).to(torch.int8), _SCALE: found}


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Load a state dict whose names, shapes and kinds of numbers all fit; a WeightsError otherwise."""
    expected = module.state_dict()
    problems = []
    for kind, names in (("missing", expected.keys() - tensors.keys()), ("unknown", tensors.keys() - expected.keys())):
        if names:
            problems.append(f"{len(names)} {kind} (first: {min(names)})")
    for name in sorted(expected.keys() & tensors.keys()):
        if expected[name].shape != tensors[name].shape:
            problems.append(f"{name} has shape {tuple(tensors[name].shape)}, expected {tuple(expected[name].shape)}")
        elif expected[name].is_floating_point() != tensors[name].is_floating_point():
            problems.append(f"{name} is {tensors[name].dtype}, expected {expected[name].dtype}")
    if problems:
        raise WeightsError(
            f"weights: {source} does not fit {type(module).__name__}: {'; '.join(problems[:3])}; "
            "it was saved from another model or configuration"
        )
    module.load_state_dict(tensors, strict=True, assign=any(tensor.is_meta for tensor in expected.values()))
