"""Reader of AIGCIQA2023.

Source: J. Wang et al., "AIGCIQA2023: A Large-scale Image Quality Assessment Database for AI Generated
Images: from the Perspectives of Quality, Authenticity and Correspondence", 2023, arXiv 2307.00211;
https://github.com/wangjiarui153/AIGCIQA2023.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Literal

import numpy as np

from aigiqa_reward.datasets.base import ScoredImages, find_table, read_sheet, refuse_absent
from aigiqa_reward.utils.io import read_regular

_GENERATORS = ("Controlnet", "DALLE", "Glide", "Lafite", "stable-diffusion", "Unidiffuser")
_PROMPTS, _IMAGES_PER_PROMPT = 100, 4
_COUNT = len(_GENERATORS) * _PROMPTS * _IMAGES_PER_PROMPT
_PROMPT_TABLE = "AIGCIQA2023_Prompts.xlsx"
_ARRAY_BYTES = 1_000_000
"""Largest file of scores; the published ones have 20 kB."""

_NUMBER = {"quality": 1, "authenticity": 2, "correspondence": 3}


def read_aigciqa2023(
    folder: str | os.PathLike[str], *, perspective: Literal["quality", "authenticity"] = "quality"
) -> ScoredImages:
    """Read scores and prompts of the 2,400 images in `Image/allimg/`; none is opened.

    Image 400 m + 4 p + (k - 1) is the k-th of the four that generator m made for prompt p, in the order Controlnet,
    DALLE, Glide, Lafite, stable-diffusion, Unidiffuser. Scores are normalized mean opinion scores of 0 to 100.

    Args:
        folder: folder of `Image/allimg/0.png` to `2399.png`; `DATA/MOS/mosz1.mat` to `mosz3.mat`, key MOSz, (2400, 1);
            in some copies `DATA/STD/SD1.mat` to `SD3.mat`, key SD, the deviations, else NaN; and
            `AIGCIQA2023_Prompts.xlsx` from the benchmark's repository: 100 rows, no header, prompts in column 3.
        perspective: score that fills `quality`; read the folder twice to have both.

    Example:
        >>> import pandas
        >>> from pathlib import Path
        >>> from scipy.io import savemat
        >>> from aigiqa_reward.datasets import read_aigciqa2023
        >>> Path("aigciqa2023/DATA/MOS").mkdir(parents=True)
        >>> Path("aigciqa2023/Image/allimg").mkdir(parents=True)
        >>> for number in range(2400):
        ...     Path(f"aigciqa2023/Image/allimg/{number}.png").touch()
        >>> for number in (1, 2, 3):
        ...     savemat(f"aigciqa2023/DATA/MOS/mosz{number}.mat", {"MOSz": [[50.0]] * 2400})
        >>> prompts = pandas.DataFrame([[i, "", f"prompt {i}"] for i in range(100)])
        >>> prompts.to_excel("aigciqa2023/AIGCIQA2023_Prompts.xlsx", header=False, index=False)
        >>> images = read_aigciqa2023("aigciqa2023")
        >>> len(images), images.generators[400], images.prompts[404]
        (2400, 'DALLE', 'prompt 1')
    """
    if perspective not in ("quality", "authenticity"):
        raise ValueError(f"perspective: expected 'quality' or 'authenticity', got {perspective!r}")
    root = Path(folder)
    prompts = _read_prompts(root)
    names = tuple(f"{image}.png" for image in range(_COUNT))
    paths = tuple(root / "Image" / "allimg" / name for name in names)
    refuse_absent(paths, "the benchmark", argument="folder", remedy="put all the published images there")
    scores = {}
    for field, number in (("quality", _NUMBER[perspective]), ("correspondence", _NUMBER["correspondence"])):
        scores[field] = _read_array(root, f"DATA/MOS/mosz{number}.mat", "MOSz")
        has_std = (root / "DATA" / "STD").is_dir()
        std = _read_array(root, f"DATA/STD/SD{number}.mat", "SD") if has_std else np.full(_COUNT, np.nan)
        scores[f"{field}_std"] = std
    return ScoredImages(
        names=names,
        paths=paths,
        prompts=tuple(prompt for _ in _GENERATORS for prompt in prompts for _ in range(_IMAGES_PER_PROMPT)),
        generators=tuple(generator for generator in _GENERATORS for _ in range(_PROMPTS * _IMAGES_PER_PROMPT)),
        **scores,
    )


def _read_prompts(root: Path) -> list[str]:
    remedy = "; take it from github.com/wangjiarui153/AIGCIQA2023"
    table = find_table(root, _PROMPT_TABLE, f"AIGCIQA2023's {_PROMPT_TABLE}, DATA/ and Image/", remedy)
    rows = read_sheet(table)
    if len(rows) != _PROMPTS or len(rows[0]) < 3:
        raise ValueError(
            f"{table}: expected {_PROMPTS} rows of at least 3 columns, the third the prompt, and no header, got "
            f"{len(rows)} rows of {len(rows[0]) if rows else 0}"
        )
    prompts = [cells[2] for cells in rows]
    for line, prompt in enumerate(prompts, start=1):
        if not prompt.strip() or prompt in prompts[: line - 1]:
            raise ValueError(f"{table}, line {line}: expected a new prompt in the third column, got {prompt!r}")
    return prompts


def _read_array(root: Path, name: str, key: str) -> np.ndarray:
    """Read the (2400,) float64 numbers of a MATLAB file."""
    from scipy.io import loadmat

    file = find_table(root, name, "AIGCIQA2023's DATA/ and Image/")
    try:
        content = loadmat(io.BytesIO(read_regular(file, most=_ARRAY_BYTES)))
    except Exception as error:  # scipy raises several kinds, NotImplementedError for a newer format among them
        raise ValueError(
            f"{file}: expected a MATLAB file, as published, got {type(error).__name__}: {error}"
        ) from error
    array = content.get(key)
    if not isinstance(array, np.ndarray) or array.shape != (_COUNT, 1) or array.dtype.kind not in "fiu":
        raise ValueError(f"{file}: expected an array {key} of ({_COUNT}, 1) numbers, got {content}"[:500])
    values = array[:, 0].astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError(
            f"{file}: expected finite numbers, got one that is not for image {np.isfinite(values).argmin()}"
        )
    return values
