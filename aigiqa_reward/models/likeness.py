"""Scores by likeness to known images: the mean of a Gaussian process, in principal directions of what towers see."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from aigiqa_reward.models.base import FullPrecision

ASPECTS = 2
"""Quality and correspondence; after them come the log of quality's variance and what tells the embedded world."""

OUTPUTS = ASPECTS + 2


class Likeness(FullPrecision):
    """Principal directions u of the statistics x, and from likeness to centres to raw scores; fitted in closed form.

    Args:
        columns: of x.
        directions: of u.
        centres: how many.
        guards: directions in which images hardly differ, but move far when pixels are pushed to raise a score.
    """

    def __init__(self, columns: int, directions: int, centres: int, guards: int) -> None:
        super().__init__()
        for name, shape in (
            ("mean", (columns,)),
            ("basis", (directions, columns)),
            ("centres", (centres, directions)),
            ("weights", (OUTPUTS, centres)),
            ("bias", (OUTPUTS,)),
            ("guard", (guards, columns)),
            ("guard_bias", (guards,)),
        ):
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("deviation", torch.ones(columns))
        self.register_buffer("thresholds", torch.ones(2))
        self.register_buffer("guard_limits", torch.ones(2))
        self.mean: Tensor
        self.deviation: Tensor
        self.basis: Tensor
        self.centres: Tensor
        self.weights: Tensor
        self.bias: Tensor
        self.thresholds: Tensor
        self.guard: Tensor
        self.guard_bias: Tensor
        self.guard_limits: Tensor

    def project(self, statistics: Float[Tensor, "batch columns"]) -> Float[Tensor, "batch directions"]:
        """U of x."""
        return ((statistics - self.mean) / self.deviation) @ self.basis.T

    def forward(self, directions: Float[Tensor, "batch directions"]) -> Float[Tensor, "batch outputs"]:
        """Quality, correspondence from the image alone, log variance of quality, and g; raw."""
        squares = directions.square().sum(dim=1, keepdim=True) + self.centres.square().sum(dim=1)
        likeness = torch.exp(2 * directions @ self.centres.T - squares)
        return likeness @ self.weights.T + self.bias

    def distances(self, statistics: Float[Tensor, "batch columns"]) -> Float[Tensor, "batch two"]:
        """How far x is from the images that people scored: in all columns, and outside the principal directions.

        Root mean squares in the deviations of those images.
        """
        standard = (statistics - self.mean) / self.deviation
        within = standard @ (self.basis / self.basis.norm(dim=1, keepdim=True)).T
        whole = standard.square().sum(dim=1)
        outside = (whole - within.square().sum(dim=1)).clamp_min(0)
        return (torch.stack([whole, outside], dim=1) / statistics.shape[1] + 1e-12).sqrt()

    def strangeness(self, statistics: Float[Tensor, "batch columns"]) -> Float[Tensor, " batch"]:
        """The larger of both distances over its threshold: above 1, x is unlike the images that people scored."""
        return (self.distances(statistics) / self.thresholds).amax(dim=1)

    def pushed(self, statistics: Float[Tensor, "batch columns"]) -> Float[Tensor, " batch"]:
        """Root mean square of x along the guarded directions, in deviations of the images that they were fitted to."""
        standard = (statistics - self.mean) / self.deviation
        return ((standard @ self.guard.T + self.guard_bias).square().mean(dim=1) + 1e-12).sqrt()

    def trust(self, statistics: Float[Tensor, "batch columns"]) -> Float[Tensor, " batch"]:
        """1 up to the first limit of `pushed`, one half a second limit beyond it.

        It falls like 1 / (1 + e^2) with the excess e, so that far away there is still a gradient that leads back.
        """
        excess = ((self.pushed(statistics) - self.guard_limits[0]) / self.guard_limits[1]).clamp_min(0)
        return 1 / (1 + excess.square())
