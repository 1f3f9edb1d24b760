"""One stochastic sampler for every noise schedule: fresh noise that leaves the distribution of the samples unchanged.

A diffusion ODE maps equal latents to equal images; copies of a particle diverge only by fresh noise.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from aigiqa_reward.sampling.rollout import State
from aigiqa_reward.sampling.schedulers import SERVED, SEVERAL_CALLS_A_STEP, noise_level

ANCESTRAL = tuple(name for name in SERVED if name not in (*SEVERAL_CALLS_A_STEP, "PNDMScheduler"))
"""Schedulers whose noise falls from each entry of their timesteps to the next. PNDM's first entries repeat."""


@dataclass(frozen=True, kw_only=True)
class StepWeights:
    """Weights, each (), of the parts of the latents after a step, for the model's predictions x0 and eps."""

    clean: Tensor  # of the clean latents x0
    eps: Tensor  # of the noise eps that the latents contain if x0 is right
    fresh: Tensor  # of new noise, the std of the step


def is_last(scheduler: Any, step: int) -> bool:
    """Return whether no noise is left after step number `step`."""
    return step + 1 == len(scheduler.timesteps)


def ancestral_weights(scheduler: Any, step: int, eta: float) -> StepWeights:
    """Return the weights of the samplers of DDIM (Song et al. 2021, eq. 12 and 16).

    With latents x = alpha x0 + sigma eps before the step, and alpha', sigma' after it (1 and 0 after the last one):

        tau = eta sigma' sqrt(1 - (alpha sigma' / (alpha' sigma))^2)
        x'  = alpha' x0 + sqrt(sigma'^2 - tau^2) eps + tau noise

    That is DDIM's eta where alpha^2 + sigma^2 = 1, Euler (eta=0) to Euler ancestral (eta=1) where alpha = 1, and for
    flow matching Euler (eta=0) and a sampler with the same marginals otherwise. It needs no history.

    Args:
        scheduler: one of `ANCESTRAL`, with its timesteps set.
        step: number of the step, from 0.
        eta: in [0, 1]; 0 adds no noise, 1 as much as a Markovian sampler.
    """
    alpha, sigma = noise_level(scheduler, step)
    last = is_last(scheduler, step)
    after = (torch.ones_like(alpha), torch.zeros_like(sigma)) if last else noise_level(scheduler, step + 1)
    next_alpha, next_sigma = after
    tau = eta * next_sigma * (1 - (alpha * next_sigma / (next_alpha * sigma)) ** 2).clamp(min=0).sqrt()
    return StepWeights(clean=next_alpha, eps=(next_sigma**2 - tau**2).clamp(min=0).sqrt(), fresh=tau)


def step_mean(scheduler: Any, step: int, latents: Tensor, clean: Tensor, weights: StepWeights) -> Tensor:
    """Return the mean (B, ...) of the latents after a step, in at least float32; differentiable in both tensors.

    `latents` (B, ...) are those before it, not scaled for the model; `clean` (B, ...) are the x0 predicted there.
    """
    alpha, sigma = (value.to(latents.device) for value in noise_level(scheduler, step))
    x = latents.to(torch.promote_types(latents.dtype, torch.float32))
    clean = clean.to(x.dtype)
    return weights.clean.to(x.device) * clean + weights.eps.to(x.device) * (x - alpha * clean) / sigma


def ancestral_step(scheduler: Any, step: int, latents: Tensor, clean: Tensor, eta: float, noise: Tensor) -> Tensor:
    """Return the latents of step `step + 1`, of the same type: `step_mean` plus standard normal noise (B, ...)."""
    weights = ancestral_weights(scheduler, step, eta)
    mean = step_mean(scheduler, step, latents, clean, weights)
    return (mean + weights.fresh.to(mean.device) * noise.to(mean.dtype)).to(latents.dtype)


def placed(state: State, step: int, latents: Tensor) -> State:
    """Return the candidates of a state at another step, with other latents. For samplers without history.

    The scheduler's own step index is set as well: `scale_model_input` looks up the noise level there.
    """
    scheduler = copy.copy(state.scheduler)
    if hasattr(scheduler, "_step_index"):
        scheduler._step_index = step
    return replace(state, latents=latents, scheduler=scheduler, step=step)


def advance(state: State, clean: Tensor, eta: float, noise: Tensor) -> State:
    """Take one `ancestral_step`."""
    latents = ancestral_step(state.scheduler, state.step, state.latents, clean, eta, noise)
    return placed(state, state.step + 1, latents)
