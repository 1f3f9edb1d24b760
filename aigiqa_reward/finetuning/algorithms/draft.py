"""Backpropagation of the reward through sampling: DRaFT-K, DRaFT-LV and AlignProp.

Clark et al. 2024, "Directly Fine-Tuning Diffusion Models on Differentiable Rewards" (DRaFT, algorithm 1); Prabhudesai
et al. 2023, "Aligning Text-to-Image Diffusion Models with Reward Backpropagation" (AlignProp).

The gradient of the reward r(x0) passes back through the decoder and the last K of T sampling steps; the first T - K run
without gradients. K = T is full backpropagation, K = 1 (DRaFT-1) needs the memory of one step, and AlignProp draws K
uniformly from 1 to T in each optimizer step. DRaFT-LV takes K = 1 and lowers its variance: the finished latents x0 are
noised n times to the level of the last step, and the gradients through that step, from x0 and from each of these, are
averaged (the paper sums them, which is a learning rate n + 1 times as high).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from aigiqa_reward.finetuning.algorithms.base import RewardBackpropagation, row_noise, setting
from aigiqa_reward.finetuning.batch import Batch, Memory, Outcome
from aigiqa_reward.finetuning.context import TrainingContext
from aigiqa_reward.sampling.rollout import State
from aigiqa_reward.sampling.schedulers import noise_level
from aigiqa_reward.utils.checks import integer


@dataclass(frozen=True, kw_only=True)
class DRaFT(RewardBackpropagation):
    """DRaFT-K, DRaFT-LV and AlignProp.

    With classifier-free guidance both branches carry gradients, at twice the cost of a step without guidance. A
    `truncation_steps` above the number of steps means all.

    Example:
        >>> from aigiqa_reward.finetuning import DRaFT
        >>> DRaFT(low_variance=4).truncation_steps, DRaFT(truncation_steps=2, sharpness_aware="image").image_radius
        (1, None)
    """

    name: ClassVar[str] = "draft"
    title: ClassVar[str] = "DRaFT"

    truncation_steps: int | Literal["all", "random"] = setting(
        1, "Last sampling steps K that carry gradients, 'all', or 'random' as in AlignProp."
    )
    low_variance: int = setting(
        0, "Extra gradients per image (n of DRaFT-LV); needs truncation_steps=1, and 0 is DRaFT-K."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        kept = self.truncation_steps
        if not isinstance(kept, str):
            integer("truncation_steps", kept, least=1)
        elif kept not in ("all", "random"):
            raise ValueError(f"truncation_steps: expected a number of steps, 'all' or 'random', got {kept!r}")
        if integer("low_variance", self.low_variance, least=0) and kept != 1:
            raise ValueError(
                f"low_variance: DRaFT-LV noises finished latents to the last step, so it needs truncation_steps=1, got "
                f"{kept!r}; pass truncation_steps=1, or low_variance=0 for DRaFT-K"
            )

    def kept_steps(self, batch: Batch, steps: int) -> int:
        """Return the number K of steps with gradients, of `steps`."""
        if self.truncation_steps == "random":
            return int(batch.numbers("truncation").integers(1, steps + 1))
        return steps if self.truncation_steps == "all" else min(self.truncation_steps, steps)

    def losses(self, context: TrainingContext, batch: Batch, part: int, memory: Memory) -> Iterator[Outcome]:
        """Yield one loss, or the n + 1 terms of DRaFT-LV."""
        state = context.start(batch)
        with torch.no_grad():
            state = context.rollout.run(state, until=state.steps - self.kept_steps(batch, state.steps))
        latents, kl = finish_sampling(context, state)
        finished = latents.detach()
        yield self._term(context, batch, latents, kl)
        del latents, kl  # frees the graph
        alpha, sigma = (level.to(finished.device) for level in noise_level(state.scheduler, state.step))
        generators = batch.generators("low variance")
        for _ in range(self.low_variance):
            noised = (alpha * finished.float() + sigma * row_noise(finished, generators)).to(finished.dtype)
            yield self._term(context, batch, *finish_sampling(context, replace(state, latents=noised)))

    def _term(self, context: TrainingContext, batch: Batch, latents: Tensor, kl: Tensor) -> Outcome:
        outcome = self.loss(context, batch, context.decode(latents), kl)
        return replace(outcome, loss=outcome.loss / (self.low_variance + 1))


def finish_sampling(context: TrainingContext, state: State) -> tuple[Tensor, Tensor]:
    """Finish sampling with gradients: latents (B, ...) and the mean distance (B,) to the reference over the steps."""
    distances, alone = [], state.step + 1 == state.steps
    while not state.done:
        prediction = context.predict(state, alone=alone)
        if context.penalty:
            distances.append(context.distance(state, prediction))
        state = context.rollout.advance(state, prediction.output)
    kl = torch.stack(distances).mean(dim=0) if distances else state.latents.new_zeros(len(state))
    return state.latents, kl
