"""DDPO on tiny pipelines of diffusers' real classes: probabilities, gradients, groups, refusals; and that it climbs."""

from __future__ import annotations

import math
from typing import Any

import pipelines
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, HeunDiscreteScheduler
from pipelines import SIDE
from policy_training import batches, gradients, red, shown, size_of, tools_of, trained, went_backward
from safetensors.torch import load, save
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from aigiqa_reward import load_embedded_pipeline
from aigiqa_reward.finetuning.algorithms.policy_gradient import DDPO, group_advantages
from aigiqa_reward.types import RewardOutput

SAMPLING = {"height": SIDE, "width": SIDE, "num_inference_steps": 4}
PLAIN = {**SAMPLING, "guidance_scale": 1.0}


def ancestral_xl() -> Any:
    pipe = pipelines.stable_diffusion_xl()
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    return pipe


PIPES = {"sd": pipelines.stable_diffusion, "sdxl": ancestral_xl, "sd3": pipelines.stable_diffusion_3}


# --------------------------------------------------------------------------------------------- probabilities


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("family", PIPES)
def test_at_the_first_update_every_ratio_is_one(family, guidance):
    tools = tools_of(PIPES[family](), **SAMPLING, guidance_scale=guidance)
    algorithm, parts = DDPO(images_per_prompt=2), batches(range(4), group=2)
    memory = algorithm.prepare(tools, parts)
    [outcomes] = went_backward(algorithm, tools, parts, memory)
    assert len(outcomes) == 3
    assert memory["advantages/0"].abs().min() > 0.5
    for outcome in outcomes:
        assert outcome.measures["old_kl"].max() < (2e-6) ** 2 / 2
        assert outcome.measures["clipped"].sum() == 0
        assert float(outcome.loss.detach()) == pytest.approx(-float(memory["advantages/0"].mean()) / 3, abs=1e-5)
    assert size_of(gradients(tools)) > 1e-4


def normals_of(tools: Any, memory: Any, step: int) -> Normal:
    """The step's distribution by diffusers' own formulas: DDIM's step without noise, Euler ancestral's sigmas."""
    state = tools.start(batches(range(4), group=2)[0])
    scheduler, x = state.scheduler, memory["latents/0"][:, step]
    time = scheduler.timesteps[step]
    if isinstance(scheduler, EulerAncestralDiscreteScheduler):
        sigma, after = scheduler.sigmas[step], scheduler.sigmas[step + 1]
        output = tools.rollout.family.predict(x / (sigma**2 + 1).sqrt(), time, state.conditioning, state.shared)
        up = (after**2 * (sigma**2 - after**2) / sigma**2).sqrt()
        return Normal(x + output * ((after**2 - up**2).sqrt() - sigma), up)
    output = tools.rollout.family.predict(x, time, state.conditioning, state.shared)
    mean = scheduler.step(output, time, x, eta=1.0, variance_noise=torch.zeros_like(x)).prev_sample
    return Normal(mean, scheduler._get_variance(time, scheduler.timesteps[step + 1]).sqrt())


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_probabilities_and_divergences_are_those_of_diffusers_sampler(family):
    tools = tools_of(PIPES[family](), penalty=1.0, **PLAIN)
    algorithm, parts = DDPO(images_per_prompt=2), batches(range(4), group=2)
    memory = algorithm.prepare(tools, parts)
    outcomes = list(algorithm.losses(tools, parts[0], 0, memory))
    assert memory["steps"].tolist() == [0, 1, 2]
    for step, outcome in enumerate(outcomes):
        with torch.no_grad():
            own = normals_of(tools, memory, step)
            with tools.lora.off():
                reference = normals_of(tools, memory, step)
        expected = own.log_prob(memory["latents/0"][:, step + 1]).mean(dim=(1, 2, 3))
        torch.testing.assert_close(memory["log_probs/0"][:, step], expected, atol=1e-4, rtol=1e-4)
        far = kl_divergence(own, reference).mean(dim=(1, 2, 3))
        assert far.min() > 1e-6
        torch.testing.assert_close(outcome.measures["kl"], far, atol=1e-7, rtol=2e-3)
        assert float(outcome.loss.detach()) == pytest.approx(
            (float(far.mean()) - float(memory["advantages/0"].mean())) / 3, abs=1e-5
        )


