"""Arrays on disk that are filled row by row."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


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
