"""Feynman-Kac steering: particles of one prompt that are resampled by a reward's scores of their previews.

Singhal et al. 2025, "A General Framework for Inference-time Scaling and Steering of Diffusion Models".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from aigiqa_reward.sampling.ancestral import ANCESTRAL, advance
from aigiqa_reward.sampling.candidates import BestOfNOutput, Judged, Picture, Preview, Tally, conclude, judge
from aigiqa_reward.sampling.pipeline_utils import in_chunks
from aigiqa_reward.sampling.rollout import Call, PromptSampler, State
from aigiqa_reward.types import RewardFunction
from aigiqa_reward.utils.checks import integer, number

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

Potential = Literal["difference", "max", "sum"]

POTENTIALS: tuple[Potential, ...] = ("difference", "max", "sum")


def log_potential(potential: Potential, rewards: Tensor, temperature: float) -> Tensor:
    """Return the logarithm (N,) of the potential of the last previews (Singhal et al. 2025); lambda = 1 / temperature.

    Args:
        potential: "difference": r_k - r_{k-1}, where r_0 = 0; "max": of r_1, ..., r_k; "sum": of the same.
        rewards: (N, k) totals of the previews of each line of descent, the latest one last; k is at least 1.
        temperature: above 0.
    """
    if potential == "difference":
        value = rewards[:, -1] if rewards.shape[1] == 1 else rewards[:, -1] - rewards[:, -2]
    else:
        value = rewards.amax(dim=1) if potential == "max" else rewards.sum(dim=1)
    return value / temperature


def last_log_potential(rewards: Tensor, so_far: Tensor, temperature: float) -> Tensor:
    """Return the logarithm of the final images' potential, so that all of a line, with `so_far`, sum to r / T."""
    return rewards / temperature - so_far


def effective_sample_size(weights: Tensor) -> float:
    """Return (sum w)^2 / sum w^2 of weights (N,), in [1, N] (Kong et al. 1994)."""
    return float(weights.sum() ** 2 / weights.square().sum())


def systematic_resampling(weights: Tensor, offset: float) -> list[int]:
    """Return the places of N survivors, ascending; place i comes N w_i times, rounded up or down (Kitagawa 1996).

    `offset`, uniform in [0, 1), is the only randomness.
    """
    edges = weights.cumsum(0) / weights.sum()
    points = (offset + torch.arange(len(weights), dtype=weights.dtype)) / len(weights)
    return torch.searchsorted(edges / edges[-1], points, right=True).clamp(max=len(weights) - 1).tolist()


@dataclass(frozen=True, kw_only=True)
class SteeringOutput(BestOfNOutput):
    """The best particles of one prompt; particle i has the number `seed + i`.

    Only the same call makes an image again, so that all `seeds` are None. Previews are those of a particle's line of
    descent.

    Attributes:
        effective_sample_sizes: (steps taken, effective sample size) at each preview, before any resampling.
        ancestors: (particles,) place whose initial noise each final particle has.
        weights: (particles,) of sum 1; with them the particles represent p(image) exp(total / temperature), normalized.
    """

    effective_sample_sizes: list[tuple[int, float]]
    ancestors: list[int]
    weights: list[float]


