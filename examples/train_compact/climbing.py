"""Climb the reward's own gradient, as far as its guard lets one, and keep what the towers see on the way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from aigiqa_reward import images as pixels
from aigiqa_reward.models.base import Seen
from aigiqa_reward.models.compact import Compact
from aigiqa_reward.types import PromptFeatures
from aigiqa_reward.utils.weights import read_weights, write_weights

STEPS, STEP = 8, 1 / 255
"""Steps of a climb, and the root mean square change per step."""

KEPT = (0, 1, 3, 6, 8)
"""Steps after which the statistics are kept."""

EVADE = 0.85
"""Share of the guard's first limit from which on a climber keeps away from it."""

BATCH = 4


@dataclass(frozen=True, kw_only=True)
class Climber:
    """Somebody who knows the model and its guard, and lifts one of three goals.

    Attributes:
        model: with the head to be deceived.
        paths: of N images.
        prompts: N.
    """

    model: Compact
    paths: list[Path]
    prompts: list[str]

    def goals(self, seen: Seen, text: PromptFeatures, rows: np.ndarray, anywhere: bool) -> Tensor:
        """(B,): quality, correspondence or their mean by the row's number, without the guard but shy of it.

        `anywhere`: every second row follows a random combination of directions instead, since a head that is fitted
        another time has other weights.
        """
        likeness, output = self.model.head.likeness, self.model.forward_head(seen, text, None)
        statistics = self.model.statistics(seen)
        assert output.correspondence is not None
        trust = output.details["trust"].clamp_min(1e-6)
        quality, correspondence = output.quality / trust, output.correspondence / trust
        which = torch.from_numpy(rows % 3)
        goal = torch.where(which == 0, quality, torch.where(which == 1, correspondence, (quality + correspondence) / 2))
        if not anywhere:
            shy = (likeness.pushed(statistics) - EVADE * likeness.guard_limits[0]) / likeness.guard_limits[1]
            return goal - shy.clamp_min(0)
        draws = [
            torch.randn(self.model.config.directions, generator=torch.Generator().manual_seed(int(r))) for r in rows
        ]
        random = (likeness.project(statistics) * torch.stack(draws)).sum(dim=1)
        return torch.where(torch.from_numpy(rows // 3 % 2 == 0), goal, random)

    def climb(self, rows: np.ndarray, anywhere: bool) -> list[Seen]:
        """What is seen of these images after the kept steps."""
        image = torch.stack([pixels.load(self.paths[row]) for row in rows])
        text = self.model.encode_prompts([self.prompts[row] for row in rows])
        kept = []
        for step in range(STEPS + 1):
            leaf = image.clone().requires_grad_()
            seen = self.model.forward_features(leaf)
            goal = self.goals(seen, text, rows, anywhere)
            if step in KEPT:
                kept.append({name: tensor.detach().clone() for name, tensor in seen.items()})
            if step < STEPS:
                (gradient,) = torch.autograd.grad(goal.sum(), leaf)
                size = gradient.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
                image = (image + STEP * gradient / size).clamp(0, 1)
        return kept

    def climb_all(self, rows: np.ndarray, path: Path, *, anywhere: bool) -> dict[str, Tensor]:
        """`rows`, `step`, and what was seen, from `path` if it was computed before."""
        if not path.exists():
            parts = []
            for part in tqdm(np.array_split(rows, -(-len(rows) // BATCH)), desc=path.stem, unit="batch"):
                for step, seen in zip(KEPT, self.climb(part, anywhere), strict=True):
                    parts.append(seen | {"rows": torch.from_numpy(part), "step": torch.full((len(part),), step)})
            write_weights(path, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})
        return read_weights(path)
