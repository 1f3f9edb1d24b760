import copy
import math
import statistics
import warnings
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler
from pipelines import SIDE
from pipelines_current import pipeline
from torch import Tensor
from watched import families

from aigiqa_reward.sampling.ancestral import ancestral_step
from aigiqa_reward.sampling.candidates import BestOfNOutput
from aigiqa_reward.sampling.schedulers import noise_level
from aigiqa_reward.sampling.steering import (
    POTENTIALS,
    ParticleSteering,
    SteeringOutput,
    effective_sample_size,
    last_log_potential,
    log_potential,
    systematic_resampling,
)

PROMPT = "a cat on a mat"
STEPS = {"height": SIDE, "width": SIDE, "num_inference_steps": 5}


@pytest.fixture(scope="module")
def sd() -> Any:
    return pipeline("sd")


def corner(images: Tensor, prompts: list[str]) -> Tensor:
    return images[:, 0, :4, :4].mean(dim=(1, 2))


def make(pipe: Any, reward: Any = corner, **arguments: Any) -> ParticleSteering:
    return ParticleSteering(pipe, reward, progress=False, **arguments)


def same(one: SteeringOutput, other: SteeringOutput, levels: int) -> None:
    assert one.ancestors == other.ancestors
    assert one.winners == other.winners and one.seeds == [None] * len(one.images)
    for image, again in zip(one.images, other.images, strict=True):
        assert np.abs(np.asarray(image).astype(int) - np.asarray(again)).max() <= levels


def test_the_effective_sample_size_at_its_ends():
    for weights, expected in (([0.2] * 5, 5), ([0.0, 3.0, 0.0], 1), ([1.0, 2.0, 3.0], 36 / 14)):
        assert effective_sample_size(torch.tensor(weights)) == pytest.approx(expected)


def test_systematic_resampling_copies_by_weight():
    generator = torch.Generator().manual_seed(0)
    weights = torch.tensor([0.05, 0.0, 0.6, 0.15, 0.2], dtype=torch.float64)
    counts = []
    for offset in torch.rand(2000, generator=generator, dtype=torch.float64).tolist():
        places = systematic_resampling(weights * 3, offset)
        assert places == sorted(places)
        counts.append(np.bincount(places, minlength=5))
        assert (np.abs(counts[-1] - 5 * weights.numpy()) < 1 + 1e-9).all()
    assert np.mean(counts, axis=0) == pytest.approx((5 * weights).tolist(), abs=0.04)
    assert systematic_resampling(torch.ones(4, dtype=torch.float64), 0.5) == [0, 1, 2, 3]
    assert systematic_resampling(torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64), 0.0) == [1, 1, 1]


@pytest.mark.parametrize("potential", POTENTIALS)
def test_potentials_multiply_to_the_tilt(potential):
    rewards = torch.rand(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logs = torch.stack([log_potential(potential, rewards[:, : k + 1], 0.2) for k in range(5)])
    last = last_log_potential(rewards[:, 5], logs.sum(dim=0), 0.2)
    torch.testing.assert_close(logs.sum(dim=0) + last, rewards[:, 5] / 0.2)
    by_hand = {"difference": lambda row: row[2] - row[1], "max": max, "sum": sum}[potential]
    assert logs[2].tolist() == pytest.approx([by_hand(row[:3]) / 0.2 for row in rewards.tolist()])


@pytest.mark.parametrize("potential", POTENTIALS)
def test_particles_stand_for_the_tilted_distribution(potential):
    # Gaussian data, whose x0 is known: every step is linear, and r(x) = x at temperature T moves the mean by var/T.
    scheduler, count, temperature = FlowMatchEulerDiscreteScheduler(), 40_000, 2.0
    scheduler.set_timesteps(12)
    generator = torch.Generator().manual_seed(1)

    def sample(steered: bool) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, generator=generator)
        log_weights, product = torch.zeros(2, count, dtype=torch.float64)
        history = torch.zeros(count, 0, dtype=torch.float64)
        for step in range(12):
            alpha, sigma = noise_level(scheduler, step)
            clean = alpha * x / (alpha**2 + sigma**2)
            if steered and step in (4, 7, 10):
                history = torch.cat([history, clean[:, None].double()], dim=1)
                logs = log_potential(potential, history, temperature)
                log_weights, product = log_weights + logs, product + logs
                weights = log_weights.softmax(0)
                if effective_sample_size(weights) < count / 2:
                    rows = systematic_resampling(weights, float(torch.rand((), generator=generator)))
                    x, clean, product, history = x[rows], clean[rows], product[rows], history[rows]
                    log_weights = torch.zeros_like(log_weights)
            x = ancestral_step(scheduler, step, x, clean, 1.0, torch.randn(count, generator=generator))
        return x.double(), (log_weights + last_log_potential(x.double(), product, temperature)).softmax(0)

    plain = sample(False)[0]
    x, weights = sample(True)
    assert float((weights * x).sum()) == pytest.approx(float(plain.mean() + plain.var() / temperature), abs=0.05)
    assert float(plain.var() / temperature) > 0.2


