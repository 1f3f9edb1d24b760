"""The policy gradient's maths against closed forms: Gaussians, quadrature, PPO, standard scores."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from aigiqa_reward.finetuning.algorithms.policy_gradient import (
    STD_FLOOR,
    GaussianStep,
    clipped_surrogate,
    flow_sde_weights,
    group_advantages,
)
from aigiqa_reward.sampling.ancestral import ancestral_weights, step_mean

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SDE = 0.7


def scheduler_of(name: str) -> Any:
    scheduler = {
        "ddim": lambda: DDIMScheduler(**BETAS, clip_sample=False),
        "euler": lambda: EulerAncestralDiscreteScheduler(**BETAS),
        "flow": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    }[name.partition("-")[0]]()
    scheduler.set_timesteps(5)
    return scheduler


def weights_of(name: str, scheduler: Any, step: int) -> Any:
    return flow_sde_weights(scheduler, step, SDE) if name == "flow-sde" else ancestral_weights(scheduler, step, 0.8)


def policy_of(name: str, latents: Tensor, clean: Tensor, step: int = 2) -> GaussianStep:
    scheduler = scheduler_of(name)
    weights = weights_of(name, scheduler, step)
    mean = step_mean(scheduler, step, latents, clean, weights)
    return GaussianStep(mean=mean, std=weights.fresh)


SAMPLERS = ["ddim", "euler", "flow", "flow-sde"]
REWARDS = {"x": (lambda x: x, lambda m: torch.ones_like(m)), "x^2": (lambda x: x**2, lambda m: 2 * m)}
"""Rewards, and the derivative of their expectation under N(m, s^2) in m: of m it is 1, of m^2 + s^2 it is 2 m."""


# --------------------------------------------------------------------------------------------- Gaussians


def test_probability_and_divergence_are_those_of_normal_distributions():
    mean, other, latents = torch.randn(3, 4, 2, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    deviation = torch.tensor(0.3, dtype=torch.float64)
    policy, reference = (GaussianStep(mean=m, std=deviation) for m in (mean, other))
    torch.testing.assert_close(policy.log_prob(latents), Normal(mean, deviation).log_prob(latents).mean(dim=(1, 2, 3)))
    expected = kl_divergence(Normal(mean, deviation), Normal(other, deviation)).mean(dim=(1, 2, 3))
    torch.testing.assert_close(policy.divergence(reference), expected)
    torch.testing.assert_close(policy.divergence(policy), torch.zeros(4, dtype=torch.float64))


def test_draws_have_the_mean_and_the_deviation():
    noise = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = GaussianStep(mean=torch.full_like(noise, 1.5), std=torch.tensor(0.2)).draw(noise)
    assert float(drawn.mean()) == pytest.approx(1.5, abs=5 * 0.2 / math.sqrt(len(noise)))
    assert float(drawn.std()) == pytest.approx(0.2, rel=0.01)


@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_expected_gradient_is_the_closed_form_exactly(sampler, reward):
    """Gauss-Hermite quadrature integrates polynomials without error, so the expectation has no sampling noise."""
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


@pytest.mark.parametrize("reward", REWARDS)
def test_estimated_gradient_is_the_closed_form_within_its_standard_error(reward):
    """With the rewards' mean as baseline, which DDPO and GRPO take off: it changes the variance, not the mean."""
    function, slope = REWARDS[reward]
    count = 400_000
    noise = torch.randn(count, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theta = torch.full((count, 1), 0.4, dtype=torch.float64, requires_grad=True)
    policy = policy_of("ddim", torch.full((count, 1), 0.7, dtype=torch.float64), theta)
    after = policy.draw(noise).detach()
    log_prob = policy.log_prob(after)
    rewards = function(after[:, 0])
    loss = clipped_surrogate((log_prob - log_prob.detach()).exp(), rewards - rewards.mean(), 1e-4)
    (samples,) = torch.autograd.grad(loss.sum(), theta)

    one, zero = (policy_of("ddim", after[:1] * 0 + 0.7, after[:1] * 0 + v).mean for v in (1.0, 0.0))
    expected = float(-slope(policy.mean[0].detach()) * (one - zero)[0])
    error = float(samples.std()) / math.sqrt(count)
    assert error < 0.01 * abs(expected)
    assert abs(float(samples.mean()) - expected) < 4 * error


def test_mean_over_dimensions_scales_the_gradient_by_their_number():
    generator = torch.Generator().manual_seed(2)
    latents, clean, after = torch.randn(3, 6, 3, 4, 4, generator=generator, dtype=torch.float64)
    advantages = torch.randn(6, generator=generator, dtype=torch.float64)
    clean.requires_grad_(True)
    policy = policy_of("flow", latents, clean)
    log_prob = policy.log_prob(after)
    loss = clipped_surrogate((log_prob - log_prob.detach()).exp(), advantages, 1e-4).sum()
    (found,) = torch.autograd.grad(loss, clean, retain_graph=True)
    joint = Normal(policy.mean, policy.std).log_prob(after).sum(dim=(1, 2, 3))
    (plain,) = torch.autograd.grad(-(advantages * joint).sum(), clean)
    torch.testing.assert_close(found * (3 * 4 * 4), plain)


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


# --------------------------------------------------------------------------------------------- advantages


def test_advantages_are_standard_scores_within_groups():
    rewards = torch.rand(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = group_advantages(rewards, 4)
    for place, group in enumerate(rewards.numpy().reshape(3, 4)):
        expected = (group - np.mean(group)) / (np.std(group) + STD_FLOOR)
        np.testing.assert_allclose(found.values[4 * place : 4 * place + 4].numpy(), expected, rtol=1e-12)
    assert not found.degenerate.any()
    whole = group_advantages(rewards, 4, deviation="batch").values
    centered = rewards.numpy().reshape(3, 4) - rewards.numpy().reshape(3, 4).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(whole, (centered / (np.std(rewards.numpy()) + STD_FLOOR)).ravel(), rtol=1e-12)


def test_groups_of_one_compare_the_whole_batch():
    rewards = torch.rand(6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(group_advantages(rewards, 1).values, group_advantages(rewards, 6).values)


@pytest.mark.parametrize("deviation", ["group", "batch"])
def test_a_group_of_equals_has_no_advantages(deviation):
    equal = torch.tensor([0.3, 0.3 + 3e-8, 0.3, 0.3])
    rewards = torch.cat([equal, torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.zeros(4)])
    found = group_advantages(rewards, 4, deviation=deviation)
    assert found.values[:4].tolist() == found.values[8:].tolist() == [0.0] * 4
    assert found.values[4:8].abs().min() > 0.1
    assert found.degenerate.tolist() == [True] * 4 + [False] * 4 + [True] * 4


@pytest.mark.parametrize("deviation", ["group", "batch"])
def test_rewards_that_are_not_finite_count_nowhere(deviation):
    nan, inf = math.nan, math.inf
    rewards = torch.tensor([0.1, nan, 0.3, 0.8, inf, nan, 0.5, -inf, nan, nan, nan, nan])
    found = group_advantages(rewards, 4, deviation=deviation)
    kept = np.array([0.1, 0.3, 0.8])
    spread = np.std(kept) if deviation == "group" else np.std([*kept, 0.5])
    expected = (kept - kept.mean()) / (spread + STD_FLOOR)
    np.testing.assert_allclose(found.values[[0, 2, 3]], expected, rtol=1e-5)
    assert found.values[[1, *range(4, 12)]].tolist() == [0.0] * 9
    assert found.degenerate.tolist() == [False] * 4 + [True] * 8


def test_advantages_are_clipped():
    rewards = torch.tensor([0.0] * 15 + [1.0])
    assert group_advantages(rewards, 16).values.max() > 3.8
    assert group_advantages(rewards, 16, limit=2.5).values.max() == 2.5
