"""Noise levels of a model's training or of a sampler: how clean latents are noised, and what should be predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aigiqa_reward.sampling.schedulers import PREDICTIONS, SEVERAL_CALLS_A_STEP, clean_of, is_flow, noise_level

EPSILON, VELOCITY, SAMPLE, FLOW = PREDICTIONS


@dataclass(frozen=True, kw_only=True)
class Noising:
    """Noise levels of a model: noised latents are alpha x0 + sigma eps at one of T levels.

    Attributes:
        times: (T,) timesteps of the levels as `Family.predict` takes them: int64, or float32 multiples of sigma for
            flow models.
        alphas: (T,) float32, sqrt(alphas_cumprod); 1 - sigma for flow models.
        sigmas: (T,) float32.
        kind: Prediction of the model: "epsilon" is eps, "v_prediction" alpha eps - sigma x0 (Salimans & Ho 2022),
            "sample" x0, "flow_prediction" eps - x0.
        middling: Whether `draw` prefers levels in the middle.
    """

    times: Tensor
    alphas: Tensor
    sigmas: Tensor
    kind: str
    middling: bool = False

    @staticmethod
    def of(scheduler: Any) -> Noising:
        """Return the levels that a pipeline's denoiser was trained on, from the configuration of its scheduler.

        Variance-preserving models have the levels of `alphas_cumprod`, however the scheduler scales its latents. Flow
        models have sigma = s k / (T + (s - 1) k) for k = 1 .. T with the static shift s of the configuration, or s = 1
        if the shift depends on the image size: the levels of diffusers' training scripts for SD3 and FLUX.1.
        """
        config, kind = scheduler.config, _prediction_of(scheduler)
        steps = config.num_train_timesteps
        if kind == FLOW:
            shift = config.get("flow_shift") if config.get("use_flow_sigmas") else config.get("shift")
            shift = 1.0 if shift is None or config.get("use_dynamic_shifting") else float(shift)
            even = torch.arange(1, steps + 1, dtype=torch.float64) / steps
            sigmas = (shift * even / (1 + (shift - 1) * even)).float()
            return Noising(times=sigmas * steps, alphas=1 - sigmas, sigmas=sigmas, kind=kind, middling=True)
        if config.get("timestep_type", "discrete") != "discrete":
            raise ValueError(
                f"scheduler: expected timestep_type='discrete', got {config.timestep_type!r} of "
                f"{type(scheduler).__name__}; use another scheduler of the same model"
            )
        kept = scheduler.alphas_cumprod.detach().double().cpu()
        alphas, sigmas = kept.sqrt().float(), (1 - kept).sqrt().float()
        return Noising(times=torch.arange(steps), alphas=alphas, sigmas=sigmas, kind=kind)

    @staticmethod
    def of_sampler(scheduler: Any) -> Noising:
        """Return the levels and timesteps of a sampler's steps, one row per step; its timesteps must be set."""
        if (name := type(scheduler).__name__) in SEVERAL_CALLS_A_STEP:
            raise ValueError(
                f"scheduler: {name} calls the denoiser between its noise levels, so its steps are no levels to train "
                "on; use timesteps='uniform', or a scheduler with one call per step (Euler, DDIM, DPM-Solver)"
            )
        kind = _prediction_of(scheduler)
        levels = [noise_level(scheduler, step) for step in range(len(scheduler.timesteps))]
        alphas, sigmas = (torch.stack(column).detach().float().cpu() for column in zip(*levels, strict=True))
        if kind != FLOW:  # variance-exploding latents are scaled before the denoiser sees them
            length = (alphas.square() + sigmas.square()).sqrt()
            alphas, sigmas = alphas / length, sigmas / length
        return Noising(times=scheduler.timesteps.detach().cpu(), alphas=alphas, sigmas=sigmas, kind=kind)

    def draw(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Draw levels (B,) int64, row i from generator i.

        Uniform (Ho et al. 2020, algorithm 1); for the training levels of flow models the sigmoid of a standard normal
        before the shift, "lognorm(0, 1)" of Esser et al. 2024, section 3.1, the default of diffusers' script for SD3.
        """
        steps = len(self.times)
        if self.middling:
            shares = [torch.sigmoid(torch.randn((), generator=g)) for g in generators]
            return (torch.stack(shares) * steps).long().clamp(max=steps - 1)
        return torch.stack([torch.randint(steps, (), generator=g) for g in generators])

    def noised(self, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """Add standard normal noise (B, ...) to clean latents (B, ...) at levels (B,)."""
        alpha, sigma = self._weights(clean, levels)
        return alpha * clean + sigma * noise

    def target(self, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """Return the model output (B, ...) that is right for `noised` of the same arguments."""
        if self.kind == VELOCITY:
            alpha, sigma = self._weights(clean, levels)
            return alpha * noise - sigma * clean
        return {EPSILON: noise, SAMPLE: clean, FLOW: noise - clean}[self.kind]

    def clean(self, noised: Tensor, output: Tensor, levels: Tensor) -> Tensor:
        """Return the clean latents x0 (B, ...) that follow from a model output for noised latents; linear in both."""
        alpha, sigma = self._weights(noised, levels)
        return clean_of(self.kind, noised, output, alpha, sigma)

    def _weights(self, like: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        shape, levels = (-1, *[1] * (like.ndim - 1)), levels.cpu()
        return self.alphas[levels].to(like).view(shape), self.sigmas[levels].to(like).view(shape)


def _prediction_of(scheduler: Any) -> str:
    kind = FLOW if is_flow(scheduler) else scheduler.config.prediction_type
    if kind not in (EPSILON, VELOCITY, SAMPLE, FLOW):
        raise ValueError(
            f"scheduler: expected prediction_type {EPSILON}, {VELOCITY} or {SAMPLE}, or a flow model, got {kind!r} of "
            f"{type(scheduler).__name__}; use another scheduler of the same model"
        )
    return kind
