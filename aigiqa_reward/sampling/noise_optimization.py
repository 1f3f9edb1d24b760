"""Noise optimization: the initial noise of a one- to four-step model climbs up a reward's gradient.

Eyring et al. 2024, "ReNO: Enhancing One-step Text-to-Image Models through Reward-based Noise Optimization".
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aigiqa_reward import images as pixels
from aigiqa_reward.images import HIGHEST, LOWEST
from aigiqa_reward.sampling.callbacks import BatchReward
from aigiqa_reward.sampling.candidates import (
    FLAGGED,
    NON_FINITE,
    BestOfNOutput,
    Picture,
    Tally,
    conclude,
    judged,
    why_dropped,
)
from aigiqa_reward.sampling.families import family_of
from aigiqa_reward.sampling.rollout import Rollout, State
from aigiqa_reward.types import RewardOutput
from aigiqa_reward.utils.checks import check_prompt, check_reward, check_text, first_seed, integer, number

Optimizer = Literal["sgd", "adam"]

NO_GRADIENT = "NaN or infinite gradients"


def norm_log_likelihood(noise: Tensor) -> Tensor:
    """Logarithm of the chi density of the norm of standard normal noise e (Eyring et al. 2024, ReNO).

    It is (d - 1) log ||e|| - ||e||^2 / 2 + const, highest at ||e|| = sqrt(d - 1).

    Args:
        noise: of d numbers in any shape.

    Returns:
        () without the constant; differentiable.
    """
    norm = torch.linalg.vector_norm(noise)
    return (noise.numel() - 1) * norm.log() - norm.square() / 2


@dataclass(kw_only=True)
class Ascent:
    """Gradient ascent on the initial noise of one candidate. See `NoiseOptimizer` for what is not described here.

    Attributes:
        rollout: of the pipeline.
        start: one candidate at its beginning.
        reward: bound to its prompt.
        after: state of the generator that has drawn the initial noise.
        history: totals of the images so far.
        best: image (1, 3, H, W), its scores and its noise (1, ...), on the CPU; None without any.
        calls: of the denoiser so far.
    """

    rollout: Rollout
    start: State
    reward: BatchReward
    after: Tensor
    iterations: int
    optimizer: Optimizer
    learning_rate: float
    regularization: float
    clip: float
    checkpointed: bool
    progress: bool
    history: list[float] = field(default_factory=list)
    best: tuple[Tensor, RewardOutput, Tensor] | None = None
    calls: int = 0

    @property
    def sigma(self) -> float | Tensor:
        """Standard deviation of the initial latents."""
        return getattr(self.start.scheduler, "init_noise_sigma", 1.0)

    def climb(self) -> str | None:
        """Optimize to the end; or return why it had to stop before."""
        from tqdm.auto import tqdm

        latents = self.start.latents
        kind = torch.promote_types(latents.dtype, torch.float32)
        noise = (latents / self.sigma).detach().to(kind).requires_grad_()
        optimizer = self._optimizer_of(noise)
        for iteration in tqdm(range(self.iterations + 1), desc="noise", disable=not self.progress):
            last = iteration == self.iterations
            with torch.set_grad_enabled(not last):
                image = self.image(noise)
            reason = self.judge(image.detach(), noise.detach())
            if last or reason is not None:
                return reason
            noise.grad = self.gradient(image, noise)
            length = nn.utils.clip_grad_norm_([noise], self.clip)
            if not bool(length.isfinite()):
                return NO_GRADIENT
            optimizer.step()
        return None

    def image(self, noise: Tensor) -> Tensor:
        """The image (1, 3, H, W), not clamped, of noise of unit variance."""
        generator = torch.Generator("cpu")
        generator.set_state(self.after)
        latents = noise.to(self.start.latents.dtype) * self.sigma  # in this order, as pipelines do
        state = replace(self.start, latents=latents, generators=(generator,))
        while not state.done:
            prediction = self.rollout.predict(state, checkpointed=self.checkpointed and torch.is_grad_enabled())
            state = self.rollout.advance(state, prediction.output)
            self.calls += 1
        return self.rollout.decode(state.latents)

    def judge(self, image: Tensor, noise: Tensor) -> str | None:
        """Note the total of an image as a file would have it, and the image if it is the best; or why there is none."""
        if not bool(image.isfinite().all()):
            return NON_FINITE
        output = self.reward.rate(image)
        total = float(output.total)
        if (why := why_dropped(total)) is not None:
            return why
        self.history.append(total)
        if self.best is not None and total <= float(self.best[1].total):
            return None
        if not self.rollout.family.flagged(image.clamp(0, 1))[0]:
            self.best = image.cpu(), output.to("cpu"), noise.to("cpu", self.start.latents.dtype, copy=True)
        return None

    def gradient(self, image: Tensor, noise: Tensor) -> Tensor:
        """Of the objective in the noise."""
        # A Reward refuses pixels far outside of [0, 1]; out there they show no difference.
        total = self.reward(image.clamp(LOWEST, HIGHEST), self.reward.places(1)).total.sum()
        found = torch.autograd.grad(total, noise, allow_unused=True)[0] if total.requires_grad else None
        if found is None:
            raise ValueError(
                "reward: NoiseOptimizer needs gradients of the total in the images, and this reward gives none: it "
                "runs without gradients, or leaves torch on the way; take a differentiable one (list_rewards() says "
                "which are), or sample with BestOfN or ParticleSteering, which need none"
            )
        likelihood = torch.autograd.grad(norm_log_likelihood(noise), noise)[0]
        return found + self.regularization * likelihood

    def _optimizer_of(self, noise: Tensor) -> torch.optim.Optimizer:
        if self.optimizer == "adam":
            return torch.optim.Adam([noise], lr=self.learning_rate, maximize=True)
        return torch.optim.SGD([noise], lr=self.learning_rate, momentum=0.9, nesterov=True, maximize=True)

    def as_passed(self, noise: Tensor) -> Tensor:
        """Noise of unit variance as latents for the pipeline's call, on the CPU."""
        latents = noise.to(self.start.latents.device) * self.sigma
        return self.rollout.family.as_passed(latents, self.start.scheduler).to("cpu", noise.dtype)


