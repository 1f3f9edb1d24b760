"""Feynman-Kac steering: particles of one prompt that are resampled by a reward's scores of their previews.

Singhal et al. 2025, "A General Framework for Inference-time Scaling and Steering of Diffusion Models".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from aigiqa_reward.rewards.bound import BoundReward
from aigiqa_reward.sampling.ancestral import ANCESTRAL, advance
from aigiqa_reward.sampling.candidates import BestOfNOutput, Judged, Picture, Preview, Tally, conclude, judge
from aigiqa_reward.sampling.families import family_of
from aigiqa_reward.sampling.pipeline_utils import in_chunks
from aigiqa_reward.sampling.rollout import Rollout, State
from aigiqa_reward.sampling.schedulers import check_scheduler
from aigiqa_reward.types import RewardFunction
from aigiqa_reward.utils.checks import check_prompt, check_reward, check_text, first_seed, integer, number

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

Potential = Literal["difference", "max", "sum"]

POTENTIALS: tuple[Potential, ...] = ("difference", "max", "sum")


def log_potential(potential: Potential, rewards: Tensor, temperature: float) -> Tensor:
    """Return the logarithm of the potential of the latest previews (Singhal et al. 2025), lambda = 1 / temperature.

    Args:
        potential: "difference": r_k - r_{k-1}, where r_0 = 0; "max": of r_1, ..., r_k; "sum": of the same.
        rewards: (N, k) previews of each particle's line of descent, the latest one last; k is at least 1.
        temperature: above 0.

    Returns:
        (N,) to be added to the logarithms of the weights.
    """
    if potential == "difference":
        value = rewards[:, -1] if rewards.shape[1] == 1 else rewards[:, -1] - rewards[:, -2]
    else:
        value = rewards.amax(dim=1) if potential == "max" else rewards.sum(dim=1)
    return value / temperature


def last_log_potential(rewards: Tensor, so_far: Tensor, temperature: float) -> Tensor:
    """Return the logarithm of the final images' potential: all potentials of a line then multiply to exp(r / T).

    `so_far` (N,) is the sum of the logarithms of the potentials at the previews, `temperature` is T.
    """
    return rewards / temperature - so_far


def effective_sample_size(weights: Tensor) -> float:
    """Return (sum w)^2 / sum w^2 of weights (N,), in [1, N] (Kong et al. 1994)."""
    return float(weights.sum() ** 2 / weights.square().sum())


def systematic_resampling(weights: Tensor, offset: float) -> list[int]:
    """Return the places of N survivors, ascending; place i comes N w_i times, rounded up or down (Kitagawa 1996).

    Args:
        weights: (N,) at least 0, of any positive sum.
        offset: uniform in [0, 1); the only randomness.
    """
    edges = weights.cumsum(0) / weights.sum()
    points = (offset + torch.arange(len(weights), dtype=weights.dtype)) / len(weights)
    return torch.searchsorted(edges / edges[-1], points, right=True).clamp(max=len(weights) - 1).tolist()


@dataclass(frozen=True, kw_only=True)
class SteeringOutput(BestOfNOutput):
    """The best particles of one prompt; particle i has the seed `seed + i`.

    A seed alone does not reproduce its image; the same call of the same `ParticleSteering` does. Previews are those
    of a particle's line of descent.

    Attributes:
        effective_sample_sizes: (steps taken, effective sample size) at each preview, before any resampling.
        ancestors: (particles,) place at which each final particle's line of descent began: whose initial noise it has.
        weights: (particles,) importance weights of the final particles, of sum 1. With them the particles represent
            p(image) exp(total / temperature), normalized.
    """

    effective_sample_sizes: list[tuple[int, float]]
    ancestors: list[int]
    weights: list[float]


class ParticleSteering:
    """Samples particles of one prompt, which a reward copies or drops during sampling.

    At some of the steps, the predicted clean image of each particle is decoded and scored. A potential of these scores
    weighs the particles; when their effective sample size has fallen below `resample_below * particles`, they are
    resampled by their weights. Copies diverge again, because the sampler adds noise (`ancestral_step`, in place of the
    scheduler's own step). Without resampling, the weighted particles represent the model's images tilted by
    exp(total / temperature); with it, better ones are reached.

    Initial and later noise of particle i come from the seed `seed + i`; resampling draws from the seed
    `seed + particles`. The same call gives the same bits; another `batch_size` gives the same particles up to rounding.

    Args:
        pipe: a text-to-image pipeline of a family in `sampling.families`, with a scheduler of `ANCESTRAL`. It is not
            changed.
        reward: a Reward, or any `f(images, prompts) -> (B,) tensor or RewardOutput`; needs no gradients.
        particles: number of particles, at least 2.
        potential: "difference" rewards a preview that has become better, "max" the best one of the line of descent,
            "sum" all of them. The final images' potential compensates for the previews', so that each has the same
            target; for "sum" with many previews it can no longer do so.
        temperature: above 0, on the scale of the totals; the smaller, the fewer lines of descent survive. 0.01 is our
            choice: the paper's lambda of 10 is for ImageReward, whose scores spread ten times as wide as ours.
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
        reward: RewardFunction,
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
        family_of(pipe, need="ParticleSteering")
        check_scheduler(pipe.scheduler, need="ParticleSteering", served=ANCESTRAL)
        self.pipe: Any = pipe
        self.reward: RewardFunction = check_reward(reward)
        self.particles = integer("particles", particles, least=2)
        if potential not in POTENTIALS:
            raise ValueError(f"potential: expected one of {', '.join(POTENTIALS)}, got {potential!r}")
        self.potential: Potential = potential
        self.temperature = number("temperature", temperature, "above 0; try 0.01", lambda value: value > 0)
        self.resample_below = number("resample_below", resample_below, "in [0, 1]; try 0.5", lambda v: 0 <= v <= 1)
        self.first = number("first", first, "in [0, 1], a share of the steps; try 0.2", lambda v: 0 <= v <= 1)
        self.every = integer("every", every, least=1)
        equal = "in (0, 1], without noise copies of a particle would stay equal; try 1.0"
        self.eta = number("eta", eta, equal, lambda value: 0 < value <= 1)
        self.top_k = integer("top_k", top_k, least=1)
        if self.top_k > self.particles:
            raise ValueError(f"top_k: expected at most particles={self.particles}, got {self.top_k}; ask for fewer")
        self.batch_size = integer("batch_size", batch_size, least=1)
        if reward_prompt is not None:
            check_text(reward_prompt, "reward_prompt", "leave it out to use the pipeline's prompt")
        self.reward_prompt = reward_prompt
        self.progress = progress

    def __call__(self, prompt: str, seed: int = 0, **pipe_kwargs: Any) -> SteeringOutput:
        """Sample the particles of one prompt and return the best.

        Args:
            prompt: one text.
            seed: seed of the first particle.
            **pipe_kwargs: arguments of the pipeline's call (steps, guidance, size, negative prompt, ...).

        Warns:
            UserWarning: once, if particles were dropped and not replaced: NaN or infinite pixels, flagged by the safety
                checker, or scored NaN or infinite by the reward. Their weight is 0.

        Raises:
            NothingRankedError: if no particle is left.
        """
        seed = first_seed(seed, self.particles + 1, "all particles, and their resampling,")
        text = check_text(check_prompt(prompt), "prompt", "pass a description of the image")
        check_scheduler(self.pipe.scheduler, need="ParticleSteering", served=ANCESTRAL)
        if "eta" in pipe_kwargs:
            raise ValueError("eta: expected as an argument of ParticleSteering, got it in the call; move it there")
        rollout = Rollout(self.pipe, need="ParticleSteering", **pipe_kwargs)
        judged_by = text if self.reward_prompt is None else self.reward_prompt
        run = _Run(plan=self, rollout=rollout, reward=BoundReward(self.reward, [judged_by]), text=judged_by, seed=seed)
        try:
            with torch.no_grad():
                output = run.sample(text)
        finally:
            if hasattr(self.pipe, "maybe_free_model_hooks"):
                self.pipe.maybe_free_model_hooks()  # offloads, as the pipeline does at the end of a call
        conclude(output, self.top_k, name="seed", stacklevel=3)
        return output


@dataclass(kw_only=True)
class _Particles:
    """N particles at one step; row i of everything belongs to place i."""

    state: State  # its generators belong to places, not to lines of descent
    clean: Tensor  # (N, ...) clean latents that were predicted last
    ancestors: list[int]  # place at which each line of descent began
    previews: list[list[Preview]]  # of each line
    reasons: list[str | None]  # why a particle was dropped, or None
    log_weights: Tensor  # (N,) float64, not normalized
    log_product: Tensor  # (N,) sum of the logarithms of a line's potentials
    sizes: list[tuple[int, float]] = field(default_factory=list)  # (steps taken, effective sample size) per preview

    @property
    def alive(self) -> list[int]:
        """Places of those that were not dropped."""
        return [row for row, reason in enumerate(self.reasons) if reason is None]

    def drop(self, row: int, reason: str) -> None:
        """Set a particle's weight to 0."""
        self.reasons[row], self.log_weights[row] = reason, -math.inf

    def weigh(self, log_potentials: Tensor, rows: list[int]) -> None:
        """Multiply the weights at these places by potentials, given by their logarithms."""
        self.log_weights[rows] += log_potentials
        self.log_product[rows] += log_potentials

    def weights(self) -> Tensor:
        """(N,) of sum 1."""
        return self.log_weights.softmax(dim=0)

    def select(self, rows: list[int]) -> None:
        """Continue with these places; the generators stay, so that copies draw different noise."""
        self.state = replace(self.state, latents=self.state.latents[rows])
        self.clean = self.clean[rows]
        self.ancestors = [self.ancestors[row] for row in rows]
        self.previews = [list(self.previews[row]) for row in rows]
        self.reasons = [self.reasons[row] for row in rows]
        self.log_product = self.log_product[rows]
        self.log_weights = torch.zeros_like(self.log_product)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One call of a ParticleSteering; `text` is the prompt that the reward sees."""

    plan: ParticleSteering
    rollout: Rollout
    reward: BoundReward
    text: str
    seed: int

    def sample(self, text: str) -> SteeringOutput:
        """Sample the particles from noise to their images."""
        from diffusers.utils.torch_utils import randn_tensor
        from tqdm.auto import tqdm

        plan, count = self.plan, self.plan.particles
        generators = [torch.Generator("cpu").manual_seed(self.seed + place) for place in range(count)]
        survival = torch.Generator("cpu").manual_seed(self.seed + count)
        start = self.rollout.start(self.rollout.encode([text])[[0] * count], generators)
        particles = _Particles(
            state=start,
            clean=torch.zeros_like(start.latents, dtype=torch.promote_types(start.latents.dtype, torch.float32)),
            ancestors=list(range(count)),
            previews=[[] for _ in range(count)],
            reasons=[None] * count,
            log_weights=torch.zeros(count, dtype=torch.float64),
            log_product=torch.zeros(count, dtype=torch.float64),
        )
        tally = Tally(plan.top_k)
        tally.calls = 0
        looks = range(max(1, round(plan.first * start.steps)), start.steps, plan.every)
        for step in tqdm(range(start.steps), desc="steering", disable=not plan.progress):
            tally.calls += len(particles.alive)
            self.predict(particles, look=step + 1 in looks)
            if not particles.alive:
                break
            if step + 1 in looks:
                self.resample(particles, survival)
            clean = particles.clean
            noise = randn_tensor(clean.shape, generators, device=clean.device, dtype=clean.dtype)
            particles.state = advance(particles.state, clean, plan.eta, noise)
        return self.finish(particles, tally)

    def predict(self, particles: _Particles, *, look: bool) -> None:
        """Call the denoiser once for every particle; with `look`, score the predicted images and weigh by them."""
        state, steps = particles.state, particles.state.steps

        def work(rows: Sequence[int]) -> tuple[Tensor, list[Judged]]:
            clean = self.rollout.predict(state[rows]).clean
            shown = self.rollout.show(clean) if look else None
            return clean, [] if shown is None else judge(shown, [False] * len(rows), self.reward, self.text)

        for rows, (clean, judged) in in_chunks(particles.alive, self.plan.batch_size, work, self.rollout.pipe):
            particles.clean[rows] = clean
            for row, scores in zip(rows, judged, strict=False):  # none without `look`
                if scores.dropped is None:
                    particles.previews[row].append(scores.preview(state.step + 1, steps))
                else:
                    particles.drop(row, scores.dropped)
        if look and (rows := particles.alive):
            totals = [[preview.total for preview in particles.previews[row]] for row in rows]
            rewards = torch.tensor(totals, dtype=torch.float64)
            particles.weigh(log_potential(self.plan.potential, rewards, self.plan.temperature), rows)

    def resample(self, particles: _Particles, survival: torch.Generator) -> None:
        """Record the effective sample size; where it is too small, resample the particles by their weights."""
        weights = particles.weights()
        size = effective_sample_size(weights)
        particles.sizes.append((particles.state.step + 1, size))
        if size < self.plan.resample_below * len(weights):
            offset = torch.rand((), generator=survival, dtype=torch.float64)
            particles.select(systematic_resampling(weights, float(offset)))

    def finish(self, particles: _Particles, tally: Tally) -> SteeringOutput:
        """Decode and score the remaining particles, and give them their final weights."""
        state, seeds = particles.state, range(self.seed, self.seed + self.plan.particles)

        def work(rows: Sequence[int]) -> None:
            images = self.rollout.show(state.latents[list(rows)], final=True)
            candidates = judge(images, self.rollout.family.flagged(images), self.reward, self.text)
            tally.add([seeds[row] for row in rows], candidates, lambda row: Picture.of(images, row))

        for _ in in_chunks(particles.alive, self.plan.batch_size, work, self.rollout.pipe):
            pass
        for row, (seed, reason, previews) in enumerate(zip(seeds, particles.reasons, particles.previews, strict=True)):
            for preview in previews:
                tally.preview(seed, preview)
            if reason is not None:
                tally.leave(seed, reason)
            elif math.isnan(tally.total(seed)):
                particles.drop(row, "its image could not be ranked")
        rows = particles.alive
        totals = torch.tensor([tally.total(seeds[row]) for row in rows], dtype=torch.float64)
        particles.weigh(last_log_potential(totals, particles.log_product[rows], self.plan.temperature), rows)
        return SteeringOutput(
            **vars(tally.output()),
            effective_sample_sizes=particles.sizes,
            ancestors=particles.ancestors,
            weights=particles.weights().tolist(),
        )
