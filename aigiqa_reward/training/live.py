"""Features computed at each step, for trainings that change the towers or draw crops anew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from aigiqa_reward import images as pixels
from aigiqa_reward.models.base import TrainedModel
from aigiqa_reward.training.store import Unreadable, asked_prompts


class LiveImages:
    """Images read from disk at each step; what `FeatureStore` reads from disk, its `look` computes.

    Attributes:
        readable: (N,) bool.
        unreadable: the images that are not, and why.
    """

    def __init__(self, paths: Sequence[Path], prompts: Sequence[str], *, progress: bool = True) -> None:
        self.paths, self.prompts = tuple(paths), tuple(prompts)
        self.readable = np.ones(len(paths), dtype=bool)
        problems = []
        for row, path in enumerate(tqdm(paths, desc="check images", unit="image", disable=not progress)):
            try:
                pixels.load(path)
            except pixels.ImageError as error:
                self.readable[row] = False
                problems.append(Unreadable(path, str(error)))
        self.unreadable = tuple(problems)
        if not self.readable.any():
            raise ValueError(f"paths: none of the {len(paths)} images can be read; the first: {problems[0].reason}")

    def __len__(self) -> int:
        """Number of images N."""
        return len(self.paths)

    def look(
        self,
        model: TrainedModel,
        rows: np.ndarray,
        device: torch.device,
        *,
        generator: torch.Generator | None = None,
        crops: int | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """What the model's towers see of these rows, with gradients, and what its assistants say."""
        seen: list[dict[str, Tensor]] = []
        contexts: list[dict[str, Tensor]] = []
        for row in rows:
            image = pixels.load(self.paths[row])[None].to(device)
            seen.append(dict(model.look(image, generator=generator, crops=crops)))
            with torch.no_grad():
                contexts.append(dict(model.prepare(image, asked_prompts([self.prompts[row]])) or {}))
        return _joined(seen), _joined(contexts) or None


def _joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: _stacked([part[name] for part in parts]) for name in parts[0]}


def _stacked(rows: Sequence[Tensor]) -> Tensor:
    """Tensors (1, ...) as one; sequences, which may differ in length, are padded with zeros to the longest."""
    longest = max((row.shape[1] for row in rows if row.ndim > 1), default=0)
    padded = [
        row
        if row.ndim < 2 or row.shape[1] == longest
        else torch.cat([row, row.new_zeros(1, longest - row.shape[1], *row.shape[2:])], dim=1)
        for row in rows
    ]
    return torch.cat(padded)
