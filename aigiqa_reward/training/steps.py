"""Parts of a training step: the rate, the crops, what must not be trained, and the figure in the progress bar."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from aigiqa_reward.evaluation import srcc
from aigiqa_reward.evaluation.correlation import MIN_ROWS
from aigiqa_reward.models.base import TrainedModel
from aigiqa_reward.training.recipes import Recipe
from aigiqa_reward.training.tasks import ScoreTask, Task
from aigiqa_reward.types import PromptFeatures


class RunningSRCC:
    """SRCC of quality over the last 30 steps of an epoch, for the progress bar."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.parts: list[tuple[np.ndarray, np.ndarray]] = []
        self.srcc = "-"

    def add(self, quality: Tensor, examples: np.ndarray) -> None:
        """Take in one step's scores."""
        if not isinstance(self.task, ScoreTask):
            return
        self.parts.append((quality.detach().float().cpu().numpy(), self.task.targets[examples, 0]))
        if len(self.parts) % 10 == 0:
            predicted, target = (np.concatenate(part) for part in zip(*self.parts[-30:], strict=True))
            known = np.isfinite(target)
            self.srcc = f"{srcc(predicted[known], target[known]):.3f}" if known.sum() >= MIN_ROWS else "-"


class WeightAverage:
    """A moving average of the trained weights (Polyak averaging), young at first so that it forgets where they began.

    Args:
        model: whose trained parameters to follow.
        decay: a step; 0 follows nothing.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        trained = model.named_parameters() if decay else ()
        self.weights = {name: p.detach().clone() for name, p in trained if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after a step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, parameter in model.named_parameters():
            if name in self.weights:
                self.weights[name].lerp_(parameter.detach(), 1 - decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model with the average in place of its weights."""
        own = {name: p.detach().clone() for name, p in model.named_parameters() if name in self.weights}
        model.load_state_dict(self.weights, strict=False)
        try:
            yield
        finally:
            model.load_state_dict(own, strict=False)


def some_rows(rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    """At most `count` distinct rows, drawn from `seed`, ascending."""
    distinct = np.unique(rows)
    return np.sort(np.random.default_rng(seed).choice(distinct, min(len(distinct), count), replace=False))


def prompts_of(prompts: PromptFeatures | None, rows: np.ndarray) -> np.ndarray | None:
    """Numbers of the prompts that these rows have, ascending.

    Wrong prompts are drawn from those of the training part: what is held out must not be seen, not even as text.
    """
    return None if prompts is None else np.unique(prompts.index.cpu().numpy()[rows])


def other_prompts(index: Tensor, allowed: np.ndarray, rng: np.random.Generator) -> Tensor:
    """For each row a prompt that is not its own, of those `allowed`: the training part's, at least two."""
    own = index.cpu().numpy()
    place = np.searchsorted(allowed, own)  # every row's own prompt is among them
    shift = rng.integers(1, len(allowed), size=len(own))
    return torch.from_numpy(allowed[(place + shift) % len(allowed)]).to(index.device)


def choose_weights(model: TrainedModel, *, towers: bool) -> None:
    """Train the head, and the towers if wanted, but for CLIP's temperature, which stays as it was trained.

    Raises:
        ValueError: a head without weights on towers that stay frozen.
    """
    for name, parameter in model.named_parameters():
        frozen = name.endswith("logit_scale")
        parameter.requires_grad_(name.startswith("head.") or (towers and not frozen))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"train_towers: this {model.name} has no weights of its own, so with frozen towers there is nothing to "
            "train; train the towers, or for tsp_mgs give it an adapter_rank above 0"
        )


def freeze_statistics(model: nn.Module) -> None:
    """Batch norms keep their statistics: a score must not depend on what else is in a batch."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def finite(loss: Tensor, recipe: Recipe, epoch: int) -> float:
    """The loss as a number.

    Raises:
        ValueError: it is NaN or infinite.
    """
    if not math.isfinite(value := float(loss.detach())):
        raise ValueError(
            f"learning_rate: the loss became {value} in epoch {epoch}; lower learning_rate ({recipe.learning_rate:g}) "
            f"or clip_norm ({recipe.clip_norm:g})"
        )
    return value


def rate(recipe: Recipe, epochs: float) -> float:
    """The learning rate after this many epochs, as a share of the highest."""
    if epochs < recipe.warmup_epochs:
        return (epochs + 1e-3) / recipe.warmup_epochs
    if recipe.schedule == "constant":
        return 1.0
    if recipe.schedule == "step":
        return recipe.step_factor ** int((epochs - recipe.warmup_epochs) / recipe.step_epochs)
    span = max(recipe.epochs - recipe.warmup_epochs, 1e-9)
    return (1 + math.cos(math.pi * (epochs - recipe.warmup_epochs) / span)) / 2