def test_an_adapter_that_does_nothing_is_at_no_distance():
    tools = tools_of(pipelines.stable_diffusion(), penalty=1.0, moved=0.0, **PLAIN)
    algorithm, parts = DDPO(images_per_prompt=2), batches(range(4), group=2)
    [outcomes] = went_backward(algorithm, tools, parts, algorithm.prepare(tools, parts))
    assert all(outcome.measures["kl"].max() == 0 for outcome in outcomes)


# --------------------------------------------------------------------------------------------- gradients


@pytest.fixture(scope="module")
def exact() -> Any:
    """TrainingContext in float64, of a small weight of the distance."""
    return tools_of(pipelines.stable_diffusion(), penalty=0.3, dtype=torch.float64, **PLAIN)


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([[row] for row in range(8)], id="eight", marks=pytest.mark.slow),
        pytest.param([[0, 2, 4, 6], [1, 3, 5, 7]], id="interleaved", marks=pytest.mark.slow),
        pytest.param([[7, 0, 3], [1, 2, 4, 5, 6]], id="unequal"),
    ],
)
def test_a_batch_in_parts_has_the_gradient_of_the_whole(exact, parts):
    algorithm = DDPO(images_per_prompt=4, timestep_fraction=0.6)
    found = []
    for rows in ([range(8)], parts):
        split = batches(*rows, group=4)
        memory = algorithm.prepare(exact, split)
        assert len(memory["steps"]) == 2
        went_backward(algorithm, exact, split, memory)
        found.append(gradients(exact))
    assert size_of(found[0]) > 1e-4
    for name, value in found[0].items():
        # Rewards and log-probabilities are kept in float32, whose rounding is all that differs.
        torch.testing.assert_close(found[1][name], value, atol=1e-6 * size_of(found[0]), rtol=1e-6)


def test_the_gradient_is_that_of_finite_differences_away_from_the_old_policy(exact):
    """In a second update, of ratios that are not one and a divergence; nothing is clipped at this range."""
    algorithm = DDPO(images_per_prompt=2, updates_per_round=2, clip_range=0.9)
    parts = batches(range(4), group=2)
    memory = algorithm.prepare(exact, parts)
    weights, generator = exact.lora.weights, torch.Generator().manual_seed(0)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    moves = [
        {n: torch.randn(w.shape, generator=generator, dtype=w.dtype) for n, w in weights.items()} for _ in range(2)
    ]

    def put(along: float) -> None:
        for name, weight in weights.items():
            weight.data = before[name] + 0.02 * moves[0][name] + along * moves[1][name]

    def loss() -> float:
        with torch.no_grad():
            return sum(float(outcome.loss) for outcome in algorithm.losses(exact, parts[0], 0, memory))

    try:
        put(0.0)
        [outcomes] = went_backward(algorithm, exact, parts, memory)
        found = gradients(exact)
        put(1e-5)
        above = loss()
        put(-1e-5)
        below = loss()
    finally:
        for name, weight in weights.items():
            weight.data = before[name]
    assert min(float(outcome.measures["old_kl"].max()) for outcome in outcomes) > 1e-8
    slope = sum(float((found[name] * moves[1][name]).sum()) for name in found)
    assert slope == pytest.approx((above - below) / 2e-5, rel=1e-5)


def test_gradient_checkpointing_changes_nothing():
    found = []
    for checkpointed in (False, True):
        tools = tools_of(pipelines.stable_diffusion(), penalty=0.1, checkpointed=checkpointed, **PLAIN)
        algorithm, parts = DDPO(images_per_prompt=2), batches(range(4), group=2)
        went_backward(algorithm, tools, parts, algorithm.prepare(tools, parts))
        found.append(gradients(tools))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-7, rtol=1e-5)


