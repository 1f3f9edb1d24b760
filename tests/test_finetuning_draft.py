"""DRaFT, DRaFT-LV, AlignProp and ReFL: gradients against finite differences and against a second sampler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
from algorithm_runs import GUIDED, PLAIN, batch_of, changed, context_of, directions, gradient, precise, slope
from finetuned import warmth
from peak_memory import Peak
from scipy import stats
from torch import Tensor

from aigiqa_reward.finetuning import DRaFT, ReFL
from aigiqa_reward.finetuning.batch import Batch, generator_of
from aigiqa_reward.finetuning.context import TrainingContext

STEPS = 2


@pytest.fixture(scope="module")
def double() -> TrainingContext:
    return context_of(precise())


@pytest.fixture(scope="module")
def guided() -> TrainingContext:
    return context_of(precise(), call=GUIDED)


def noise_of(batch: Batch) -> Tensor:
    generators = [generator_of(batch.seed, "noise", batch.round, row) for row in batch.rows]
    return torch.cat([torch.randn((1, 4, 16, 16), generator=g, dtype=torch.float64) for g in generators])


def denoised(pipe: Any, latents: Tensor, time: Tensor, prompts: Iterable[str], scale: float) -> Tensor:
    def predict(texts: Iterable[str]) -> Tensor:
        tokens = pipe.tokenizer(list(texts), padding="max_length", max_length=77, return_tensors="pt").input_ids
        with torch.no_grad():
            states = pipe.text_encoder(tokens)[0]
        return pipe.unet(latents, time, encoder_hidden_states=states).sample

    output = predict(prompts)
    if scale > 1:
        blank = predict([""] * len(latents))
        output = blank + scale * (output - blank)
    return output


def sampled(context: TrainingContext, batch: Batch, latents: Tensor, first: int = 0, last: int = STEPS) -> Tensor:
    pipe = context.rollout.pipe
    pipe.scheduler.set_timesteps(STEPS)
    for time in pipe.scheduler.timesteps[first:last]:
        output = denoised(pipe, latents, time, batch.prompts, context.rollout.family.guidance)
        latents = pipe.scheduler.step(output, time, latents).prev_sample
    return latents


def loss_at(context: TrainingContext, batch: Batch, latents: Tensor) -> Tensor:
    vae = context.rollout.pipe.vae
    images = (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(-0.5, 1.5)
    return -warmth(images, [*batch.prompts]).mean()


def flat_gradient(context: TrainingContext, loss: Tensor) -> Tensor:
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(context.lora.weights.values()))])


def test_gradients_are_those_of_backpropagation_from_the_prefix(guided: TrainingContext) -> None:
    batch = batch_of((0, 1))
    whole = flat_gradient(guided, loss_at(guided, batch, sampled(guided, batch, noise_of(batch))))
    prefix = sampled(guided, batch, noise_of(batch), last=1).detach()
    last = flat_gradient(guided, loss_at(guided, batch, sampled(guided, batch, prefix, first=1)))
    assert not torch.allclose(whole, last, rtol=1e-2)
    for steps, expected in (("all", whole), (STEPS + 5, whole), (1, last)):
        found = gradient(guided, DRaFT(truncation_steps=steps), batch)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10 * float(expected.norm()))


def test_refl_has_the_gradient_of_the_clean_prediction(guided: TrainingContext) -> None:
    algorithm, pipe = ReFL(earliest=0.0), guided.rollout.pipe
    batch = next(b for step in range(50) if algorithm.judged_step(b := batch_of((0, 1), round=step), 2) == 1)
    with torch.no_grad():
        latents = sampled(guided, batch, noise_of(batch), last=1)
    time = pipe.scheduler.timesteps[1]
    kept = pipe.scheduler.alphas_cumprod[time].double()
    clean = (latents - (1 - kept).sqrt() * denoised(pipe, latents, time, batch.prompts, 3.0)) / kept.sqrt()
    loss = loss_at(guided, batch, clean)
    expected = flat_gradient(guided, loss)
    (outcome,) = algorithm.losses(guided, batch, 0, {})
    assert float(outcome.loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
    found = gradient(guided, algorithm, batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(expected.norm()))


@pytest.mark.parametrize(
    ("earliest", "steps", "expected"),
    [(0.75, 40, range(30, 40)), (0.0, 3, range(3)), (0.99, 3, [2]), (0.5, 1, [0]), (0.75, 5, [3, 4])],
)
def test_refl_judges_one_of_the_late_steps(earliest: float, steps: int, expected: range) -> None:
    drawn = [ReFL(earliest=earliest).judged_step(batch_of(round=step), steps) for step in range(800)]
    counts = Counter(drawn)
    assert sorted(counts) == list(expected)
    assert len(counts) == 1 or stats.chisquare([counts[step] for step in expected]).pvalue > 0.001
    assert drawn == [ReFL(earliest=earliest).judged_step(batch_of((2, 3), round=step), steps) for step in range(800)]


def test_only_the_kept_steps_have_gradients_and_no_step_is_taken_twice(
    double: TrainingContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    kind, stepped = type(double.rollout.pipe.scheduler), []
    step = kind.step
    monkeypatch.setattr(kind, "step", lambda *given, **named: stepped.append(1) or step(*given, **named))
    handle = double.lora.denoiser.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    gradient(double, DRaFT(), batch_of())
    assert calls == [False, True]
    calls.clear(), stepped.clear()
    gradient(changed(double, checkpointed=True), DRaFT(truncation_steps="all"), batch_of())
    handle.remove()
    assert (len(calls), len(stepped)) == (2 * STEPS, STEPS), "denoised again in the backward pass, but not stepped"


def test_a_ceiling_ends_the_gradient(double: TrainingContext) -> None:
    batch = batch_of((0, 1))
    (outcome,) = DRaFT().losses(double, batch, 0, {})
    low, high = sorted(outcome.measures["reward"].tolist())
    assert low < high
    between = changed(double, ceiling=(low + high) / 2)
    only = gradient(double, DRaFT(), batch_of([int(outcome.measures["reward"].argmin())])) / 2
    torch.testing.assert_close(gradient(between, DRaFT(), batch), only, rtol=1e-9, atol=1e-12 * float(only.norm()))
    (capped,) = DRaFT().losses(between, batch, 0, {})
    assert capped.measures["reward"].tolist() == outcome.measures["reward"].tolist(), "what is logged is not capped"
    assert float(capped.loss.detach()) == pytest.approx(-(low + (low + high) / 2) / 2)


def test_the_penalty_is_the_mean_square_of_what_the_adapter_changes(double: TrainingContext) -> None:
    context = changed(double, penalty=5.0, reward=lambda images, prompts: 0 * images.mean(dim=(1, 2, 3)))
    pipe, batch = context.rollout.pipe, batch_of()

    def loss() -> float:
        latents, found = noise_of(batch), []
        pipe.scheduler.set_timesteps(STEPS)
        for place, time in enumerate(pipe.scheduler.timesteps):
            output = denoised(pipe, latents, time, batch.prompts, 1.0)
            pipe.unet.disable_adapters()
            found.append(float((output - denoised(pipe, latents, time, batch.prompts, 1.0)).square().mean()))
            pipe.unet.enable_adapters()
            latents = sampled(context, batch, latents, first=place, last=place + 1)
        return 5.0 * sum(found) / len(found)

    algorithm = DRaFT(truncation_steps="all")
    (outcome,) = algorithm.losses(context, batch, 0, {})
    found = gradient(context, algorithm, batch)
    with torch.no_grad():
        assert float(outcome.loss.detach()) == pytest.approx(loss(), rel=1e-9) != 0
        for direction in directions(context):
            assert float(found @ direction) == pytest.approx(slope(context, loss, direction), rel=1e-5)


def test_images_that_are_not_finite_are_a_loss_that_is_not() -> None:
    context = context_of(pipelines.stable_diffusion(), lambda images, prompts: pytest.fail("was shown NaN"))
    context.rollout.pipe.vae.decoder.register_forward_hook(lambda module, given, output: output * float("nan"))
    for algorithm in (DRaFT(), ReFL()):
        (outcome,) = algorithm.losses(context, batch_of(), 0, {})
        assert bool(outcome.loss.isnan())


def test_low_variance_has_a_loss_for_the_image_and_for_each_noise(double: TrainingContext) -> None:
    batch = batch_of((0, 1))
    outcomes = list(DRaFT(low_variance=3).losses(double, batch, 0, {}))
    rewards = torch.stack([outcome.measures["reward"] for outcome in outcomes])
    (plain,) = DRaFT().losses(double, batch, 0, {})
    assert torch.equal(rewards[0], plain.measures["reward"])
    assert len({float(reward) for reward in rewards[:, 0]}) == len(outcomes) == 4
    torch.testing.assert_close(sum(outcome.loss.detach() for outcome in outcomes), -rewards.mean())


def test_the_random_truncation_is_uniform_and_its_gradient_that_of_the_drawn_number(double: TrainingContext) -> None:
    algorithm, steps, count = DRaFT(truncation_steps="random"), 5, 1000
    drawn = [algorithm.kept_steps(batch_of(round=step), steps) for step in range(count)]
    assert stats.chisquare([drawn.count(k) for k in range(1, steps + 1)]).pvalue > 0.001
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.1
    others = [algorithm.kept_steps(batch_of((4, 5), round=step), steps) for step in range(count)]
    assert others == drawn, "one draw for all parts of a step"
    batch = next(b for step in range(20) if algorithm.kept_steps(b := batch_of(round=step), STEPS) == 2)
    expected = gradient(double, DRaFT(truncation_steps=2), batch)
    assert torch.equal(gradient(double, algorithm, batch), expected)


def test_scores_and_texts_have_their_own_precision() -> None:
    seen = []

    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        seen.append((images.dtype, (images[0, 0] @ images[0, 1]).dtype))
        return warmth(images, prompts)

    first, second = (context_of(pipelines.stable_diffusion(), reward) for _ in range(2))
    plain = first.encode(["a", "b"]).positive["encoder_hidden_states"]
    with torch.autocast("cpu", torch.bfloat16):
        for context in (second, context_of(precise(), reward)):
            context.score(context.decode(context.start(batch_of()).latents), batch_of().prompts)
        cast = second.encode(["b", "a", "b"]).positive["encoder_hidden_states"]
    assert seen == [(torch.float32, torch.float32), (torch.float64, torch.float64)]
    assert torch.equal(cast, plain[[1, 0, 1]])


def peak(steps: int, *, checkpointed: bool) -> int:
    call = {**PLAIN, "num_inference_steps": steps}
    context = context_of(pipelines.stable_diffusion(), call=call, checkpointed=checkpointed)
    context.encode(batch_of().prompts)
    with Peak() as counter:
        gradient(context, DRaFT(truncation_steps="all"), batch_of())
    return counter.most


@pytest.mark.parametrize("steps", [(1, 3), pytest.param((10, 25, 50), marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_steps(steps: tuple[int, ...]) -> None:
    latents = 4 * 4 * 16 * 16
    first, *others = (peak(count, checkpointed=True) for count in steps)
    for count, found in zip(steps[1:], others, strict=True):
        assert found - 12 * latents * (count - steps[0]) < 1.1 * first
    if steps[0] == 1:
        assert peak(3, checkpointed=False) > 2 * first, "and this can fail"
