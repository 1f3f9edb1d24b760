"""Flow-GRPO on tiny SD3 and FLUX: the published probabilities, refusals; and that it climbs."""

from __future__ import annotations

import math
from typing import Any

import pipelines
import pytest
import torch
from pipelines import SIDE
from policy_training import batches, gradients, shown, size_of, tools_of, trained, went_backward
from torch.distributions import Normal, kl_divergence

from aigiqa_reward.finetuning.algorithms.policy_gradient import FlowGRPO

SAMPLING = {"height": SIDE, "width": SIDE, "num_inference_steps": 4}
PIPES = {"sd3": (pipelines.stable_diffusion_3, 1.0), "flux": (pipelines.flux, 3.5)}
"""Pipelines, and a guidance scale: SD3's without guidance, FLUX's as an input."""


def tools_for(family: str, **more: Any) -> Any:
    build, guidance = PIPES[family]
    return tools_of(build(), **{**SAMPLING, "guidance_scale": guidance, **more})


@pytest.mark.parametrize("sampler", ["sde", "ancestral"])
@pytest.mark.parametrize("family", PIPES)
def test_at_the_first_update_every_ratio_is_one(family, sampler):
    tools = tools_for(family)
    algorithm, parts = FlowGRPO(images_per_prompt=2, sampler=sampler), batches([0, 2], [1, 3], group=2)
    memory = algorithm.prepare(tools, parts)
    for part, outcomes in enumerate(went_backward(algorithm, tools, parts, memory)):
        assert len(outcomes) == 3
        for outcome in outcomes:
            assert outcome.measures["old_kl"].max() < (2e-6) ** 2 / 2
            expected = -float(memory[f"advantages/{part}"].mean()) / 3
            assert float(outcome.loss.detach()) == pytest.approx(expected, abs=1e-5)
    assert memory["advantages/0"].abs().min() > 0.5
    assert size_of(gradients(tools)) > 1e-5


def published(tools: Any, memory: Any, step: int) -> Normal:
    """Equations 9 to 12 of the paper, in the model's velocity."""
    state = tools.start(batches(range(4), group=2)[0])
    x, time = memory["latents/0"][:, step], state.scheduler.timesteps[step]
    velocity = tools.rollout.family.predict(x, time, state.conditioning, state.shared).double()
    sigmas = state.scheduler.sigmas.double().tolist()
    t, dt = sigmas[step], sigmas[step + 1] - sigmas[step]
    sigma_t = 0.7 * math.sqrt(t / (1 - (sigmas[1] if t == 1 else t)))
    mean = x + (velocity + sigma_t**2 / (2 * t) * (x + (1 - t) * velocity)) * dt
    return Normal(mean, sigma_t * math.sqrt(-dt))


@pytest.mark.parametrize("family", PIPES)
def test_probabilities_and_divergences_are_the_published_ones(family):
    tools = tools_for(family, penalty=1.0)
    algorithm, parts = FlowGRPO(images_per_prompt=2), batches(range(4), group=2)
    memory = algorithm.prepare(tools, parts)
    for step, outcome in enumerate(algorithm.losses(tools, parts[0], 0, memory)):
        with torch.no_grad():
            own = published(tools, memory, step)
            with tools.lora.off():
                reference = published(tools, memory, step)
        expected = own.log_prob(memory["latents/0"][:, step + 1].double()).flatten(1).mean(dim=1)
        torch.testing.assert_close(memory["log_probs/0"][:, step].double(), expected, atol=1e-4, rtol=1e-4)
        far = kl_divergence(own, reference).flatten(1).mean(dim=1)
        assert far.min() > 1e-7
        torch.testing.assert_close(outcome.measures["kl"].double(), far, atol=1e-8, rtol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("family", PIPES)
def test_updates_raise_a_reward_without_gradients(family):
    """On noise that training has not seen, by the pipeline's own sampler, which takes no noise; paired."""
    tools = tools_for(family, moved=0.0, num_inference_steps=3)
    before = shown(tools, 16)
    trained(
        FlowGRPO(images_per_prompt=8, updates_per_round=2, clip_range=1e-3),
        tools,
        rounds=6,
        rows=16,
        learning_rate=3e-2,
    )
    gain = shown(tools, 16) - before
    assert gain.mean() > 4 * gain.std() / math.sqrt(16)


def test_models_without_a_flow_are_refused_and_told_of_ddpo():
    tools = tools_of(pipelines.stable_diffusion(), **SAMPLING)
    with pytest.raises(ValueError, match=r"got StableDiffusionPipeline with DDIMScheduler; train it with DDPO"):
        FlowGRPO().check(tools, ["a cat"])
    FlowGRPO().check(tools_for("sd3"), ["a cat"])


@pytest.mark.parametrize(
    ("name", "value"), [("noise_level", 0.0), ("noise_level", 1.5), ("sampler", "cps"), ("images_per_prompt", 0)]
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        FlowGRPO(**{name: value})
