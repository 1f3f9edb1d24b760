"""Noise optimization: gradient ascent on the initial noise of a one- to four-step model.

Eyring et al. 2024, "ReNO: Enhancing One-step Text-to-Image Models through Reward-based Noise Optimization".
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from aigiqa_reward.rewards.smooth import sharpness_aware
from aigiqa_reward.sampling import candidates
from aigiqa_reward.sampling.candidates import BestOfNOutput, Picture, Tally, conclude, judged, why_dropped
from aigiqa_reward.sampling.guidance import reward_gradient
from aigiqa_reward.sampling.rollout import Call, PromptSampler, State, displayed
from aigiqa_reward.types import RewardFunction, RewardOutput
from aigiqa_reward.utils.checks import integer, number
from aigiqa_reward.utils.isolation import check_gradients_allowed

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

Optimizer = Literal["sgd", "adam"]

LEARNING_RATES: dict[Optimizer, float] = {"sgd": 5.0, "adam": 0.02}
"""Defaults: for sgd ReNO's; 20 steps of adam at 0.02 move noise of unit variance by at most 0.4 per number."""


def norm_log_likelihood(noise: Tensor) -> Tensor:
    """Return the logarithm of the chi density of the norm of d standard normal numbers e, without its constant.

    It is (d - 1) log ||e|| - ||e||^2 / 2, highest at ||e|| = sqrt(d - 1), and differentiable.
    """
    norm = torch.linalg.vector_norm(noise)
    return (noise.numel() - 1) * norm.log() - norm.square() / 2


@dataclass(frozen=True, kw_only=True)
class NoiseOptimizerOutput(BestOfNOutput):
    """The best image of the optimization, as the only candidate; `noises` holds its initial latents."""

    history: list[float]  # totals of the image before each step of the optimizer (the first is the seed's), and at last

    @property
    def noise(self) -> Tensor:
        """Initial latents (1, ...) of the best image, on the CPU, of the pipeline's own type, as its call takes them.

        `pipe(prompt, latents=output.noise, **pipe_kwargs)` makes the image again. They are of about unit variance, and
        packed where the pipeline's call takes them so: (1, tokens, channels) in FLUX and Qwen-Image. A sampler that
        draws noise between steps needs a generator of the seed that has drawn `noise.shape` numbers before.
        """
        assert self.noises is not None, "an output without an image is an error"
        return self.noises[0]


