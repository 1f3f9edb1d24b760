"""One stochastic sampler for every noise schedule: how fresh noise comes in without changing the samples' distribution.

A diffusion ODE takes equal latents to equal images. Particles that were copied must be able to part again.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from aigiqa_reward.sampling.rollout import State
from aigiqa_reward.sampling.schedules import SERVED, SEVERAL_CALLS_A_STEP, noise_level

ANCESTRAL = tuple(name for name in SERVED if name not in (*SEVERAL_CALLS_A_STEP, "PNDMScheduler"))
"""Schedulers whose noise falls from each entry of their timesteps to the next. PNDM's first entries repeat."""


def ancestral_step(scheduler: Any, step: int, latents: Tensor, clean: Tensor, eta: float, noise: Tensor) -> Tensor:
    """Latents of step `step + 1`, by the family of samplers of DDIM (Song et al. 2021, eq. 12 and 16).

    With latents x = alpha x0 + sigma eps before the step, and alpha', sigma' after it (1 and 0 after the last one):

        tau = eta sigma' sqrt(1 - (alpha sigma' / (alpha' sigma))^2)
        x'  = alpha' x0 + sqrt(sigma'^2 - tau^2) eps + tau noise

    That is DDIM's eta where alpha^2 + sigma^2 = 1, Euler (eta=0) to Euler ancestral (eta=1) where alpha = 1, and for
    flow matching Euler (eta=0) and a sampler with the same marginals otherwise. Only the scheduler's noise levels are
    used, and no history.

    Args:
        scheduler: one of `ANCESTRAL`, with its timesteps set.
        step: number of the step, from 0.
        latents: (B, ...) before it, not scaled for the model.
        clean: (B, ...) latents x0 as seen from there.
        eta: in [0, 1]; 0 takes nothing of the noise, 1 as much as a Markovian sampler does.
        noise: (B, ...) standard normal.

    Returns:
        (B, ...) of the latents' type; computed in at least float32.
    """
    alpha, sigma = (value.to(latents.device) for value in noise_level(scheduler, step))
    if step + 1 == len(scheduler.timesteps):
        next_alpha, next_sigma = torch.ones_like(alpha), torch.zeros_like(sigma)
    else:
        next_alpha, next_sigma = (value.to(latents.device) for value in noise_level(scheduler, step + 1))
    x = latents.to(torch.promote_types(latents.dtype, torch.float32))
    clean, noise = clean.to(x.dtype), noise.to(x.dtype)
    kept = alpha * next_sigma / (next_alpha * sigma)
    tau = eta * next_sigma * (1 - kept**2).clamp(min=0).sqrt()
    told = (next_sigma**2 - tau**2).clamp(min=0).sqrt()
    return (next_alpha * clean + told * (x - alpha * clean) / sigma + tau * noise).to(latents.dtype)


def advance(state: State, clean: Tensor, eta: float, noise: Tensor) -> State:
    """Candidates after one `ancestral_step`, at whose end their scheduler knows which step it is at."""
    latents = ancestral_step(state.scheduler, state.step, state.latents, clean, eta, noise)
    scheduler = copy.copy(state.scheduler)
    if hasattr(scheduler, "_step_index"):
        scheduler._step_index = state.step + 1  # where `scale_model_input` looks up the noise level
    return replace(state, latents=latents, scheduler=scheduler, step=state.step + 1)
