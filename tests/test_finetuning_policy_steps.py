"""DDPO and Flow-GRPO on tiny pipelines: probabilities against diffusers' samplers, rounds, rows left out, training."""

from __future__ import annotations

import math
from typing import Any

import pipelines
import pytest
import torch
from algorithm_runs import (
    PLAIN,
    batch_of,
    batches,
    context_of,
    directions,
    flat,
    loss_of,
    precise,
    put,
    run_backward,
    slope,
    take_gradient,
)
from diffusers import EulerAncestralDiscreteScheduler
from finetuned import PROMPTS
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from aigiqa_reward.finetuning import DDPO, FlowGRPO
from aigiqa_reward.finetuning.advantages import group_advantages
from aigiqa_reward.finetuning.algorithms.policy_gradient import PolicyGradient
from aigiqa_reward.finetuning.context import TrainingContext
from aigiqa_reward.types import RewardOutput

CALL = {**PLAIN, "num_inference_steps": 4}


def ancestral_xl() -> Any:
    pipe = pipelines.stable_diffusion_xl()
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    return pipe


PIPES = {**pipelines.FAMILIES, "sdxl": ancestral_xl}


def red(images: Tensor, prompts: list[str]) -> Tensor:
    assert len(images) == len(prompts)
    return images[:, 0].mean(dim=(1, 2)).detach()


def red_context(family: str = "sd", reward: Any = red, **more: Any) -> TrainingContext:
    guidance = {"guidance_scale": 3.5} if family == "flux" else {}
    return context_of(PIPES[family](), reward, moved=0.1, call={**CALL, **guidance, **more.pop("call", {})}, **more)


@pytest.mark.parametrize(
    ("family", "algorithm"),
    [
        ("sd", DDPO(images_per_prompt=2)),
        pytest.param("flux", FlowGRPO(images_per_prompt=2), marks=pytest.mark.slow),
        pytest.param("sd3", FlowGRPO(images_per_prompt=2, sampler="ancestral"), marks=pytest.mark.slow),
    ],
)
def test_at_the_first_update_every_ratio_is_one(family: str, algorithm: PolicyGradient) -> None:
    context = red_context(family, call={"guidance_scale": 3.0} if family == "sd" else {})
    parts = batches([0, 2], [1, 3], group=2)
    memory = algorithm.prepare(context, parts)
    for part, outcomes in enumerate(run_backward(algorithm, context, parts, memory)):
        assert len(outcomes) == 3
        for outcome in outcomes:
            assert outcome.measures["old_kl"].max() < (2e-6) ** 2 / 2
            assert outcome.measures["clipped"].sum() == 0
            expected = -float(memory[f"advantages/{part}"].mean()) / 3
            assert float(outcome.loss.detach()) == pytest.approx(expected, abs=1e-5)
    assert memory["advantages/0"].abs().min() > 0.5
    assert take_gradient(context).norm() > 1e-5


def published(context: TrainingContext, memory: Any, step: int) -> Normal:
    state = context.start(batch_of(range(4), group=2))
    scheduler, x = state.scheduler, memory["latents/0"][:, step]
    time, predict = scheduler.timesteps[step], context.rollout.family.predict
    if isinstance(scheduler, EulerAncestralDiscreteScheduler):
        sigma, after = scheduler.sigmas[step], scheduler.sigmas[step + 1]
        output = predict(x / (sigma**2 + 1).sqrt(), time, state.conditioning, state.shared)
        up = (after**2 * (sigma**2 - after**2) / sigma**2).sqrt()
        return Normal(x + output * ((after**2 - up**2).sqrt() - sigma), up)
    output = predict(x, time, state.conditioning, state.shared)
    if "FlowMatch" in type(scheduler).__name__:
        sigmas, velocity = scheduler.sigmas.double().tolist(), output.double()
        t, dt = sigmas[step], sigmas[step + 1] - sigmas[step]
        sigma_t = 0.7 * math.sqrt(t / (1 - (sigmas[1] if t == 1 else t)))
        mean = x + (velocity + sigma_t**2 / (2 * t) * (x + (1 - t) * velocity)) * dt
        return Normal(mean, sigma_t * math.sqrt(-dt))
    mean = scheduler.step(output, time, x, eta=1.0, variance_noise=torch.zeros_like(x)).prev_sample
    return Normal(mean, scheduler._get_variance(time, scheduler.timesteps[step + 1]).sqrt())


