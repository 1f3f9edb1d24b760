"""Read what the compact reward is trained on, and the options that say where it is.

- AGIQA-3K: `data.csv` and `images/`, as `aigiqa_reward.datasets.read_agiqa3k` reads them.
- BIQ2021: a clone of the public git repository nisarahmedrana/BIQ2021 on GitHub, with `Images/` and the two tables
  `Train (Images and MOS).csv` and `Test (Images and MOS).csv`, of 10,000 and 2,000 photographs. The repository has no
  license file: 8,000 of the photographs come from Unsplash, 4,000 are the authors' own, and the paper (Ahmed and Asif,
  Journal of Electronic Imaging, 2022) calls the database freely available.
- Flickr8k (Hodosh et al. 2013): `images/` and `captions.csv` with the columns image, split and caption, a row per
  caption. Rows whose split is `train` are used.
- VISOR (Gokhale et al. 2022, repository microsoft/VISOR): `images/` and `prompts.csv` with the columns image, prompt.

The emoji world's pictures come with the package.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aigiqa_reward.datasets import ScoredImages, group_folds, read_agiqa3k
from aigiqa_reward.datasets.base import Row, find_table, read_csv, refuse_absent

FOLDS = 5
"""Number of folds of AGIQA-3K's prompts."""

OPTIONAL = {"biq2021": "BIQ2021", "flickr8k": "Flickr8k", "visor": "VISOR"}
"""Data sets that a training can do without."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Folders of the data sets, None for one that is left out, and what is left out of AGIQA-3K.

    Attributes:
        agiqa3k, biq2021, flickr8k, visor: the folders.
        held_out: fold of AGIQA-3K's prompts that is not trained on; the last scalars are fitted to it.
        leave_out: generator of AGIQA-3K whose images the quality training does not see, in all of its variants.
    """

    agiqa3k: Path
    biq2021: Path | None = None
    flickr8k: Path | None = None
    visor: Path | None = None
    held_out: int = 0
    leave_out: str | None = None

    def describe(self) -> dict[str, Any]:
        """Return what decides a training's result, without the folders' names."""
        used = [name for name in OPTIONAL if getattr(self, name) is not None]
        return {"data": ", ".join(["agiqa3k", *used]), "held_out": self.held_out, "leave_out": self.leave_out}

    @property
    def complete(self) -> bool:
        """Whether these are the sources of the weights that ship."""
        folders = (self.biq2021, self.flickr8k, self.visor)
        return None not in folders and self.held_out == 0 and self.leave_out is None

    def images(self) -> ScoredImages:
        """Read AGIQA-3K."""
        return read_agiqa3k(self.agiqa3k)

    def is_trained(self, images: ScoredImages) -> np.ndarray:
        """Return which images of AGIQA-3K (N,) have a prompt that is trained on."""
        return group_folds(images.prompts, FOLDS, seed=0) != self.held_out

    def is_left_out(self, images: ScoredImages) -> np.ndarray:
        """Return which images of AGIQA-3K (N,) the generator made that is left out."""
        families = np.array([name.split("_")[0] for name in images.generators])
        if self.leave_out is not None and self.leave_out not in families:
            known = ", ".join(sorted(set(families.tolist())))
            raise ValueError(f"leave_out: expected a generator of {known}, got {self.leave_out!r}")
        return families == self.leave_out


@dataclass(frozen=True, kw_only=True)
class Photographs:
    """N photographs of BIQ2021 and their mean opinion scores (N,) from 0 to 1."""

    paths: tuple[Path, ...]
    scores: np.ndarray


def read_biq2021(folder: Path, part: str = "Train") -> Photographs:
    """Read one of the two tables, "Train" or "Test"; no image is opened."""
    name = f"{part} (Images and MOS).csv"
    what = "a clone of the repository nisarahmedrana/BIQ2021, with Images/ and two tables,"
    rows = read_csv(find_table(folder, name, what), ("Image Name", "MOS"))
    images = folder / "Images"
    found = {path.name.lower(): path for path in images.iterdir()} if images.is_dir() else {}
    names = [row["Image Name"] for row in rows]  # one of them ends in .jpg, and its file in .JPG
    paths = tuple(found.get(name.lower(), images / name) for name in names)
    refuse_absent(paths, name, argument="biq2021", remedy="clone the whole repository")
    return Photographs(paths=paths, scores=np.array([row.number("MOS") for row in rows], np.float32))


def read_flickr8k(folder: Path) -> dict[Path, list[str]]:
    """Read the captions of each training photograph."""
    table = find_table(folder, "captions.csv", "Flickr8k's captions.csv (image, split, caption) and images/")
    rows = [row for row in read_csv(table, ("image", "split", "caption")) if row["split"] == "train"]
    captions: dict[Path, list[str]] = {}
    for row, path in zip(rows, _paths(rows, folder, "flickr8k"), strict=True):
        captions.setdefault(path, []).append(row["caption"])
    return captions


def read_visor(folder: Path) -> dict[Path, str]:
    """Read the prompt of each image."""
    table = find_table(folder, "prompts.csv", "VISOR's prompts.csv (image, prompt) and images/")
    rows = read_csv(table, ("image", "prompt"))
    return dict(zip(_paths(rows, folder, "visor"), (row["prompt"] for row in rows), strict=True))


def _paths(rows: Sequence[Row], folder: Path, argument: str) -> list[Path]:
    paths = [folder / "images" / row["image"] for row in rows]
    listed_by = rows[0].table.name if rows else "the table"
    refuse_absent(list(dict.fromkeys(paths)), listed_by, argument=argument, remedy="put the images there")
    return paths


def digest(values: Any) -> str:
    """Return a short hash of JSON values, for the name of a file that is computed from them."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]


def read_options(description: str | None) -> tuple[Sources, Path]:
    """Read the command line: the sources, and the folder for checkpoints and features."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agiqa3k", type=Path, required=True, metavar="DIR", help="folder of AGIQA-3K")
    for name, title in OPTIONAL.items():
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", help=f"folder of {title}")
    parser.add_argument("--runs", type=Path, required=True, metavar="DIR", help="folder for checkpoints and features")
    parser.add_argument("--held-out", type=int, choices=range(FOLDS), default=0, help="fold of prompts to leave out")
    parser.add_argument("--leave-out", metavar="GENERATOR", help="generator that the quality training does not see")
    parser.add_argument("--without", nargs="+", choices=OPTIONAL, default=[], help="data sets to train without")
    arguments = parser.parse_args()
    folders = {name: None if name in arguments.without else getattr(arguments, name) for name in OPTIONAL}
    if absent := [name for name, folder in folders.items() if folder is None and name not in arguments.without]:
        parser.error(f"--{absent[0]}: expected the folder of {OPTIONAL[absent[0]]}, or --without {absent[0]}")
    sources = Sources(agiqa3k=arguments.agiqa3k, held_out=arguments.held_out, leave_out=arguments.leave_out, **folders)
    return sources, arguments.runs
