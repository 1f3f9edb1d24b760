"""Tasks that a model is fitted to: human scores of images, or which of two images people preferred."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from aigiqa_reward.datasets import PreferencePairs, ScoredImages
from aigiqa_reward.evaluation import srcc
from aigiqa_reward.evaluation.metrics import MIN_ROWS, correlations
from aigiqa_reward.training.recipes import POINTWISE, Recipe


def pairwise_margin_loss(
    predicted: Float[Tensor, " batch"], target: Float[Tensor, " batch"], *, margin: float = 0.1
) -> Float[Tensor, ""]:
    """Average relu(-sign(y_i - y_j) (p_i - p_j) + margin) over the pairs with different targets (MST-CLIPIQA).

    0 if all targets are equal.
    """
    order = torch.sign(target[:, None] - target[None])
    wrong = F.relu(margin - order * (predicted[:, None] - predicted[None]))
    return (wrong * order.abs()).sum() / order.abs().sum().clamp_min(1)


def preference_loss(
    better: Float[Tensor, " pairs"], worse: Float[Tensor, " pairs"], *, temperature: float = 1.0
) -> Float[Tensor, ""]:
    """Average -log sigmoid((Q1 - Q2) / tau) over pairs of which people preferred the first (CPA-IQA; Bradley-Terry)."""
    return F.softplus((worse - better) / temperature).mean()


def pairwise_preference_loss(
    predicted: Float[Tensor, " batch"], target: Float[Tensor, " batch"], *, temperature: float = 1.0
) -> Float[Tensor, ""]:
    """Apply `preference_loss` to every pair of a batch whose targets differ; 0 if all are equal."""
    first, second = torch.nonzero(target[:, None] > target[None], as_tuple=True)
    loss = preference_loss(predicted[first], predicted[second], temperature=temperature)
    return loss if len(first) else predicted.sum() * 0


Scores: TypeAlias = tuple[Tensor, Tensor | None]
"""Quality (B,) and correspondence (B,), or None where a model has none."""

_Values = TypeVar("_Values", Tensor, np.ndarray)


@dataclass
class ScoreTask:
    """Mean opinion scores, as shares of the best one in the training part.

    Attributes:
        images: images with their scores.
        targets: (N, 2) quality and correspondence on the models' scale; NaN where people gave none.
    """

    images: ScoredImages
    targets: np.ndarray

    @classmethod
    def of(cls, images: ScoredImages, train: np.ndarray) -> ScoreTask:
        """Divide scores by their maximum on the rows of the training part, so that 1 is the best human score there."""
        raw = np.stack([images.quality, images.correspondence], axis=1)
        highest = np.array([np.nanmax(column[train]) if np.isfinite(column[train]).any() else 1.0 for column in raw.T])
        for aspect, best in zip(("quality", "correspondence"), highest, strict=True):
            if best <= 0:
                expected = "a best training score above 0"
                raise ValueError(
                    f"{aspect}: expected {expected}, got {best:g}; shift the scores so that the worst is 0"
                )
        return cls(images, raw / highest)

    def __post_init__(self) -> None:
        self.paths, self.prompts = list(self.images.paths), list(self.images.prompts)

    def means(self, examples: np.ndarray) -> tuple[float, float]:
        """Return mean quality and correspondence of these images; 0.5 where people gave none."""
        columns = (column[np.isfinite(column)] for column in self.targets[examples].T)
        quality, correspondence = (float(column.mean()) if len(column) else 0.5 for column in columns)
        return quality, correspondence

    def rows(self, examples: np.ndarray) -> np.ndarray:
        """Return the images of examples, which are the same."""
        return examples

    def usable(self, examples: np.ndarray, readable: np.ndarray) -> np.ndarray:
        """Return the examples whose image is readable."""
        return examples[readable[examples]]

    def check_validation(self, examples: np.ndarray) -> None:
        """Refuse too few scored images for a rank correlation."""
        scored = int(np.isfinite(self.targets[examples]).sum(axis=0).max(initial=0))
        if scored < MIN_ROWS:
            expected = f"at least {MIN_ROWS} scored images to choose the epoch by"
            raise ValueError(f"validation: expected {expected}, got {scored}; give more images")

    def loss(self, scores: Scores, examples: np.ndarray, recipe: Recipe) -> Tensor:
        """Sum the recipe's losses of the aspects that people scored."""
        total = scores[0].sum() * 0
        for predicted, column in zip(scores, self.targets.T, strict=True):
            target = torch.as_tensor(column[examples], dtype=torch.float32)
            known = torch.isfinite(target)
            if predicted is not None and known.any():
                total = total + _score_loss(predicted[known.to(predicted.device)], target[known].to(predicted), recipe)
        return total

    def measure(
        self, quality: np.ndarray, correspondence: np.ndarray | None, examples: np.ndarray, monitor: str
    ) -> float:
        """Average SRCC, or SRCC + PLCC, over the aspects."""
        values = []
        for predicted, column in zip((quality, correspondence), self.targets.T, strict=True):
            known = np.isfinite(column[examples])
            if predicted is not None and known.sum() >= MIN_ROWS:
                x, y = predicted[known], column[examples][known]
                agreement = correlations(x, y).plcc if monitor == "srcc+plcc" else 0.0
                values.append(np.nan_to_num(srcc(x, y) + agreement, nan=-1.0))
        if not values:
            raise ValueError(f"validation: expected at least {MIN_ROWS} scored images, got {len(examples)}")
        return float(np.mean(values))


