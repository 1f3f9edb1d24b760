"""Weighted particles: potentials of what a reward said of them, effective sample size, systematic resampling.

Singhal et al. 2025, "A General Framework for Inference-time Scaling and Steering of Diffusion Models".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from aigiqa_reward.sampling.candidates import Preview
from aigiqa_reward.sampling.rollout import State

Potential = Literal["difference", "max", "sum"]

POTENTIALS: tuple[Potential, ...] = ("difference", "max", "sum")


def log_potential(potential: Potential, rewards: Tensor, temperature: float) -> Tensor:
    """Logarithm of the potential of the latest previews (Singhal et al. 2025), lambda = 1 / temperature.

    Args:
        potential: "difference": r_k - r_{k-1}, where r_0 = 0; "max": of r_1, ..., r_k; "sum": of the same.
        rewards: (N, k) of each particle's line of descent, the latest one last; k is at least 1.
        temperature: above 0.

    Returns:
        (N,) to be added to the logarithms of the weights.
    """
    if potential == "difference":
        value = rewards[:, -1] if rewards.shape[1] == 1 else rewards[:, -1] - rewards[:, -2]
    elif potential == "max":
        value = rewards.amax(dim=1)
    else:
        value = rewards.sum(dim=1)
    return value / temperature


def last_log_potential(rewards: Tensor, so_far: Tensor, temperature: float) -> Tensor:
    """Logarithm of the final images' potential: with it, all potentials of a line of descent multiply to exp(r / T).

    Args:
        rewards: (N,) of the final images.
        so_far: (N,) sum of the logarithms of the potentials at the previews.
        temperature: T.
    """
    return rewards / temperature - so_far


def effective_sample_size(weights: Tensor) -> float:
    """Of weights (N,): (sum w)^2 / sum w^2, in [1, N] (Kong et al. 1994)."""
    return float(weights.sum() ** 2 / weights.square().sum())


def systematic_resampling(weights: Tensor, offset: float) -> list[int]:
    """Places of N survivors, ascending; place i comes N w_i times, rounded up or down (Kitagawa 1996).

    Args:
        weights: (N,) at least 0, of any positive sum.
        offset: uniform in [0, 1); the only randomness.
    """
    edges = weights.cumsum(0) / weights.sum()
    points = (offset + torch.arange(len(weights), dtype=weights.dtype)) / len(weights)
    return torch.searchsorted(edges / edges[-1], points, right=True).clamp(max=len(weights) - 1).tolist()


@dataclass(kw_only=True)
class Particles:
    """N particles at one step; row i of everything belongs to place i.

    Attributes:
        state: of N rows, on whose way `clean` (N, ...) is the clean latents that were predicted last.
        generators: (N,) sources of the particles' noise; of a place, not of a line of descent.
        ancestors: (N,) at which place each line of descent began.
        rewards: (N, k) totals of a line's k previews; `previews` in full.
        reasons: (N,) why a particle was dropped, or None.
        log_weights: (N,) float64, not normalised; `log_product` is the sum of a line's potentials' logarithms.
        sizes: (steps taken, effective sample size) at each preview.
    """

    state: State
    clean: Tensor
    generators: list[torch.Generator]
    ancestors: list[int]
    rewards: list[list[float]]
    previews: list[list[Preview]]
    reasons: list[str | None]
    log_weights: Tensor
    log_product: Tensor
    sizes: list[tuple[int, float]] = field(default_factory=list)

    @classmethod
    def of(cls, state: State) -> Particles:
        """At their beginning."""
        count = len(state)
        return cls(
            state=state,
            clean=state.latents,
            generators=list(state.generators),
            ancestors=list(range(count)),
            rewards=[[] for _ in range(count)],
            previews=[[] for _ in range(count)],
            reasons=[None] * count,
            log_weights=torch.zeros(count, dtype=torch.float64),
            log_product=torch.zeros(count, dtype=torch.float64),
        )

    @property
    def alive(self) -> list[int]:
        """Places of those that were not dropped."""
        return [row for row, reason in enumerate(self.reasons) if reason is None]

    def drop(self, row: int, reason: str) -> None:
        """Give a particle no weight."""
        self.reasons[row], self.log_weights[row] = reason, -math.inf

    def weigh(self, log_potentials: Tensor, rows: Sequence[int]) -> None:
        """Multiply the weights at these places by potentials, given by their logarithms."""
        rows = list(rows)
        self.log_weights[rows] += log_potentials
        self.log_product[rows] += log_potentials

    def weights(self) -> Tensor:
        """(N,) of sum 1."""
        return self.log_weights.softmax(dim=0)

    def select(self, rows: list[int]) -> None:
        """Go on with these places. The generators stay where they are, so that copies draw different noise."""
        self.state = replace(self.state, latents=self.state.latents[rows])
        self.clean = self.clean[rows]
        self.ancestors = [self.ancestors[row] for row in rows]
        self.rewards = [list(self.rewards[row]) for row in rows]
        self.previews = [list(self.previews[row]) for row in rows]
        self.reasons = [self.reasons[row] for row in rows]
        self.log_product = self.log_product[rows]
        self.log_weights = torch.zeros_like(self.log_product)

    def noise(self) -> Tensor:
        """(N, ...) standard normal, row i from generator i."""
        shape, kind = self.clean.shape[1:], self.clean.dtype
        drawn = [torch.randn(shape, generator=g, dtype=kind, device=g.device) for g in self.generators]
        return torch.stack(drawn).to(self.clean.device)
