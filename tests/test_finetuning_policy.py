"""The mathematics of DDPO and Flow-GRPO against closed forms: Gaussians, quadrature, PPO, advantages, the SDE."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from aigiqa_reward.finetuning.advantages import STD_FLOOR, group_advantages
from aigiqa_reward.finetuning.algorithms.policy_gradient import (
    GaussianStep,
    clipped_surrogate,
    flow_sde_weights,
)
from aigiqa_reward.sampling.ancestral import ancestral_weights, step_mean

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SDE = 0.7
"""The paper's noise level a."""

REWARDS = {"x": (lambda x: x, lambda m: torch.ones_like(m)), "x^2": (lambda x: x**2, lambda m: 2 * m)}
"""Rewards, and the derivative of their expectation under N(m, s^2) in m: of m it is 1, of m^2 + s^2 it is 2 m."""


def scheduler_of(name: str, steps: int = 5) -> Any:
    scheduler = {
        "ddim": lambda: DDIMScheduler(**BETAS, clip_sample=False),
        "euler": lambda: EulerAncestralDiscreteScheduler(**BETAS),
        "flow": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    }[name.partition("-")[0]]()
    scheduler.set_timesteps(steps)
    return scheduler


def weights_of(name: str, scheduler: Any, step: int) -> Any:
    return flow_sde_weights(scheduler, step, SDE) if name == "flow-sde" else ancestral_weights(scheduler, step, 0.8)


def policy_of(name: str, latents: Tensor, clean: Tensor, step: int = 2) -> GaussianStep:
    scheduler = scheduler_of(name)
    weights = weights_of(name, scheduler, step)
    return GaussianStep(mean=step_mean(scheduler, step, latents, clean, weights), std=weights.fresh)


def test_probability_divergence_and_draws_are_those_of_normal_distributions():
    mean, other, latents = torch.randn(3, 4, 2, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    std = torch.tensor(0.3, dtype=torch.float64)
    policy, reference = (GaussianStep(mean=m, std=std) for m in (mean, other))
    torch.testing.assert_close(policy.log_prob(latents), Normal(mean, std).log_prob(latents).mean(dim=(1, 2, 3)))
    expected = kl_divergence(Normal(mean, std), Normal(other, std)).mean(dim=(1, 2, 3))
    torch.testing.assert_close(policy.divergence(reference), expected)
    noise = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = GaussianStep(mean=torch.full_like(noise, 1.5), std=torch.tensor(0.2)).draw(noise)
    assert float(drawn.mean()) == pytest.approx(1.5, abs=5 * 0.2 / math.sqrt(len(noise)))
    assert float(drawn.std()) == pytest.approx(0.2, rel=0.01)


@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize("sampler", ["ddim", "euler", "flow", "flow-sde"])
def test_expected_gradient_is_the_closed_form_exactly(sampler, reward):
    function, slope = REWARDS[reward]
    nodes, shares = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(20))
    shares = shares / shares.sum()
    latents = torch.full((20, 1), 0.7, dtype=torch.float64)
    theta = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    policy = policy_of(sampler, latents, theta.expand(20, 1))
    after = policy.draw(nodes[:, None]).detach()
    log_prob = policy.log_prob(after)
    ratio = (log_prob - log_prob.detach()).exp()
    loss = clipped_surrogate(ratio, function(after[:, 0]), 1e-4)
    (found,) = torch.autograd.grad((shares * loss).sum(), theta)

    one, zero = (policy_of(sampler, latents[:1], torch.full((1, 1), v, dtype=torch.float64)).mean for v in (1.0, 0.0))
    expected = -slope(policy.mean[0].detach()) * (one - zero)[0]
    assert float(found) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.0, -2.0, 2.0, 2.0),
        (1.05, 2.0, -2.1, -2.0),
        (1.3, 2.0, -2.2, 0.0),  # already more probable than it may become
        (1.3, -2.0, 2.6, 2.0),  # worse than thought, and more probable: still pushed down
        (0.7, -2.0, 1.8, 0.0),  # already less probable than it may become
        (0.7, 2.0, -1.4, -2.0),
        (1.3, 0.0, 0.0, 0.0),
    ],
)
def test_clipped_surrogate_is_that_of_ppo(ratio, advantage, value, slope):
    at = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    loss = clipped_surrogate(at, torch.tensor([advantage], dtype=torch.float64), 0.1)
    (found,) = torch.autograd.grad(loss.sum(), at)
    assert (float(loss.detach()), float(found)) == pytest.approx((value, slope))


def test_advantages_are_standard_scores_within_groups():
    rewards = torch.rand(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, degenerate = group_advantages(rewards, 4)
    for place, group in enumerate(rewards.numpy().reshape(3, 4)):
        expected = (group - np.mean(group)) / (np.std(group) + STD_FLOOR)
        np.testing.assert_allclose(found[4 * place : 4 * place + 4].numpy(), expected, rtol=1e-12)
    assert not degenerate.any()
    assert torch.equal(group_advantages(rewards, 1)[0], group_advantages(rewards, 12)[0]), "one group"
    assert group_advantages(rewards, 4, limit=0.5)[0].abs().max() == 0.5
    whole = group_advantages(rewards, 4, deviation="batch")[0]
    centered = rewards.numpy().reshape(3, 4) - rewards.numpy().reshape(3, 4).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(whole, (centered / (np.std(rewards.numpy()) + STD_FLOOR)).ravel(), rtol=1e-12)


@pytest.mark.parametrize("deviation", ["group", "batch"])
def test_groups_of_equals_and_rewards_that_are_not_finite_have_no_advantages(deviation):
    nan, inf = math.nan, math.inf
    equal, one, other = [0.3, 0.3 + 3e-8, 0.3, 0.3], [0.1, nan, 0.3, 0.8], [inf, nan, 0.5, -inf]
    rewards = torch.tensor([*one, *equal, *other, *[0.0] * 4, *[nan] * 4])
    found, degenerate = group_advantages(rewards, 4, deviation=deviation)
    kept = np.array([0.1, 0.3, 0.8])
    spread = np.std(kept) if deviation == "group" else np.std([*kept, *equal, 0.5, *[0.0] * 4])
    np.testing.assert_allclose(found[[0, 2, 3]], (kept - kept.mean()) / (spread + STD_FLOOR), rtol=1e-5)
    assert found[[1, *range(4, 20)]].tolist() == [0.0] * 17
    assert degenerate.tolist() == [False] * 4 + [True] * 16


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_flow_sde_is_the_published_step(step):
    scheduler = scheduler_of("flow")
    x, velocity = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigmas = [float(s) for s in scheduler.sigmas]
    time, dt = sigmas[step], sigmas[step + 1] - sigmas[step]
    sigma_t = SDE * math.sqrt(time / (1 - (sigmas[1] if time == 1 else time)))
    expected = x + (velocity + sigma_t**2 / (2 * time) * (x + (1 - time) * velocity)) * dt
    weights = flow_sde_weights(scheduler, step, SDE)
    found = step_mean(scheduler, step, x, x - time * velocity, weights)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert float(weights.fresh) == pytest.approx(sigma_t * math.sqrt(-dt), rel=1e-5)


def test_flow_sde_keeps_its_head_where_a_schedule_begins_a_little_below_one():
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.set_timesteps(8)
    assert 0.999 < float(scheduler.sigmas[0]) < 1
    assert float(flow_sde_weights(scheduler, 0, SDE).fresh) == pytest.approx(SDE, rel=0.02)