def test_a_second_update_is_clipped_and_goes_no_further_up():
    tools = tools_of(pipelines.stable_diffusion(), **PLAIN)
    algorithm, parts = DDPO(images_per_prompt=2, updates_per_round=2), batches(range(4), group=2)
    memory = algorithm.prepare(tools, parts)
    went_backward(algorithm, tools, parts, memory)
    for name, value in gradients(tools).items():
        tools.lora.weights[name].data -= 0.5 * value / (value.norm() + 1e-12)
    [outcomes] = went_backward(algorithm, tools, parts, memory)
    clipped = torch.cat([outcome.measures["clipped"] for outcome in outcomes])
    assert 0 < clipped.mean() <= 1
    assert min(float(outcome.measures["old_kl"].max()) for outcome in outcomes) > (1e-4) ** 2 / 2


# --------------------------------------------------------------------------------------------- rounds


def test_what_is_kept_is_plain_and_survives_a_checkpoint():
    def both(images: Tensor, prompts: list[str]) -> RewardOutput:
        quality = red(images, prompts)
        return RewardOutput(total=(quality + 1) / 2, quality=quality, correspondence=torch.ones_like(quality))

    tools = tools_of(pipelines.stable_diffusion(), reward=both, **PLAIN)
    algorithm, parts = DDPO(images_per_prompt=2), batches([0, 3], [1, 2], group=2)
    memory = load(save(dict(algorithm.prepare(tools, parts))))
    [outcome, *_] = algorithm.losses(tools, parts[1], 1, memory)
    assert set(outcome.measures) == {
        "reward", "quality", "correspondence", "degenerate", "dropped", "clipped", "old_kl"
    }  # fmt: skip
    torch.testing.assert_close(outcome.measures["reward"], (outcome.measures["quality"] + 1) / 2)
    totals = torch.stack([memory[f"reward/{part}"][place] for part, place in ((0, 0), (1, 0), (1, 1), (0, 1))])
    expected = group_advantages(totals, 2).values.float()
    torch.testing.assert_close(memory["advantages/1"], expected[[1, 2]], atol=1e-5, rtol=1e-5)
    assert memory["latents/0"].shape == (2, 4, 4, SIDE // 2, SIDE // 2)


def test_rewards_beyond_the_ceiling_are_equal():
    tools = tools_of(pipelines.stable_diffusion(), ceiling=0.0, **PLAIN)
    algorithm, parts = DDPO(images_per_prompt=4), batches(range(4), group=4)
    memory = algorithm.prepare(tools, parts)
    assert memory["advantages/0"].tolist() == [0.0] * 4
    assert memory["degenerate/0"].tolist() == [1.0] * 4
    assert memory["reward/0"].min() > 0.1
    went_backward(algorithm, tools, parts, memory)
    assert size_of(gradients(tools)) == 0


def test_trained_steps_are_drawn_anew_and_alike_in_all_parts():
    tools = tools_of(pipelines.stable_diffusion(), **{**PLAIN, "num_inference_steps": 9})
    algorithm, drawn = DDPO(images_per_prompt=2, timestep_fraction=0.5), set()
    for turn in range(4):
        [one, two] = batches([0, 1], [2, 3], group=2, round=turn)
        state = tools.start(one)
        assert algorithm.trained_steps(one, state) == algorithm.trained_steps(two, state)
        drawn.add(tuple(algorithm.trained_steps(one, state)))
    assert len(drawn) > 1
    assert all(len(steps) == 4 and list(steps) == sorted(set(steps)) and max(steps) <= 7 for steps in drawn)


@pytest.mark.parametrize("broken", ["pixels", "score"])
def test_an_image_that_is_not_finite_is_left_out_and_counted(broken):
    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        assert images.isfinite().all()
        totals = red(images, prompts)
        if broken == "score":
            totals[2] = math.inf
        return totals

    tools = tools_of(pipelines.stable_diffusion(), reward=reward, penalty=0.1, **PLAIN)
    if broken == "pixels":

        def spoil(_: Any, __: Any, output: Tensor) -> Tensor:
            spoiled = output.clone()
            spoiled[2, 1, 3, 3] = math.nan
            return spoiled

        tools.rollout.pipe.vae.decoder.register_forward_hook(spoil)
    algorithm, parts = DDPO(images_per_prompt=4), batches(range(8), group=4)
    memory = algorithm.prepare(tools, parts)
    [outcomes] = went_backward(algorithm, tools, parts, memory)
    assert memory["dropped/0"].tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
    assert memory["advantages/0"][2] == 0
    kept = memory["reward/0"][[0, 1, 3]].double()
    expected = (kept - kept.mean()) / (kept.std(correction=0) + 1e-4)
    torch.testing.assert_close(memory["advantages/0"][[0, 1, 3]].double(), expected, atol=1e-4, rtol=1e-4)
    others = memory["reward/0"][[0, 1, 3, 4, 5, 6, 7]]
    assert float(outcomes[0].measures["reward"].mean()) == pytest.approx(float(others.mean()))
    assert all(outcome.measures["kl"][2] == 0 for outcome in outcomes)
    assert 0 < size_of(gradients(tools)) < math.inf


def test_where_nothing_is_finite_no_loss_is():
    tools = tools_of(pipelines.stable_diffusion(), reward=lambda images, _: images[:, 0, 0, 0] * math.nan, **PLAIN)
    algorithm, parts = DDPO(images_per_prompt=4), batches(range(4), group=4)
    memory = algorithm.prepare(tools, parts)
    assert all(outcome.loss.isnan() for outcome in algorithm.losses(tools, parts[0], 0, memory))


# --------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("rows", "group", "message"),
    [
        (6, 4, "got 6 rows over all parts and processes for groups of 4"),
        (2, 4, "processes 4 or another multiple of 4, or images_per_prompt a divisor of 2"),
        (1, 1, "train_batch_size: DDPO compares images with each other, got a whole batch of 1"),
    ],
)
def test_a_batch_without_whole_groups_is_refused(exact, rows, group, message):
    with pytest.raises(ValueError, match=message):
        DDPO(images_per_prompt=group).prepare(exact, batches(range(rows), group=group))


