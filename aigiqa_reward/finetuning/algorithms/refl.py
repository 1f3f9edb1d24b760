"""ReFL: the reward of one late step's clean prediction.

Xu et al. 2023, "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation", algorithm 1: run
without gradients to a random late step t, predict x0 from there with gradients, and take the reward of its image. The
paper's loss on the model's training images, against drifting away, has the distance to the reference in its place here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from aigiqa_reward.finetuning.algorithms.base import Algorithm
from aigiqa_reward.finetuning.algorithms.draft import outcome
from aigiqa_reward.finetuning.batch import Batch, Memory, Outcome
from aigiqa_reward.finetuning.context import TrainingContext
from aigiqa_reward.utils.checks import number


@dataclass(frozen=True, kw_only=True)
class ReFL(Algorithm):
    """Reward feedback learning.

    Example:
        >>> from aigiqa_reward.finetuning import ReFL
        >>> ReFL(earliest=0.5).name
        'refl'
    """

    name: ClassVar[str] = "refl"
    reward_gradient: ClassVar[bool] = True

    earliest: float = field(
        default=0.75, metadata={"help": "Share of the sampling steps, in [0, 1), before which no step is judged."}
    )

    def __post_init__(self) -> None:
        number("earliest", self.earliest, "in [0, 1), a share of the steps", lambda value: 0 <= value < 1)

    def chosen(self, batch: Batch, steps: int) -> int:
        """The step, from 0, whose prediction is judged; of the last, where rounding leaves none."""
        first = min(int(self.earliest * steps), steps - 1)
        return int(batch.numbers("late step").integers(first, steps))

    def losses(self, tools: TrainingContext, batch: Batch, part: int, memory: Memory) -> Iterator[Outcome]:
        """One loss."""
        del part, memory
        state = tools.start(batch)
        with torch.no_grad():
            state = tools.rollout.run(state, until=self.chosen(batch, state.steps))
        prediction = tools.predict(state, alone=True)
        far = tools.distance(state, prediction) if tools.penalty else state.latents.new_zeros(len(state))
        yield outcome(tools, batch, tools.decode(prediction.clean.to(state.latents.dtype)), far)