@pytest.mark.parametrize("family", PIPES)
def test_probabilities_and_divergences_are_those_of_the_published_samplers(family: str) -> None:
    context = red_context(family, penalty=1.0)
    kind = DDPO if family in ("sd", "sdxl") else FlowGRPO
    algorithm, parts = kind(images_per_prompt=2), batches(range(4), group=2)
    memory = algorithm.prepare(context, parts)
    assert memory["steps"].tolist() == [0, 1, 2]
    for step, outcome in enumerate(algorithm.losses(context, parts[0], 0, memory)):
        with torch.no_grad():
            own = published(context, memory, step)
            with context.lora.off():
                reference = published(context, memory, step)
        after = memory["latents/0"][:, step + 1]
        expected = own.log_prob(after.to(own.mean.dtype)).flatten(1).mean(dim=1).float()
        torch.testing.assert_close(memory["log_probs/0"][:, step], expected, atol=1e-4, rtol=1e-4)
        far = kl_divergence(own, reference).flatten(1).mean(dim=1).float()
        assert far.min() > 1e-7
        torch.testing.assert_close(outcome.measures["kl"], far, atol=1e-7, rtol=2e-3)


def test_the_gradient_is_that_of_finite_differences_away_from_the_old_policy() -> None:
    context = context_of(precise(), red, moved=0.1, penalty=0.3, call=CALL)
    algorithm, parts = DDPO(images_per_prompt=2, updates_per_round=2, clip_range=0.9), batches(range(4), group=2)
    memory = algorithm.prepare(context, parts)
    away, along = directions(context)
    put(context, flat(context) + 0.02 * away)
    (outcomes,) = run_backward(algorithm, context, parts, memory)
    found = take_gradient(context)
    assert min(float(outcome.measures["old_kl"].max()) for outcome in outcomes) > 1e-8
    expected = slope(context, lambda: loss_of(algorithm, context, parts, memory), along, small=1e-5)
    assert float(found @ along) == pytest.approx(expected, rel=1e-5)


def test_all_parts_are_compared_and_their_scores_logged() -> None:
    def both(images: Tensor, prompts: list[str]) -> RewardOutput:
        quality = red(images, prompts)
        return RewardOutput(total=(quality + 1) / 2, quality=quality, correspondence=torch.ones_like(quality))

    context = red_context(reward=both)
    algorithm, parts = DDPO(images_per_prompt=2), batches([0, 3], [1, 2], group=2)
    memory = algorithm.prepare(context, parts)
    [outcome, *_] = algorithm.losses(context, parts[1], 1, memory)
    names = {"reward", "quality", "correspondence", "degenerate", "dropped", "clipped", "old_kl"}
    assert set(outcome.measures) == names
    torch.testing.assert_close(outcome.measures["reward"], (outcome.measures["quality"] + 1) / 2)
    totals = torch.stack([memory[f"reward/{part}"][place] for part, place in ((0, 0), (1, 0), (1, 1), (0, 1))])
    expected = group_advantages(totals, 2)[0].float()
    torch.testing.assert_close(memory["advantages/1"], expected[[1, 2]], atol=1e-5, rtol=1e-5)
    context.ceiling = 0.0
    memory = algorithm.prepare(context, parts)
    assert not memory["advantages/0"].any() and memory["degenerate/0"].all(), "rewards beyond the ceiling are equal"


def test_trained_steps_are_drawn_anew_and_alike_in_all_parts() -> None:
    context = red_context(call={"num_inference_steps": 9})
    algorithm, drawn = DDPO(images_per_prompt=2, timestep_fraction=0.5), set()
    for turn in range(4):
        one, two = batches([0, 1], [2, 3], group=2, round=turn)
        state = context.start(one)
        assert algorithm.trained_steps(one, state) == algorithm.trained_steps(two, state)
        drawn.add(tuple(algorithm.trained_steps(one, state)))
    assert len(drawn) > 1
    assert all(len(steps) == 4 and list(steps) == sorted(set(steps)) and max(steps) <= 7 for steps in drawn)


