"""Losses that fit predicted scores to human ones. The sign flips here and nowhere else: lower is better."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


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