class ParticleSteering(PromptSampler):
    """Samples particles of one prompt, which a reward copies or drops during sampling.

    At some of the steps, each particle's predicted clean image is decoded and scored. A potential of these scores
    weighs the particles; when their effective sample size has fallen below `resample_below * particles`, they are
    resampled by their weights. Copies diverge again, because the sampler adds noise (`ancestral_step`). Without
    resampling, the weighted particles represent the model's images tilted by exp(total / temperature); with it, better
    ones are reached.

    Particle i draws all its noise from the seed `seed + i`, resampling from `seed + particles`. The same call gives the
    same bits; another `batch_size` gives the same particles up to rounding.

    Args:
        pipe: a text-to-image pipeline of a family in `sampling.families`, with a scheduler of `ANCESTRAL`; not changed.
        reward: a Reward, or any `f(images, prompts) -> (B,) tensor or RewardOutput`; needs no gradients.
        particles: number of particles, at least 2.
        potential: "difference" rewards a preview that has become better, "max" the best one of the line of descent,
            "sum" all of them. All have the same target, but "sum" misses it with many previews.
        temperature: above 0, on the scale of the totals; the smaller, the fewer lines of descent survive. The paper's
            0.1 is for ImageReward, whose scores spread ten times as wide as ours.
        resample_below: share of `particles` in [0, 1]; 0 never resamples.
        first: share of the steps in [0, 1] after which the first preview is scored; 1 for none.
        every: number of steps between previews after the first.
        eta: noise of the sampler, in (0, 1].
        top_k: number of images to return, in [1, particles].
        batch_size: particles in the denoiser, the decoder and the reward at once, at least 1.
        reward_prompt: the text that the reward sees; by default the pipeline's prompt.
        progress: show a progress bar over the steps.

    Example:
        >>> from aigiqa_reward import create_reward, load_embedded_pipeline
        >>> from aigiqa_reward.sampling import ParticleSteering
        >>> steering = ParticleSteering(load_embedded_pipeline(), create_reward("compact"), particles=2, progress=False)
        >>> result = steering("a red apple on a blue background", seed=0, num_inference_steps=3)
        >>> len(result.images), len(result.all_scores)
        (1, 2)
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        reward: RewardFunction | str,
        particles: int = 4,
        potential: Potential = "difference",
        temperature: float = 0.01,
        resample_below: float = 0.5,
        first: float = 0.2,
        every: int = 1,
        eta: float = 1.0,
        top_k: int = 1,
        batch_size: int = 4,
        reward_prompt: str | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__(pipe, reward, reward_prompt, progress)
        self._check_scheduler(ANCESTRAL)
        self.particles = integer("particles", particles, least=2)
        if potential not in POTENTIALS:
            raise ValueError(f"potential: expected one of {', '.join(POTENTIALS)}, got {potential!r}")
        self.potential: Potential = potential
        self.temperature = number("temperature", temperature, "above 0; try 0.01", lambda value: value > 0)
        self.resample_below = number("resample_below", resample_below, "in [0, 1]; try 0.5", lambda v: 0 <= v <= 1)
        self.first = number("first", first, "in [0, 1], a share of the steps; try 0.2", lambda v: 0 <= v <= 1)
        self.every = integer("every", every, least=1)
        self.eta = number("eta", eta, "in (0, 1]: copies diverge by noise; try 1.0", lambda v: 0 < v <= 1)
        self.top_k = integer("top_k", top_k, least=1)
        if self.top_k > self.particles:
            raise ValueError(f"top_k: expected at most particles={self.particles}, got {self.top_k}; ask for fewer")
        self.batch_size = integer("batch_size", batch_size, least=1)

    def __call__(self, prompt: str, seed: int = 0, **pipe_kwargs: Any) -> SteeringOutput:
        """Sample the particles of one prompt and return the best.

        Particles whose pixels or totals are not finite, or that the safety checker flags, have the weight 0; one
        warning names those that were not replaced. If none is left, a NothingRankedError is raised.

        Args:
            prompt: one text.
            seed: seed of the first particle.
            **pipe_kwargs: arguments of the pipeline's call (steps, guidance, size, negative prompt, ...).
        """
        self._check_scheduler(ANCESTRAL)
        if "eta" in pipe_kwargs:
            raise ValueError("eta: expected as an argument of ParticleSteering, got it in the call; move it there")
        seeds, of = self.particles + 1, "all particles, and their resampling,"
        with self._call(prompt, seed, seeds, of, pipe_kwargs) as call, torch.no_grad():
            output = _Run(self, call).sample()
        conclude(output, self.top_k, name="seed", stacklevel=3)
        return output


class _Run:
    """One call of a ParticleSteering; row i of everything belongs to place i of the N particles."""

    def __init__(self, plan: ParticleSteering, call: Call) -> None:
        count, rollout = plan.particles, call.rollout
        self.plan, self.call, self.tally = plan, call, Tally(plan.top_k)
        self.seeds = range(call.seed, call.seed + count)
        # Generators belong to places, not to lines of descent, so that copies draw different noise.
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in self.seeds]
        self.survival = torch.Generator("cpu").manual_seed(call.seed + count)
        self.state: State = rollout.start(rollout.encode([call.prompt])[[0] * count], self.generators)
        kind = torch.promote_types(self.state.latents.dtype, torch.float32)
        self.clean = torch.zeros_like(self.state.latents, dtype=kind)  # latents x0 that were predicted last
        self.ancestors = list(range(count))  # place at which each line of descent began
        self.previews: list[list[Preview]] = [[] for _ in range(count)]  # of each line
        self.reasons: list[str | None] = [None] * count  # why a particle was dropped
        self.log_weights = torch.zeros(count, dtype=torch.float64)  # not normalized
        self.log_product = torch.zeros(count, dtype=torch.float64)  # sums of the logarithms of a line's potentials
        self.sizes: list[tuple[int, float]] = []  # (steps taken, effective sample size) per preview

    @property
    def alive(self) -> list[int]:
        return [row for row, reason in enumerate(self.reasons) if reason is None]

    def drop(self, row: int, reason: str) -> None:
        self.reasons[row], self.log_weights[row] = reason, -math.inf

    def weigh(self, log_potentials: Tensor, rows: list[int]) -> None:
        self.log_weights[rows] += log_potentials
        self.log_product[rows] += log_potentials

    def sample(self) -> SteeringOutput:
        """Sample the particles from noise to their images."""
        from diffusers.utils.torch_utils import randn_tensor
        from tqdm.auto import tqdm

        plan, steps, clean = self.plan, self.state.steps, self.clean
        looks = range(max(1, round(plan.first * steps)), steps, plan.every)
        self.tally.calls = 0
        for step in tqdm(range(steps), desc="steering", disable=not plan.progress):
            self.tally.calls += len(self.alive)
            self.predict(look=step + 1 in looks)
            if not self.alive:
                break
            if step + 1 in looks:
                self.resample()
            noise = randn_tensor(clean.shape, self.generators, device=clean.device, dtype=clean.dtype)
            self.state = advance(self.state, self.clean, plan.eta, noise)
        return self.finish()

    def predict(self, *, look: bool) -> None:
        """Call the denoiser once for every particle; with `look`, score the predicted images and weigh by them."""
        call, state = self.call, self.state

        def work(rows: Sequence[int]) -> tuple[Tensor, list[Judged]]:
            clean = call.rollout.predict(state[rows]).clean
            none = [False] * len(rows)
            return clean, judge(call.rollout.show(clean), none, call.reward, call.text) if look else []

        for rows, (clean, judged) in in_chunks(self.alive, self.plan.batch_size, work, call.rollout.pipe):
            self.clean[rows] = clean
            for row, scores in zip(rows, judged, strict=False):  # none without `look`
                if scores.dropped is None:
                    self.previews[row].append(scores.preview(state.step + 1, state.steps))
                else:
                    self.drop(row, scores.dropped)
        if look and (rows := self.alive):
            totals = [[preview.total for preview in self.previews[row]] for row in rows]
            rewards = torch.tensor(totals, dtype=torch.float64)
            self.weigh(log_potential(self.plan.potential, rewards, self.plan.temperature), rows)

    def resample(self) -> None:
        """Record the effective sample size; where it is too small, resample the particles by their weights."""
        weights = self.log_weights.softmax(dim=0)
        size = effective_sample_size(weights)
        self.sizes.append((self.state.step + 1, size))
        if size >= self.plan.resample_below * len(weights):
            return
        rows = systematic_resampling(weights, float(torch.rand((), generator=self.survival, dtype=torch.float64)))
        self.state = replace(self.state, latents=self.state.latents[rows])
        self.clean, self.log_product = self.clean[rows], self.log_product[rows]
        self.ancestors = [self.ancestors[row] for row in rows]
        self.reasons = [self.reasons[row] for row in rows]
        self.previews = [list(self.previews[row]) for row in rows]
        self.log_weights = torch.zeros_like(self.log_product)

    def finish(self) -> SteeringOutput:
        """Decode and score the remaining particles, and give them their final weights."""
        call, seeds, tally = self.call, self.seeds, self.tally

        def work(rows: Sequence[int]) -> None:
            images = call.rollout.show(self.state.latents[list(rows)], final=True)
            candidates = judge(images, call.rollout.family.flagged(images), call.reward, call.text)
            tally.add([seeds[row] for row in rows], candidates, lambda row: Picture.of(images, row, seeded=False))

        list(in_chunks(self.alive, self.plan.batch_size, work, call.rollout.pipe))
        for row, (seed, reason, previews) in enumerate(zip(seeds, self.reasons, self.previews, strict=True)):
            for preview in previews:
                tally.preview(seed, preview)
            if reason is not None:
                tally.leave(seed, reason)
            elif math.isnan(tally.total(seed)):
                self.drop(row, "its image could not be ranked")
        rows = self.alive
        totals = torch.tensor([tally.total(seeds[row]) for row in rows], dtype=torch.float64)
        self.weigh(last_log_potential(totals, self.log_product[rows], self.plan.temperature), rows)
        return SteeringOutput(
            **vars(tally.output()),
            effective_sample_sizes=self.sizes,
            ancestors=self.ancestors,
            weights=self.log_weights.softmax(dim=0).tolist(),
        )
