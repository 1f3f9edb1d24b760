"""Reading and writing weight files: safetensors only, checked by hash, loaded strictly, never unpickled.

Frozen towers are stored as int8 with one scale a row (`name` and `name.row_scale`), which is a quarter of float32; what
was trained here is stored as float16. Both are float32 again when read.
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
"""Largest file that is read: chosen here, above any tower in use; so that a file of any size cannot fill the memory."""

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_STORED = frozenset((*_FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool))
"""Types of numbers that a model here has."""


class WeightsError(ValueError):
    """A checkpoint that is missing, damaged, altered, or made for another model."""


def sha256(path: str | os.PathLike[str]) -> str:
    """The hexadecimal SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_weights(
    path: str | os.PathLike[str], *, expected_sha256: str | None = None, most_bytes: int = MAX_WEIGHT_BYTES
) -> dict[str, Tensor]:
    """Read a safetensors file, undoing the storage types of `write_weights`.

    Args:
        path: the file.
        expected_sha256: refuse the file if its hash is another.
        most_bytes: refuse a larger file before it is read.

    Returns:
        Tensors by name; floating ones as float32 (float64 if stored so).

    Raises:
        WeightsError: missing, not a regular file, too large, not safetensors, altered, with types of numbers that no
            model here has, with scales that fit nothing, or with NaN/inf values.
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
    except KeyError as error:  # safetensors knows more types than torch has
        raise WeightsError(f"weights: {file} holds numbers of the type {error}, which no model here has") from error
    except (SafetensorError, RuntimeError) as error:  # torch refuses sizes whose product overflows
        raise WeightsError(f"weights: {file} is not a whole safetensors file ({error})") from error
    return {name: _restored(name, stored, file) for name in stored if not _is_scale(name, stored)}


def read_checked(
    path: str | os.PathLike[str], *, expected_sha256: str | None, most_bytes: int = MAX_WEIGHT_BYTES
) -> bytes:
    """The bytes of a file that must be the one it was when its hash was noted.

    Args:
        path: the file.
        expected_sha256: hexadecimal; None takes the file as it is.
        most_bytes: refuse a larger file before it is read.

    Raises:
        WeightsError: missing, not a regular file, too large, or altered.
    """
    file = Path(path)
    try:
        data = read_regular(file, most=most_bytes)
    except OSError as error:
        raise WeightsError(f"weights: cannot read {file}: {error.strerror}") from error
    if expected_sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != expected_sha256:
        raise WeightsError(
            f"weights: {file} was altered or damaged: expected sha256 {expected_sha256[:12]}..., got {found[:12]}...; "
            "reinstall the package (pip install --force-reinstall aigiqa-reward)"
        )
    return data


def _is_scale(name: str, stored: Mapping[str, Tensor]) -> bool:
    return name.endswith(_SCALE) and name.removesuffix(_SCALE) in stored


def _restored(name: str, stored: Mapping[str, Tensor], file: Path) -> Tensor:
    tensor = stored[name]
    if tensor.dtype not in _STORED:
        raise WeightsError(f"weights: {file} holds {tensor.dtype} numbers in {name!r}, which no model here has")
    if name + _SCALE in stored:
        scale = stored[name + _SCALE]
        if tensor.ndim < 1 or scale.shape != tensor.shape[:1] or not scale.is_floating_point():
            raise WeightsError(
                f"weights: {file} holds scales of shape {tuple(scale.shape)} for {name!r} of shape "
                f"{tuple(tensor.shape)}; expected one for each first index"
            )
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
    """Write tensors to a safetensors file in one atomic step.

    Args:
        path: the file; an existing one is replaced only when the new one is whole.
        tensors: by name.
        dtype: store floating tensors as this type; None keeps each one's own.
        to_int8: which tensors to store as int8 with one scale for each first index.
        lossless: store float32 tensors as float16 or int8 too where `read_weights` then gives them back equal: what
            was read from such a file and not trained since is then as small again as it was.
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
    """The shortest form of a float32 tensor from which `_restored` makes it again, by the suffix of the name."""
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
    """Load a full state dict, and refuse one that does not fit in every name, shape and kind of number.

    Raises:
        WeightsError: names missing, unknown, or of another shape.
    """
    expected = module.state_dict()
    problems = []
    if missing := sorted(expected.keys() - tensors.keys()):
        problems.append(f"{len(missing)} missing (first: {missing[0]})")
    if unknown := sorted(tensors.keys() - expected.keys()):
        problems.append(f"{len(unknown)} unknown (first: {unknown[0]})")
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
    module.load_state_dict(tensors, strict=True)
