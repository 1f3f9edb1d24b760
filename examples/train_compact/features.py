"""Store once what the frozen towers see: of images that people scored, of spoilt ones, and of the embedded world."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from degradations import DEGRADATIONS, degrade
from torch import Tensor
from tqdm import tqdm

from aigiqa_reward import images as pixels
from aigiqa_reward.models.base import Seen
from aigiqa_reward.models.compact import Compact
from aigiqa_reward.utils.weights import read_weights, write_weights

BATCH = 16


def looking() -> torch.autocast:
    """Convolutions in bfloat16 where the machine computes with it; elsewhere it would take twenty times as long."""
    able = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=able)


@torch.inference_mode()
def store(
    model: Compact, count: int, batch: Callable[[np.ndarray], Tensor], path: Path, *, kept: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What `model` sees of `count` pictures, from `path` if it was computed before; `kept` goes with it."""
    if not path.exists():
        seen: list[Seen] = []
        for rows in tqdm(np.array_split(np.arange(count), -(-count // BATCH)), desc=path.stem, unit="batch"):
            images = batch(rows)
            with looking():
                seen.append({name: tensor.float() for name, tensor in model.forward_features(images).items()})
        write_weights(path, kept | {name: torch.cat([part[name] for part in seen]) for name in seen[0]})
    return read_weights(path)


def spoilt(paths: list[Path]) -> tuple[Callable[[np.ndarray], Tensor], dict[str, Tensor]]:
    """Every fourth image spoilt in one way at a random level: how to get a batch, and which, how and how far."""
    rng = np.random.default_rng(4)
    chosen = np.arange(0, len(paths), 4)
    kinds, levels = rng.permutation(len(chosen)) % len(DEGRADATIONS), rng.uniform(0.1, 1.0, len(chosen))

    def batch(rows: np.ndarray) -> Tensor:
        return torch.stack(
            [
                degrade(
                    pixels.load(paths[chosen[row]]),
                    list(DEGRADATIONS)[kinds[row]],
                    float(levels[row]),
                    torch.Generator().manual_seed(int(row)),
                )
                for row in rows
            ]
        )

    known = {"rows": chosen, "kinds": kinds, "levels": levels.astype(np.float32)}
    return batch, {name: torch.from_numpy(values) for name, values in known.items()}


def clean(paths: list[Path]) -> Callable[[np.ndarray], Tensor]:
    """Images as they are, in batches."""
    return lambda rows: torch.stack([pixels.load(paths[row]) for row in rows])
