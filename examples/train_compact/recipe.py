"""Settings of the training, and the loss both parts of it share."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from aigiqa_reward.training.losses import pairwise_margin_loss


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings, chosen here on one fold."""

    epochs: int = 3
    batch_size: int = 24
    tower_lr: float = 2e-4
    head_lr: float = 1e-3
    weight_decay: float = 0.05
    dropout: float = 0.3
    ema: float = 0.99
    margin: float = 0.03
    rank_weight: float = 0.5
    branch_epochs: int = 8
    branch_lr: float = 3e-4
    branch_dropout: float = 0.5
    branch_match_weight: float = 0.03
    mismatch_margin: float = 0.5
    mismatch_weight: float = 0.3
    world_batch: int = 8
    world_weight: float = 0.5
    noun_share: float = 0.42
    colour_share: float = 0.35
    scored_weight: float = 5.0
    place_ridge: float = 0.03
    text_ridge: float = 0.3
    colour_scale: float = 3.0


def score_loss(predicted: Tensor, target: Tensor, recipe: Recipe) -> Tensor:
    """Squared error and order within the batch; human scores scatter by about 0.1 on this scale."""
    return F.mse_loss(predicted, target) + recipe.rank_weight * pairwise_margin_loss(
        predicted, target, margin=recipe.margin
    )
