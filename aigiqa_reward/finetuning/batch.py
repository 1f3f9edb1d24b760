"""The rows of an optimizer step: their prompts, their seeds, their losses, and which process takes which."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def seed_of(seed: int, purpose: str, *place: int) -> int:
    """Derive a seed in [0, 2^63) for one purpose and place, different from that of any other."""
    text = f"{seed}/{purpose}/{'/'.join(map(str, place))}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator_of(seed: int, purpose: str, *place: int) -> torch.Generator:
    """Make a CPU generator with the seed of `seed_of`."""
    return torch.Generator("cpu").manual_seed(seed_of(seed, purpose, *place))


Memory = Mapping[str, Tensor]
"""Named tensors that an algorithm keeps from step to step within a round; saved with a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The rows of one forward pass of the denoiser.

    Attributes:
        prompts: (B,) texts.
        places: (B,) index of each row's prompt in the training prompts, or in the algorithm's examples.
        rows: (B,) index of each row in the batch of the whole step, over accumulation steps and processes.
        round: round that the rows belong to; equals `step` except for algorithms with several steps per round.
        step: optimizer step, from 0.
        size: number of rows in the batch of the whole step.
        seed: seed of the training.
    """

    prompts: tuple[str, ...]
    places: tuple[int, ...]
    rows: tuple[int, ...]
    round: int
    step: int
    size: int
    seed: int

    def __len__(self) -> int:
        return len(self.rows)

    def generators(self, purpose: str) -> list[torch.Generator]:
        """Make one generator per row, the same in every step of a round."""
        return [generator_of(self.seed, purpose, self.round, row) for row in self.rows]

    def numbers(self, purpose: str) -> np.random.Generator:
        """Make one generator for all rows of the step, the same in all of its batches and processes."""
        return np.random.default_rng(seed_of(self.seed, purpose, self.step))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A loss (), the mean over the rows of a batch, and named (B,) or () tensors whose means are logged with it."""

    loss: Tensor
    measures: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The order of the training prompts: shuffled, each prompt once per epoch.

    `part_size` is the number of rows per forward pass, `parts` that of passes per step and process, `rows_per_prompt`
    that of consecutive rows with the same prompt. `round_of` maps a step to its round, whose steps have the same rows.
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
                f"train_batch_size: expected the batch of a step ({self.part_size} rows x {self.parts} accumulation "
                f"steps x {self.processes} processes = {self.size}) to be a multiple of the {self.rows_per_prompt} "
                "images per prompt; change one of them"
            )

    @property
    def size(self) -> int:
        """Number of rows in the batch of a whole step."""
        return self.part_size * self.parts * self.processes

    def batches(self, step: int, process: int = 0) -> list[Batch]:
        """Return the batches of a step that one process takes: every `processes`-th."""
        round_, batches = self.round_of(step), []
        for start in range(process * self.part_size, self.size, self.processes * self.part_size):
            rows = tuple(range(start, start + self.part_size))
            places = tuple(self._place((round_ * self.size + row) // self.rows_per_prompt) for row in rows)
            prompts = tuple(self.prompts[place] for place in places)
            batches.append(
                Batch(
                    prompts=prompts, places=places, rows=rows, round=round_, step=step, size=self.size, seed=self.seed
                )
            )
        return batches

    def _place(self, slot: int) -> int:
        epoch, place = divmod(slot, len(self.prompts))
        return int(_order(self.seed, epoch, len(self.prompts))[place])


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed_of(seed, "order", epoch)).permutation(count)
