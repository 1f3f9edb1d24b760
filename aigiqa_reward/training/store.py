"""Images of a training as the towers see them: features stored on disk, or computed anew at each step."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.lib.format import open_memmap
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from aigiqa_reward import images as pixels
from aigiqa_reward.models.base import TrainedModel, distinct_prompts
from aigiqa_reward.types import PromptFeatures
from aigiqa_reward.utils.io import read_json
from aigiqa_reward.utils.run_folder import write_json

MAX_BYTES = 20_000_000_000
"""Default bound of a store's size."""

CONTEXT = "context."
"""Prefix of the assistants' outputs among the names of a store."""

_NOTED_EVERY = 64
"""Images after which the progress of a store is written."""


@dataclass(frozen=True)
class Unreadable:
    """An image that was left out, and why."""

    path: Path
    reason: str


def listed(unreadable: Sequence[Unreadable]) -> list[dict[str, str]]:
    """Return paths and reasons as JSON values."""
    return [{"path": str(entry.path), "reason": entry.reason} for entry in unreadable]


class FeatureStore:
    """Features of N images, as float16 arrays in a folder.

    Attributes:
        arrays: arrays (N, ...) by name; names of assistants' outputs begin with `context.`.
        readable: (N,) bool.
        unreadable: images that could not be read, and why.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], unreadable: Sequence[tuple[int, Unreadable]]) -> None:
        self.arrays = dict(arrays)
        self.readable = np.ones(len(next(iter(self.arrays.values()))), dtype=bool)
        self.readable[[row for row, _ in unreadable]] = False
        self.unreadable = tuple(entry for _, entry in unreadable)

    def __len__(self) -> int:
        """Number of images N."""
        return len(self.readable)

    def features(
        self,
        model: TrainedModel,
        rows: np.ndarray,
        device: torch.device,
        *,
        generator: torch.Generator | None = None,
        crops: int | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """Read what `forward_features` and `prepare` gave for these rows; the second is None without assistants.

        With a generator and a number of crops, so many of the stored crops are drawn, the same for all rows.
        """
        chosen = None
        if generator is not None and crops is not None and model.crop_features:
            count = self.arrays[model.crop_features[0]].shape[1]
            chosen = torch.randperm(count, generator=generator)[:crops].numpy()
        seen: dict[str, Tensor] = {}
        context: dict[str, Tensor] = {}
        for name, array in self.arrays.items():
            drawn = chosen is not None and name in model.crop_features
            picked = array[np.asarray(rows)[:, None], chosen] if drawn else array[rows]
            tensor = torch.from_numpy(picked).to(device)
            tensor = tensor.float() if tensor.is_floating_point() else tensor
            if name.startswith(CONTEXT):
                context[name.removeprefix(CONTEXT)] = tensor
            else:
                seen[name] = tensor
        return seen, context or None


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
    """Compute the features of images into a subfolder of `folder`, resuming an interrupted call.

    Images that cannot be read are left out and listed. The subfolder's name is a hash of the towers' weights, of the
    settings that change what they see, of the assistants with the prompts that they read, and of the images' paths,
    sizes and times of change. A second process that wants the same features waits for the first; damaged files are
    computed again.

    Args:
        model: model whose towers compute them.
        paths: files of the N images.
        prompts: prompt of each image.
        folder: folder of all stores.
        max_bytes: largest size of a store.
        batch_size: number of images of one size per forward pass.
        progress: whether to show a bar on stderr.
    """
    home = folder / f"{model.name}-{_key(model, paths, prompts)[:16]}"
    home.mkdir(parents=True, exist_ok=True)
    lock = FileLock(home / ".lock")
    try:
        held = lock.acquire(blocking=False)
    except Timeout:
        if progress:
            tqdm.write(f"another process computes {home}; waiting for it", file=sys.stderr)
        held = lock.acquire()
    with held:
        state = _earlier(home, len(paths))
        _fill(model, paths, prompts, home, state, max_bytes, batch_size, progress)
        unreadable = [(row, Unreadable(paths[row], reason)) for row, reason in state["unreadable"]]
        _refuse_none(paths, [entry for _, entry in unreadable])
        arrays = {name: open_memmap(home / f"{name}.npy", "r") for name in state["arrays"]}
    return FeatureStore(arrays, unreadable)


def _earlier(home: Path, count: int) -> dict[str, Any]:
    """Read the progress of an earlier call, with the names of its arrays; none if a file is damaged."""
    try:
        state = read_json(home / "progress.json")
        names, rows = state["arrays"], [row for row, _ in state["unreadable"]]
        lengths = {len(open_memmap(home / f"{Path(name).name}.npy", "r")) for name in names}
        if lengths != {count} or not 0 < state["done"] <= count or max(rows, default=0) >= state["done"]:
            raise ValueError("not the progress of these images")
    except Exception:  # numpy raises what Python's tokenizer does for a damaged header
        for file in home.glob("*.npy"):
            file.unlink()
        return {"done": 0, "unreadable": [], "arrays": []}
    return state


@torch.no_grad()
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
    """Compute what is missing, and write the progress every 64 images."""
    device = next(model.parameters()).device
    model.eval()
    writer = _ArrayWriter(home, len(paths), max_bytes)
    title = f"{model.name} features"
    with tqdm(total=len(paths), initial=state["done"], desc=title, unit="image", disable=not progress) as bar:
        for rows, images, end in _batches(paths, state["done"], batch_size, state["unreadable"]):
            if rows:
                stacked = torch.stack(images).to(device)
                seen = dict(model.forward_features(stacked))
                context = model.prepare(stacked, asked_prompts([prompts[row] for row in rows])) or {}
                writer.write(rows, seen | {f"{CONTEXT}{name}": tensor for name, tensor in context.items()})
                state["arrays"] = sorted(writer.arrays)
            state["done"] = end
            if state["arrays"] and (end % _NOTED_EVERY < batch_size or end == len(paths)):
                writer.flush()
                write_json(home / "progress.json", state)
            bar.update(end - bar.n)


def _batches(
    paths: Sequence[Path], start: int, size: int, unreadable: list[Any]
) -> Iterator[tuple[list[int], list[Tensor], int]]:
    """Yield rows and images of neighbors of one size, and the first row not yet seen; list unreadable ones."""
    rows: list[int] = []
    images: list[Tensor] = []
    for row in range(start, len(paths)):
        try:
            image = pixels.load(paths[row])
        except pixels.ImageError as error:
            unreadable.append([row, str(error)])
            continue
        if images and (len(images) == size or image.shape != images[0].shape):
            yield rows, images, row
            rows, images = [], []
        rows.append(row)
        images.append(image)
    if start < len(paths):
        yield rows, images, len(paths)


def asked_prompts(prompts: Sequence[str]) -> PromptFeatures:
    """Return prompts for assistants, which read words and no features."""
    texts, index = distinct_prompts(prompts)
    return PromptFeatures(texts=texts, index=index, tensors={}, model="")


class _ArrayWriter:
    """Arrays of N rows in files, made when the first features show their shapes, or opened if they exist.

    Sequences, whose length (the second dimension) differs between batches, are padded with zeros to the longest.
    """

    def __init__(self, home: Path, count: int, max_bytes: int) -> None:
        self.home, self.count, self.max_bytes = home, count, max_bytes
        self.arrays: dict[str, Any] = {}

    def write(self, rows: Sequence[int], features: Mapping[str, Tensor]) -> None:
        stored = {name: _storable(name, tensor) for name, tensor in features.items()}
        self._make_room(stored)
        for name, values in stored.items():
            array = self.arrays[name]
            if values.shape[1:] == array.shape[1:]:
                array[rows] = values
            else:
                array[rows] = 0
                array[rows, : values.shape[1]] = values

    def _make_room(self, stored: Mapping[str, np.ndarray]) -> None:
        """Make or lengthen the arrays that these values do not fit into."""
        for name in stored.keys() - self.arrays.keys():
            if (path := self.home / f"{name}.npy").exists():
                self.arrays[name] = open_memmap(path, "r+")
        short = [
            name
            for name, values in stored.items()
            if name not in self.arrays or (values.ndim > 1 and values.shape[1] > self.arrays[name].shape[1])
        ]
        shapes = {name: (self.count, *stored[name].shape[1:]) for name in short}
        added = sum(int(np.prod(shapes[name])) * stored[name].itemsize for name in short)
        total = added + sum(array.nbytes for name, array in self.arrays.items() if name not in short)
        free = shutil.disk_usage(self.home).free
        if added and (total > self.max_bytes or added > free):
            raise ValueError(
                f"max_bytes: the features of {self.count} images take {total / 1e9:.1f} GB, allowed are "
                f"{self.max_bytes / 1e9:.1f} GB and free {free / 1e9:.1f} GB; allow more, score fewer crops, or pass "
                "train_towers=True"
            )
        for name in short:
            path = self.home / f"{name}.npy"
            fresh = open_memmap(path.with_suffix(".part"), "w+", stored[name].dtype, shapes[name])
            if name in self.arrays:
                width = self.arrays[name].shape[1]
                fresh[:, :width] = self.arrays.pop(name)
            del fresh  # Windows replaces no file that is open
            path.with_suffix(".part").replace(path)
            self.arrays[name] = open_memmap(path, "r+")

    def flush(self) -> None:
        for array in self.arrays.values():
            array.flush()


def _storable(name: str, tensor: Tensor) -> np.ndarray:
    stored = tensor.half() if tensor.is_floating_point() else tensor
    if stored.is_floating_point() and not bool(torch.isfinite(stored).all()):
        raise ValueError(f"model: its feature {name!r} exceeds float16 and cannot be stored; pass train_towers=True")
    return stored.cpu().numpy()


def _key(model: TrainedModel, paths: Sequence[Path], prompts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith("head."):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    description = model.describe()
    settings = {name: description["config"][name] for name in model.feature_settings}
    roles = description.get("assistants")
    assistants = {role: getattr(model, role) for role in roles or ()}  # an assistant without `identity` is its class
    named = [[role, str(getattr(one, "identity", type(one).__qualname__))] for role, one in assistants.items()]
    parts: list[Any] = [settings, description["towers"], roles and [*named, list(prompts)]]  # assistants read prompts
    for path in paths:
        stat = path.stat() if path.exists() else None
        parts.append([str(path), *([stat.st_size, stat.st_mtime_ns] if stat else [])])
    digest.update(json.dumps(parts, sort_keys=True).encode())
    return digest.hexdigest()


def _refuse_none(paths: Sequence[Path], unreadable: Sequence[Unreadable]) -> None:
    if len(unreadable) == len(paths):
        raise ValueError(f"paths: none of the {len(paths)} images can be read; the first: {unreadable[0].reason}")


class LiveImages:
    """Images read from disk at each step, for trainings that change the towers, in place of a `FeatureStore`."""

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
        _refuse_none(paths, problems)

    def __len__(self) -> int:
        """Number of images N."""
        return len(self.paths)

    def features(
        self,
        model: TrainedModel,
        rows: np.ndarray,
        device: torch.device,
        *,
        generator: torch.Generator | None = None,
        crops: int | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """Compute what the model's towers see of these rows, with gradients, and its assistants' outputs."""
        seen: list[dict[str, Tensor]] = []
        contexts: list[dict[str, Tensor]] = []
        for row in rows:
            image = pixels.load(self.paths[row])[None].to(device)
            seen.append(dict(model.forward_features(image, generator=generator, crops=crops)))
            with torch.no_grad():
                contexts.append(dict(model.prepare(image, asked_prompts([self.prompts[row]])) or {}))
        return _joined(seen), _joined(contexts) or None


def _joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack tensors (1, ...) by name; sequences, which may differ in length, are padded with zeros to the longest."""
    return {
        name: torch.cat([part[name] for part in parts])
        if parts[0][name].ndim < 2
        else pad_sequence([part[name][0] for part in parts], batch_first=True)
        for name in parts[0]
    }


ImageSource: TypeAlias = FeatureStore | LiveImages
