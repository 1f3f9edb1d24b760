"""Which prompts a step's batch holds, and which of its rows a process takes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    pass


def seed_of(seed: int, purpose: str, *place: int) -> int:
    """A seed in [0, 2^63) for one purpose at one place, unlike that of any other."""
    text = f"{seed}/{purpose}/{'/'.join(map(str, place))}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator_of(seed: int, purpose: str, *place: int) -> torch.Generator:
    """Torch's randomness, on the CPU."""
    return torch.Generator("cpu").manual_seed(seed_of(seed, purpose, *place))


def numbers_of(seed: int, purpose: str, *place: int) -> np.random.Generator:
    """NumPy's randomness."""
    return np.random.default_rng(seed_of(seed, purpose, *place))


Memory = Mapping[str, Tensor]
"""What an algorithm keeps from one step to the next within a round: named tensors, saved with a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The part of a step's batch that goes through the denoiser at once.

    Attributes:
        prompts: (B,) texts.
        places: (B,) index of each row's prompt in the training's list of prompts, or of the algorithm's examples.
        rows: (B,) their places in the step's whole batch, over all parts and processes.
        round: number of the round that the rows belong to; the step's own, but for algorithms of several steps a round.
        step: number of the optimizer's step, from 0.
        size: rows of the step's whole batch.
        seed: of the training.
    """

    prompts: tuple[str, ...]
    places: tuple[int, ...]
    rows: tuple[int, ...]
    round: int
    step: int
    size: int
    seed: int

    def __len__(self) -> int:
        """Number of rows B."""
        return len(self.rows)

    def generators(self, purpose: str) -> list[torch.Generator]:
        """(B,) one for each row, equal in every step of a round."""
        return [generator_of(self.seed, purpose, self.round, row) for row in self.rows]

    def numbers(self, purpose: str) -> np.random.Generator:
        """One for all rows of the step, equal in all parts and processes."""
        return numbers_of(self.seed, purpose, self.step)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A loss, and what to tell of it.

    Attributes:
        loss: () mean over the rows of a batch. The losses that an algorithm yields for a batch add up.
        measures: named (B,) or () numbers without gradients for progress bar, history and trackers. Means over the
            whole batch are shown; a name that is yielded several times for a batch is averaged too.
    """

    loss: Tensor
    measures: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Prompts in a random order, all of them once before one comes again.

    Attributes:
        prompts: to train on.
        part_size: rows that go through the denoiser at once.
        parts: of each process in a step.
        processes: number of processes.
        rows_per_prompt: rows in a row with the same prompt.
        round_of: the round of a step of the optimizer; all steps of one have the same rows.
        seed: of the order.
    """

    prompts: Sequence[str]
    part_size: int
    parts: int
    processes: int = 1
    rows_per_prompt: int = 1
    round_of: Callable[[int], int] = int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size % self.rows_per_prompt:
            raise ValueError(
                f"train_batch_size: expected a step's batch ({self.part_size} rows x {self.parts} accumulation steps x "
                f"{self.processes} processes = {self.size}) to be a multiple of the {self.rows_per_prompt} images of a "
                "prompt; change train_batch_size, gradient_accumulation_steps or the number of images a prompt"
            )

    @property
    def size(self) -> int:
        """Rows of a step's whole batch."""
        return self.part_size * self.parts * self.processes

    def batches(self, step: int, process: int = 0) -> list[Batch]:
        """The parts of a step's batch that a process takes, every `processes`-th."""
        round_ = self.round_of(step)
        slots = self.size // self.rows_per_prompt
        order = [self._place(round_ * slots + slot) for slot in range(slots)]
        found = []
        for part in range(self.parts):
            first = (part * self.processes + process) * self.part_size
            rows = tuple(range(first, first + self.part_size))
            places = tuple(order[row // self.rows_per_prompt] for row in rows)
            prompts = tuple(self.prompts[place] for place in places)
            found.append(
                Batch(
                    prompts=prompts,
                    places=places,
                    rows=rows,
                    round=round_,
                    step=step,
                    size=self.size,
                    seed=self.seed,
                )
            )
        return found

    def _place(self, slot: int) -> int:
        epoch, place = divmod(slot, len(self.prompts))
        return int(_order(self.seed, epoch, len(self.prompts))[place])


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return numbers_of(seed, "order", epoch).permutation(count)