def _score_loss(predicted: Tensor, target: Tensor, recipe: Recipe) -> Tensor:
    if recipe.loss == "pairwise":
        loss = pairwise_preference_loss(predicted, target, temperature=recipe.temperature)
    elif recipe.loss == "none":
        loss = predicted.sum() * 0
    else:
        loss = POINTWISE[recipe.loss](predicted, target)
    if recipe.rank_weight:
        loss = loss + recipe.rank_weight * pairwise_margin_loss(predicted, target, margin=recipe.margin)
    return loss


@dataclass
class PairTask:
    """Preferences between two images of one prompt, explained by the mean of quality and correspondence."""

    pairs: PreferencePairs

    def __post_init__(self) -> None:
        sides = [list(zip(side, self.pairs.prompts, strict=True)) for side in (self.pairs.better, self.pairs.worse)]
        place = {shown: row for row, shown in enumerate(sorted({*sides[0], *sides[1]}))}  # an image with each prompt
        self.paths, self.prompts = [path for path, _ in place], [prompt for _, prompt in place]
        self._better, self._worse = (np.array([place[shown] for shown in side]) for side in sides)

    def rows(self, examples: np.ndarray) -> np.ndarray:
        """Return the preferred images of the pairs, then the others."""
        return np.concatenate([self._better[examples], self._worse[examples]])

    def usable(self, examples: np.ndarray, readable: np.ndarray) -> np.ndarray:
        """Return the pairs whose images are both readable."""
        return examples[readable[self._better[examples]] & readable[self._worse[examples]]]

    def check_validation(self, examples: np.ndarray) -> None:
        """Accept any number of pairs."""
        del examples

    def loss(self, scores: Scores, examples: np.ndarray, recipe: Recipe) -> Tensor:
        """Apply `preference_loss`, whatever the recipe's loss for scores is."""
        better, worse = _total(*scores).chunk(2)
        return preference_loss(better, worse, temperature=recipe.temperature)

    def measure(
        self, quality: np.ndarray, correspondence: np.ndarray | None, examples: np.ndarray, monitor: str
    ) -> float:
        """Return the share of the pairs in which the preferred image scores higher."""
        del examples, monitor
        better, worse = np.split(_total(quality, correspondence), 2)
        return float(np.mean(better > worse))


def _total(quality: _Values, correspondence: _Values | None) -> _Values:
    return quality if correspondence is None else (quality + correspondence) / 2


Task: TypeAlias = ScoreTask | PairTask
