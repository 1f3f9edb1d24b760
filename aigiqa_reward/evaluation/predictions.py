"""What a model predicted on images with human scores, out of fold, and its one file on disk."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from aigiqa_reward.utils.io import read_arrays

FORMAT = 1
"""Version of the file; raised when a field changes its meaning."""

MAX_BYTES = 1_000_000_000
"""Most that a file unpacks to: chosen here; a million images with ten wrong prompts each take less."""

_OPTIONAL = (
    "wrong_prompt_correspondence",
    "image_only_correspondence",
    "shuffled_prompt_correspondence",
    "predicted_uncertainty",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """Human scores and held-out predictions of N images. Higher is better; predictions may have any scale.

    Attributes:
        names: file name of each image, length N.
        prompts: its prompt.
        generators: the generator and variant that made it.
        folds: (N,) integer; the fold whose model, trained without this image's prompt, predicted it.
        target_quality: (N,) human quality score, in the benchmark's units.
        target_correspondence: (N,) human correspondence score.
        predicted_quality: (N,).
        predicted_correspondence: (N,) with the image's own prompt.
        wrong_prompt_correspondence: (N, K) of the same images with K other prompts, or None.
        image_only_correspondence: (N,) of a control that predicts correspondence without the prompt, or None.
        shuffled_prompt_correspondence: (N,) of the model with the prompt of another image, or None.
        predicted_uncertainty: (N,) standard deviation of quality that the model expects, or None; both then have the
            benchmark's units.

    Raises:
        ValueError: unequal lengths, wrong shapes, or NaN or infinite values.

    Example:
        >>> import numpy as np
        >>> from aigiqa_reward.evaluation import Predictions
        >>> human = np.linspace(1, 5, 6)
        >>> table = Predictions(
        ...     names=tuple("abcdef"),
        ...     prompts=tuple("ppqqrr"),
        ...     generators=("sd", "xl") * 3,
        ...     folds=np.array([0, 0, 0, 1, 1, 1]),
        ...     target_quality=human,
        ...     target_correspondence=human,
        ...     predicted_quality=human / 5,
        ...     predicted_correspondence=human / 5,
        ... )
        >>> Predictions.load(table.save("predictions.npz")).names
        ('a', 'b', 'c', 'd', 'e', 'f')
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
        count = len(self.names)
        if count == 0:
            raise ValueError("names: expected at least one image, got none")
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            if isinstance(value, np.ndarray):
                _check_array(field.name, value, count)
            elif len(value) != count:
                raise ValueError(f"{field.name}: expected {count} entries, one an image, got {len(value)}")

    def __len__(self) -> int:
        """Number of images N."""
        return len(self.names)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one compressed .npz, whole or not at all, and return its path.

        Raises:
            ValueError: `path` does not end in .npz.
        """
        from aigiqa_reward.utils.io import write_atomically  # here, because it loads torch and the measures do not

        target = Path(path)
        if target.suffix != ".npz":
            raise ValueError(f"path: expected a name that ends in .npz, got {str(target)!r}")
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        arrays = {name: np.asarray(value) for name, value in values.items() if value is not None}
        arrays["format"] = np.asarray(FORMAT)
        data = io.BytesIO()
        np.savez_compressed(data, **arrays)  # pyright: ignore[reportArgumentType]
        write_atomically(target, data.getvalue())
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Predictions:
        """Read what `save` wrote; nothing in the file is unpickled.

        Raises:
            ValueError: no such file, another kind of file, another version, or fields missing or unknown.
        """
        source = Path(path)
        if not source.is_file():
            raise ValueError(f"path: no file at {str(source)!r}; make it with Predictions.save")
        try:
            arrays: dict[str, Any] = read_arrays(source, most=MAX_BYTES)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"path: {str(source)!r} is not a file of Predictions.save, or is damaged ({error})"
            ) from error
        version = arrays.pop("format", None)
        if version is None or version.shape != () or version.dtype.kind not in "iu" or int(version) != FORMAT:
            raise ValueError(f"path: expected format {FORMAT} in {str(source)!r}, got {version}; save it again")
        known = {field.name for field in fields(cls)}
        missing, unknown = sorted(known - set(_OPTIONAL) - set(arrays)), sorted(set(arrays) - known)
        if missing or unknown:
            raise ValueError(
                f"path: {str(source)!r} lacks the fields {missing} and has the unknown fields {unknown}; save it again"
            )
        try:
            texts = {name: _texts(name, arrays.pop(name)) for name in ("names", "prompts", "generators")}
            return cls(**texts, **arrays)
        except ValueError as error:
            raise ValueError(f"{error}; in {str(source)!r}") from error


def _texts(name: str, array: np.ndarray) -> tuple[str, ...]:
    if array.ndim != 1 or array.dtype.kind != "U":
        raise ValueError(f"{name}: expected a list of texts, got {array.dtype} of shape {array.shape}")
    return tuple(array.tolist())


def _check_array(name: str, array: np.ndarray, count: int) -> None:
    if name == "wrong_prompt_correspondence":
        if array.ndim != 2 or array.shape[0] != count or array.shape[1] == 0:
            raise ValueError(f"{name}: expected shape ({count}, K) with K of at least 1, got {array.shape}")
    elif array.shape != (count,):
        raise ValueError(f"{name}: expected shape ({count},), one number an image, got {array.shape}")
    kinds, expected = ("iu", "integers") if name == "folds" else ("fiu", "numbers")
    if array.dtype.kind not in kinds:
        raise ValueError(f"{name}: expected {expected}, got dtype {array.dtype}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        rows = np.flatnonzero(~np.isfinite(array).reshape(count, -1).all(axis=1))
        raise ValueError(
            f"{name}: expected finite numbers, got NaN or infinite ones in {len(rows)} rows, "
            f"the first {rows[0]}; drop or repair those rows"
        )