@contextmanager
def without_weight_gradients(pipe: Any, reward: Any) -> Iterator[None]:
    """Let autograd keep nothing for gradients of weights."""
    modules = [module for module in (*pipe.components.values(), reward) if isinstance(module, nn.Module)]
    asked = {weight for module in modules for weight in module.parameters() if weight.requires_grad}
    try:
        for weight in asked:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in asked:
            weight.requires_grad_()


__all__ = ["NoiseOptimizer", "NoiseOptimizerOutput", "norm_log_likelihood"]

LEARNING_RATES: dict[Optimizer, float] = {"sgd": 5.0, "adam": 0.02}
"""For sgd ReNO's; for adam chosen here: as its steps do not shrink with the gradient, 20 of them move noise of standard
deviation 1 by at most 0.4 a number."""


@dataclass(frozen=True, kw_only=True)
class NoiseOptimizerOutput(BestOfNOutput):
    """The best image on the way, as the only candidate; `noises` holds its initial latents.

    Attributes:
        history: total of the image before each step of the optimizer, and after the last one; history[0] is the image
            of the seed.
    """

    history: list[float]

    @property
    def noise(self) -> Tensor:
        """Initial latents (1, ...) of the best image, on the CPU, of the pipeline's own type, as its call takes them.

        `pipe(prompt, latents=output.noise, **pipe_kwargs)` makes the image again. They are of about unit variance:
        Stable Diffusion, SDXL and PixArt multiply what they are given by their scheduler's `init_noise_sigma`. FLUX
        and Qwen-Image take them packed, (1, tokens, channels); FLUX.2 as (1, channels, height, width) of its tokens;
        all others as (1, channels, height, width). A sampler that draws noise on its way goes on where the initial
        noise ended: give such a pipeline a generator of the seed that has drawn `noise.shape` numbers before.
        """
        assert self.noises is not None, "an output without an image is an error"
        return self.noises[0]


