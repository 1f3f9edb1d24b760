"""Training's noise against diffusers' own schedulers, and against our inversion of a sampler's."""

from __future__ import annotations

from typing import Any

import pytest
import scipy.stats
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from pipelines import FAMILIES, FEW_STEPS
from pipelines_current import CALL, CURRENT_FAMILIES
from torch import Tensor

from aigiqa_reward.finetuning.noising import Noising
from aigiqa_reward.sampling.rollout import Rollout
from aigiqa_reward.sampling.schedulers import noise_level, predict_clean

BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KINDS = ("epsilon", "v_prediction", "sample")
BUILDERS = {**FAMILIES, **CURRENT_FAMILIES}


def drawn(count: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    clean, noise = torch.randn(2, count, 4, 6, 8, generator=generator)
    return clean, noise


@pytest.mark.parametrize("kind", KINDS)
def test_variance_preserving_noise_is_diffusers(kind):
    scheduler = DDPMScheduler(**BETAS, prediction_type=kind)
    noising, levels = Noising.of(scheduler), torch.tensor([0, 1, 500, 998, 999])
    clean, noise = drawn()
    torch.testing.assert_close(noising.noised(clean, noise, levels), scheduler.add_noise(clean, noise, levels))
    velocity = scheduler.get_velocity(clean, noise, levels)
    expected = {"epsilon": noise, "v_prediction": velocity, "sample": clean}[kind]
    torch.testing.assert_close(noising.target(clean, noise, levels), expected)
    found = noising.clean(noising.noised(clean, noise, levels), expected, levels)
    torch.testing.assert_close(found, clean, atol=1e-5, rtol=1e-4)
    assert torch.equal(noising.times[levels], levels)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_noise_along_a_flow_is_diffusers(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    noising, (clean, noise) = Noising.of(scheduler), drawn()
    torch.testing.assert_close(noising.times, scheduler.timesteps.flip(0))
    levels = torch.tensor([0, 1, 500, 998, 999])
    expected = scheduler.scale_noise(clean, scheduler.timesteps.flip(0)[levels], noise)
    torch.testing.assert_close(noising.noised(clean, noise, levels), expected)
    torch.testing.assert_close(noising.target(clean, noise, levels), noise - clean)
    torch.testing.assert_close(noising.clean(expected, noise - clean, levels), clean)


def test_other_schedulers_of_flow_models_have_the_levels_of_their_shift():
    dynamic = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    torch.testing.assert_close(Noising.of(dynamic).times, dynamic.timesteps.flip(0))
    solver = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    expected = Noising.of(FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert torch.equal(Noising.of(solver).times, expected.times)
    assert torch.equal(Noising.of(solver).sigmas, expected.sigmas)


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[] if k in ("sdxl", "flux", "sana") else pytest.mark.slow) for k in BUILDERS]
)
@torch.no_grad()
def test_times_mean_what_they_mean_to_the_sampler(kind):
    rollout = Rollout(BUILDERS[kind](), **{**CALL.get(kind, FEW_STEPS), "num_inference_steps": 5})
    state = rollout.start(rollout.encode(["a cat"]), [torch.Generator().manual_seed(0)])
    noising = Noising.of(rollout.pipe.scheduler)
    for step, time in enumerate(state.scheduler.timesteps):
        alpha, sigma = noise_level(state.scheduler, step)
        level = int((noising.times - time).abs().argmin())
        share = sigma if noising.kind == "flow_prediction" else sigma / (alpha**2 + sigma**2).sqrt()
        assert abs(float(noising.sigmas[level]) - float(share)) < 3e-3
    assert len(state.scheduler.timesteps) == 5


def set_up(scheduler: Any) -> Any:
    scheduler.set_timesteps(6)
    return scheduler


@pytest.mark.parametrize(
    "scheduler",
    [
        set_up(DDIMScheduler(**BETAS, prediction_type="v_prediction", timestep_spacing="trailing")),
        set_up(EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True)),  # between the training's levels
        set_up(DPMSolverMultistepScheduler(**BETAS)),
        set_up(FlowMatchEulerDiscreteScheduler(shift=3.0)),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_samplers_noise_is_what_its_denoiser_sees(scheduler):
    noising, (clean, noise) = Noising.of_sampler(scheduler), drawn(1)
    assert torch.equal(noising.times, scheduler.timesteps)
    for step, time in enumerate(scheduler.timesteps):
        scheduler._step_index = scheduler._begin_index = None
        add = scheduler.scale_noise if hasattr(scheduler, "scale_noise") else None
        latents = add(clean, time[None], noise) if add else scheduler.add_noise(clean, noise, time[None])
        scheduler._step_index = None
        seen = scheduler.scale_model_input(latents, time) if hasattr(scheduler, "scale_model_input") else latents
        level = torch.tensor([step])
        torch.testing.assert_close(noising.noised(clean, noise, level), seen, atol=1e-5, rtol=1e-4)
        target = noising.target(clean, noise, level)
        torch.testing.assert_close(predict_clean(scheduler, step, latents, target), clean, atol=3e-4, rtol=1e-3)
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(noising.draw([generator] * 6000), minlength=6)
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 0.01


def test_levels_are_uniform_and_along_a_flow_a_squashed_normal():
    generator = torch.Generator().manual_seed(0)
    levels = Noising.of(DDPMScheduler(**BETAS)).draw([generator] * 4000)
    assert levels.dtype == torch.int64
    assert scipy.stats.kstest(levels.numpy() / 1000, "uniform").pvalue > 0.01
    levels = Noising.of(FlowMatchEulerDiscreteScheduler(shift=3.0)).draw([generator] * 4000)
    assert scipy.stats.kstest(torch.logit((levels.double() + 0.5) / 1000).numpy(), "norm").pvalue > 0.01


@pytest.mark.parametrize("scheduler", [DDPMScheduler(**BETAS), FlowMatchEulerDiscreteScheduler()])
def test_a_rows_level_is_its_generators_alone(scheduler):
    noising = Noising.of(scheduler)
    together = noising.draw([torch.Generator().manual_seed(seed) for seed in range(20)])
    alone = [int(noising.draw([torch.Generator().manual_seed(seed)])) for seed in range(20)]
    assert together.tolist() == alone
    assert len(set(alone)) > 10


def test_schedulers_without_usable_levels_are_refused():
    with pytest.raises(ValueError, match=r"got 'continuous' of EulerDiscreteScheduler"):
        Noising.of(EulerDiscreteScheduler(**BETAS, timestep_type="continuous"))
