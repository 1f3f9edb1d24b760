"""Held-out predictions of a model on images with human scores, in one .npz file."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from aigiqa_reward.utils.io import read_arrays, write_atomically

MAX_BYTES = 1_000_000_000


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """Human scores and held-out predictions of N images. Higher is better; predictions may have any scale.

    Attributes:
        names: (N,) file name of each image.
        prompts: (N,) its prompt.
        generators: (N,) generator and variant that made it.
        folds: (N,) integer; the fold whose model, trained without this image's prompt, predicted it.
        target_quality: (N,) human quality score, in the benchmark's units.
        target_correspondence: (N,) human correspondence score.
        predicted_quality: (N,) predicted quality.
        predicted_correspondence: (N,) predicted correspondence with the image's own prompt.
        wrong_prompt_correspondence: (N, K) of the same images with K other prompts, or None.
        image_only_correspondence: (N,) of a control that predicts correspondence without the prompt, or None.
        shuffled_prompt_correspondence: (N,) of the model with the prompt of another image, or None.
        predicted_uncertainty: (N,) error of quality that the model expects, or None; both then have the benchmark's
            units.
    """

    names: tuple[str, ...]
    prompts: tuple[str, ...]
    generators: tuple[str, ...]
    folds: np.ndarray
    target_quality: np.ndarray
    target_correspondence: np.ndarray
    predicted_quality: np.ndarray
    predicted_correspondence: np.ndarray
    wrong_prompt_correspondence: np.ndarray | None = None
    image_only_correspondence: np.ndarray | None = None
    shuffled_prompt_correspondence: np.ndarray | None = None
    predicted_uncertainty: np.ndarray | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and len(value) != len(self.names):
                raise ValueError(f"{field.name}: expected {len(self.names)} entries, one per image, got {len(value)}")

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def join(cls, parts: Sequence[Predictions]) -> Predictions:
        """Put tables one after the other."""
        columns = {field.name: [getattr(part, field.name) for part in parts] for field in fields(cls)}
        joined: dict[str, Any] = {name: sum(columns.pop(name), ()) for name in ("names", "prompts", "generators")}
        joined |= {name: np.concatenate(found) for name, found in columns.items() if found[0] is not None}
        return cls(**joined)

    def save(self, path: Path) -> Path:
        """Write one compressed .npz."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        data = io.BytesIO()
        np.savez_compressed(data, format=1, **{name: array for name, array in arrays.items() if array is not None})
        write_atomically(path, data.getvalue())
        return path

    @classmethod
    def load(cls, path: Path) -> Predictions:
        """Read a file that `save` wrote; nothing in it is unpickled."""
        arrays = read_arrays(path, most=MAX_BYTES)
        arrays.pop("format")
        texts = {name: tuple(arrays.pop(name).tolist()) for name in ("names", "prompts", "generators")}
        return cls(**texts, **arrays)