class NoiseOptimizer:
    """Optimizes the initial noise of one image through the whole rollout: all steps, decoder and reward.

    In each iteration the noise e takes a step of gradient ascent on

        total(decode(rollout(e))) + regularization * ((d - 1) log ||e|| - ||e||^2 / 2)

    and of all images on the way the one of the highest total is returned. For models that make an image in one to four
    steps (SD-Turbo, SDXL-Turbo, latent consistency models, FLUX schnell). An iteration costs about three calls of the
    model, four when checkpointed. No parameter gets a `.grad`. In float16 gradients may vanish or overflow: load the
    pipeline in bfloat16 or float32; the noise itself is kept in float32.

    Args:
        pipe: a text-to-image pipeline of a family that `sampling.families` lists. It is left as it was.
        reward: a Reward, or any `f(images, prompts) -> (B,) tensor or RewardOutput` with gradients in the images.
        iterations: at least 1.
        learning_rate: above 0; by default `LEARNING_RATES` of the optimizer.
        regularization: at least 0; the default is ReNO's.
        clip: longest gradient of the whole, above 0; `math.inf` for no clipping. The default is ReNO's.
        optimizer: "sgd", with Nesterov momentum 0.9 as in ReNO, or "adam".
        checkpointed: keep no activations of the denoiser, compute them again on the way back.
        longest: more steps than this are refused.
        reward_prompt: the text that the reward sees; by default the pipeline's prompt.
        progress: show a progress bar over the iterations.

    Raises:
        TypeError: an argument of a wrong type, or a pipeline without an adapter.
        ValueError: an argument out of range.

    Example:
        >>> from aigiqa_reward import create_reward, load_embedded_pipeline
        >>> from aigiqa_reward.sampling import NoiseOptimizer
        >>> optimize = NoiseOptimizer(load_embedded_pipeline(), create_reward("compact"), iterations=2, progress=False)
        >>> result = optimize("a red apple on a blue background", seed=0, num_inference_steps=1)
        >>> len(result.history), result.scores[0] == max(result.history), result.noise.shape
        (3, True, torch.Size([1, 4, 16, 16]))
    """

    def __init__(
        self,
        pipe: Any,
        reward: Any,
        iterations: Any = 20,
        learning_rate: float | None = None,
        regularization: float = 0.01,
        clip: float = 0.1,
        optimizer: Optimizer = "sgd",
        checkpointed: bool = True,
        longest: Any = 4,
        reward_prompt: Any = None,
        progress: bool = True,
    ) -> None:
        family_of(pipe, need="NoiseOptimizer")
        self.pipe: Any = pipe
        self.reward = check_reward(reward)
        self.iterations = integer("iterations", iterations, least=1)
        if optimizer not in LEARNING_RATES:
            raise ValueError(f"optimizer: expected one of {', '.join(LEARNING_RATES)}, got {optimizer!r}")
        self.optimizer: Optimizer = optimizer
        rate = LEARNING_RATES[optimizer] if learning_rate is None else learning_rate
        self.learning_rate = number(
            "learning_rate", rate, f"above 0; try {LEARNING_RATES[optimizer]}", lambda v: 0 < v < math.inf
        )
        self.regularization = number(
            "regularization", regularization, "of at least 0; try 0.01", lambda v: 0 <= v < math.inf
        )
        self.clip = number("clip", clip, "above 0; try 0.1, or math.inf for no clipping", lambda v: v > 0)
        self.checkpointed = checkpointed
        self.longest = integer("longest", longest, least=1)
        if reward_prompt is not None:
            check_text(reward_prompt, "reward_prompt", "leave it out to use the pipeline's prompt")
        self.reward_prompt = reward_prompt
        self.progress = progress

    def __call__(self, prompt: Any, seed: Any = 0, **pipe_kwargs: Any) -> NoiseOptimizerOutput:
        """Optimize the noise of one prompt.

        Args:
            prompt: one text.
            seed: of the noise to start from.
            **pipe_kwargs: arguments of the pipeline's call (steps, guidance, size, negative prompt, ...).

        Warns:
            UserWarning: if an image, its total or a gradient is not finite: the best so far is returned.

        Raises:
            TypeError: a list of prompts, or another argument of a wrong type.
            ValueError: an argument that cannot be served, more steps than `longest`, a reward without gradients.
            NothingRankedError: if there is no image: not finite from the start, or all flagged by the safety checker.
        """
        seed = first_seed(seed, 1, "the noise")
        text = check_text(check_prompt(prompt), "prompt", "pass what the image shall show")
        if torch.is_inference_mode_enabled():
            raise ValueError("NoiseOptimizer: torch.inference_mode() forbids gradients; call it outside of that block")
        rollout = Rollout(self.pipe, need="NoiseOptimizer", **pipe_kwargs)
        generator = torch.Generator("cpu").manual_seed(seed)
        try:
            start = rollout.start(rollout.encode([text]), [generator])
            self._check_steps(start.steps)
            reward = BatchReward(self.reward, text if self.reward_prompt is None else self.reward_prompt)
            ascent = self._ascent(rollout, start, reward, generator.get_state())
            with torch.enable_grad(), without_weight_gradients(self.pipe, self.reward):
                stopped = ascent.climb()
        finally:
            if hasattr(self.pipe, "maybe_free_model_hooks"):
                self.pipe.maybe_free_model_hooks()  # offloads, as the pipeline does at the end of a call
        output = _output(ascent, seed, stopped)
        conclude(output, 1, name="seed", stacklevel=3)
        if stopped is not None:
            warnings.warn(
                f"NoiseOptimizer stopped after {len(ascent.history)} images because of {stopped}; the best so far is "
                "returned. Half precision overflows easily: load the pipeline in bfloat16 or float32, or lower "
                "learning_rate=",
                stacklevel=2,
            )
        return output

    def _check_steps(self, steps: int) -> None:
        if steps > self.longest:
            raise ValueError(
                f"num_inference_steps: expected at most longest={self.longest} calls of the denoiser, got {steps}; the "
                "gradient passes through each of them, costs time and memory for each and fades or explodes on a long "
                "way. Use a model of one to four steps with num_inference_steps=1 to 4, raise longest=, or take "
                "BestOfN or ParticleSteering, which need no gradients"
            )

    def _ascent(self, rollout: Rollout, start: State, reward: BatchReward, after: Tensor) -> Ascent:
        return Ascent(
            rollout=rollout,
            start=start,
            reward=reward,
            after=after,
            iterations=self.iterations,
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            regularization=self.regularization,
            clip=self.clip,
            checkpointed=self.checkpointed,
            progress=self.progress,
        )


def _output(ascent: Ascent, seed: int, stopped: str | None) -> NoiseOptimizerOutput:
    tally = Tally(1)
    tally.calls = ascent.calls
    if ascent.best is None:
        tally.leave(seed, stopped or FLAGGED)
    else:
        image, scores, noise = ascent.best
        picture = Picture(image=pixels.to_pil(ascent.rollout.family.marked(image))[0], noise=ascent.as_passed(noise))
        tally.add([seed], judged(scores), lambda _: picture)
    return NoiseOptimizerOutput(**vars(tally.output()), history=ascent.history)
