"""Guidance by a reward's gradient: after each step of a stock pipeline the latents move up the reward."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from aigiqa_reward.rewards.bound import BoundReward
from aigiqa_reward.rewards.smooth import sharpness_aware
from aigiqa_reward.sampling.callbacks import LoggedStep, SeenStep, Watch
from aigiqa_reward.sampling.families import Conditioning, family_of
from aigiqa_reward.sampling.rollout import Rollout
from aigiqa_reward.sampling.schedulers import noise_level
from aigiqa_reward.types import RewardFunction, RewardOutput
from aigiqa_reward.utils.checks import integer, number
from aigiqa_reward.utils.isolation import check_gradients_allowed, without_autocast

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


@dataclass(frozen=True, kw_only=True)
class GuidedStep(LoggedStep):
    """One step of guidance; the scores are those before it."""

    gradient_norm: list[float]  # (B,) before clipping
    shift_norm: list[float]  # (B,) Euclidean length of the move of the latents


class RewardGuidance(Watch[GuidedStep]):
    """Moves the latents up the gradient of the reward's total after each step of a stock pipeline.

    Write the latents before step i as x_i = alpha_i x0 + sigma_i eps, with n_i^2 = alpha_i^2 + sigma_i^2, the share of
    noise s_i = sigma_i / n_i in [0, 1], and c(g) = g / max(1, ||g|| / clip) per image. After step i

        x_{i+1} += scale s_i alpha_{i+1} c(g),            g = d total(decode(x0)) / d x0            (the default)
        x_{i+1} += scale s_{i+1} n_{i+1} c(n_{i+1} g),    g = d total(decode(x0(x_{i+1}))) / d x_{i+1}

    The first differentiates the decoder and the reward only, at x0 as predicted in step i, and is equivalent to a step
    from a moved x0 with the same noise (He et al. 2024, Manifold Preserving Guided Diffusion); after the last step x0
    is x_{i+1} itself and alpha_{i+1} = 1. The second (`through_denoiser=True`) calls the denoiser again at x_{i+1} and
    differentiates it as well (Chung et al. 2023, Diffusion Posterior Sampling; Bansal et al. 2023, Universal Guidance):
    one more forward and backward pass per step, and no guidance after the last. Gradients of a reward in [0, 1] are
    mostly well below 1 in norm (0.03 to 0.1 of the compact reward at the embedded pipeline's latents, whose norm is
    about 30), so that `scale` is large; `history` has the lengths of the moves, since the `with` block was entered.

    Neither the scheduler's state nor any parameter's `.grad` changes. In float16 gradients may vanish or overflow: load
    the whole pipeline in bfloat16 or float32. (The VAEs of Stable Diffusion 1.x and SDXL are refused in float16.)

    Args:
        pipe: see `RewardLogger`.
        reward: see `RewardLogger`; it must be differentiable with respect to the images.
        prompt: see `RewardLogger`; with `through_denoiser` the prompt of the pipeline's call.
        scale: length of a move at full noise and clipped gradient is at most `scale * clip`; 0 changes nothing.
        through_denoiser: whether to use the second formula.
        start: first share of the steps to guide, in [0, 1].
        stop: share of the steps before which to stop.
        clip: maximum gradient norm per image for clipping, above 0; `math.inf` for no clipping.
        every: guide every `every`-th step.
        image_radius: above 0, the reward's gradient is taken at the worst image within that RMS distance per pixel
            (`SharpnessAwareReward`; try 0.4 / 255), for one more forward and backward pass of the reward per step.
        **pipe_kwargs: with `through_denoiser`, the arguments of the pipeline's call (height, guidance_scale, ...).

    Example:
        >>> from aigiqa_reward import create_reward, load_embedded_pipeline
        >>> from aigiqa_reward.sampling import RewardGuidance
        >>> pipe, prompt = load_embedded_pipeline(), "a red apple on a blue background"
        >>> with RewardGuidance(pipe, create_reward("compact"), prompt, scale=20.0) as guidance:
        ...     image = pipe(prompt, num_inference_steps=3, callback_on_step_end=guidance).images[0]
        >>> [entry.step for entry in guidance.history]
        [0, 1, 2]
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        reward: RewardFunction | str,
        prompt: str | Sequence[str],
        scale: float = 20.0,
        through_denoiser: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        clip: float = 1.0,
        every: int = 1,
        image_radius: float = 0.0,
        **pipe_kwargs: Any,
    ) -> None:
        super().__init__(pipe, sharpness_aware(reward, image_radius), prompt)
        self.scale = number("scale", scale, "that is finite; try 20.0, and look at .history", math.isfinite)
        self.clip = number("clip", clip, "above 0; math.inf for no clipping", lambda v: v > 0)
        if not 0 <= start < stop <= 1:
            raise ValueError(f"start, stop: expected shares of the steps, 0 <= start < stop <= 1, got {start}, {stop}")
        family_of(pipe, pipe_kwargs, need="RewardGuidance")  # refuses a misspelt argument now
        self.start, self.stop, self.every = start, stop, integer("every", every, least=1)
        self.through_denoiser, self._pipe_kwargs = through_denoiser, pipe_kwargs
        self._rollout: Rollout | None = None
        self._conditioning: Conditioning | None = None

    def __enter__(self) -> Self:
        vae = self.pipe.vae
        if vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
            raise ValueError(
                "pipe: RewardGuidance takes gradients through the VAE, which overflows in float16 (its configuration "
                "says force_upcast); load the whole pipeline in bfloat16 or float32"
            )
        if self.through_denoiser:
            self._rollout = Rollout(self.pipe, need="RewardGuidance", **self._pipe_kwargs)
            self._conditioning = self._rollout.encode(self.texts)
        return super().__enter__()

    def after_step(self, seen: SeenStep) -> Tensor | None:
        """Return the moved latents, if this step is guided."""
        if seen.index == 0 and self._rollout is not None:  # later another callback may have cut guidance off
            given = self._rollout.family.options.guidance_scale
            _check_same("guidance_scale", getattr(self.pipe, "guidance_scale", None), given)
        if not self._is_due(seen):
            return None
        check_gradients_allowed("RewardGuidance")
        last = seen.index + 1 == seen.count
        levels = [noise_level(self.pipe.scheduler, index) for index in (seen.index, seen.index + (not last))]
        (alpha, sigma), (next_alpha, next_sigma) = ([value.to(seen.latents.device) for value in ab] for ab in levels)
        if self.through_denoiser:
            output, gradient = self._judge(self._through_denoiser, seen)
            gradient, weight = (next_alpha**2 + next_sigma**2).sqrt() * gradient, next_sigma  # sigma = s n
        else:
            output, gradient = self._judge(self._at_clean, seen)
            weight = sigma / (alpha**2 + sigma**2).sqrt() * (1.0 if last else next_alpha)
        norms = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
        kept = (norms / self.clip).clamp(min=1).reciprocal().view(-1, *[1] * (gradient.ndim - 1))
        shift = self.scale * weight * kept * gradient
        shifts = torch.linalg.vector_norm(shift.flatten(1), dim=1)
        lengths = {"gradient_norm": norms.tolist(), "shift_norm": shifts.tolist()}
        self.history.append(GuidedStep(**seen.scores(output), **lengths))
        return (seen.latents + shift).to(seen.latents.dtype)

    def _is_due(self, seen: SeenStep) -> bool:
        last = seen.index + 1 == seen.count
        if (seen.final and not last) or (last and self.through_denoiser):
            return False  # another callback has chosen the image, or no call of the denoiser is left
        return self.start <= seen.index / seen.count < self.stop and seen.index % self.every == 0

    def _at_clean(self, seen: SeenStep) -> tuple[Tensor, Tensor]:
        clean = seen.clean(self.pipe.scheduler).detach().requires_grad_()
        return self.decode(clean), clean

    def _through_denoiser(self, seen: SeenStep) -> tuple[Tensor, Tensor]:
        rollout, conditioning = self._rollout, self._conditioning
        assert rollout is not None and conditioning is not None  # made on entering
        _check_same("height, width", self._size, rollout.family.size())
        generators = [torch.Generator().manual_seed(row) for row in range(len(seen.latents))]  # their noise is not used
        state = rollout.start(conditioning[self.places(len(seen.latents))], generators)
        latents = seen.latents.detach().to(torch.promote_types(seen.latents.dtype, torch.float32)).requires_grad_()
        scheduler = copy.copy(self.pipe.scheduler)  # which notes what it scales
        state = replace(state, latents=latents.to(seen.latents.dtype), scheduler=scheduler, step=seen.index + 1)
        return rollout.decode(rollout.predict(state).clean), latents

    def _judge(self, paint: Callable[[SeenStep], tuple[Tensor, Tensor]], seen: SeenStep) -> tuple[RewardOutput, Tensor]:
        with torch.enable_grad():
            images, latents = paint(seen)
            output = self.reward(images, self.prompts(images))
            gradient = reward_gradient(self.reward, output.total, latents, "RewardGuidance")
        if not bool(gradient.isfinite().all()):
            raise ValueError(
                "reward: the gradient of the total has NaN or infinite values; a half-precision VAE overflows easily: "
                "load the pipeline in bfloat16 or float32"
            )
        return output, gradient


def reward_gradient(reward: BoundReward, totals: Tensor, latents: Tensor, needed_by: str) -> Tensor:
    """Return the gradient of the sum of a reward's totals (B,) in the latents, without setting any `.grad`."""
    with without_autocast():  # which would round the reward's backward pass
        found = torch.autograd.grad(totals.sum(), latents, allow_unused=True)[0] if totals.requires_grad else None
    if found is None:
        reward.require_gradient(totals.detach(), needed_by)
    assert found is not None  # else the line above raises
    return found


def _check_same(name: str, sampled: Any, given: Any) -> None:
    if sampled != given:
        raise ValueError(
            f"{name}: the pipeline samples with {sampled}, and RewardGuidance has {given}, its argument or the "
            "default; pass both the same arguments"
        )
