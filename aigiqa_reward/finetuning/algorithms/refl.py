"""ReFL: the reward of the clean prediction x0 of one late step.

Xu et al. 2023, "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation", algorithm 1:
sample without gradients to a random late step t, predict x0 there with gradients, and take the reward of its image. The
KL penalty replaces the paper's loss on images of the model's training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from aigiqa_reward.finetuning.algorithms.base import RewardBackpropagation, setting
from aigiqa_reward.finetuning.batch import Batch, Memory, Outcome
from aigiqa_reward.finetuning.context import TrainingContext
from aigiqa_reward.utils.checks import number


@dataclass(frozen=True, kw_only=True)
class ReFL(RewardBackpropagation):
    """Reward feedback learning.

    Example:
        >>> from aigiqa_reward.finetuning import ReFL
        >>> ReFL(earliest=0.5).name
        'refl'
    """

    name: ClassVar[str] = "refl"
    title: ClassVar[str] = "ReFL"

    earliest: float = setting(0.75, "Share of the sampling steps, in [0, 1), before which no step is judged.")

    def __post_init__(self) -> None:
        super().__post_init__()
        number("earliest", self.earliest, "in [0, 1), a share of the steps", lambda value: 0 <= value < 1)

    def judged_step(self, batch: Batch, steps: int) -> int:
        """Draw the step, from 0, whose prediction is judged; the last one if rounding leaves none."""
        return int(batch.numbers("late step").integers(min(int(self.earliest * steps), steps - 1), steps))

    def losses(self, context: TrainingContext, batch: Batch, part: int, memory: Memory) -> Iterator[Outcome]:
        """Yield one loss."""
        state = context.start(batch)
        with torch.no_grad():
            state = context.rollout.run(state, until=self.judged_step(batch, state.steps))
        prediction = context.predict(state, alone=True)
        kl = context.distance(state, prediction) if context.penalty else state.latents.new_zeros(len(state))
        images = context.decode(prediction.clean.to(state.latents.dtype))
        yield self.loss(context, batch, images, kl)
