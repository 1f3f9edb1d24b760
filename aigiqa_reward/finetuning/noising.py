"""Training's forward process: noise at random levels, and what the denoiser should say of it.

A denoiser was trained on all levels, in one form; a sampler visits a few of them, in a form of its own. `Noising.of` is
the training's process, which depends on what the scheduler says of it (betas, prediction type, shift) and not on how it
samples; `Noising.of_sampler` has the levels of a sampler's steps alone, in the training's form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aigiqa_reward.sampling.schedules import SEVERAL_CALLS_A_STEP, is_flow, noise_level

EPSILON, VELOCITY, SAMPLE, FLOW = "epsilon", "v_prediction", "sample", "flow_prediction"


@dataclass(frozen=True, kw_only=True)
class Noising:
    """Noised latents are alpha x0 + sigma eps at one of T levels; level 0 .. T - 1 is a row's index into the tables.

    Attributes:
        times: (T,) what the denoiser is told of a level, as `Family.predict` takes it: int64 numbers of timesteps, or
            float32 multiples of sigma along a flow.
        alphas: (T,) float32, sqrt(alphas_cumprod); 1 - sigma along a flow.
        sigmas: (T,) float32.
        kind: what the model predicts: "epsilon" eps, "v_prediction" alpha eps - sigma x0 (Salimans & Ho 2022), "sample"
            x0, "flow_prediction" eps - x0.
        middling: whether `draw` prefers levels in the middle.
    """

    times: Tensor
    alphas: Tensor
    sigmas: Tensor
    kind: str
    middling: bool = False

    @staticmethod
    def of(scheduler: Any) -> Noising:
        """The process that a pipeline's denoiser was trained on, as its scheduler's configuration tells it.

        Variance-preserving ones have the levels of `alphas_cumprod`, however the scheduler itself scales its latents.
        Flows have sigma = s k / (T + (s - 1) k) for k = 1 .. T with the configuration's static shift s, and no shift
        where it depends on the image's size: the levels of diffusers' training scripts for SD3 and FLUX.1.

        Raises:
            ValueError: a prediction type or a scale of time that is not known here.
        """
        config, name = scheduler.config, type(scheduler).__name__
        steps = config.num_train_timesteps
        if is_flow(scheduler):
            shift = config.get("flow_shift") if config.get("use_flow_sigmas") else config.get("shift")
            shift = 1.0 if shift is None or config.get("use_dynamic_shifting") else float(shift)
            even = torch.arange(1, steps + 1, dtype=torch.float64) / steps
            sigmas = (shift * even / (1 + (shift - 1) * even)).float()
            return Noising(times=sigmas * steps, alphas=1 - sigmas, sigmas=sigmas, kind=FLOW, middling=True)
        kind = _kind(scheduler)
        if config.get("timestep_type", "discrete") != "discrete":
            raise ValueError(
                f"scheduler: {name} has timestep_type={config.timestep_type!r}; training by noised images knows "
                "'discrete' ones: another scheduler of the same pipeline may have it"
            )
        kept = scheduler.alphas_cumprod.detach().double().cpu()
        return Noising(
            times=torch.arange(steps), alphas=kept.sqrt().float(), sigmas=(1 - kept).sqrt().float(), kind=kind
        )

    @staticmethod
    def of_sampler(scheduler: Any) -> Noising:
        """The levels at which a sampler asks the denoiser, and the times that it tells it there.

        Args:
            scheduler: with its timesteps set, as of `Rollout.start`; the tables have one row a step.

        Raises:
            ValueError: a prediction type that is not known here; a sampler that asks between its levels.
        """
        name = type(scheduler).__name__
        if name in SEVERAL_CALLS_A_STEP:
            raise ValueError(
                f"scheduler: {name} asks its denoiser between its noise levels, so that its steps are no levels to "
                "train on; take timesteps='uniform', or a scheduler of one call a step (Euler, DDIM, DPM-Solver)"
            )
        kind = FLOW if is_flow(scheduler) else _kind(scheduler)
        levels = [noise_level(scheduler, step) for step in range(len(scheduler.timesteps))]
        alphas, sigmas = (torch.stack(column).detach().float().cpu() for column in zip(*levels, strict=True))
        if kind != FLOW:  # latents whose variance explodes are scaled before the denoiser sees them
            length = (alphas.square() + sigmas.square()).sqrt()
            alphas, sigmas = alphas / length, sigmas / length
        return Noising(times=scheduler.timesteps.detach().cpu(), alphas=alphas, sigmas=sigmas, kind=kind)

    def draw(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Levels (B,) int64, row i from generator i.

        Uniform (Ho et al. 2020, algorithm 1); along a flow's training the sigmoid of a standard normal before the
        shift, "lognorm(0, 1)" of Esser et al. 2024, section 3.1, the default of diffusers' script for SD3.
        """
        steps = len(self.times)
        if self.middling:
            shares = [torch.sigmoid(torch.randn((), generator=g)) for g in generators]
            return (torch.stack(shares) * steps).long().clamp(max=steps - 1)
        return torch.stack([torch.randint(steps, (), generator=g) for g in generators])

    def noised(self, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """Latents (B, ...) with noise of unit variance (B, ...) at levels (B,)."""
        alpha, sigma = self._weights(clean, levels)
        return alpha * clean + sigma * noise

    def target(self, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """What the model's output (B, ...) should be for `noised` of the same."""
        alpha, sigma = self._weights(clean, levels)
        if self.kind == EPSILON:
            return noise
        if self.kind == SAMPLE:
            return clean
        return noise - clean if self.kind == FLOW else alpha * noise - sigma * clean

    def _weights(self, like: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        shape, levels = (-1, *[1] * (like.ndim - 1)), levels.cpu()
        return self.alphas[levels].to(like).view(shape), self.sigmas[levels].to(like).view(shape)


def _kind(scheduler: Any) -> str:
    """What a model predicts that is no flow's.

    Raises:
        ValueError: what is not known here.
    """
    kind = scheduler.config.prediction_type
    if kind not in (EPSILON, VELOCITY, SAMPLE):
        raise ValueError(
            f"scheduler: {type(scheduler).__name__} has prediction_type={kind!r}; training by noised images knows "
            f"{EPSILON}, {VELOCITY}, {SAMPLE}, and flow matching"
        )
    return kind
