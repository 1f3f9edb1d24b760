"""Flow-GRPO: policy gradient on the steps of a flow model that is sampled by a stochastic differential equation.

Liu et al. 2025, "Flow-GRPO: Training Flow Matching Models via Online RL".
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from aigiqa_reward.finetuning.algorithms.base import Algorithm
from aigiqa_reward.finetuning.algorithms.draft import told
from aigiqa_reward.finetuning.batch import Batch, Memory, Outcome
from aigiqa_reward.finetuning.context import TrainingContext
from aigiqa_reward.sampling.ancestral import ANCESTRAL, StepWeights, ancestral_weights, is_last, placed, step_mean
from aigiqa_reward.sampling.rollout import State
from aigiqa_reward.sampling.schedulers import check_scheduler, is_flow, noise_level
from aigiqa_reward.utils.checks import integer, number

DEVIATION_FLOOR = 1e-4
"""Added to the deviation of rewards before dividing by it, as in Flow-GRPO's code. DDPO's 1e-6 would blow differences
of rounding up to whole advantages, since our rewards are near [0, 1]."""

EQUAL = 4 * torch.finfo(torch.float32).eps
"""Rewards that differ by less than this share of their size are equal up to float32's rounding."""


@dataclass(frozen=True, kw_only=True)
class GaussianStep:
    """The distribution N(mean, deviation^2 I) of the latents after one step of a sampler.

    Attributes:
        mean: (B, ...) in at least float32.
        deviation: () above 0 for probabilities; 0 is a step without noise, which is only drawn from.
    """

    mean: Tensor
    deviation: Tensor

    def draw(self, noise: Tensor) -> Tensor:
        """Latents (B, ...) for standard normal noise (B, ...)."""
        return self.mean + self.deviation * noise.to(self.mean)

    def log_prob(self, latents: Tensor) -> Tensor:
        """(B,) logarithm of the density at latents (B, ...), **mean** over their D dimensions, as in DDPO's code.

        The mean is 1/D of the logarithm of the joint density. So the ratio of two policies is the D-th root of the
        joint one, the gradient is 1/D of the policy gradient, and the clip ranges of DDPO and Flow-GRPO (1e-4, both of
        whose codes take this mean) mean here what they mean there. The sum would make ratios of exp(1000) at large D.
        """
        far = (latents.to(self.mean) - self.mean) / self.deviation
        values = -far.square() / 2 - self.deviation.log() - math.log(2 * math.pi) / 2
        return values.flatten(1).mean(dim=1)

    def divergence(self, reference: GaussianStep) -> Tensor:
        """(B,) KL(self || reference) for a reference of equal deviation, mean over the dimensions like `log_prob`.

        Closed form ||mean - mean_ref||^2 / (2 deviation^2), as in Liu et al. 2025. (Their code leaves the step's length
        out of the variance, so that its KL is this one times |dt|.)
        """
        far = (self.mean - reference.mean) / self.deviation
        return far.square().flatten(1).mean(dim=1) / 2


def flow_sde_weights(scheduler: Any, step: int, amount: float) -> StepWeights:
    """One Euler-Maruyama step of the SDE of Flow-GRPO (Liu et al. 2025, eq. 9 to 12), which has the flow's marginals.

    With velocity v, time t (the scheduler's sigma) and sigma_t = a sqrt(t / (1 - t)), over dt = t' - t < 0:

        x' = x + [v + sigma_t^2 / (2t) (x + (1 - t) v)] dt + sigma_t sqrt(-dt) noise

    Since x0 = x - t v and eps = x + (1 - t) v, that is

        x' = (1 - t') x0 + (t' - sigma_t^2 |dt| / (2t)) eps + sigma_t sqrt(|dt|) noise

    Relation to `ancestral_weights`: to first order in dt both are one SDE, with a = sqrt(2) eta. There eps has the
    weight sqrt(t'^2 - tau^2), so that what is not x0 keeps the variance t'^2 at any number of steps, exactly. Here it
    gets more, which shows as noise in images of few steps (Wang & Yu 2025, "Coefficients-Preserving Sampling for
    Reinforcement Learning with Flow Matching", whose sampler is that other form with another tau).

    The last step takes no noise (the authors' code does), because its noise would stay in the image. Where 1 - t is 0,
    at the first step, 1 - t' stands in for it, as in the authors' code; so it does where 1 - t is less than a tenth
    of |dt|, chosen here for schedules that begin a little below 1.

    Args:
        scheduler: of a flow model, with its timesteps set.
        step: number of the step, from 0.
        amount: a of the paper, which takes 0.7.
    """
    _, time = noise_level(scheduler, step)
    if is_last(scheduler, step):
        return StepWeights(clean=torch.ones_like(time), told=torch.zeros_like(time), fresh=torch.zeros_like(time))
    _, after = noise_level(scheduler, step + 1)
    length = time - after
    rest = 1 - time if float(1 - time) > float(length) / 10 else 1 - after
    variance = amount**2 * time / rest * length
    return StepWeights(clean=1 - after, told=after - variance / (2 * time), fresh=variance.sqrt())


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """(B,) loss -min(A ratio, A clip(ratio, 1 - c, 1 + c)) (Schulman et al. 2017, PPO, eq. 7).

    At ratio 1 its gradient is that of -A log p, the plain policy gradient.

    Args:
        ratio: (B,) probability under the policy by that under the one that sampled.
        advantages: (B,) A, held fixed.
        clip_range: c above 0.
    """
    return -torch.minimum(advantages * ratio, advantages * ratio.clamp(1 - clip_range, 1 + clip_range))


