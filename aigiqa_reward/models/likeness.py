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
    """

    def __init__(self, columns: int, directions: int, centres: int) -> None:
        super().__init__()
        for name, shape in (
            ("mean", (columns,)),
            ("basis", (directions, columns)),
            ("centres", (centres, directions)),
            ("weights", (OUTPUTS, centres)),
            ("bias", (OUTPUTS,)),
        ):
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("deviation", torch.ones(columns))
        self.register_buffer("thresholds", torch.ones(2))
        self.mean: Tensor
        self.deviation: Tensor
        self.basis: Tensor
        self.centres: Tensor
        self.weights: Tensor
        self.bias: Tensor
        self.thresholds: Tensor

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
