"""ReFL: which step is judged, and the gradient through its clean prediction."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from finetuned import GUIDED, batch_of, decoded, gradient, noise_of, precise, sampled, text, tools_of, warmth
from scipy import stats

from aigiqa_reward.finetuning import ReFL
from aigiqa_reward.finetuning.context import TrainingContext
from aigiqa_reward.rewards.bound import BoundReward


@pytest.fixture(scope="module")
def tools() -> TrainingContext:
    return tools_of(precise(), double=True, call=GUIDED)


@pytest.mark.parametrize(
    ("earliest", "steps", "expected"),
    [(0.75, 40, range(30, 40)), (0.0, 3, range(3)), (0.99, 3, [2]), (0.5, 1, [0]), (0.75, 5, [3, 4])],
)
def test_the_judged_step_is_one_of_the_late_ones(earliest: float, steps: int, expected: range) -> None:
    drawn = [ReFL(earliest=earliest).judged_step(batch_of(step=step), steps) for step in range(800)]
    counts = Counter(drawn)
    assert sorted(counts) == list(expected)
    assert len(counts) == 1 or stats.chisquare([counts[step] for step in expected]).pvalue > 0.001
    assert drawn == [ReFL(earliest=earliest).judged_step(batch_of((2, 3), step=step), steps) for step in range(800)]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("judged", [0, 1])
def test_gradient_is_that_of_the_clean_prediction(tools: TrainingContext, judged: int, checkpointed: bool) -> None:
    """x0 = (x - sqrt(1 - a) eps) / sqrt(a), of the guided eps, from latents that are cut off the graph."""
    tools.checkpointed = checkpointed
    algorithm, pipe = ReFL(earliest=0.0), tools.rollout.pipe
    step = next(step for step in range(50) if algorithm.judged_step(batch_of(step=step), 2) == judged)
    batch = batch_of((0, 1), step=step)
    with torch.no_grad():
        latents = sampled(pipe, batch.prompts, noise_of(batch), scale=3.0, last=judged)
    time = pipe.scheduler.timesteps[judged]
    output, blank = (
        pipe.unet(latents, time, encoder_hidden_states=text(pipe, prompts)).sample
        for prompts in (batch.prompts, ["", ""])
    )
    kept = pipe.scheduler.alphas_cumprod[time].double()
    clean = (latents - (1 - kept).sqrt() * (blank + 3.0 * (output - blank))) / kept.sqrt()
    loss = -warmth(decoded(pipe, clean).clamp(-0.5, 1.5), [*batch.prompts]).mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(tools.lora.weights.values()))])
    assert float(expected.norm()) > 0
    (outcome,) = algorithm.losses(tools, batch, 0, {})
    assert float(outcome.loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
    found = gradient(tools, algorithm, batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(expected.norm()))


def test_only_one_prediction_has_gradients(tools: TrainingContext) -> None:
    tools.checkpointed = False
    with_gradients = []
    handle = tools.lora.denoiser.register_forward_pre_hook(lambda *_: with_gradients.append(torch.is_grad_enabled()))
    step = next(step for step in range(50) if ReFL(earliest=0.0).judged_step(batch_of(step=step), 2) == 1)
    gradient(tools, ReFL(earliest=0.0), batch_of(step=step))
    handle.remove()
    assert with_gradients == [False, True]


def test_the_penalty_counts_at_the_judged_step(tools: TrainingContext) -> None:
    batch = batch_of()
    (plain,) = ReFL().losses(tools, batch, 0, {})
    tools.penalty = 2.0
    try:
        (penalized,) = ReFL().losses(tools, batch, 0, {})
    finally:
        tools.penalty = 0.0
    assert float(penalized.measures["kl"]) > 0
    torch.testing.assert_close(penalized.loss, plain.loss + 2 * penalized.measures["kl"].mean())


def test_a_reward_without_gradients_is_refused(tools: TrainingContext) -> None:
    tools.bound = BoundReward(lambda images, prompts: warmth(images.detach(), prompts))
    with pytest.raises(
        ValueError, match=r"^reward: fine-tuning with DRaFT or ReFL needs its gradient.*DPO, DDPO or FlowGRPO"
    ):
        next(ReFL().losses(tools, batch_of(), 0, {}))
    tools.bound = BoundReward(warmth)
