"""A reward as a torchmetrics metric: its mean over a data set, also across processes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from aigiqa_reward.images import ImageSource
from aigiqa_reward.rewards.scorer import Scorer
from aigiqa_reward.types import RewardFunction
from aigiqa_reward.utils.checks import how_to_install

try:
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError(f"RewardMetric needs torchmetrics; {how_to_install('metrics')}") from error


class RewardMetric(Metric):
    """Mean score of a reward over all images seen, as a `torchmetrics.Metric`.

    Args:
        reward: a Reward or any RewardFunction; it stays on its device.
        aspect: "total", "quality" or "correspondence".
        batch_size: images scored at a time.

    Example:
        >>> import torch
        >>> from aigiqa_reward import RewardMetric
        >>> metric = RewardMetric(lambda images, prompts: images.mean(dim=(1, 2, 3)))
        >>> metric.update(torch.zeros(2, 3, 64, 64), ["a black square"] * 2)
        >>> metric.update(torch.ones(1, 3, 64, 64), ["a white square"])
        >>> metric.compute()
        tensor(0.3333)
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    score_sum: Tensor
    count: Tensor

    def __init__(self, reward: RewardFunction, aspect: str = "total", *, batch_size: int = 32) -> None:
        super().__init__()
        if aspect not in ("total", "quality", "correspondence"):
            raise ValueError(f"aspect: expected one of total, quality, correspondence, got {aspect!r}")
        self.aspect = aspect
        self._scorer = Scorer(reward, batch_size)  # no submodule: a metric's checkpoint holds no weights
        self.add_state("score_sum", torch.tensor(0.0, dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(
        self, images: Sequence[ImageSource] | Tensor | np.ndarray, prompts: Sequence[str] | str | None = None
    ) -> None:
        """Add images and their prompts, in any form that `Scorer.score` takes."""
        scores = getattr(self._scorer.score(images, prompts), self.aspect)
        if scores is None:
            raise ValueError(f"aspect: the reward gives no {self.aspect} here; pass prompts, or choose another aspect")
        self.score_sum += scores.sum().to(self.score_sum)
        self.count += len(scores)

    def compute(self) -> Tensor:
        """Return the mean of all scores, NaN without any."""
        return self.score_sum / self.count
