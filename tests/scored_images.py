"""Human-scored images in AGIQA-3K's layout, and small towers to see them.

Quality is how sharp an image is, correspondence how much of the color that its prompt names it has.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from aigiqa_reward.datasets import ScoredImages, read_agiqa3k
from aigiqa_reward.encoders.open_clip import OpenCLIPConfig
from aigiqa_reward.rewards.build import build_model

COLORS = {"red": (0.8, 0.15, 0.1), "blue": (0.1, 0.2, 0.8)}
THINGS = ("house", "boat", "tree", "chair", "lamp", "bird", "car", "bridge", "cup", "tower", "clock", "shoe")
GENERATORS = ("one_model", "two_model")
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "mst_clipiqa": (
        "coarse",
        {"coarse_side": 32, "fine_side": 32, "width": 32, "rank": 8, "heads": 2, "hidden": 16, "head_hidden": 32},
    ),
    "tsp_mgs": ("clip", {"crops": 3, "train_crops": 2, "short_side": 40}),
}
"""Of the systems that take a CLIP: the tower's role, and settings that fit the tiny one."""


def write_scored_images(folder: Path, *, prompts: int = 12, images: int = 5, seed: int = 0) -> ScoredImages:
    """Write `prompts` x `images` JPEG files of 40 x 40 px with their scores, and read them back."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    with (folder / "data.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(
            ["name", "prompt", "adj1", "adj2", "style", "mos_quality", "std_quality", "mos_align", "std_align"]
        )
        for place in range(prompts):
            color = tuple(COLORS)[place % 2]
            prompt = f"a {color} {THINGS[place % len(THINGS)]}" + (f" {place}" if place >= len(THINGS) else "")
            for image in range(images):
                name = f"{GENERATORS[rng.integers(2)]}_{place * images + image:03d}.jpg"
                sharp, share = rng.random(2)
                picture(sharp, share, color, rng).save(folder / "images" / name, quality=95, subsampling=0)
                table.writerow([name, prompt, "", "", "", 0.5 + 4 * sharp, 0.3, 0.5 + 4 * share, 0.3])
    return read_agiqa3k(folder)


def picture(sharp: float, share: float, color: str, rng: np.random.Generator) -> Image.Image:
    """Grain on blocks, blurred the more the less `sharp` it is; `share` of it has the color, the rest the other."""
    own, other = np.array(COLORS[color]), np.array(COLORS["blue" if color == "red" else "red"])
    tint = share * own + (1 - share) * other
    grain = rng.standard_normal((40, 40, 1)) * 0.25
    pixels = gaussian_filter(grain, (2.0 * (1 - sharp), 2.0 * (1 - sharp), 0)) + tint
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))


def tiny_tower(clip: Path) -> OpenCLIPConfig:
    return OpenCLIPConfig(architecture=f"local-dir:{clip}")


def tiny_model(name: str, clip: Path, *, seed: int = 0, **settings: Any) -> Any:
    """A system on the tiny CLIP with a fresh head drawn from `seed`."""
    role, small = SMALL[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model(name, towers={role: tiny_tower(clip)}, settings={**small, **settings})
