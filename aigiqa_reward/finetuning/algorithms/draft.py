"""Backpropagation of the reward through sampling: DRaFT-K, DRaFT-LV and AlignProp.

Clark et al. 2024, "Directly Fine-Tuning Diffusion Models on Differentiable Rewards" (DRaFT, algorithm 1); Prabhudesai
et al. 2023, "Aligning Text-to-Image Diffusion Models with Reward Backpropagation" (AlignProp).

The gradient of the reward r(x0) passes back through the decoder and the last K of T sampling steps; the first T - K run
without. K = T is backpropagation through all of sampling, K = 1 (DRaFT-1) costs one step's memory, AlignProp draws
K uniformly from 1 to T anew in each step. DRaFT-LV takes K = 1 and lowers its variance: the finished latents x0 are
noised n times to the last step's level, and the gradients through that step, of x0 and of these, are averaged (the
paper adds them up, which is a learning rate n + 1 times as high).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from aigiqa_reward.finetuning.algorithms.base import Algorithm
from aigiqa_reward.finetuning.batch import Batch, Memory, Outcome
from aigiqa_reward.finetuning.context import TrainingContext
from aigiqa_reward.sampling.rollout import State
from aigiqa_reward.sampling.schedulers import noise_level
from aigiqa_reward.types import RewardOutput
from aigiqa_reward.utils.checks import integer


@dataclass(frozen=True, kw_only=True)
class DRaFT(Algorithm):
    """DRaFT-K, DRaFT-LV, AlignProp.

    With classifier-free guidance both branches are in the graph: the gradient is that of the images which the pipeline
    makes with the same `guidance_scale`, at twice the cost of a step without guidance.

    Example:
        >>> from aigiqa_reward.finetuning import DRaFT
        >>> DRaFT(truncation_steps=2), DRaFT(low_variance=4).truncation_steps
        (DRaFT(truncation_steps=2, low_variance=0), 1)
        >>> DRaFT(truncation_steps=2, low_variance=4)
        Traceback (most recent call last):
            ...
        ValueError: low_variance: DRaFT-LV noises finished latents to the last step, so it needs ...
    """

    name: ClassVar[str] = "draft"
    reward_gradient: ClassVar[bool] = True

    truncation_steps: int | Literal["all", "random"] = field(
        default=1, metadata={"help": "Last sampling steps K that carry gradients, 'all', or 'random' as in AlignProp."}
    )
    low_variance: int = field(
        default=0,
        metadata={"help": "Extra gradients per image (n of DRaFT-LV); needs truncation_steps=1, and 0 is DRaFT-K."},
    )

    def __post_init__(self) -> None:
        if isinstance(self.truncation_steps, str) and self.truncation_steps not in ("all", "random"):
            raise ValueError(
                f"truncation_steps: expected a number of steps, 'all' or 'random', got {self.truncation_steps!r}"
            )
        if not isinstance(self.truncation_steps, str):
            integer("truncation_steps", self.truncation_steps, least=1)
        integer("low_variance", self.low_variance, least=0)
        if self.low_variance and self.truncation_steps != 1:
            raise ValueError(
                f"low_variance: DRaFT-LV noises finished latents to the last step, so it needs truncation_steps=1, got "
                f"{self.truncation_steps!r}"
            )

    def truncated(self, batch: Batch, steps: int) -> int:
        """K of this step, of `steps`."""
        if self.truncation_steps == "all":
            return steps
        if self.truncation_steps == "random":
            return int(batch.numbers("truncation").integers(1, steps + 1))
        return min(self.truncation_steps, steps)

    def losses(self, tools: TrainingContext, batch: Batch, part: int, memory: Memory) -> Iterator[Outcome]:
        """One loss, or n + 1 of them for DRaFT-LV."""
        del part, memory
        state = tools.start(batch)
        kept = self.truncated(batch, state.steps)
        with torch.no_grad():
            state = tools.rollout.run(state, until=state.steps - kept)
        latents, far = climb(tools, state)
        finished = latents.detach()
        yield self.one_of_all(outcome(tools, batch, tools.decode(latents), far))
        del latents, far  # and with them what the backward pass needed
        for noised in self.noised(state, finished, batch):
            latents, far = climb(tools, replace(state, latents=noised))
            yield self.one_of_all(outcome(tools, batch, tools.decode(latents), far))

    def one_of_all(self, found: Outcome) -> Outcome:
        """One of the n + 1 terms whose mean is the loss."""
        return replace(found, loss=found.loss / (self.low_variance + 1))

    def noised(self, state: State, finished: Tensor, batch: Batch) -> Iterator[Tensor]:
        """Finished latents at the noise level of the last step, n times with fresh noise."""
        alpha, sigma = (v.to(finished.device) for v in noise_level(state.scheduler, state.step))
        generators = batch.generators("low variance")
        for _ in range(self.low_variance):
            noise = torch.stack([torch.randn(finished.shape[1:], generator=g) for g in generators])
            yield (alpha * finished.float() + sigma * noise.to(finished.device)).to(finished.dtype)


def climb(tools: TrainingContext, state: State) -> tuple[Tensor, Tensor]:
    """Finish sampling with gradients: latents (B, ...) and the mean distance (B,) to the reference on the way."""
    far, alone = [], state.step + 1 == state.steps
    while not state.done:
        prediction = tools.predict(state, alone=alone)
        if tools.penalty:
            far.append(tools.distance(state, prediction))
        state = tools.rollout.advance(state, prediction.output)
    return state.latents, torch.stack(far).mean(dim=0) if far else state.latents.new_zeros(len(state))


def outcome(tools: TrainingContext, batch: Batch, images: Tensor, far: Tensor) -> Outcome:
    """The loss -min(total, ceiling) + penalty * distance, mean over the rows; NaN for images that are not finite.

    Raises:
        ValueError: the reward has no gradients in the images.
    """
    if not bool(images.isfinite().all()):  # a Reward refuses to look at them
        return Outcome(loss=images.new_tensor(math.nan))
    scores: RewardOutput = tools.score(images, batch.prompts)
    tools.require_gradient(scores.total)
    climbing = tools.capped(scores.total).to(images.device)
    loss = (tools.penalty * far - climbing).mean()
    return Outcome(loss=loss, measures=told(scores) | ({"kl": far.detach()} if tools.penalty else {}))


def told(scores: RewardOutput) -> dict[str, Tensor]:
    """What to tell of scores: reward, quality, correspondence."""
    named = {"reward": scores.total, "quality": scores.quality, "correspondence": scores.correspondence}
    return {name: value.detach() for name, value in named.items() if value is not None}
