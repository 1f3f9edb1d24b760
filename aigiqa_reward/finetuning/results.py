"""Results of a training and of its validations, in memory and on disk."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aigiqa_reward.images.loading import open_rgb
from aigiqa_reward.utils.io import read_json, write_atomically
from aigiqa_reward.utils.run_folder import write_json


@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """Result of a training, whose pipeline has the kept adapter loaded.

    Attributes:
        folder: output folder, with the kept adapter in `pytorch_lora_weights.safetensors`.
        steps: optimizer steps taken.
        kept_step: step whose weights were kept: that of the best validation by the held-out reward, else the last.
        stopped: reason for stopping early, or None.
        history: lines of `history.jsonl`.
    """

    folder: Path
    steps: int
    kept_step: int
    stopped: str | None
    history: Sequence[Mapping[str, Any]]


SHOWN_PROMPTS, SHOWN_SEEDS = 8, 4
"""Number of prompts and seeds in the pictures of a validation."""

PER_IMAGE = (
    "reward",
    "quality",
    "correspondence",
    "holdout",
    "holdout_correspondence",
    "saturation",
    "chroma",
    "contrast",
)
"""Names of the numbers per validation image."""


@dataclass(frozen=True, kw_only=True)
class ValidationResult:
    """Numbers and thumbnails of the validation images at one step, of P prompts and S seeds.

    Attributes:
        step: optimizer steps taken before.
        prompts: (P,) texts.
        numbers: (P, S) float64 arrays by the names in PER_IMAGE; NaN for images with NaN pixels and where a reward has
            no correspondence. `holdout` is the total of the held-out reward.
        diversity: (P,) mean cosine distance between the features of a prompt's images, in [0, 2]; NaN below two.
        nonfinite: number of images with NaN or infinite pixels.
        tiles: (p, s, h, w, 3) uint8 thumbnails of the first prompts and seeds, at most 8 and 4.
        seconds: duration of the validation.
    """

    step: int
    prompts: tuple[str, ...]
    numbers: Mapping[str, np.ndarray]
    diversity: np.ndarray
    nonfinite: int
    tiles: np.ndarray
    seconds: float = 0.0

    @property
    def reward(self) -> np.ndarray:
        """(P, S) totals of the trained reward."""
        return self.numbers["reward"]

    @property
    def holdout(self) -> np.ndarray:
        """(P, S) totals of the held-out reward."""
        return self.numbers["holdout"]

    @property
    def mosaic(self) -> np.ndarray:
        """(p h, s w, 3) uint8: the tiles as one picture, one row per prompt."""
        rows, columns, height, width, _ = self.tiles.shape
        return np.ascontiguousarray(self.tiles.swapaxes(1, 2)).reshape(rows * height, columns * width, 3)

    def summary(self) -> dict[str, float]:
        """Return means over the finite images (of `diversity` over prompts), where defined, and counts."""
        means = {name: mean(self.numbers[name]) for name in PER_IMAGE} | {"diversity": mean(self.diversity)}
        counts = {"images": float(self.reward.size), "nonfinite": float(self.nonfinite)}
        return {n: v for n, v in means.items() if np.isfinite(v)} | counts | {"seconds": round(self.seconds, 3)}

    def write(self, folder: Path) -> None:
        """Write `step-000050.json`, and the thumbnails as `tiles/step-000050.png`, into a folder."""
        picture = io.BytesIO()
        Image.fromarray(self.mosaic).save(picture, "PNG")
        write_atomically(folder / "tiles" / f"step-{self.step:06d}.png", picture.getvalue())
        arrays = {
            "numbers": {name: values.tolist() for name, values in self.numbers.items()},
            "diversity": self.diversity.tolist(),
            "tiles": self.tiles.shape[:4],
        }
        write_json(folder / f"step-{self.step:06d}.json", {**vars(self), "summary": self.summary(), **arrays})

    @staticmethod
    def read(folder: Path, step: int) -> ValidationResult:
        """Read what `write` wrote; a ValueError if it is missing or damaged."""
        try:
            named = read_json(folder / f"step-{step:06d}.json")
            rows, columns, height, width = named["tiles"]
            mosaic = np.asarray(open_rgb(folder / "tiles" / f"step-{step:06d}.png"))
            return ValidationResult(
                step=named["step"],
                prompts=tuple(named["prompts"]),
                numbers={name: np.array(values, dtype=np.float64) for name, values in named["numbers"].items()},
                diversity=np.array(named["diversity"], dtype=np.float64),
                nonfinite=named["nonfinite"],
                tiles=mosaic.reshape(rows, height, columns, width, 3).swapaxes(1, 2),
                seconds=named["seconds"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"folder: cannot read the validation of step {step} in {folder} ({error})") from error


def mean(values: np.ndarray) -> float:
    """Return the mean of the finite values; NaN if there are none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # mean of an empty slice
        return float(np.nanmean(values))