@pytest.mark.parametrize("broken", ["pixels", "score"])
def test_an_image_that_is_not_finite_is_left_out_and_counted(broken: str) -> None:
    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        assert images.isfinite().all()
        totals = red(images, prompts)
        if broken == "score":
            totals[2] = math.inf
        return totals

    context = red_context(reward=reward, penalty=0.1)
    if broken == "pixels":

        def spoil(_: Any, __: Any, output: Tensor) -> Tensor:
            spoiled = output.clone()
            spoiled[2, 1, 3, 3] = math.nan
            return spoiled

        context.rollout.pipe.vae.decoder.register_forward_hook(spoil)
    algorithm, parts = DDPO(images_per_prompt=4), batches(range(8), group=4)
    memory = algorithm.prepare(context, parts)
    (outcomes,) = run_backward(algorithm, context, parts, memory)
    assert memory["dropped/0"].tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
    assert memory["advantages/0"][2] == 0
    kept = memory["reward/0"][[0, 1, 3]].double()
    expected = (kept - kept.mean()) / (kept.std(correction=0) + 1e-4)
    torch.testing.assert_close(memory["advantages/0"][[0, 1, 3]].double(), expected, atol=1e-4, rtol=1e-4)
    others = memory["reward/0"][[0, 1, 3, 4, 5, 6, 7]]
    assert float(outcomes[0].measures["reward"].mean()) == pytest.approx(float(others.mean()))
    assert all(outcome.measures["kl"][2] == 0 for outcome in outcomes)
    assert 0 < take_gradient(context).norm() < math.inf


def test_where_nothing_is_finite_no_loss_is() -> None:
    context = red_context(reward=lambda images, _: images[:, 0, 0, 0] * math.nan, call={"num_inference_steps": 2})
    algorithm, parts = DDPO(images_per_prompt=4), batches(range(4), group=4)
    memory = algorithm.prepare(context, parts)
    assert all(outcome.loss.isnan() for outcome in algorithm.losses(context, parts[0], 0, memory))


@pytest.mark.parametrize(
    ("rows", "group", "steps", "message"),
    [
        (6, 4, 4, "images_per_prompt: expected a divisor of .* got 4 for 6 rows over all parts and processes"),
        (2, 4, 4, "processes 4 or another multiple of 4"),
        (1, 1, 4, "train_batch_size: DDPO compares images with each other, got a batch of 1"),
        (2, 2, 1, "num_inference_steps: DDPO trains the steps with noise, .* got 1 and none to train; use 2 or more"),
    ],
)
def test_batches_and_steps_that_cannot_be_compared_are_refused(rows: int, group: int, steps: int, message: str) -> None:
    context = red_context(call={"num_inference_steps": steps})
    with pytest.raises(ValueError, match=message):
        DDPO(images_per_prompt=group).prepare(context, batches(range(rows), group=group))


@pytest.mark.slow
def test_updates_raise_a_reward_without_gradients_on_noise_that_training_has_not_seen() -> None:
    call = {**PLAIN, "num_inference_steps": 3}
    context, count = context_of(pipelines.stable_diffusion_3(), red, moved=0.0, call=call), 16
    rollout, prompts = context.rollout, [PROMPTS[place % 2] for place in range(count)]

    @torch.no_grad()
    def unseen() -> Tensor:
        generators = [torch.Generator().manual_seed(90_000 + place) for place in range(count)]
        state = rollout.run(rollout.start(context.encode(prompts), generators))
        return context.score(rollout.show(state.latents), prompts).total

    before, algorithm = unseen(), FlowGRPO(images_per_prompt=8, updates_per_round=2, clip_range=1e-3)
    optimizer = torch.optim.AdamW(context.lora.weights.values(), lr=3e-2)
    for turn in range(6):
        parts = batches(range(16), group=8, round=turn, seed=5)
        memory = algorithm.prepare(context, parts)
        for _ in range(2):
            optimizer.zero_grad()
            run_backward(algorithm, context, parts, memory)
            optimizer.step()
    gain = unseen() - before
    assert gain.mean() > 4 * gain.std() / math.sqrt(count)
