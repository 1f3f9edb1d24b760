"""Reader of AIGCIQA2023 in its published layout.

Source: J. Wang et al., "AIGCIQA2023: A Large-scale Image Quality Assessment Database for AI Generated Images: from the
Perspectives of Quality, Authenticity and Correspondence", 2023, arXiv 2307.00211;
https://github.com/wangjiarui153/AIGCIQA2023.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import numpy as np

from aigiqa_reward.datasets.base import ScoredImages, find_table, read_sheet, refuse_absent, unpublished

_GENERATORS = ("Controlnet", "DALLE", "Glide", "Lafite", "stable-diffusion", "Unidiffuser")
_PROMPTS = 100
_IMAGES_PER_PROMPT = 4
_COUNT = len(_GENERATORS) * _PROMPTS * _IMAGES_PER_PROMPT
_PROMPT_TABLE = "AIGCIQA2023_Prompts.xlsx"
_ARRAY_BYTES = 1_000_000
"""Largest file of scores: chosen here; 2,400 of them take 20 kB, and a compressed file may unpack to a thousandfold."""

_NUMBER = {"quality": 1, "authenticity": 2, "correspondence": 3}


def read_aigciqa2023(
    folder: str | os.PathLike[str], *, perspective: Literal["quality", "authenticity"] = "quality"
) -> ScoredImages:
    """Read the scores and the prompts, and find the images in `Image/allimg/`; none is opened.

    Image i = 400 m + 4 p + (k - 1) is the k-th of the four that generator m made for prompt p, in the order
    Controlnet, DALLE, Glide, Lafite, stable-diffusion, Unidiffuser (the published `pic-index.xlsx` lists them so).
    Scores stay as published, normalized mean opinion scores on a scale of 0 to 100, of three perspectives: quality,
    authenticity and correspondence.

    Args:
        folder: holds `DATA/MOS/mosz1.mat` to `mosz3.mat`, key MOSz, (2400, 1); `Image/allimg/0.png` to `2399.png`;
            and `AIGCIQA2023_Prompts.xlsx`, which lies beside the archive in the benchmark's repository: 100 rows
            without a header, the prompt in the third column. Where a copy has `DATA/STD/SD1.mat` to `SD3.mat`, key
            SD, they are the deviations between raters; elsewhere those are NaN.
        perspective: which score fills `quality`. `ScoredImages` has one place for what is judged without the
            prompt; read the folder twice to have both.

    Returns:
        The 2,400 images in their published order.

    Raises:
        ImportError: the extra `data` is not installed.
        ValueError: no such perspective; a file or image is missing, or an array or the prompts have another shape.

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
    by_image = [(m, p) for m in range(len(_GENERATORS)) for p in range(_PROMPTS) for _ in range(_IMAGES_PER_PROMPT)]
    names = tuple(f"{image}.png" for image in range(_COUNT))
    paths = tuple(root / "Image" / "allimg" / name for name in names)
    refuse_absent(paths, "the benchmark", remedy="put all the published images there")
    return ScoredImages(
        names=names,
        paths=paths,
        prompts=tuple(prompts[p] for _, p in by_image),
        generators=tuple(_GENERATORS[m] for m, _ in by_image),
        quality=_read_scores(root, perspective),
        quality_std=_read_deviations(root, perspective),
        correspondence=_read_scores(root, "correspondence"),
        correspondence_std=_read_deviations(root, "correspondence"),
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
    lines: dict[str, int] = {}
    for line, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise ValueError(f"{table}, line {line}: expected a prompt in the third column, got a blank cell")
        if prompt in lines:
            raise ValueError(
                f"{table}, line {line}: expected {_PROMPTS} prompts, got that of line {lines[prompt]} again"
            )
        lines[prompt] = line
    return prompts


def _read_scores(root: Path, perspective: str) -> np.ndarray:
    return _read_array(root, f"DATA/MOS/mosz{_NUMBER[perspective]}.mat", "MOSz")


def _read_deviations(root: Path, perspective: str) -> np.ndarray:
    if not (root / "DATA" / "STD").is_dir():
        return unpublished(_COUNT)
    return _read_array(root, f"DATA/STD/SD{_NUMBER[perspective]}.mat", "SD")


def _read_array(root: Path, name: str, key: str) -> np.ndarray:
    """The (2400,) float64 numbers of a MATLAB file."""
    from scipy.io import loadmat, whosmat

    file = find_table(root, name, "AIGCIQA2023's DATA/ and Image/")
    if file.stat().st_size > _ARRAY_BYTES:
        raise ValueError(
            f"{file}: expected at most {_ARRAY_BYTES:,} bytes, got {file.stat().st_size:,}; take the published file"
        )
    try:
        shapes = {name: shape for name, shape, _ in whosmat(file)}  # before what it says it holds is made room for
        content = loadmat(file, variable_names=[key]) if shapes.get(key) == (_COUNT, 1) else shapes
    except Exception as error:  # scipy raises several kinds, NotImplementedError for a newer format among them
        raise ValueError(
            f"{file}: expected a MATLAB file, as published, got {type(error).__name__}: {error}"
        ) from error
    if key not in content:
        found = ", ".join(name for name in content if not name.startswith("__")) or "nothing"
        raise ValueError(f"{file}: expected an array {key}, got {found}; take the published file")
    array = content[key]
    if not isinstance(array, np.ndarray) or array.shape != (_COUNT, 1) or array.dtype.kind not in "fiu":
        found = f"shape {array}" if isinstance(array, tuple) else f"{array.dtype} of shape {array.shape}"
        raise ValueError(f"{file}: expected {key} to hold ({_COUNT}, 1) numbers, got {found}")
    values = array[:, 0].astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise ValueError(f"{file}: expected finite numbers, got {values[bad[0]]} for image {bad[0]}; correct it")
    return values
