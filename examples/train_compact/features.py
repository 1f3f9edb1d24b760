"""Store once what the frozen first stages of EfficientNet-Lite0 see of every image; training then starts from there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from aigiqa_reward import images as pixels
from aigiqa_reward.datasets import ScoredImages
from aigiqa_reward.encoders.compact import CompactImageTower
from aigiqa_reward.encoders.timm import TimmEncoder
from aigiqa_reward.models.blocks import colour_histogram
from aigiqa_reward.models.compact import COLOURS, CompactConfig
from aigiqa_reward.weights import write_atomically

FROZEN_STAGES = 3
"""Stages of blocks that stay as ImageNet left them, down to stride 8: chosen here, half of the cost of training."""

TRAIN_CROPS = 9
"""Places that training crops come from, on a 3 x 3 grid."""


def stem(encoder: TimmEncoder, images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] to the map after the frozen stages."""
    trunk = encoder.trunk
    features = trunk.bn1(trunk.conv_stem(pixels.normalise(images, encoder.config.mean, encoder.config.std)))
    return trunk.blocks[:FROZEN_STAGES](features)


class Tail(nn.Module):
    """The trained rest of a tower: from the map after the frozen stages to pooled features."""

    def __init__(self, encoder: TimmEncoder) -> None:
        super().__init__()
        trunk = encoder.trunk
        self.blocks, self.conv, self.norm = trunk.blocks[FROZEN_STAGES:], trunk.conv_head, trunk.bn2

    def forward(self, features: Tensor) -> Tensor:
        return self.norm(self.conv(self.blocks(features))).mean(dim=(2, 3))


@dataclass(frozen=True)
class StoredFeatures:
    """Maps and features of N images: whole as it is and mirrored, crops on a grid, and the place among texts."""

    whole: np.ndarray  # (N, 2, C, h, w) float16
    crops: np.ndarray  # (N, 9, C, h', w') float16
    pooled: np.ndarray  # (N, 1280) float32, of the frozen tower
    semantic: np.ndarray  # (N, 384) float32
    colours: np.ndarray  # (N, 125) float32

    @staticmethod
    def maps(array: np.ndarray, rows: np.ndarray, views: np.ndarray) -> Tensor:
        """The chosen view of each row, as a batch."""
        return torch.from_numpy(array[rows, views]).float().contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def store_features(
    images: ScoredImages, encoder: TimmEncoder, tower: CompactImageTower, config: CompactConfig, folder: Path
) -> StoredFeatures:
    """Compute the features into `folder`, going on where an earlier call was interrupted."""
    folder.mkdir(parents=True, exist_ok=True)
    progress = folder / "progress.json"
    done = json.loads(progress.read_text()) if progress.exists() else 0
    first = pixels.load(images.paths[0])[None]
    shapes = {
        "whole": (2, *stem(encoder, pixels.resize_to_area(first, config.area**2, least=32)).shape[1:]),
        "crops": (TRAIN_CROPS, *stem(encoder, pixels.even_crops(first, config.crop, 1)[0]).shape[1:]),
        "pooled": (tower.width,),
        "semantic": (tower.semantic_width,),
        "colours": (COLOURS**3,),
    }
    arrays = {}
    for name, shape in shapes.items():
        dtype = np.float16 if name in ("whole", "crops") else np.float32
        path, mode = folder / f"{name}.npy", "r+" if done else "w+"
        arrays[name] = np.lib.format.open_memmap(path, mode, dtype, (len(images), *shape) if mode == "w+" else None)
    for start in tqdm(range(done, len(images), 16), desc="features", unit="16 images", disable=done == len(images)):
        rows = slice(start, min(start + 16, len(images)))
        batch = torch.stack([pixels.load(path) for path in images.paths[rows]])
        whole = pixels.resize_to_area(batch, config.area**2, least=32)
        crops = pixels.even_crops(batch, config.crop, TRAIN_CROPS)
        features = tower(whole)
        arrays["whole"][rows] = torch.stack([stem(encoder, whole), stem(encoder, whole.flip(3))], dim=1).numpy()
        arrays["crops"][rows] = stem(encoder, crops.flatten(0, 1)).unflatten(0, crops.shape[:2]).numpy()
        arrays["pooled"][rows], arrays["semantic"][rows] = features.pooled.numpy(), features.semantic.numpy()
        arrays["colours"][rows] = colour_histogram(whole, COLOURS).numpy()
        write_atomically(progress, str(rows.stop).encode())
    return StoredFeatures(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in shapes})