class NoiseOptimizer(PromptSampler):
    """Optimizes the initial noise of one image through the whole rollout: all steps, decoder and reward.

    In each iteration the noise e takes a step of gradient ascent on

        total(decode(rollout(e))) + regularization * ((d - 1) log ||e|| - ||e||^2 / 2)

    and of all images along the way the one with the highest total is returned. For models that make an image in one to
    four steps (SD-Turbo, SDXL-Turbo, latent consistency models, FLUX schnell). An iteration costs about three calls of
    the model, four when checkpointed. No parameter gets a `.grad`. In float16 gradients may vanish or overflow: load
    the pipeline in bfloat16 or float32; the noise itself is kept in float32.

    Args:
        pipe: a text-to-image pipeline of a family in `sampling.families`. It is left as it was.
        reward: a Reward, or any `f(images, prompts) -> (B,) tensor or RewardOutput` with gradients in the images.
        iterations: steps of the optimizer, at least 1.
        learning_rate: above 0; by default `LEARNING_RATES` of the optimizer.
        regularization: weight of the noise's log-likelihood, at least 0; the default is ReNO's.
        clip: maximum gradient norm for clipping, above 0; `math.inf` for no clipping. The default is ReNO's.
        optimizer: "sgd", with Nesterov momentum 0.9 as in ReNO, or "adam".
        checkpointed: keep no activations of the denoiser, compute them again in the backward pass.
        longest: maximum number of sampling steps; more are an error.
        reward_prompt: the text that the reward sees; by default the pipeline's prompt.
        progress: show a progress bar over the iterations.
        image_radius: see `RewardGuidance`.

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
        pipe: DiffusionPipeline,
        reward: RewardFunction | str,
        iterations: int = 20,
        learning_rate: float | None = None,
        regularization: float = 0.01,
        clip: float = 0.1,
        optimizer: Optimizer = "sgd",
        checkpointed: bool = True,
        longest: int = 4,
        reward_prompt: str | None = None,
        progress: bool = True,
        image_radius: float = 0.0,
    ) -> None:
        super().__init__(pipe, sharpness_aware(reward, image_radius), reward_prompt, progress)
        self.iterations = integer("iterations", iterations, least=1)
        if optimizer not in LEARNING_RATES:
            raise ValueError(f"optimizer: expected one of {', '.join(LEARNING_RATES)}, got {optimizer!r}")
        self.optimizer: Optimizer = optimizer
        rate = LEARNING_RATES[optimizer] if learning_rate is None else learning_rate
        expected = f"above 0; try {LEARNING_RATES[optimizer]}"
        self.learning_rate = number("learning_rate", rate, expected, lambda v: 0 < v < math.inf)
        expected = "of at least 0; try 0.01"
        self.regularization = number("regularization", regularization, expected, lambda v: 0 <= v < math.inf)
        self.clip = number("clip", clip, "above 0; try 0.1, or math.inf for no clipping", lambda v: v > 0)
        self.checkpointed = checkpointed
        self.longest = integer("longest", longest, least=1)

    def __call__(self, prompt: str, seed: int = 0, **pipe_kwargs: Any) -> NoiseOptimizerOutput:
        """Optimize the noise of one prompt.

        If an image, its total or a gradient is not finite, it warns and returns the best so far; without one, or if the
        safety checker flagged all, a NothingRankedError is raised.

        Args:
            prompt: one text.
            seed: seed of the initial noise.
            **pipe_kwargs: arguments of the pipeline's call (steps, guidance, size, negative prompt, ...).
        """
        check_gradients_allowed("NoiseOptimizer")
        with self._call(prompt, seed, 1, "all candidates", pipe_kwargs) as call:
            ascent = _Ascent(self, call)
            with torch.enable_grad(), without_weight_gradients(self.pipe, self.reward):
                stopped = ascent.climb()
        output = ascent.output(stopped)
        conclude(output, 1, name="seed", stacklevel=3)
        if stopped is not None:
            message = (
                f"NoiseOptimizer stopped after {len(ascent.history)} images because of {stopped}; the best so far is "
                "returned. Half precision overflows easily: use bfloat16 or float32, or lower learning_rate="
            )
            warnings.warn(message, stacklevel=2)
        return output


class _Ascent:
    """One call of a NoiseOptimizer."""

    def __init__(self, plan: NoiseOptimizer, call: Call) -> None:
        self.plan, self.call = plan, call
        generator = torch.Generator("cpu").manual_seed(call.seed)
        self.start: State = call.rollout.start(call.rollout.encode([call.prompt]), [generator])
        if self.start.steps > plan.longest:
            raise ValueError(
                f"num_inference_steps: expected at most longest={plan.longest} calls of the denoiser, got "
                f"{self.start.steps}; the gradient passes through each and fades or explodes over many. Use a model of "
                "one to four steps, raise longest=, or use BestOfN or ParticleSteering, which need no gradients"
            )
        self.after = generator.get_state()  # of the generator that has drawn the initial noise
        self.sigma: float | Tensor = getattr(self.start.scheduler, "init_noise_sigma", 1.0)  # std of initial latents
        self.history: list[float] = []
        self.best: tuple[Tensor, RewardOutput, Tensor] | None = None  # image (1, 3, H, W), scores and noise, on the CPU
        self.calls = 0  # of the denoiser

    def climb(self) -> str | None:
        """Optimize to the end; or return the reason for stopping before."""
        from tqdm.auto import tqdm

        plan, latents, reward = self.plan, self.start.latents, self.call.reward
        kind = torch.promote_types(latents.dtype, torch.float32)
        noise = (latents / self.sigma).detach().to(kind).requires_grad_()
        if plan.optimizer == "adam":
            optimizer: torch.optim.Optimizer = torch.optim.Adam([noise], lr=plan.learning_rate, maximize=True)
        else:
            optimizer = torch.optim.SGD([noise], lr=plan.learning_rate, momentum=0.9, nesterov=True, maximize=True)
        steps = tqdm(range(plan.iterations), desc="noise", disable=not plan.progress)
        for iteration in itertools.chain(steps, [plan.iterations]):
            last = iteration == plan.iterations
            with torch.set_grad_enabled(not last):
                image = self.image(noise)
            reason = self.judge(image.detach(), noise.detach())
            if reason is not None:
                return reason
            if last:
                continue
            gradient = reward_gradient(reward, reward(image, [self.call.text]).total, noise, "NoiseOptimizer")
            likelihood = torch.autograd.grad(norm_log_likelihood(noise), noise)[0]
            noise.grad = gradient + plan.regularization * likelihood
            if not bool(nn.utils.clip_grad_norm_([noise], plan.clip).isfinite()):
                return "NaN or infinite gradients"
            optimizer.step()
        return None

    def image(self, noise: Tensor) -> Tensor:
        """Sample the image (1, 3, H, W), not clamped, from noise of unit variance."""
        generator, rollout = torch.Generator("cpu"), self.call.rollout
        generator.set_state(self.after)
        latents = noise.to(self.start.latents.dtype) * self.sigma  # in this order, as pipelines do
        state = replace(self.start, latents=latents, generators=(generator,))
        while not state.done:
            prediction = rollout.predict(state, checkpointed=self.plan.checkpointed and torch.is_grad_enabled())
            state = rollout.advance(state, prediction.output)
            self.calls += 1
        return rollout.decode(state.latents)

    def judge(self, image: Tensor, noise: Tensor) -> str | None:
        """Record the total of an image as a file would have it, and the image if it is the best; or say why not."""
        if not bool(image.isfinite().all()):
            return candidates.NON_FINITE
        shown = displayed(image)
        output = self.call.reward.score(shown, [self.call.text])
        if (why := why_dropped(total := float(output.total))) is not None:
            return why
        self.history.append(total)
        if self.best is not None and total <= float(self.best[1].total):
            return None
        if not self.call.rollout.family.flagged(shown)[0]:
            self.best = image.cpu(), output.to("cpu"), noise.to("cpu", self.start.latents.dtype, copy=True)
        return None

    def output(self, stopped: str | None) -> NoiseOptimizerOutput:
        tally, family, start = Tally(1), self.call.rollout.family, self.start
        tally.calls = self.calls
        if self.best is None:
            tally.leave(self.call.seed, stopped or candidates.FLAGGED)
        else:
            image, scores, noise = self.best
            latents = family.as_passed(noise.to(start.latents.device) * self.sigma, start.scheduler)
            latents = latents.to("cpu", noise.dtype)
            tally.add(
                [self.call.seed],
                judged(scores),
                lambda row: Picture.of(family.marked(image), row, latents, seeded=False),
            )
        return NoiseOptimizerOutput(**vars(tally.output()), history=self.history)


@contextmanager
def without_weight_gradients(*parts: Any) -> Iterator[None]:
    """Let autograd keep nothing for gradients of weights of pipelines and rewards."""
    modules = [module for part in parts for module in (*getattr(part, "components", {}).values(), part)]
    asked = {w for m in modules if isinstance(m, nn.Module) for w in m.parameters() if w.requires_grad}
    try:
        for weight in asked:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in asked:
            weight.requires_grad_()
