"""DDPO and Flow-GRPO: policy gradients on the steps of a stochastic sampler, for rewards without gradients.

Black et al. 2024, "Training Diffusion Models with Reinforcement Learning" (DDPO); Liu et al. 2025, "Flow-GRPO: Training
Flow Matching Models via Online RL". Each step of the sampler draws the next latents from a Gaussian whose mean the
denoiser gives. Steps that led to images with a higher reward than those they are compared with are made more probable.
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from aigiqa_reward.finetuning.advantages import compare, part_of
from aigiqa_reward.finetuning.algorithms.base import (
    Algorithm,
    mean_square,
    row_noise,
    score_latents,
    setting,
    where_rows,
)
from aigiqa_reward.finetuning.batch import Batch, Memory, Outcome
from aigiqa_reward.finetuning.context import TrainingContext
from aigiqa_reward.sampling.ancestral import ANCESTRAL, StepWeights, ancestral_weights, is_last, placed, step_mean
from aigiqa_reward.sampling.rollout import State
from aigiqa_reward.sampling.schedulers import check_scheduler, is_flow, noise_level
from aigiqa_reward.utils.checks import integer, number


@dataclass(frozen=True, kw_only=True)
class GaussianStep:
    """Distribution N(mean, std^2 I) of the latents (B, ...) after one step of a sampler, in at least float32.

    The () std is above 0; it is 0 for a step without noise, which has no probabilities.
    """

    mean: Tensor
    std: Tensor

    def draw(self, noise: Tensor) -> Tensor:
        """Return latents (B, ...) for standard normal noise (B, ...)."""
        return self.mean + self.std * noise.to(self.mean)

    def log_prob(self, latents: Tensor) -> Tensor:
        """Return the log density (B,) at latents (B, ...), **mean** over their D dimensions, as in DDPO's code.

        The ratio of two policies is thus the D-th root of the joint one (which could be exp(1000)), the gradient is 1/D
        of the policy gradient, and the clip ranges of DDPO's and Flow-GRPO's code (1e-4) mean the same here.
        """
        far = (latents.to(self.mean) - self.mean) / self.std
        return (-far.square() / 2 - self.std.log() - math.log(2 * math.pi) / 2).flatten(1).mean(dim=1)

    def divergence(self, reference: GaussianStep) -> Tensor:
        """Return KL(self || reference) (B,) for a reference of equal std, mean over the dimensions like `log_prob`.

        Closed form ||mean - mean_ref||^2 / (2 std^2), as in Liu et al. 2025, whose code multiplies it by |dt|.
        """
        return mean_square((self.mean - reference.mean) / self.std) / 2


def flow_sde_weights(scheduler: Any, step: int, amount: float) -> StepWeights:
    """Return one Euler-Maruyama step of Flow-GRPO's SDE (Liu et al. 2025, eq. 9 to 12), which has the flow's marginals.

    With velocity v, time t (the scheduler's sigma) and sigma_t = a sqrt(t / (1 - t)), over dt = t' - t < 0:

        x' = x + [v + sigma_t^2 / (2t) (x + (1 - t) v)] dt + sigma_t sqrt(-dt) noise

    Since x0 = x - t v and eps = x + (1 - t) v, that is

        x' = (1 - t') x0 + (t' - sigma_t^2 |dt| / (2t)) eps + sigma_t sqrt(|dt|) noise

    To first order in dt this is `ancestral_weights` with a = sqrt(2) eta. There eps has the weight sqrt(t'^2 - tau^2),
    which keeps the variance t'^2 at any number of steps. Here it gets more, which shows as noise in images of few steps
    (Wang & Yu 2025, "Coefficients-Preserving Sampling for Reinforcement Learning with Flow Matching").

    As in the authors' code, the last step takes no noise, and where 1 - t is 0, at the first step, 1 - t' replaces it;
    so it does where 1 - t is less than a tenth of |dt|, for schedules that begin a little below 1. The noise level a is
    `amount`, 0.7 in the paper.
    """
    _, time = noise_level(scheduler, step)
    if is_last(scheduler, step):
        return StepWeights(clean=torch.ones_like(time), eps=torch.zeros_like(time), fresh=torch.zeros_like(time))
    _, after = noise_level(scheduler, step + 1)
    length = time - after
    rest = 1 - time if float(1 - time) > float(length) / 10 else 1 - after
    variance = amount**2 * time / rest * length
    return StepWeights(clean=1 - after, eps=after - variance / (2 * time), fresh=variance.sqrt())


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """Return the loss -min(A ratio, A clip(ratio, 1 - c, 1 + c)) (B,) (Schulman et al. 2017, PPO, eq. 7).

    At ratio 1 its gradient is that of -A log p, the plain policy gradient.
    """
    return -torch.minimum(advantages * ratio, advantages * ratio.clamp(1 - clip_range, 1 + clip_range))


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(Algorithm):
    """A policy gradient on the steps of a stochastic sampler."""

    learning_rate: ClassVar[float] = 3e-4

    images_per_prompt: int = setting(
        4, "Images per prompt, which are compared with each other; 1 compares the whole batch."
    )
    updates_per_round: int = setting(1, "Optimizer steps on the same sampled images.")
    clip_range: float = setting(
        1e-4, "Distance from 1 at which the probability ratio of a sampling step is clipped, in (0, 1)."
    )
    advantage_clip: float = setting(10.0, "Largest advantage, in standard deviations of the reward.")
    deviation: Literal["group", "batch"] = setting(
        "group", "Standard deviation that divides advantages: of the prompt's 'group' or of the 'batch'."
    )
    timestep_fraction: float = setting(
        1.0, "Share of the sampling steps to train on, in (0, 1], drawn anew each round."
    )

    def __post_init__(self) -> None:
        integer("images_per_prompt", self.images_per_prompt, least=1)
        integer("updates_per_round", self.updates_per_round, least=1)
        number("clip_range", self.clip_range, "in (0, 1); try 1e-4", lambda value: 0 < value < 1)
        number("advantage_clip", self.advantage_clip, "above 0; math.inf for no clipping", lambda value: value > 0)
        number("timestep_fraction", self.timestep_fraction, "in (0, 1]", lambda value: 0 < value <= 1)
        allowed = ("group",) if self.images_per_prompt == 1 else ("group", "batch")  # one image: the batch is the group
        if self.deviation not in allowed:
            raise ValueError(f"deviation: expected {' or '.join(map(repr, allowed))}, got {self.deviation!r}")

    @property
    def steps_per_round(self) -> int:
        return self.updates_per_round

    @property
    def rows_per_prompt(self) -> int:
        return self.images_per_prompt

    @abstractmethod
    def weights(self, scheduler: Any, step: int) -> StepWeights:
        """Return the weights of clean latents, predicted noise and fresh noise after step number `step`."""

    def check(self, context: TrainingContext, prompts: Sequence[str]) -> None:
        super().check(context, prompts)
        if self.updates_per_round == 1 and self.clip_range != type(self).clip_range:
            warnings.warn("clip_range: has no effect with updates_per_round=1, since all ratios are 1", stacklevel=4)
        family = context.rollout.family
        check_scheduler(family.pipe.scheduler, need=self.title, flow=family.flow, served=ANCESTRAL)
        if eta := family.options.eta:
            raise ValueError(
                f"eta: {self.title} adds its own noise to the steps, got eta={eta:g} among the arguments of the "
                f"pipeline; leave it out there and set the noise in {self.title}"
            )

    @torch.no_grad()
    def prepare(self, context: TrainingContext, batches: Sequence[Batch]) -> Memory:
        """Sample and score this process's batches, and compare them with those of all processes.

        Samples with pixels or scores that are not finite get advantage 0, and zeros in place of their latents. If none
        is finite, the losses are NaN. The memory has the numbers of the n trained "steps"; and for each batch, as
        "NAME/PART": latents (B, T, ...) before each of the T steps, log_probs (B, n), advantages, degenerate, dropped
        and scores (B,).
        """
        self._check_size(batches[0].size)
        memory, scores = {}, []
        for part, batch in enumerate(batches):
            state = context.start(batch)
            steps = self.trained_steps(batch, state)
            end, latents, log_probs = self.sample(context, state, steps)
            scores.append({name: v.cpu() for name, v in score_latents(context, end, batch.prompts).items()})
            finite = scores[-1]["reward"].isfinite()
            memory["steps"] = torch.tensor(steps)
            memory[f"latents/{part}"] = where_rows(finite, latents, 0)
            memory[f"log_probs/{part}"] = where_rows(finite, log_probs, 0)
        options: Any = {"deviation": self.deviation, "limit": self.advantage_clip}
        return memory | compare(context, batches, scores, self.images_per_prompt, **options)

    def _check_size(self, size: int) -> None:
        if size % (group := self.images_per_prompt):
            near = max(group, size // group * group)
            raise ValueError(
                f"images_per_prompt: expected a divisor of the batch of an optimizer step, got {group} for {size} rows "
                "over all parts and processes; change it, or make train_batch_size x gradient_accumulation_steps x "
                f"processes {near} or another multiple of {group}"
            )
        if size < 2:
            raise ValueError(
                f"train_batch_size: {self.title} compares images with each other, got a batch of 1; make "
                "train_batch_size x gradient_accumulation_steps x processes at least 2"
            )

    def trained_steps(self, batch: Batch, state: State) -> list[int]:
        """Draw the numbers of the steps to train, ascending; equal for all parts and processes."""
        noisy = [k for k in range(state.steps) if float(self.weights(state.scheduler, k).fresh) > 0]
        if not noisy:
            raise ValueError(
                f"num_inference_steps: {self.title} trains the steps with noise, which the last one is not, got "
                f"{state.steps} and none to train; use 2 or more"
            )
        count = max(1, round(self.timestep_fraction * len(noisy)))
        return sorted(batch.numbers("timesteps").choice(noisy, size=count, replace=False).tolist())

    def sample(self, context: TrainingContext, state: State, steps: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return finished latents (B, ...), and on the CPU those before each step (B, T, ...) and log-probs (B, n)."""
        before, log_probs = [], []
        while not state.done:
            policy = self.policy(state, context.predict(state).clean)
            # Rounded to the dtype of the latents first, so that the probability is that of what is kept.
            noise = row_noise(policy.mean, state.generators, policy.mean.dtype)
            after = policy.draw(noise).to(state.latents.dtype)
            before.append(state.latents.cpu())
            if state.step in steps:
                log_probs.append(policy.log_prob(after).cpu())
            state = placed(state, state.step + 1, after)
        return state.latents, torch.stack(before, dim=1), torch.stack(log_probs, dim=1)

    def policy(self, state: State, clean: Tensor) -> GaussianStep:
        """Return the distribution of the latents after the next step of a state, for predicted x0 (B, ...)."""
        weights = self.weights(state.scheduler, state.step)
        mean = step_mean(state.scheduler, state.step, state.latents, clean, weights)
        return GaussianStep(mean=mean, std=weights.fresh.to(mean.device))

    def losses(self, context: TrainingContext, batch: Batch, part: int, memory: Memory) -> Iterator[Outcome]:
        """Yield one loss per trained step; their sum is the mean over these steps."""
        state = context.start(batch)
        device = state.latents.device
        own = part_of(memory, part)
        logged = {name: v for name, v in own.items() if name not in ("latents", "log_probs", "advantages")}
        logged |= context.above_ceiling(own["reward"])
        steps = memory["steps"].tolist()
        for place, step in enumerate(steps):
            before, after = own["latents"][:, step : step + 2].to(device).unbind(dim=1)
            advantages, old, dropped = (own[name].to(device) for name in ("advantages", "log_probs", "dropped"))
            loss, measures = self.step_loss(
                context, placed(state, step, before), after, advantages=advantages, old=old[:, place], alive=1 - dropped
            )
            yield Outcome(loss=loss.mean() / len(steps), measures={**logged, **measures})

    def step_loss(
        self, context: TrainingContext, state: State, after: Tensor, *, advantages: Tensor, old: Tensor, alive: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss (B,) of the step from `state` to the latents `after` (B, ...), and what to log.

        `old` (B,) are the log-probabilities when `after` was drawn, `alive` (B,) is 0 for rows that are left out.
        """
        policy = self.policy(state, context.predict(state).clean)
        change = (policy.log_prob(after) - old) * alive
        ratio = change.exp()
        loss = clipped_surrogate(ratio, advantages, self.clip_range)
        over = (ratio - 1) * advantages.sign() > self.clip_range
        # clipped: rows whose gradient the clip ends; old_kl: the approximate KL divergence of DDPO's code.
        measures = {"clipped": over.float(), "old_kl": change.square() / 2}
        if context.penalty:
            with context.reference():
                reference = self.policy(state, context.rollout.predict(state).clean)
            kl = policy.divergence(reference) * alive
            loss = loss + context.penalty * kl
            measures["kl"] = kl
        return loss, {name: value.detach() for name, value in measures.items()}


@dataclass(frozen=True, kw_only=True)
class DDPO(PolicyGradient):
    """Denoising diffusion policy optimization.

    The sampler is `ancestral_weights`: DDIM with eta, Euler ancestral, or one with equal marginals for flow models. The
    trained pipeline samples with its own scheduler, with or without noise.

    Example:
        >>> from aigiqa_reward.finetuning import DDPO
        >>> DDPO(eta=1.0, images_per_prompt=4).rows_per_prompt
        4
    """

    name: ClassVar[str] = "ddpo"
    title: ClassVar[str] = "DDPO"

    eta: float = setting(1.0, "Noise of the sampler, in (0, 1], as in DDIM; the paper's code uses 1.")

    def __post_init__(self) -> None:
        super().__post_init__()
        number("eta", self.eta, "in (0, 1]; without noise a step has no probability", lambda v: 0 < v <= 1)

    def weights(self, scheduler: Any, step: int) -> StepWeights:
        return ancestral_weights(scheduler, step, self.eta)


@dataclass(frozen=True, kw_only=True)
class FlowGRPO(PolicyGradient):
    """Group relative policy optimization of flow models.

    Training samples with noise and may take few steps (the paper: 10); the trained pipeline samples with its own
    scheduler, without noise and with any number of steps. A `noise_level` of sqrt(2) is "ancestral" with eta = 1.

    Example:
        >>> from aigiqa_reward.finetuning import FlowGRPO
        >>> FlowGRPO(images_per_prompt=8, noise_level=0.7).sampler
        'sde'
    """

    name: ClassVar[str] = "grpo"
    title: ClassVar[str] = "Flow-GRPO"

    advantage_clip: float = setting(5.0, "Largest advantage, in standard deviations of the reward.")
    sampler: Literal["sde", "ancestral"] = setting(
        "sde", "Sampling step: 'sde' as in the paper, or 'ancestral', with cleaner images in few steps."
    )
    noise_level: float = setting(0.7, "Noise a of sigma_t = a sqrt(t / (1 - t)), in (0, sqrt(2)]; the paper uses 0.7.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampler not in ("sde", "ancestral"):
            raise ValueError(f"sampler: expected 'sde' or 'ancestral', got {self.sampler!r}")
        # A little above sqrt(2), for those who round.
        number("noise_level", self.noise_level, "in (0, sqrt(2)]; try 0.7", lambda value: 0 < value < 1.4143)

    def check(self, context: TrainingContext, prompts: Sequence[str]) -> None:
        pipe = context.rollout.pipe
        if not is_flow(pipe.scheduler):
            raise ValueError(
                f"pipe: expected a flow model (SD3, FLUX, ...) for Flow-GRPO, got {type(pipe).__name__} with "
                f"{type(pipe.scheduler).__name__}; train it with DDPO (`aigiqa-reward finetune ddpo`)"
            )
        super().check(context, prompts)

    def weights(self, scheduler: Any, step: int) -> StepWeights:
        if self.sampler == "sde":
            return flow_sde_weights(scheduler, step, self.noise_level)
        return ancestral_weights(scheduler, step, min(1.0, self.noise_level / math.sqrt(2)))