def test_the_same_call_gives_the_same_bits_and_chunks_change_nothing(sd):
    arguments = {"temperature": 0.05, "top_k": 4, "particles": 4}
    one = make(sd, **arguments)(PROMPT, seed=3, **STEPS)
    assert len(set(one.ancestors)) < 4  # there was resampling to agree on
    again = make(sd, **arguments)(PROMPT, seed=3, **STEPS)
    same(one, again, levels=0)
    assert (one.all_scores, one.effective_sample_sizes) == (again.all_scores, again.effective_sample_sizes)
    other = make(sd, **arguments, batch_size=3)(PROMPT, seed=3, **STEPS)
    same(one, other, levels=2)
    assert other.all_scores == pytest.approx(one.all_scores, abs=1e-3)
    assert isinstance(one, BestOfNOutput)
    assert one.all_seeds == [3, 4, 5, 6] and one.denoiser_calls == 4 * 5
    assert [step for step, _ in one.effective_sample_sizes] == [1, 2, 3, 4]
    assert sum(one.weights) == pytest.approx(1)
    assert len(set(one.all_scores)) == 4  # copies part
    assert [preview.step for preview in one.previews[3]] == [1, 2, 3, 4]


@families("sd3", slow=("sd", "flux"))
def test_a_high_temperature_steers_nothing_and_a_low_one_raises_the_reward(name):
    pipe = pipeline(name)
    arguments = {"every": 2, "first": 0.4}
    plain = make(pipe, first=1.0)(PROMPT, seed=0, **STEPS)
    hot = make(pipe, temperature=1e9, **arguments)(PROMPT, seed=0, **STEPS)
    assert hot.ancestors == plain.ancestors == [0, 1, 2, 3]
    assert hot.all_scores == plain.all_scores
    assert plain.effective_sample_sizes == []
    assert [size for _, size in hot.effective_sample_sizes] == pytest.approx([4, 4])
    assert hot.weights == pytest.approx([0.25] * 4)
    means = []
    for temperature in (1e9, 0.01):
        steered = [make(pipe, temperature=temperature, **arguments)(PROMPT, seed=s, **STEPS) for s in (4, 8)]
        means.append(statistics.mean(score for output in steered for score in output.all_scores))
    assert means[1] > means[0] + 0.05


def test_weights_tilt_by_the_reward_where_nothing_is_resampled(sd):
    out = make(sd, resample_below=0.0, temperature=0.1)(PROMPT, **STEPS)
    tilt = np.exp(np.array(out.all_scores) / 0.1)
    assert out.ancestors == [0, 1, 2, 3]
    assert out.weights == pytest.approx((tilt / tilt.sum()).tolist())


def test_what_is_not_finite_gets_no_weight():
    pipe = pipelines.stable_diffusion()
    calls = []

    def break_second(_: Any, args: Any, output: Tensor) -> None:
        calls.append(len(output))
        if len(calls) == 2:  # the second preview: place 1 of 4
            output[1, 0, 0, 0] = math.nan

    pipe.vae.decoder.register_forward_hook(break_second)
    with pytest.warns(UserWarning, match="seed 1: NaN or infinite pixels"):
        out = make(pipe, resample_below=0.0)(PROMPT, **STEPS)
    assert out.weights[1] == 0 and sum(out.weights) == pytest.approx(1)
    assert list(out.dropped) == [1] and out.denoiser_calls == 20 - 3
    calls.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # its place is taken by a copy of another
        out = make(pipe, resample_below=1.0, temperature=1e9)(PROMPT, **STEPS)
    assert set(out.ancestors) == {0, 2, 3} and out.dropped == {}
    with pytest.raises(RuntimeError, match="none of the 4 candidates could be ranked"):
        make(pipe, lambda images, prompts: images[:, 0, 0, 0] * math.nan)(PROMPT, **STEPS)
    calls.clear()

    def overflow_at_the_end(images: Tensor, prompts: list[str]) -> Tensor:
        scores = corner(images, prompts)
        return torch.where(scores == scores.max(), torch.inf, scores)

    plan = make(pipe, overflow_at_the_end, resample_below=0.0, first=1.0)
    with pytest.warns(UserWarning, match=r"seed \d: the reward gave inf\)"):
        out = plan(PROMPT, **{**STEPS, "num_inference_steps": 2})
    assert [weight == 0 for weight in out.weights] == [seed in out.dropped for seed in range(4)]
    assert sum(out.weights) == pytest.approx(1) and math.isfinite(out.scores[0])


def test_bad_arguments_are_refused(sd):
    refused = {
        "particles": 1, "potential": "best", "temperature": 0.0, "resample_below": 1.5, "first": -0.1, "every": 0,
        "eta": 0.0, "top_k": 5, "batch_size": 0, "reward_prompt": " ",
    }  # fmt: skip
    for name, value in refused.items():
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            make(sd, **{name: value})
    with pytest.raises(TypeError, match=r"temperature: expected a number above 0.*'hot'"):
        make(sd, temperature="hot")
    with pytest.raises(TypeError, match="ParticleSteering runs a pipeline's parts itself"):
        make(lambda prompt: prompt)
    with pytest.raises(TypeError, match="one prompt per call"):
        make(sd)([PROMPT])
    with pytest.raises(ValueError, match="eta: expected as an argument of ParticleSteering"):
        make(sd)(PROMPT, eta=0.5)
    with pytest.raises(ValueError, match=r"seed: expected an integer in .* got 18446744073709551615"):
        make(sd)(PROMPT, seed=2**64 - 1)
    pipe = copy.copy(sd)
    for scheduler in (PNDMScheduler, HeunDiscreteScheduler):  # which have points between the steps
        pipe.scheduler = scheduler.from_config(sd.scheduler.config)
        with pytest.raises(ValueError, match=rf"ParticleSteering cannot serve {scheduler.__name__}.*DDIMScheduler"):
            make(pipe)