def test_one_step_is_refused():
    tools = tools_of(pipelines.stable_diffusion(), **{**PLAIN, "num_inference_steps": 1})
    with pytest.raises(ValueError, match=r"num_inference_steps: DDPO trains .* got 1 step and .* 2 or more"):
        DDPO(images_per_prompt=2).prepare(tools, batches(range(2), group=2))


def test_what_has_no_stochastic_sampler_is_refused():
    DDPO().check(tools_of(pipelines.stable_diffusion(), **PLAIN), ["a cat"])
    pipe = pipelines.stable_diffusion()
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="scheduler: DDPO cannot serve HeunDiscreteScheduler"):
        DDPO().check(tools_of(pipe, **PLAIN), ["a cat"])
    with pytest.raises(ValueError, match=r"eta: .* got eta=0\.5 .* leave it out"):
        DDPO().check(tools_of(pipelines.stable_diffusion(), eta=0.5, **PLAIN), ["a cat"])


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("images_per_prompt", 0, ValueError),
        ("images_per_prompt", 2.0, TypeError),
        ("updates_per_round", 0, ValueError),
        ("clip_range", 0.0, ValueError),
        ("clip_range", math.nan, ValueError),
        ("advantage_clip", -1.0, ValueError),
        ("deviation", "prompt", ValueError),
        ("timestep_fraction", 1.5, ValueError),
        ("timestep_fraction", 0.0, ValueError),
        ("eta", 0.0, ValueError),
        ("eta", "1", TypeError),
    ],
)
def test_settings_out_of_range_are_refused(name, value, error):
    with pytest.raises(error, match=f"^{name}: expected"):
        DDPO(**{name: value})


def test_settings_tell_the_loop_of_groups_and_rounds():
    algorithm = DDPO(images_per_prompt=6, updates_per_round=3)
    assert (algorithm.rows_per_prompt, algorithm.steps_per_round, algorithm.reward_gradient) == (6, 3, False)


# --------------------------------------------------------------------------------------------- it climbs


@pytest.mark.slow
def test_a_few_updates_raise_a_reward_without_gradients():
    """The embedded generator becomes redder on seeds and noise that training has not seen, every one."""
    tools = tools_of(load_embedded_pipeline(), moved=0.0, num_inference_steps=3, guidance_scale=1.0)
    before = shown(tools, 8)
    trained(DDPO(images_per_prompt=4), tools, rounds=5, rows=8, learning_rate=4e-3)
    gain = shown(tools, 8) - before
    assert gain.min() > 0
    assert gain.mean() > 0.03
