from __future__ import annotations

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from pipelines import FAMILIES, SIDE
from torch import Tensor

from aigiqa_reward.sampling.ancestral import advance, ancestral_step
from aigiqa_reward.sampling.rollout import Rollout
from aigiqa_reward.sampling.schedulers import noise_level, predict_clean

PROMPT = "a cat on a mat"
STEPS = {"height": SIDE, "width": SIDE, "num_inference_steps": 5}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def drawn(*seeds: int) -> list[Tensor]:
    return [torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_where_variance_is_kept_it_is_ddim(eta):
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(5)
    latents, output, noise = drawn(0, 1, 2)
    for step, time in enumerate(scheduler.timesteps):
        clean = predict_clean(scheduler, step, latents, output)
        expected = scheduler.step(output, time, latents, eta=eta, variance_noise=noise).prev_sample
        found = ancestral_step(scheduler, step, latents, clean, eta, noise)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        latents = expected


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        EulerDiscreteScheduler(**BETAS),
        EulerDiscreteScheduler(**BETAS, prediction_type="v_prediction", timestep_spacing="trailing"),
    ],
    ids=["flow", "exploding", "v_prediction"],
)
def test_without_noise_it_is_euler(scheduler):
    scheduler.set_timesteps(4)
    latents, output, noise = drawn(0, 1, 2)
    for step, time in enumerate(scheduler.timesteps):
        clean = predict_clean(scheduler, step, latents, output)
        expected = scheduler.step(output, time, latents).prev_sample
        found = ancestral_step(scheduler, step, latents, clean, 0.0, noise)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        latents = expected


def test_with_all_noise_on_exploding_latents_it_is_euler_ancestral():
    scheduler = EulerAncestralDiscreteScheduler(**BETAS)
    scheduler.set_timesteps(4)
    latents, output = drawn(0, 1)
    for step, time in enumerate(scheduler.timesteps):
        clean = predict_clean(scheduler, step, latents, output)
        (noise,) = drawn(7)
        expected = scheduler.step(output, time, latents, generator=torch.Generator().manual_seed(7)).prev_sample
        found = ancestral_step(scheduler, step, latents, clean, 1.0, noise)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        latents = expected


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_with_any_noise_latents_keep_their_mean_and_variance(eta):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    count, clean = 200_000, torch.tensor(1.7)
    before, fresh = torch.randn(2, count, generator=torch.Generator().manual_seed(0))
    for step in range(3):
        alpha, sigma = noise_level(scheduler, step)
        after = ancestral_step(scheduler, step, alpha * clean + sigma * before, clean.expand(count), eta, fresh)
        alpha, sigma = noise_level(scheduler, step + 1)
        assert float(after.mean()) == pytest.approx(float(alpha * clean), abs=5 * float(sigma) / math.sqrt(count))
        assert float(after.std()) == pytest.approx(float(sigma), rel=0.01)


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_our_way_without_noise_is_the_pipelines(family):
    """Euler's pipelines, step by step, with the noise level that the denoiser's input is scaled by."""
    rollout = Rollout(FAMILIES[family](), **STEPS)
    with torch.no_grad():
        state = start = rollout.start(rollout.encode([PROMPT]), [torch.Generator().manual_seed(0)])
        while not state.done:
            clean = rollout.predict(state).clean
            state = advance(state, clean, 0.0, torch.full_like(clean, 9.0))
        expected = rollout.run(start).latents
    torch.testing.assert_close(state.latents, expected, atol=1e-4, rtol=1e-4)
