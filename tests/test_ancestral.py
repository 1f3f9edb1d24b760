from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from diffusers import FlowMatchEulerDiscreteScheduler as FlowMatchEuler
from pipelines import SIDE
from pipelines_current import pipeline
from torch import Tensor

from aigiqa_reward.sampling.ancestral import advance, ancestral_step
from aigiqa_reward.sampling.rollout import Rollout
from aigiqa_reward.sampling.schedulers import noise_level, predict_clean

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def drawn(seed: int) -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def ddim(eta: float):
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=True)
    return scheduler, eta, lambda: {"eta": eta, "variance_noise": drawn(7)}


@pytest.mark.parametrize(
    ("scheduler", "eta", "noise"),
    [
        *map(ddim, (0.0, 0.4, 1.0)),
        (FlowMatchEuler(shift=3.0), 0.0, dict),
        (EulerDiscreteScheduler(**BETAS), 0.0, dict),
        (EulerDiscreteScheduler(**BETAS, prediction_type="v_prediction", timestep_spacing="trailing"), 0.0, dict),
        (EulerAncestralDiscreteScheduler(**BETAS), 1.0, lambda: {"generator": torch.Generator().manual_seed(7)}),
    ],
)
def test_it_is_diffusers_own_sampler(scheduler, eta, noise):
    scheduler.set_timesteps(5)
    latents, output = drawn(0), drawn(1)
    for step, time in enumerate(scheduler.timesteps):
        clean = predict_clean(scheduler, step, latents, output)
        expected = scheduler.step(output, time, latents, **noise()).prev_sample
        found = ancestral_step(scheduler, step, latents, clean, eta, drawn(7))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        latents = expected


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_with_any_noise_latents_keep_their_mean_and_variance(eta):
    scheduler = FlowMatchEuler(shift=3.0)
    scheduler.set_timesteps(4)
    count, clean = 200_000, torch.tensor(1.7)
    before, fresh = torch.randn(2, count, generator=torch.Generator().manual_seed(0))
    for step in range(3):
        alpha, sigma = noise_level(scheduler, step)
        after = ancestral_step(scheduler, step, alpha * clean + sigma * before, clean.expand(count), eta, fresh)
        alpha, sigma = noise_level(scheduler, step + 1)
        assert float(after.mean()) == pytest.approx(float(alpha * clean), abs=5 * float(sigma) / math.sqrt(count))
        assert float(after.std()) == pytest.approx(float(sigma), rel=0.01)


@pytest.mark.parametrize("family", ["sdxl", "flux", pytest.param("sd3", marks=pytest.mark.slow)])
def test_our_sampler_without_noise_is_the_pipelines(family):
    rollout = Rollout(pipeline(family), height=SIDE, width=SIDE, num_inference_steps=5)
    with torch.no_grad():
        state = start = rollout.start(rollout.encode(["a cat on a mat"]), [torch.Generator().manual_seed(0)])
        while not state.done:
            clean = rollout.predict(state).clean
            state = advance(state, clean, 0.0, torch.full_like(clean, 9.0))
        expected = rollout.run(start).latents
    torch.testing.assert_close(state.latents, expected, atol=1e-4, rtol=1e-4)
