"""DRaFT-LV, AlignProp's draw, half precision, memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pipelines
import pytest
import torch
from diffusers import DDIMScheduler
from finetuned import CALL, batch_of, gradient, precise, tools_of, warmth
from peak_memory import Peak
from scipy import stats
from torch import Tensor

from aigiqa_reward.finetuning import DRaFT, FinetuneConfig
from aigiqa_reward.finetuning.context import TrainingContext
from aigiqa_reward.finetuning.optimizers import accelerator_of

# ------------------------------------------------------------------------------------------------ low variance


def test_low_variance_is_the_mean_over_fresh_noise() -> None:
    """From pure noise to the image in one step: noise for the finished latents is then as good as the first.

    So DRaFT-LV with n = 4 is the mean of five independent draws of DRaFT-1: its expectation, a fifth of its variance.
    """
    pipe = pipelines.stable_diffusion()
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config,
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )
    tools = tools_of(pipe, lambda images, prompts: images.mean(dim=(1, 2, 3)), call={**CALL, "num_inference_steps": 1})
    draws = 20
    one, low = (
        torch.stack([gradient(tools, algorithm, batch_of(step=step, seed=seed)) for step in range(draws)]).double()
        for seed, algorithm in enumerate((DRaFT(), DRaFT(low_variance=4)))
    )
    variance = [float(samples.var(dim=0).sum()) for samples in (one, low)]
    assert 0.1 < variance[1] / variance[0] < 0.4
    apart = float((one.mean(dim=0) - low.mean(dim=0)).square().sum())
    assert apart < 3 * sum(variance) / draws
    without = float((one.mean(dim=0) - 5 * low.mean(dim=0)).square().sum())
    assert without > 3 * sum(variance) / draws, "a sum in place of the mean would be seen"


def test_low_variance_has_a_loss_for_the_image_and_for_each_noise() -> None:
    tools, batch = tools_of(pipelines.stable_diffusion()), batch_of((0, 1))
    outcomes = list(DRaFT(low_variance=3).losses(tools, batch, 0, {}))
    assert len(outcomes) == 4
    rewards = torch.stack([outcome.measures["reward"] for outcome in outcomes])
    (plain,) = DRaFT().losses(tools, batch, 0, {})
    assert torch.equal(rewards[0], plain.measures["reward"])
    assert len({float(reward) for reward in rewards[:, 0]}) == 4
    total = sum(outcome.loss.detach() for outcome in outcomes)
    torch.testing.assert_close(total, -rewards.mean())
    again = torch.stack([o.measures["reward"] for o in DRaFT(low_variance=3).losses(tools, batch, 0, {})])
    assert torch.equal(again, rewards)


# ------------------------------------------------------------------------------------------------ AlignProp


def test_the_random_truncation_is_uniform() -> None:
    algorithm, steps, count = DRaFT(truncation_steps="random"), 5, 1000
    drawn = [algorithm.kept_steps(batch_of(step=step), steps) for step in range(count)]
    counts = Counter(drawn)
    assert sorted(counts) == [1, 2, 3, 4, 5]
    assert stats.chisquare([counts[k] for k in range(1, steps + 1)]).pvalue > 0.001
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.1
    others = [algorithm.kept_steps(batch_of((4, 5), step=step), steps) for step in range(count)]
    assert others == drawn, "one draw for all parts of a step"
    assert [algorithm.kept_steps(batch_of(step=step, seed=1), steps) for step in range(count)] != drawn


def test_the_gradient_is_that_of_the_drawn_number() -> None:
    tools, algorithm = tools_of(pipelines.stable_diffusion()), DRaFT(truncation_steps="random")
    seen = set()
    for step in range(6):
        batch = batch_of(step=step)
        seen.add(algorithm.kept_steps(batch, 2))
        expected = gradient(tools, DRaFT(truncation_steps=algorithm.kept_steps(batch, 2)), batch)
        assert torch.equal(gradient(tools, algorithm, batch), expected)
    assert seen == {1, 2}


# ------------------------------------------------------------------------------------------------ half precision


def test_half_precision_keeps_the_gradient(tmp_path: Path) -> None:
    """A weight that autocast has cast without gradients, in the prefix, must not be taken again with them."""
    tools, batch, call = tools_of(pipelines.stable_diffusion()), batch_of((0, 1)), DRaFT()
    expected = gradient(tools, call, batch)
    weights = list(tools.lora.weights.values())
    tools.accelerator = accelerator_of(FinetuneConfig(mixed_precision="bf16"), tmp_path, torch.device("cpu"), None)
    for weight in weights:
        weight.grad = None
    with tools.accelerator.autocast():
        (outcome,) = call.losses(tools, batch, 0, {})
    outcome.loss.backward()
    ours = torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None])
    assert ours.dtype == torch.float32
    assert not torch.equal(ours, expected)
    assert float(torch.cosine_similarity(ours, expected, dim=0)) > 0.98
    assert float(ours.norm() / expected.norm()) == pytest.approx(1, abs=0.1)


def test_scores_are_in_the_rewards_precision() -> None:
    seen = []

    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        seen.append((images.dtype, (images[0, 0] @ images[0, 1]).dtype))
        return warmth(images, prompts)

    for tools in (tools_of(pipelines.stable_diffusion(), reward), tools_of(precise(), reward, double=True)):
        with torch.autocast("cpu", torch.bfloat16):
            tools.score(tools.decode(tools.start(batch_of()).latents), batch_of().prompts)
    assert seen[0] == (torch.float32, torch.float32)
    assert seen[1] == (torch.float64, torch.float64)


def test_texts_are_encoded_in_the_encoders_precision() -> None:
    """Whether a prompt is first met by a validation or under autocast must not matter."""
    first, second = (tools_of(pipelines.stable_diffusion()) for _ in range(2))
    plain = first.encode(["a", "b"]).positive["encoder_hidden_states"]
    with torch.autocast("cpu", torch.bfloat16):
        cast = second.encode(["b", "a", "b"]).positive["encoder_hidden_states"]
    assert isinstance(plain, Tensor)
    assert isinstance(cast, Tensor)
    assert torch.equal(cast, plain[[1, 0, 1]])


# ------------------------------------------------------------------------------------------------ memory


def peak(steps: int, *, checkpointed: bool) -> int:
    pipe = pipelines.stable_diffusion()
    tools: TrainingContext = tools_of(pipe, call={**CALL, "num_inference_steps": steps}, checkpointed=checkpointed)
    tools.encode(batch_of().prompts)
    with Peak() as counter:
        gradient(tools, DRaFT(truncation_steps="all"), batch_of())
    return counter.most


@pytest.mark.parametrize("steps", [(1, 3), pytest.param((10, 25, 50), marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_steps(steps: tuple[int, ...]) -> None:
    """But for what the sampler keeps of each step: a few latents of 4 x 16 x 16 numbers."""
    latents = 4 * 4 * 16 * 16
    first, *others = (peak(count, checkpointed=True) for count in steps)
    for count, found in zip(steps[1:], others, strict=True):
        assert found - 12 * latents * (count - steps[0]) < 1.1 * first
    if steps[0] == 1:
        assert peak(3, checkpointed=False) > 2 * peak(1, checkpointed=False), "and this can fail"
