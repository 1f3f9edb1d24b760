"""Losses that fit predicted scores to human ones. The sign flips here and nowhere else: lower is better."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

PointwiseLoss: TypeAlias = Callable[[Tensor, Tensor], Tensor]

POINTWISE: dict[str, PointwiseLoss] = {
    "mse": F.mse_loss,
    "mae": F.l1_loss,
    "smooth_l1": F.smooth_l1_loss,
}
"""Losses of each score alone, by name; mean over the batch."""


def pairwise_margin_loss(
    predicted: Float[Tensor, " batch"], target: Float[Tensor, " batch"], *, margin: float = 0.1
) -> Float[Tensor, ""]:
    """Mean over the pairs with different targets of relu(-sign(y_i - y_j) (p_i - p_j) + margin) (MST-CLIPIQA).

    Args:
        predicted: scores, higher is better.
        target: human scores.
        margin: how far apart a pair should be, in units of `predicted`.

    Returns:
        A scalar; 0 if all targets are equal.
    """
    order = torch.sign(target[:, None] - target[None])
    wrong = F.relu(margin - order * (predicted[:, None] - predicted[None]))
    return (wrong * order.abs()).sum() / order.abs().sum().clamp_min(1)


def preference_loss(
    better: Float[Tensor, " pairs"], worse: Float[Tensor, " pairs"], *, temperature: float = 1.0
) -> Float[Tensor, ""]:
    """Mean of -log sigmoid((Q1 - Q2) / tau) over pairs of which people preferred the first (CPA-IQA; Bradley-Terry).

    Args:
        better: scores of the preferred images.
        worse: scores of the others.
        temperature: tau, in units of the scores.
    """
    return F.softplus((worse - better) / temperature).mean()


def pairwise_preference_loss(
    predicted: Float[Tensor, " batch"], target: Float[Tensor, " batch"], *, temperature: float = 1.0
) -> Float[Tensor, ""]:
    """`preference_loss` over every pair of a batch whose targets differ; 0 if all are equal."""
    first, second = torch.nonzero(target[:, None] > target[None], as_tuple=True)
    if len(first) == 0:
        return predicted.sum() * 0
    return preference_loss(predicted[first], predicted[second], temperature=temperature)