@dataclass(frozen=True, kw_only=True)
class Advantages:
    """How much better each sample is than its group.

    Attributes:
        values: (N,) float64; 0 for a sample without a finite reward, and in a degenerate group.
        degenerate: (N,) whether its group tells nothing: all rewards equal, or fewer than two of them finite.
    """

    values: Tensor
    degenerate: Tensor


def group_advantages(
    rewards: Tensor, size: int, *, deviation: Literal["group", "batch"] = "group", limit: float = math.inf
) -> Advantages:
    """Rewards less their group's mean, by a deviation, clipped to [-limit, limit].

    The group's deviation is that of Flow-GRPO, and of DDPO's per-prompt statistics (which DDPO's code keeps over
    several rounds; here each round has all it needs). That of the whole batch is what Flow-GRPO's code calls
    `global_std`: it does not blow up differences within groups of near equals.

    Args:
        rewards: (N,) sample i belongs to group i // size; what is not finite counts nowhere.
        size: of a group, a divisor of N. 1 makes all N one group: DDPO without per-prompt statistics.
        deviation: whose standard deviation (of the population, as in both codes) divides.
        limit: largest advantage.
    """
    values = rewards.double().reshape(-1, size if size > 1 else len(rewards))
    fine = values.isfinite()
    values = torch.where(fine, values, 0.0)
    count = fine.sum(dim=1, keepdim=True)
    centered = torch.where(fine, values - values.sum(dim=1, keepdim=True) / count.clamp(min=1), 0.0)
    largest = values.abs().amax(dim=1, keepdim=True)
    degenerate = (count < 2) | (centered.abs().amax(dim=1, keepdim=True) <= EQUAL * largest)
    if deviation == "group":
        spread = (centered.square().sum(dim=1, keepdim=True) / count.clamp(min=1)).sqrt()
    else:
        every = values[fine]
        spread = every.std(correction=0) if len(every) else values.new_zeros(())
    result = torch.where(degenerate, 0.0, centered / (spread + DEVIATION_FLOOR)).clamp(-limit, limit)
    return Advantages(values=result.flatten(), degenerate=degenerate.expand_as(values).flatten())


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(Algorithm):
    """A policy gradient on the steps of a stochastic sampler."""

    learning_rate: ClassVar[float] = 3e-4
    title: ClassVar[str]

    images_per_prompt: int = field(
        default=4,
        metadata={"help": "Images per prompt, which are compared with each other; 1 compares the whole batch."},
    )
    updates_per_round: int = field(default=1, metadata={"help": "Optimizer steps on the same sampled images."})
    clip_range: float = field(
        default=1e-4,
        metadata={"help": "Distance from 1 at which the probability ratio of a sampling step is clipped, in (0, 1)."},
    )
    advantage_clip: float = field(
        default=10.0, metadata={"help": "Largest advantage, in standard deviations of the reward."}
    )
    deviation: Literal["group", "batch"] = field(
        default="group",
        metadata={"help": "Standard deviation that divides advantages: of the prompt's 'group' or of the 'batch'."},
    )
    timestep_fraction: float = field(
        default=1.0, metadata={"help": "Share of the sampling steps to train on, in (0, 1], drawn anew each round."}
    )

    def __post_init__(self) -> None:
        integer("images_per_prompt", self.images_per_prompt, least=1)
        integer("updates_per_round", self.updates_per_round, least=1)
        number("clip_range", self.clip_range, "in (0, 1); try 1e-4", lambda value: 0 < value < 1)
        number("advantage_clip", self.advantage_clip, "above 0; math.inf for no clipping", lambda value: value > 0)
        number("timestep_fraction", self.timestep_fraction, "in (0, 1]", lambda value: 0 < value <= 1)
        if self.deviation not in ("group", "batch"):
            raise ValueError(f"deviation: expected 'group' or 'batch', got {self.deviation!r}")

    @property
    def steps_per_round(self) -> int:
        """Updates on the same samples."""
        return self.updates_per_round

    @property
    def rows_per_prompt(self) -> int:
        """Size of a group."""
        return self.images_per_prompt

    @abstractmethod
    def weights(self, scheduler: Any, step: int) -> StepWeights:
        """What the latents after step number `step` are made of."""

    def check(self, tools: TrainingContext, prompts: Sequence[str]) -> None:
        """Refuse a scheduler without a stochastic sampler, and arguments of the pipeline that would go unheard."""
        super().check(tools, prompts)
        check_scheduler(tools.rollout.pipe.scheduler, need=self.title, served=ANCESTRAL)
        if eta := tools.rollout.family.options.eta:
            raise ValueError(
                f"eta: {self.title} brings its own noise into the steps, got eta={eta:g} among the pipeline's "
                f"arguments; leave it out there (a setting of {self.title} says how much noise)"
            )

    # ----------------------------------------------------------------------------------------- sampling

    @torch.no_grad()
    def prepare(self, tools: TrainingContext, batches: Sequence[Batch]) -> Memory:
        """Sample and score this process's parts, compare them with those of all processes.

        Samples with pixels or scores that are not finite get advantage 0, and zeros in place of their latents. If none
        are finite, so are no losses.

        Returns:
            On the CPU: "steps" (n,), the numbers of the trained steps; and for each part, as "NAME/PART": latents
            (B, T, ...) before each of the T steps, log_probs (B, n), advantages, degenerate, dropped (B,) and what the
            reward said (B,).
        """
        self._check_size(batches)
        memory: dict[str, Tensor] = {}
        scores: list[dict[str, Tensor]] = []
        for part, batch in enumerate(batches):
            state = tools.start(batch)
            chosen = self.trained(batch, state)
            end, latents, log_probs = self.sample(tools, state, chosen)
            scored = judged(tools, end, batch)
            alive = scored["reward"].isfinite()
            memory["steps"] = torch.tensor(chosen)
            memory[f"latents/{part}"] = zero_unless(alive, latents)
            memory[f"log_probs/{part}"] = zero_unless(alive, log_probs)
            memory[f"dropped/{part}"] = (~alive).float()
            scores.append(scored)
        lengths = [len(batch) for batch in batches]
        for name, values in self.compared(tools, batches, scores).items():
            for part, value in enumerate(values.split(lengths)):
                memory[f"{name}/{part}"] = value.clone()
        return memory

    def trained(self, batch: Batch, state: State) -> list[int]:
        """Numbers of the steps to train, ascending; equal for all parts and processes.

        Raises:
            ValueError: no step takes noise.
        """
        noisy = [k for k in range(state.steps) if float(self.weights(state.scheduler, k).fresh) > 0]
        if not noisy:
            raise ValueError(
                f"num_inference_steps: {self.title} trains the steps that take noise, which the last one does not; got "
                f"{state.steps} step{'s' * (state.steps > 1)} and none left to train; sample with 2 or more"
            )
        count = max(1, round(self.timestep_fraction * len(noisy)))
        drawn = batch.numbers("timesteps").choice(noisy, size=count, replace=False)
        return sorted(int(step) for step in drawn)

    def sample(self, tools: TrainingContext, state: State, chosen: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Finished latents (B, ...); the latents (B, T, ...) before each step and the trained steps' log_probs (B, n).

        The last two are on the CPU.
        """
        before, log_probs = [], []
        while not state.done:
            policy = self.policy(state, tools.predict(state).clean)
            # Rounded to the latents' type before their probability is taken, so that it is the one of what is kept.
            after = policy.draw(noise(state, policy.mean)).to(state.latents.dtype)
            before.append(state.latents.cpu())
            if state.step in chosen:
                log_probs.append(policy.log_prob(after).cpu())
            state = placed(state, state.step + 1, after)
        return state.latents, torch.stack(before, dim=1), torch.stack(log_probs, dim=1)

    def policy(self, state: State, clean: Tensor) -> GaussianStep:
        """The distribution of the latents after the step that a state is before, for predicted x0 (B, ...)."""
        weights = self.weights(state.scheduler, state.step)
        mean = step_mean(state.scheduler, state.step, state.latents, clean, weights)
        return GaussianStep(mean=mean, deviation=weights.fresh.to(mean.device))

    def compared(
        self, tools: TrainingContext, batches: Sequence[Batch], scores: Sequence[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Advantages of this process's rows, part after part, and what to tell of them; on the CPU."""
        device = tools.accelerator.device
        rows = torch.tensor([row for batch in batches for row in batch.rows])
        own = {name: torch.cat([part[name] for part in scores]) for name in scores[0]}
        places = tools.gather(rows.to(device)).cpu()
        tables = {}
        for name, values in own.items():
            table = torch.full((batches[0].size,), math.nan, dtype=torch.float64)
            table[places] = tools.gather(values.to(device)).cpu().double()
            tables[name] = table
        climbing = tools.capped(tables["reward"])
        advantages = group_advantages(
            climbing, self.images_per_prompt, deviation=self.deviation, limit=self.advantage_clip
        )
        # Nothing to learn from and something broken: the loop stops at a loss that is NaN.
        lost = math.nan if not tables["reward"].isfinite().any() else 0.0
        result = {"advantages": advantages.values[rows] + lost, "degenerate": advantages.degenerate[rows]}
        for name, table in tables.items():
            mean = table[table.isfinite()].mean().nan_to_num()
            result[name] = torch.where(table.isfinite(), table, mean)[rows]  # so that the mean is that of the finite
        return {name: value.float() for name, value in result.items()}

    def _check_size(self, batches: Sequence[Batch]) -> None:
        size, group = batches[0].size, self.images_per_prompt
        if size % group:
            near = max(group, size // group * group)
            raise ValueError(
                f"images_per_prompt: a step's whole batch holds whole groups, got {size} rows over all parts and "
                f"processes for groups of {group}; make train_batch_size x gradient_accumulation_steps x processes "
                f"{near} or another multiple of {group}, or images_per_prompt a divisor of {size}"
            )
        if size < 2:
            raise ValueError(
                f"train_batch_size: {self.title} compares images with each other, got a whole batch of 1; make "
                "train_batch_size x gradient_accumulation_steps x processes at least 2"
            )

    # ----------------------------------------------------------------------------------------- losses

    def losses(self, tools: TrainingContext, batch: Batch, part: int, memory: Memory) -> Iterator[Outcome]:
        """One loss for each trained step; together they are the mean over these steps."""
        state = tools.start(batch)
        device = state.latents.device
        steps = memory["steps"].tolist()
        shown = {
            name: memory[f"{name}/{part}"]
            for name in ("reward", "quality", "correspondence", "degenerate", "dropped")
            if f"{name}/{part}" in memory
        }
        for place, step in enumerate(steps):
            before, after = memory[f"latents/{part}"][:, step : step + 2].to(device).unbind(dim=1)
            here = placed(state, step, before)
            loss, measures = self.step_loss(
                tools,
                here,
                after,
                advantages=memory[f"advantages/{part}"].to(device),
                old=memory[f"log_probs/{part}"][:, place].to(device),
                alive=1 - memory[f"dropped/{part}"].to(device),
            )
            yield Outcome(loss=loss.mean() / len(steps), measures={**shown, **measures})

    def step_loss(
        self, tools: TrainingContext, state: State, after: Tensor, *, advantages: Tensor, old: Tensor, alive: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (B,) of one step, and what to tell of it.

        Args:
            tools: the pipeline's parts.
            state: before the step.
            after: (B, ...) the latents that were drawn.
            advantages: (B,) of the images that came of it.
            old: (B,) log-probabilities when they were drawn.
            alive: (B,) 0 for rows that are left out.
        """
        policy = self.policy(state, tools.predict(state).clean)
        change = (policy.log_prob(after) - old) * alive
        ratio = change.exp()
        loss = clipped_surrogate(ratio, advantages, self.clip_range)
        over = (ratio - 1) * advantages.sign() > self.clip_range
        measures = {
            "clipped": over.float(),  # whose gradient the clip has ended
            "old_kl": change.square() / 2,  # the approximate KL divergence of DDPO's code
        }
        if tools.penalty:
            with tools.reference():
                reference = self.policy(state, tools.rollout.predict(state).clean)
            far = policy.divergence(reference) * alive
            loss = loss + tools.penalty * far
            measures["kl"] = far
        return loss, {name: value.detach() for name, value in measures.items()}


def noise(state: State, like: Tensor) -> Tensor:
    """(B, ...) standard normal, row i from the state's generator i."""
    drawn = [torch.randn(like.shape[1:], generator=g, dtype=like.dtype, device=g.device) for g in state.generators]
    return torch.stack(drawn).to(like.device)


def zero_unless(alive: Tensor, values: Tensor) -> Tensor:
    """Values (B, ...) whose rows are zero where `alive` (B,) is not."""
    return torch.where(alive.reshape(-1, *[1] * (values.ndim - 1)), values, 0)


def judged(tools: TrainingContext, latents: Tensor, batch: Batch) -> dict[str, Tensor]:
    """What the reward says (B,) of the images as the pipeline would give them; on the CPU.

    An image with pixels that are not finite is not shown to the reward, a gray one is; its scores are NaN, as are those
    of an image whose total is not finite.
    """
    images = tools.rollout.show(latents)
    fine = images.flatten(1).isfinite().all(dim=1)
    gray = torch.full_like(images, 0.5)
    scores = told(tools.score(torch.where(fine[:, None, None, None], images, gray), batch.prompts))
    fine = fine.cpu() & scores["reward"].isfinite().cpu()
    return {name: torch.where(fine, value.cpu(), math.nan) for name, value in scores.items()}


@dataclass(frozen=True, kw_only=True)
class DDPO(PolicyGradient):
    """Denoising diffusion policy optimization.

    The sampler is `ancestral_weights`: DDIM with eta, Euler ancestral, or for flow models one with equal marginals. The
    pipeline may sample with its own scheduler afterwards, with or without noise.

    Example:
        >>> from aigiqa_reward.finetuning import DDPO
        >>> DDPO(eta=1.0, images_per_prompt=4).rows_per_prompt
        4
    """

    name: ClassVar[str] = "ddpo"
    title: ClassVar[str] = "DDPO"

    eta: float = field(
        default=1.0, metadata={"help": "Noise of the sampler, in (0, 1], as in DDIM; the paper's code uses 1."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        number("eta", self.eta, "in (0, 1], without noise a step has no probability; try 1.0", lambda v: 0 < v <= 1)

    def weights(self, scheduler: Any, step: int) -> StepWeights:
        """DDIM's (Song et al. 2021), for every noise schedule."""
        return ancestral_weights(scheduler, step, self.eta)


@dataclass(frozen=True, kw_only=True)
class FlowGRPO(PolicyGradient):
    """Group relative policy optimization of flow models.

    Training samples with noise and may take few steps (the paper: 10); the pipeline samples with its own scheduler
    afterwards, without noise and with as many steps as one likes.

    Example:
        >>> from aigiqa_reward.finetuning import FlowGRPO
        >>> FlowGRPO(images_per_prompt=8, noise_level=0.7).sampler
        'sde'
    """

    name: ClassVar[str] = "grpo"
    title: ClassVar[str] = "Flow-GRPO"

    advantage_clip: float = field(
        default=5.0, metadata={"help": "Largest advantage, in standard deviations of the reward."}
    )
    sampler: Literal["sde", "ancestral"] = field(
        default="sde",
        metadata={"help": "Sampling step: 'sde' as in the paper, or 'ancestral', with cleaner images in few steps."},
    )
    noise_level: float = field(
        default=0.7, metadata={"help": "Noise a of sigma_t = a sqrt(t / (1 - t)), in (0, sqrt(2)]; the paper uses 0.7."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampler not in ("sde", "ancestral"):
            raise ValueError(f"sampler: expected 'sde' or 'ancestral', got {self.sampler!r}")
        # A little above sqrt(2), for those who round.
        number("noise_level", self.noise_level, "in (0, sqrt(2)]; try 0.7", lambda value: 0 < value < 1.4143)

    def check(self, tools: TrainingContext, prompts: Sequence[str]) -> None:
        """Refuse models that are not of flow matching, besides what every policy gradient refuses."""
        pipe = tools.rollout.pipe
        if not is_flow(pipe.scheduler):
            raise ValueError(
                f"pipe: Flow-GRPO trains flow models (SD3, FLUX, ...), got {type(pipe).__name__} with "
                f"{type(pipe.scheduler).__name__}; train it with DDPO (`aigiqa-reward finetune ddpo`), whose sampler "
                "is of any noise schedule"
            )
        super().check(tools, prompts)

    def weights(self, scheduler: Any, step: int) -> StepWeights:
        """Of the sampler that was asked for."""
        if self.sampler == "sde":
            return flow_sde_weights(scheduler, step, self.noise_level)
        return ancestral_weights(scheduler, step, min(1.0, self.noise_level / math.sqrt(2)))
