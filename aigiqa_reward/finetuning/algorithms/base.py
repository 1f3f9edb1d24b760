"""What a fine-tuning algorithm is to the loop: losses of a batch. Everything else is the loop's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

if TYPE_CHECKING:
    from aigiqa_reward.finetuning.batch import Batch, Memory, Outcome
    from aigiqa_reward.finetuning.config import FinetuneConfig
    from aigiqa_reward.finetuning.context import TrainingContext


class Algorithm(ABC):
    """One way to fine-tune by reward: a frozen dataclass of its settings, with the maths as methods.

    Attributes:
        name: as the command line calls it.
        reward_gradient: whether the reward has to give gradients in the images.
        learning_rate: default.
        kl_coeff: likewise.
    """

    name: ClassVar[str]
    reward_gradient: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-4
    kl_coeff: ClassVar[float] = 0.01

    @property
    def steps_per_round(self) -> int:
        """Steps of the optimizer on the same rows; `prepare` runs at the first of them."""
        return 1

    def round_of(self, step: int) -> int:
        """The round that a step belongs to; all steps of a round have the same rows."""
        return step // self.steps_per_round

    @property
    def rows_per_prompt(self) -> int:
        """How many rows in a row of a step's batch have the same prompt."""
        return 1

    @property
    def examples(self) -> Sequence[str] | None:
        """Prompts of the algorithm's own examples, which then take the place of the training's; None has none."""
        return None

    def settings(self) -> dict[str, Any]:
        """Everything that decides its outcome, by name, so that a checkpoint of other settings is recognized."""
        named = [entry.name for entry in fields(cast(Any, self)) if entry.init]
        return {f"{self.name}.{name}": getattr(self, name) for name in named}

    def check(self, tools: TrainingContext, prompts: Sequence[str]) -> None:
        """Refuse what this algorithm cannot train.

        Args:
            tools: the pipeline's parts, the reward, the processes.
            prompts: to train on.

        Raises:
            ValueError: a scheduler, a reward or settings that it cannot serve.
        """
        if self.reward_gradient:
            tools.try_gradient(prompts[0])
        del tools, prompts

    def ready(
        self, tools: TrainingContext, prompts: Sequence[str], folder: Path, settings: FinetuneConfig, *, progress: bool
    ) -> Algorithm:
        """What trains: this, or the same with the examples that it made first.

        Runs once before everything else, while the adapter changes nothing yet.

        Args:
            tools: the pipeline's parts, the reward, the processes.
            prompts: to train on.
            folder: of the training; what is made there is found again by a training that goes on.
            settings: of the training.
            progress: show a bar.
        """
        del tools, prompts, folder, settings, progress
        return self

    def prepare(self, tools: TrainingContext, batches: Sequence[Batch]) -> Memory:
        """What all parts of a round's batch need before the first loss; runs without gradients.

        Args:
            tools: the pipeline's parts, the reward, the processes.
            batches: this process's parts. Its results must hold them all, in this order.
        """
        del tools, batches
        return {}

    @abstractmethod
    def losses(self, tools: TrainingContext, batch: Batch, part: int, memory: Memory) -> Iterator[Outcome]:
        """Losses of one part, one after the other; the loop goes backward through each before it asks for the next.

        Args:
            tools: the pipeline's parts, the reward, the processes.
            batch: the rows.
            part: place of the batch among this process's parts.
            memory: of `prepare`.
        """
