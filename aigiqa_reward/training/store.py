"""Features computed at each step, for trainings that change the towers or draw crops anew."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.lib.format import open_memmap
from torch import Tensor
from tqdm import tqdm

from aigiqa_reward import images as pixels
from aigiqa_reward.models.base import TrainedModel, distinct_prompts
from aigiqa_reward.types import PromptFeatures
from aigiqa_reward.utils.io import read_json, write_atomically


class ArrayWriter:
    """Arrays of N rows, made when the first features say their shapes, or opened where they are.

    Sequences, whose length (the second dimension) differs between batches, are padded with zeros to the longest.

    Args:
        home: folder of the arrays.
        count: N.
        max_bytes: of all arrays together.
    """

    def __init__(self, home: Path, count: int, max_bytes: int) -> None:
        self.home, self.count, self.max_bytes = home, count, max_bytes
        self.arrays: dict[str, Any] = {}

    def write(self, rows: Sequence[int], features: Mapping[str, Tensor]) -> None:
        """Store the features of some rows.

        Raises:
            ValueError: they are beyond float16, or the arrays beyond `max_bytes` or the disk.
        """
        stored = {name: _storable(name, tensor) for name, tensor in features.items()}
        self._make_room(stored)
        for name, values in stored.items():
            if values.shape[1:] == self.arrays[name].shape[1:]:
                self.arrays[name][rows] = values
            else:
                self.arrays[name][rows] = 0
                self.arrays[name][rows, : values.shape[1]] = values

    def _make_room(self, stored: Mapping[str, np.ndarray]) -> None:
        """Make or lengthen the arrays that do not take these values."""
        for name in stored.keys() - self.arrays.keys():
            if (path := self.home / f"{name}.npy").exists():
                self.arrays[name] = np.lib.format.open_memmap(path, "r+")
        short = [name for name, values in stored.items() if not self._takes(name, values)]
        shapes = {name: (self.count, *stored[name].shape[1:]) for name in short}
        added = sum(int(np.prod(shapes[name])) * stored[name].itemsize for name in short)
        total = added + sum(array.nbytes for name, array in self.arrays.items() if name not in short)
        room = shutil.disk_usage(self.home).free
        if added and (total > self.max_bytes or added > room):
            raise ValueError(
                f"max_bytes: the features of {self.count} images take {total / 1e9:.1f} GB, allowed are "
                f"{self.max_bytes / 1e9:.1f} GB and free {room / 1e9:.1f} GB; allow more, score fewer crops, or train "
                "with train_towers=True, which keeps none"
            )
        for name in short:
            path = self.home / f"{name}.npy"
            fresh = np.lib.format.open_memmap(path.with_suffix(".part"), "w+", stored[name].dtype, shapes[name])
            if name in self.arrays:
                fresh[:, : self.arrays[name].shape[1]] = self.arrays[name]
                fresh.flush()
            path.with_suffix(".part").replace(path)
            self.arrays[name] = fresh

    def _takes(self, name: str, values: np.ndarray) -> bool:
        if name not in self.arrays:
            return False
        there = self.arrays[name].shape
        return values.ndim < 2 or values.shape[1] <= there[1] or values.shape[2:] != there[2:]

    def flush(self) -> None:
        """Write down what is still in memory."""
        for array in self.arrays.values():
            array.flush()


def _storable(name: str, tensor: Tensor) -> np.ndarray:
    stored = tensor.half() if tensor.is_floating_point() else tensor
    if stored.is_floating_point() and not bool(torch.isfinite(stored).all()):
        raise ValueError(
            f"model: its feature {name!r} has values beyond float16, so features cannot be stored; "
            "train with train_towers=True, which keeps none"
        )
    return stored.cpu().numpy()


MAX_BYTES = 20_000_000_000
"""Largest store that is written without being asked: chosen here, a fiftieth of a common disk."""

CONTEXT = "context."
"""Prefix of what assistants said, among the names of a store."""


@dataclass(frozen=True)
class Unreadable:
    """An image that was left out, and why."""

    path: Path
    reason: str


class FeatureStore:
    """Features of N images, as float16 arrays in a folder.

    Attributes:
        arrays: by name, (N, ...) each; those of assistants begin with `context.`.
        readable: (N,) bool.
        unreadable: the images that are not, and why.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], unreadable: Sequence[tuple[int, Unreadable]]) -> None:
        self.arrays = dict(arrays)
        count = len(next(iter(self.arrays.values())))
        self.readable = np.ones(count, dtype=bool)
        self.readable[[row for row, _ in unreadable]] = False
        self.unreadable = tuple(entry for _, entry in unreadable)

    def __len__(self) -> int:
        """Number of images N."""
        return len(self.readable)

    def seen(
        self,
        rows: np.ndarray,
        device: torch.device,
        *,
        crop_features: Sequence[str] = (),
        crops: int | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Return the stored features of these rows; of `crop_features` only `crops` crops, the same for all rows.

        Crops are drawn from `generator`; without one, or with `crops` None, all are read.
        """
        chosen = None
        if generator is not None and crops is not None and crop_features:
            count = self.arrays[crop_features[0]].shape[1]
            chosen = torch.randperm(count, generator=generator)[:crops].numpy()
        return {
            name: self._rows(name, rows, device, chosen if name in crop_features else None)
            for name in self.arrays
            if not name.startswith(CONTEXT)
        }

    def look(
        self,
        model: TrainedModel,
        rows: np.ndarray,
        device: torch.device,
        *,
        generator: torch.Generator | None = None,
        crops: int | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """Features and context of rows; with a generator, of crops that it draws."""
        seen = self.seen(rows, device, crop_features=model.crop_features, crops=crops, generator=generator)
        return seen, self.context(rows, device)

    def context(self, rows: np.ndarray, device: torch.device) -> dict[str, Tensor] | None:
        """What `prepare` gave for these rows; None for a model without assistants."""
        names = [name for name in self.arrays if name.startswith(CONTEXT)]
        return {name.removeprefix(CONTEXT): self._rows(name, rows, device) for name in names} or None

    def _rows(self, name: str, rows: np.ndarray, device: torch.device, crops: np.ndarray | None = None) -> Tensor:
        array = self.arrays[name]
        picked = array[rows] if crops is None else array[np.asarray(rows)[:, None], crops[None]]
        tensor = torch.from_numpy(picked).to(device)
        return tensor.float() if tensor.is_floating_point() else tensor


def store_features(
    model: TrainedModel,
    paths: Sequence[Path],
    prompts: Sequence[str],
    folder: Path,
    *,
    max_bytes: int = MAX_BYTES,
    batch_size: int = 8,
    progress: bool = True,
) -> FeatureStore:
    """Compute the features of images into a folder of their own below `folder`, going on where a call was interrupted.

    Images that cannot be read are left out and listed. The folder's name is a hash of the towers' weights, of the
    settings that change what they see, of the assistants, and of the images' paths, sizes and times of change. A second
    process that wants the same features waits for the first; what is damaged is computed again.

    Args:
        model: whose towers look.
        paths: N images.
        prompts: of each.
        folder: for all stores.
        max_bytes: refuse to write more.
        batch_size: images of one size looked at together.
        progress: show a bar on stderr.

    Raises:
        ValueError: the store would be larger than `max_bytes`, no image can be read, or features overflow float16.
    """
    home = folder / f"{model.name}-{_key(model, paths)[:16]}"
    home.mkdir(parents=True, exist_ok=True)
    with _alone(home, progress):
        state = _left_by(home, len(paths))
        _fill(model, paths, prompts, home, state, max_bytes, batch_size, progress)
        unreadable = [(row, Unreadable(paths[row], reason)) for row, reason in state["unreadable"]]
        if len(unreadable) == len(paths):
            raise ValueError(
                f"paths: none of the {len(paths)} images can be read; the first: {unreadable[0][1].reason}"
            )
        arrays = {name: open_memmap(home / f"{name}.npy", "r") for name in state["arrays"]}
    return FeatureStore(arrays, unreadable)


@contextmanager
def _alone(home: Path, show: bool) -> Iterator[None]:
    """Let one process at a time into a folder; the lock of a killed one is free."""
    lock = FileLock(home / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if show:
            tqdm.write(f"another process computes {home}; waiting for it", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _left_by(home: Path, count: int) -> dict[str, Any]:
    """How far the last call came: images done, unreadable ones, names of arrays; nothing if anything is not whole."""
    try:
        state = read_json(home / "progress.json")
        done, names = int(state["done"]), [str(name) for name in state["arrays"]]
        if any(Path(name).name != name for name in names):
            raise ValueError("not names of arrays in this folder")
        unreadable = [[int(row), str(reason)] for row, reason in state["unreadable"]]
        if not names or {len(open_memmap(home / f"{name}.npy", "r")) for name in names} != {count}:
            raise ValueError("not the arrays of these images")
        if not 0 < done <= count or any(not 0 <= row < done for row, _ in unreadable):
            raise ValueError("not the progress of these images")
    except Exception:  # numpy lets through what Python's tokenizer says of a damaged header
        for file in home.glob("*.npy"):
            file.unlink()
        return {"done": 0, "unreadable": [], "arrays": []}
    return {"done": done, "unreadable": unreadable, "arrays": names}


def _fill(
    model: TrainedModel,
    paths: Sequence[Path],
    prompts: Sequence[str],
    home: Path,
    state: dict[str, Any],
    max_bytes: int,
    batch_size: int,
    progress: bool,
) -> None:
    """Compute what is not there yet, writing down how far it came every 64 images."""
    device = next(model.parameters()).device
    model.eval()
    writer = ArrayWriter(home, len(paths), max_bytes)
    rows = range(state["done"], len(paths))
    bar = tqdm(
        total=len(paths), initial=state["done"], desc=f"{model.name} features", unit="image", disable=not progress
    )
    with bar:
        for batch in _batches(paths, rows, batch_size, state["unreadable"]):
            if batch.images:
                stack = torch.stack(batch.images).to(device)
                writer.write(batch.rows, _look(model, stack, [prompts[row] for row in batch.rows]))
                state["arrays"] = sorted(writer.arrays)
            state["done"] = batch.end
            if state["arrays"] and (batch.end % 64 < batch_size or batch.end == len(paths)):
                writer.flush()
                write_atomically(home / "progress.json", json.dumps(state).encode())
            bar.update(batch.end - bar.n)


@torch.no_grad()
def _look(model: TrainedModel, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    seen = dict(model.forward_features(images))
    context = model.prepare(images, asked_prompts(prompts))
    return seen | {f"{CONTEXT}{name}": tensor for name, tensor in (context or {}).items()}


def asked_prompts(prompts: Sequence[str]) -> PromptFeatures:
    """Prompts for assistants, which read words and no features."""
    texts, index = distinct_prompts(prompts)
    return PromptFeatures(texts=texts, index=index, tensors={}, model="")


@dataclass
class _Batch:
    rows: list[int]
    images: list[Tensor]
    end: int


def _batches(paths: Sequence[Path], rows: Sequence[int], size: int, unreadable: list[Any]) -> Iterator[_Batch]:
    """Neighboring images of one size, at most `size` together; unreadable ones are added to the list."""
    batch = _Batch([], [], rows[0] if len(rows) else 0)
    for row in rows:
        try:
            image = pixels.load(paths[row])
        except pixels.ImageError as error:
            unreadable.append([row, str(error)])
            image = None
        if image is not None and batch.images and (len(batch.images) == size or image.shape != batch.images[0].shape):
            yield batch
            batch = _Batch([], [], row)
        if image is not None:
            batch.rows.append(row)
            batch.images.append(image)
        batch.end = row + 1
    if batch.end > (rows[0] if len(rows) else 0):
        yield batch


def _key(model: TrainedModel, paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith("head."):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    description = model.describe()
    settings = {name: description["config"][name] for name in model.feature_settings}
    roles = description.get("assistants")
    parts: list[Any] = [settings, description["towers"], roles and [_identity(model, role) for role in roles]]
    for path in paths:
        stat = path.stat() if path.exists() else None
        parts.append([str(path), *([stat.st_size, stat.st_mtime_ns] if stat else [])])
    digest.update(json.dumps(parts, sort_keys=True).encode())
    return digest.hexdigest()


def _identity(model: TrainedModel, role: str) -> list[str]:
    """What determines an assistant's answers: what it says of itself, else its class."""
    assistant = getattr(model, role)
    return [role, str(getattr(assistant, "identity", type(assistant).__qualname__))]


class LiveImages:
    """Images read from disk at each step; what `FeatureStore` reads from disk, its `look` computes.

    Attributes:
        readable: (N,) bool.
        unreadable: the images that are not, and why.
    """

    def __init__(self, paths: Sequence[Path], prompts: Sequence[str], *, progress: bool = True) -> None:
        self.paths, self.prompts = tuple(paths), tuple(prompts)
        self.readable = np.ones(len(paths), dtype=bool)
        problems = []
        for row, path in enumerate(tqdm(paths, desc="check images", unit="image", disable=not progress)):
            try:
                pixels.load(path)
            except pixels.ImageError as error:
                self.readable[row] = False
                problems.append(Unreadable(path, str(error)))
        self.unreadable = tuple(problems)
        if not self.readable.any():
            raise ValueError(f"paths: none of the {len(paths)} images can be read; the first: {problems[0].reason}")

    def __len__(self) -> int:
        """Number of images N."""
        return len(self.paths)

    def look(
        self,
        model: TrainedModel,
        rows: np.ndarray,
        device: torch.device,
        *,
        generator: torch.Generator | None = None,
        crops: int | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """What the model's towers see of these rows, with gradients, and what its assistants say."""
        seen: list[dict[str, Tensor]] = []
        contexts: list[dict[str, Tensor]] = []
        for row in rows:
            image = pixels.load(self.paths[row])[None].to(device)
            seen.append(dict(model.forward_features(image, generator=generator, crops=crops)))
            with torch.no_grad():
                contexts.append(dict(model.prepare(image, asked_prompts([self.prompts[row]])) or {}))
        return _joined(seen), _joined(contexts) or None


def _joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: _stacked([part[name] for part in parts]) for name in parts[0]}


def _stacked(rows: Sequence[Tensor]) -> Tensor:
    """Tensors (1, ...) as one; sequences, which may differ in length, are padded with zeros to the longest."""
    longest = max((row.shape[1] for row in rows if row.ndim > 1), default=0)
    padded = [
        row
        if row.ndim < 2 or row.shape[1] == longest
        else torch.cat([row, row.new_zeros(1, longest - row.shape[1], *row.shape[2:])], dim=1)
        for row in rows
    ]
    return torch.cat(padded)
