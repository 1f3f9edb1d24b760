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
        groups: what a split must keep on one side; left out or None, the prompts.

    A benchmark that did not publish a score holds NaN in its place.

    Raises:
        ValueError: unequal lengths.

    Example:
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from aigiqa_reward.datasets import ScoredImages
        >>> images = ScoredImages(
        ...     names=("a", "b"),
        ...     paths=(Path("a.png"), Path("b.png")),
        ...     prompts=("a red fox", "a red fox"),
        ...     generators=("sdxl", "flux"),
        ...     quality=np.array([3.1, 4.2]),
        ...     quality_std=np.full(2, np.nan),
        ...     correspondence=np.full(2, np.nan),
        ...     correspondence_std=np.full(2, np.nan),
        ... )
        >>> images.has_quality, images.has_correspondence, images.subset([1]).names
        (True, False, ('b',))
    """

    names: tuple[str, ...]
    paths: tuple[Path, ...]
    prompts: tuple[str, ...]
    generators: tuple[str, ...]
    quality: np.ndarray
    quality_std: np.ndarray
    correspondence: np.ndarray
    correspondence_std: np.ndarray
    groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _groups_or_prompts(self)
        for field in fields(self):
            value = getattr(self, field.name)
            if len(value) != len(self.names) or (isinstance(value, np.ndarray) and value.ndim != 1):
                raise ValueError(
                    f"{field.name}: expected {len(self.names)} entries, one an image, got shape {np.shape(value)}"
                )

    def __len__(self) -> int:
        """Number of images N."""
        return len(self.names)

    @property
    def has_quality(self) -> bool:
        """Whether any image has a score of quality."""
        return bool(np.any(~np.isnan(self.quality)))

    @property
    def has_correspondence(self) -> bool:
        """Whether any image has a score of correspondence."""
        return bool(np.any(~np.isnan(self.correspondence)))

    def subset(self, rows: np.ndarray | Sequence[int] | Sequence[bool]) -> ScoredImages:
        """The images that `rows` names: a boolean mask (N,), or row numbers in the order wanted.

        Raises:
            ValueError: a mask of another length, or row numbers that do not exist.
        """
        index = _row_numbers(rows, len(self))
        return ScoredImages(
            names=tuple(self.names[i] for i in index),
            paths=tuple(self.paths[i] for i in index),
            prompts=tuple(self.prompts[i] for i in index),
            generators=tuple(self.generators[i] for i in index),
            quality=self.quality[index],
            quality_std=self.quality_std[index],
            correspondence=self.correspondence[index],
            correspondence_std=self.correspondence_std[index],
            groups=tuple(self.groups[i] for i in index),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class PreferencePairs:
    """N choices of people between two images of one prompt. Row i is choice i; ties are left out.

    Attributes:
        prompts: the prompt that both images were made from, length N.
        better: the file of the image that was preferred.
        worse: the file of the other.
        groups: what a split must keep on one side; left out or None, the prompts.

    Raises:
        ValueError: unequal lengths, or an image preferred to itself.

    Example:
        >>> from pathlib import Path
        >>> from aigiqa_reward.datasets import PreferencePairs
        >>> pairs = PreferencePairs(prompts=("a red fox",), better=(Path("a.png"),), worse=(Path("b.png"),))
        >>> pairs.groups, len(pairs.subset([0]).prompts)
        (('a red fox',), 1)
    """

    prompts: tuple[str, ...]
    better: tuple[Path, ...]
    worse: tuple[Path, ...]
    groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _groups_or_prompts(self)
        for field in fields(self):
            value = getattr(self, field.name)
            if len(value) != len(self.prompts):
                raise ValueError(f"{field.name}: expected {len(self.prompts)} entries, one a pair, got {len(value)}")
        for row, (better, worse) in enumerate(zip(self.better, self.worse, strict=True)):
            if better == worse:
                raise ValueError(f"better, worse: expected two images, got {str(better)!r} twice at row {row}")

    def __len__(self) -> int:
        """Number of pairs N."""
        return len(self.prompts)

    def subset(self, rows: np.ndarray | Sequence[int] | Sequence[bool]) -> PreferencePairs:
        """The pairs that `rows` names: a boolean mask (N,), or row numbers in the order wanted.

        Raises:
            ValueError: a mask of another length, or row numbers that do not exist.
        """
        index = _row_numbers(rows, len(self))
        return PreferencePairs(
            prompts=tuple(self.prompts[i] for i in index),
            better=tuple(self.better[i] for i in index),
            worse=tuple(self.worse[i] for i in index),
            groups=tuple(self.groups[i] for i in index),
        )


def _groups_or_prompts(table: ScoredImages | PreferencePairs) -> None:
    if not table.groups:
        object.__setattr__(table, "groups", table.prompts)


def _row_numbers(rows: np.ndarray | Sequence[int] | Sequence[bool], count: int) -> np.ndarray:
    """A mask or row numbers as row numbers of a table of `count` rows."""
    index = np.asarray(rows)
    if index.dtype == bool:
        if index.shape != (count,):
            raise ValueError(f"rows: expected a mask of shape ({count},), got {index.shape}")
        return np.flatnonzero(index)
    if index.size == 0:
        return np.zeros(0, dtype=np.int64)
    if index.ndim != 1 or index.dtype.kind not in "iu":
        raise ValueError(f"rows: expected a boolean mask or row numbers, got {index.dtype} of shape {index.shape}")
    if index.min() < -count or index.max() >= count:
        raise ValueError(f"rows: expected numbers below {count}, got {int(index.min())} to {int(index.max())}")
    return index
