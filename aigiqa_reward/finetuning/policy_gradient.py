"""What DDPO and Flow-GRPO share: sample a round, compare it within groups, raise the probability of what was better.

A round samples with the present adapter and keeps the latents of every step. The losses then ask the denoiser again,
with gradients, how probable each step was: one step at a time, so that memory does not grow with their number. The
reward is a number; nothing is differentiated through it, the decoder or the sampler.

The policy is the sampler's step with the guided model: under classifier-free guidance both branches are in it, as in
the code of DDPO and of Flow-GRPO. The last step of a sampler takes no noise. It has no probability and is left out of
the losses: what the adapter changes in how the last noisy latents become the image has no gradient here.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from aigiqa_reward.finetuning.algorithm import Algorithm, Batch, Memory, Outcome
from aigiqa_reward.finetuning.draft import told
from aigiqa_reward.finetuning.policy import GaussianStep, clipped_surrogate, group_advantages
from aigiqa_reward.finetuning.tools import Tools
from aigiqa_reward.sampling.ancestral import ANCESTRAL, StepWeights, placed, step_mean
from aigiqa_reward.sampling.checks import number
from aigiqa_reward.sampling.rollout import State
from aigiqa_reward.sampling.schedules import check_scheduler
from aigiqa_reward.selection import integer


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(Algorithm):
    """A policy gradient on the steps of a stochastic sampler.

    Attributes:
        images_per_prompt: size of a group, whose images are compared with each other. Divides the step's whole batch.
            1 compares the whole batch, whatever the prompts. The default is chosen here: it fits the default batch;
            Flow-GRPO takes 24.
        updates_per_round: steps of the optimiser on the same samples. In the first, all ratios are 1; from the
            second on they are clipped.
        clip_range: how far from 1 the ratio of a step may go before its gradient ends. The default is that of the
            code of DDPO and Flow-GRPO, for the mean over the latents' dimensions (`GaussianStep.log_prob`).
        advantage_clip: largest advantage, in standard deviations of the reward.
        deviation: whose standard deviation divides the advantages, the group's or the batch's.
        timestep_fraction: share in (0, 1] of the steps that are trained, drawn anew each round.
    """

    learning_rate: ClassVar[float] = 3e-4
    title: ClassVar[str]

    images_per_prompt: int = 4
    updates_per_round: int = 1
    clip_range: float = 1e-4
    advantage_clip: float = 10.0
    deviation: Literal["group", "batch"] = "group"
    timestep_fraction: float = 1.0

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

    def check(self, tools: Tools, prompts: Sequence[str]) -> None:
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
    def prepare(self, tools: Tools, batches: Sequence[Batch]) -> Memory:
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

    def sample(self, tools: Tools, state: State, chosen: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
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
        self, tools: Tools, batches: Sequence[Batch], scores: Sequence[dict[str, Tensor]]
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

    def losses(self, tools: Tools, batch: Batch, part: int, memory: Memory) -> Iterator[Outcome]:
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
        self, tools: Tools, state: State, after: Tensor, *, advantages: Tensor, old: Tensor, alive: Tensor
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


def judged(tools: Tools, latents: Tensor, batch: Batch) -> dict[str, Tensor]:
    """What the reward says (B,) of the images as the pipeline would give them; on the CPU.

    An image with pixels that are not finite is not shown to the reward, a grey one is; its scores are NaN, as are those
    of an image whose total is not finite.
    """
    images = tools.rollout.show(latents)
    fine = images.flatten(1).isfinite().all(dim=1)
    grey = torch.full_like(images, 0.5)
    scores = told(tools.score(torch.where(fine[:, None, None, None], images, grey), batch.prompts))
    fine = fine.cpu() & scores["reward"].isfinite().cpu()
    return {name: torch.where(fine, value.cpu(), math.nan) for name, value in scores.items()}
