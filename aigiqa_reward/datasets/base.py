"""What every reader of a benchmark returns: images on disk and what people said of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredImages:
    """N images with their human scores, in the benchmark's own units, higher is better. Row i is image i.

    Attributes:
        names: the benchmark's name of each image, length N.
        paths: its file.
        prompts: the prompt it was made from.
        generators: the generator, and variant, that made it.
        quality: (N,) float64, mean opinion score of perceptual quality.
        quality_std: (N,) float64, deviation between raters.
        correspondence: (N,) float64, mean opinion score of correspondence to the prompt.
        correspondence_std: (N,) float64, deviation between raters.

    A benchmark that did not publish a score holds NaN in its place.

    Raises:
        ValueError: unequal lengths.
    """

    names: tuple[str, ...]
    paths: tuple[Path, ...]
    prompts: tuple[str, ...]
    generators: tuple[str, ...]
    quality: np.ndarray
    quality_std: np.ndarray
    correspondence: np.ndarray
    correspondence_std: np.ndarray

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if len(value) != len(self.names) or (isinstance(value, np.ndarray) and value.ndim != 1):
                raise ValueError(
                    f"{field.name}: expected {len(self.names)} entries, one an image, got shape {np.shape(value)}"
                )

    def __len__(self) -> int:
        """Number of images N."""
        return len(self.names)

    def subset(self, rows: np.ndarray | Sequence[int] | Sequence[bool]) -> ScoredImages:
        """The images that `rows` names: a boolean mask (N,), or row numbers in the order wanted.

        Raises:
            ValueError: a mask of another length, or row numbers that do not exist.
        """
        index = np.asarray(rows)
        if index.dtype == bool:
            if index.shape != (len(self),):
                raise ValueError(f"rows: expected a mask of shape ({len(self)},), got {index.shape}")
            index = np.flatnonzero(index)
        elif index.size == 0:
            index = np.zeros(0, dtype=np.int64)
        if index.ndim != 1 or index.dtype.kind not in "iu":
            raise ValueError(f"rows: expected a boolean mask or row numbers, got {index.dtype} of shape {index.shape}")
        if index.size and (index.min() < -len(self) or index.max() >= len(self)):
            raise ValueError(f"rows: expected numbers below {len(self)}, got {int(index.min())} to {int(index.max())}")
        return ScoredImages(
            names=tuple(self.names[i] for i in index),
            paths=tuple(self.paths[i] for i in index),
            prompts=tuple(self.prompts[i] for i in index),
            generators=tuple(self.generators[i] for i in index),
            quality=self.quality[index],
            quality_std=self.quality_std[index],
            correspondence=self.correspondence[index],
            correspondence_std=self.correspondence_std[index],
        )
