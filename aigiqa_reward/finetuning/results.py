"""What a validation found, in memory and on disk."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aigiqa_reward.images.loading import open_rgb
from aigiqa_reward.utils.io import read_json, write_atomically


@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """What a fine-tuning came to. The pipeline holds the kept adapter.

    Attributes:
        folder: with `pytorch_lora_weights.safetensors`, the kept adapter.
        steps: of the optimizer that were taken.
        kept_step: after which the kept weights stood: the best validation's by the held-out reward, else the last.
        stopped: why it ended before its time; None if it did not.
        history: lines of `history.jsonl`.
    """

    folder: Path
    steps: int
    kept_step: int
    stopped: str | None
    history: Sequence[Mapping[str, Any]]


SHOWN_PROMPTS, SHOWN_SEEDS = 8, 4
"""Of so many prompts and seeds the images are kept for pictures; chosen here, what fits a screen."""

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
"""Numbers of each image."""


@dataclass(frozen=True, kw_only=True)
class ValidationResult:
    """Numbers and small copies of the validation images at one step, P prompts x S seeds.

    Attributes:
        step: steps of the optimizer before it.
        prompts: (P,) texts.
        numbers: (P, S) float64 arrays by the names in PER_IMAGE; NaN for images with NaN pixels, and throughout where
            a reward tells no correspondence. `reward`, `quality`, `correspondence` are of the trained reward, `holdout`
            is the held-out one's total; its correspondence is told beside, and no decision uses it.
        diversity: (P,) mean cosine distance between the looks of a prompt's images, in [0, 2]; NaN below two images.
        nonfinite: how many images have NaN or infinite pixels.
        tiles: (p, s, h, w, 3) uint8 copies of the first prompts' and seeds' images, at most 8 and 4.
        seconds: that it took.
    """

    step: int
    prompts: tuple[str, ...]
    numbers: Mapping[str, np.ndarray]
    diversity: np.ndarray
    nonfinite: int
    tiles: np.ndarray
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if set(self.numbers) != set(PER_IMAGE):
            raise ValueError(f"numbers: expected {', '.join(PER_IMAGE)}, got {', '.join(sorted(self.numbers))}")
        shapes = {np.shape(values) for values in self.numbers.values()}
        if len(shapes) > 1 or any(len(s) != 2 or s[0] != len(self.prompts) or s[1] < 1 for s in shapes):
            raise ValueError(
                f"numbers: expected arrays ({len(self.prompts)} prompts, S seeds), all alike, got shapes "
                f"{sorted(shapes)}"
            )
        if np.shape(self.diversity) != (len(self.prompts),):
            raise ValueError(
                f"diversity: expected one number a prompt, ({len(self.prompts)},), got {np.shape(self.diversity)}"
            )
        if self.tiles.dtype != np.uint8 or self.tiles.ndim != 5 or self.tiles.shape[-1] != 3:
            raise ValueError(
                f"tiles: expected uint8 of shape (p, s, h, w, 3), got {self.tiles.dtype} of {self.tiles.shape}"
            )

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
        """(p h, s w, 3) uint8: the tiles as one picture, a row a prompt."""
        rows, columns, height, width, _ = self.tiles.shape
        mosaic = self.tiles.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3)
        return np.ascontiguousarray(mosaic)

    def summary(self) -> dict[str, float]:
        """Means over the finite images (of `diversity` over prompts), as JSON holds them.

        Names whose mean is undefined are left out; `images` and `nonfinite` are counts, `seconds` is what it took.
        """
        means = {name: _mean(self.numbers[name]) for name in PER_IMAGE} | {"diversity": _mean(self.diversity)}
        counts = {"images": float(self.reward.size), "nonfinite": float(self.nonfinite)}
        known = {name: mean for name, mean in means.items() if np.isfinite(mean)}
        return known | counts | {"seconds": round(self.seconds, 3)}

    # ----------------------------------------------------------------------------------------- files

    def write(self, folder: Path) -> None:
        """Write `step-000050.json`, and the copies of the images as `tiles/step-000050.png`.

        Args:
            folder: of a training's validations.
        """
        rows, columns, height, width, _ = self.tiles.shape
        picture = io.BytesIO()
        Image.fromarray(self.mosaic).save(picture, "PNG")
        write_atomically(tiles_file(folder, self.step), picture.getvalue())
        told: dict[str, Any] = {
            "step": self.step,
            "summary": self.summary(),
            "prompts": list(self.prompts),
            "numbers": {name: nested(values) for name, values in self.numbers.items()},
            "diversity": nested(self.diversity),
            "nonfinite": self.nonfinite,
            "tiles": [rows, columns, height, width],
            "seconds": self.seconds,
        }
        write_atomically(numbers_file(folder, self.step), json.dumps(told, ensure_ascii=False).encode())

    @staticmethod
    def read(folder: Path, step: int) -> ValidationResult:
        """What `write` wrote.

        Raises:
            ValueError: it is not there, or damaged.
        """
        try:
            told = read_json(numbers_file(folder, step))
            rows, columns, height, width = told["tiles"]
            mosaic = np.asarray(open_rgb(tiles_file(folder, step)))
            return ValidationResult(
                step=told["step"],
                prompts=tuple(told["prompts"]),
                numbers={name: unnested(values) for name, values in told["numbers"].items()},
                diversity=unnested(told["diversity"]),
                nonfinite=told["nonfinite"],
                tiles=mosaic.reshape(rows, height, columns, width, 3).transpose(0, 2, 1, 3, 4),
                seconds=told["seconds"],
            )
        except Exception as error:  # what is told may be of any kind
            raise ValueError(
                f"folder: cannot read the validation of step {step} in {folder} ({error}); it was not "
                "written by this version, or was altered"
            ) from error


def numbers_file(folder: Path, step: int) -> Path:
    """Where a validation's numbers are."""
    return folder / f"step-{step:06d}.json"


def picture_file(folder: Path, step: int) -> Path:
    """Where the picture of a validation is."""
    return folder / f"step-{step:06d}.png"


def tiles_file(folder: Path, step: int) -> Path:
    """Where the copies of a validation's images are, as one picture without gaps: rows prompts, columns seeds."""
    return folder / "tiles" / f"step-{step:06d}.png"


def nested(values: np.ndarray) -> list[Any]:
    """An array as JSON holds it: lists, with null for NaN."""
    cells = values.astype(object)
    cells[~np.isfinite(values)] = None
    return cells.tolist()


def unnested(values: Any) -> np.ndarray:
    """What `nested` made, as float64."""
    return np.array(values, dtype=np.float64)


def _mean(values: np.ndarray) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a mean over nothing, which is NaN
        return float(np.nanmean(values))
