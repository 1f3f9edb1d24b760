"""Guidance by a reward's gradient: after each step of a stock pipeline the latents are moved to where it is higher."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from aigiqa_reward.images import HIGHEST, LOWEST
from aigiqa_reward.sampling.callbacks import LoggedStep, SeenStep, Watch
from aigiqa_reward.sampling.families import Conditioning, family_of
from aigiqa_reward.sampling.rollout import Rollout, State
from aigiqa_reward.sampling.schedulers import noise_level
from aigiqa_reward.types import RewardOutput
from aigiqa_reward.utils.checks import integer


@dataclass(frozen=True, kw_only=True)
class GuidedStep(LoggedStep):
    """What one step of guidance saw and did; the scores are those before it.

    Attributes:
        gradient_norm: (B,) norm of what is clipped, before it is.
        shift_norm: (B,) Euclidean length of the move of the latents.
    """

    gradient_norm: list[float]
    shift_norm: list[float]


class RewardGuidance(Watch):
    """Moves the latents up the gradient of the reward's total after each step of a stock pipeline.

        with RewardGuidance(pipe, reward, prompt, scale=20.0) as guidance:
            image = pipe(prompt, callback_on_step_end=guidance).images[0]

    Write the latents before step i as x_i = alpha_i x0 + sigma_i eps, with n_i^2 = alpha_i^2 + sigma_i^2, the share of
    noise s_i = sigma_i / n_i in [0, 1], and c(g) = g / max(1, ||g|| / clip) image by image. After step i

        x_{i+1} += scale s_i alpha_{i+1} c(g),            g = d total(decode(x0)) / d x0            (the default)
        x_{i+1} += scale s_{i+1} n_{i+1} c(n_{i+1} g),    g = d total(decode(x0(x_{i+1}))) / d x_{i+1}

    The first differentiates the decoder and the reward only, at x0 as predicted in step i, and is what a step from a
    moved x0 with the same noise comes to (MPGD: He et al. 2024, Manifold Preserving Guided Diffusion); after the last
    step x0 is x_{i+1} itself and alpha_{i+1} = 1. The second (`through_denoiser=True`) asks the denoiser again at
    x_{i+1} and differentiates it as well (Chung et al. 2023, Diffusion Posterior Sampling; Bansal et al. 2023,
    Universal Guidance for Diffusion Models): one more forward and backward pass of it a step, its memory too, and no
    guidance after the last step. s fades with the noise; n makes the move independent of how a scheduler scales its
    latents. Gradients of a reward in [0, 1] are mostly well below 1 in norm (0.03 to 0.1 of the compact reward at the
    embedded pipeline's latents, whose norm is about 30), so that `scale` is large; `history` says how far steps went.

    Neither the scheduler's state nor any parameter's `.grad` changes. In float16 gradients may vanish or overflow: load
    the whole pipeline in bfloat16 or float32. (The VAEs of Stable Diffusion 1.x and SDXL are refused in float16.)

    Args:
        pipe: a text-to-image pipeline of Stable Diffusion 1 to 3.5, SDXL, FLUX, Qwen-Image, Z-Image or Sana.
        reward: a Reward, or any `f(images, prompts) -> (B,) tensor or RewardOutput` with gradients in the images.
        prompt: the text that the reward sees for all images, or a list of the batch's texts. With
            `through_denoiser` it must be what the pipeline is called with.
        scale: length of a move at full noise and clipped gradient is at most `scale * clip`; 0 changes nothing.
        through_denoiser: which of the two.
        start: guide from this share of the steps, in [0, 1].
        stop: to before this share.
        clip: longest gradient of one image, above 0; `math.inf` for no clipping.
        every: guide after the first of every so many steps.
        **pipe_kwargs: with `through_denoiser`, the arguments of the pipeline's call (height, guidance_scale, ...).

    Attributes:
        history: the guided steps since the `with` block was entered.

    Raises:
        TypeError, ValueError: as of `RewardLogger`; an argument out of range, or one of the pipeline that guidance
            cannot serve; on entering, a VAE that overflows in float16; at a step, a reward without gradients, or
            gradients that are not finite.

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
        pipe: Any,
        reward: Any,
        prompt: str | Sequence[str],
        scale: float = 20.0,
        through_denoiser: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        clip: float = 1.0,
        every: Any = 1,
        **pipe_kwargs: Any,
    ) -> None:
        super().__init__(pipe, reward, prompt)
        if not math.isfinite(scale):
            raise ValueError(f"scale: expected a finite number, got {scale}; pass 20.0, and look at .history")
        if not 0 <= start < stop <= 1:
            raise ValueError(f"start, stop: expected shares of the steps, 0 <= start < stop <= 1, got {start}, {stop}")
        if not clip > 0:
            raise ValueError(f"clip: expected a norm above 0, got {clip}; pass math.inf for no clipping")
        family_of(pipe, pipe_kwargs, need="RewardGuidance")  # refuses a misspelt argument now
        self.scale, self.clip = float(scale), float(clip)
        self.start, self.stop, self.every = start, stop, integer("every", every, least=1)
        self.through_denoiser = through_denoiser
        self.history: list[GuidedStep] = []
        self._pipe_kwargs = pipe_kwargs
        self._rollout: Rollout | None = None
        self._conditioning: Conditioning | None = None

    def __enter__(self) -> RewardGuidance:
        _check_vae(self.pipe.vae)
        if self.through_denoiser:
            self._rollout = Rollout(self.pipe, need="RewardGuidance", **self._pipe_kwargs)
            self._conditioning = self._rollout.encode(self.reward.texts)
        super().__enter__()
        self.history = []
        return self

    def after_step(self, seen: SeenStep) -> Tensor | None:
        """The latents, moved, if it is the step's turn."""
        if seen.index == 0:  # later another callback may have cut guidance off
            self._check_scale()
        if not self._is_due(seen):
            return None
        if torch.is_inference_mode_enabled():
            raise ValueError(
                "RewardGuidance: torch.inference_mode() forbids gradients; call the pipeline outside of it (it runs "
                "without gradients by itself, and guidance turns them on where it needs them)"
            )
        last = seen.index + 1 == seen.count
        levels = [noise_level(self.pipe.scheduler, index) for index in (seen.index, seen.index + (not last))]
        (alpha, sigma), (next_alpha, next_sigma) = ([value.to(seen.latents.device) for value in ab] for ab in levels)
        if self.through_denoiser:
            norm = (next_alpha**2 + next_sigma**2).sqrt()
            output, gradient = self._through_denoiser(seen)
            gradient, weight = norm * gradient, next_sigma  # sigma = s n
        else:
            output, gradient = self._at_clean(seen)
            weight = sigma / (alpha**2 + sigma**2).sqrt() * (1.0 if last else next_alpha)
        norms = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
        kept = (norms / self.clip).clamp(min=1).reciprocal().view(-1, *[1] * (gradient.ndim - 1))
        shift = self.scale * weight * kept * gradient
        shifts = torch.linalg.vector_norm(shift.flatten(1), dim=1)
        scores = seen.score(output, gradient_norm=norms.tolist(), shift_norm=shifts.tolist())
        self.history.append(GuidedStep(**scores))
        return (seen.latents + shift).to(seen.latents.dtype)

    def _check_scale(self) -> None:
        sampled = getattr(self.pipe, "guidance_scale", None)
        told = sampled if self._rollout is None else self._rollout.family.options.guidance_scale
        if told != sampled:
            raise ValueError(
                f"guidance_scale: the pipeline samples with {sampled}, and RewardGuidance was told {told} (or left at "
                "the default); give both the same arguments"
            )

    def _is_due(self, seen: SeenStep) -> bool:
        last = seen.index + 1 == seen.count
        if seen.final and not last:
            return False  # another callback has chosen the image
        if last and self.through_denoiser:
            return False
        return self.start <= seen.index / seen.count < self.stop and seen.index % self.every == 0

    def _at_clean(self, seen: SeenStep) -> tuple[RewardOutput, Tensor]:
        clean = seen.clean(self.pipe.scheduler).detach().requires_grad_()
        with torch.enable_grad():
            output = self._judge(self.decode(clean))
            return output, _gradient(output, clean)

    def _through_denoiser(self, seen: SeenStep) -> tuple[RewardOutput, Tensor]:
        rollout = self._rollout
        assert rollout is not None  # made on entering
        state = self._state(rollout, seen)
        latents = seen.latents.detach().to(torch.promote_types(seen.latents.dtype, torch.float32)).requires_grad_()
        with torch.enable_grad():
            state = replace(state, latents=latents.to(seen.latents.dtype))
            output = self._judge(rollout.decode(rollout.predict(state).clean))
            return output, _gradient(output, latents)

    def _state(self, rollout: Rollout, seen: SeenStep) -> State:
        """The batch before the next step, for the denoiser; with a copy of the scheduler, which scales its input."""
        told, sampled = rollout.family.size(), self._size
        if told != sampled:
            raise ValueError(
                f"height, width: the pipeline samples at {sampled}, and RewardGuidance was told {told} (or left at the "
                "defaults); give both the same arguments"
            )
        count = len(seen.latents)
        assert self._conditioning is not None  # made on entering
        conditioning = self._conditioning[self.reward.places(count).tolist()]
        generators = [torch.Generator().manual_seed(row) for row in range(count)]
        with torch.no_grad():
            shared = rollout.family.start(generators, conditioning).shared  # its noise is not used
        return State(
            latents=seen.latents,
            conditioning=conditioning,
            shared=shared,
            generators=tuple(generators),
            scheduler=copy.copy(self.pipe.scheduler),
            step=seen.index + 1,
        )

    def _judge(self, images: Tensor) -> RewardOutput:
        # Early x0 may decode to far outside of [0, 1], which a Reward refuses; out there a pixel shows no difference.
        return self.reward(images.clamp(LOWEST, HIGHEST), self.reward.places(len(images)))


def _check_vae(vae: Any) -> None:
    """Refuse one that the pipeline lifts out of float16 to decode, which cannot be done below a gradient."""
    if vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
        raise ValueError(
            "pipe: RewardGuidance takes gradients through the VAE, which overflows in float16 (its configuration says "
            "force_upcast); load the whole pipeline in bfloat16 or float32 (with the VAE alone in another type its own "
            "call fails)"
        )


def _gradient(output: RewardOutput, latents: Tensor) -> Tensor:
    """The total's gradient in the latents, row by row; nobody gets a `.grad`."""
    total = output.total.sum()
    found = torch.autograd.grad(total, latents, allow_unused=True)[0] if total.requires_grad else None
    if found is None:
        raise ValueError(
            "reward: RewardGuidance needs gradients of the total in the images, and this reward gives none: it runs "
            "without gradients, or leaves torch on the way; take a differentiable one (list_rewards() says which "
            "are), or sample with BestOfN or ParticleSteering, which need none"
        )
    if not bool(found.isfinite().all()):
        raise ValueError(
            "reward: the gradient of the total has NaN or infinite values; a half-precision VAE overflows easily: load "
            "the pipeline in bfloat16 or float32"
        )
    return found
