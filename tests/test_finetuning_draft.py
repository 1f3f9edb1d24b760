"""DRaFT's gradients against finite differences, a second sampler, and each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pipelines
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from finetuned import CALL, GUIDED, batch_of, decoded, flat, gradient, noise_of, precise, put, sampled, tools_of, warmth
from torch import Tensor

from aigiqa_reward.finetuning import DRaFT
from aigiqa_reward.finetuning.context import TrainingContext

STEPS = 2


@pytest.fixture(scope="module")
def double() -> TrainingContext:
    """Stable Diffusion in float64 with a random adapter."""
    return tools_of(precise(), double=True)


@pytest.fixture(scope="module")
def guided() -> TrainingContext:
    return tools_of(precise(), double=True, call=GUIDED)


def with_options(tools: TrainingContext, **options: Any) -> TrainingContext:
    """The same pipeline and adapter."""
    kept = {name: getattr(tools, name) for name in ("rollout", "lora", "reward", "accelerator")}
    return TrainingContext(**{**kept, **options})


def slopes(tools: TrainingContext, function: Callable[[], float], count: int = 2) -> list[tuple[Tensor, float]]:
    """Directions in the space of the adapter's weights, and central differences along them."""
    start, small, found = flat(tools), 1e-4, []
    for seed in range(count):
        direction = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed), dtype=start.dtype)
        values = []
        for sign in (1, -1):
            put(tools, start + sign * small * direction)
            values.append(function())
        put(tools, start)
        found.append((direction, (values[0] - values[1]) / (2 * small)))
    return found


# ------------------------------------------------------------------------------------------------ the gradient


@pytest.mark.parametrize("kept", [1, 2])
@pytest.mark.parametrize("which", ["double", "guided"])
def test_gradient_is_that_of_finite_differences(which: str, kept: int, request: pytest.FixtureRequest) -> None:
    """Of the loss by another sampler, whose prefix has the adapter as it is and whose rest the one that is moved."""
    tools: TrainingContext = request.getfixturevalue(which)
    pipe, batch = tools.rollout.pipe, batch_of()
    scale = tools.rollout.family.guidance
    with torch.no_grad():
        before = sampled(pipe, batch.prompts, noise_of(batch), scale=scale, last=STEPS - kept)

        def loss() -> float:
            after = sampled(pipe, batch.prompts, before, scale=scale, first=STEPS - kept)
            return -float(warmth(decoded(pipe, after), [*batch.prompts]).mean())

        expected = slopes(tools, loss)
    found = gradient(tools, DRaFT(truncation_steps=kept), batch)
    for direction, slope in expected:
        assert float(found @ direction) == pytest.approx(slope, rel=1e-5) != 0
    again = gradient(with_options(tools, checkpointed=True), DRaFT(truncation_steps=kept), batch)
    torch.testing.assert_close(again, found, rtol=1e-10, atol=1e-10 * float(found.norm()))


@pytest.mark.parametrize("which", ["double", "guided"])
def test_all_steps_are_full_backpropagation(which: str, request: pytest.FixtureRequest) -> None:
    tools: TrainingContext = request.getfixturevalue(which)
    pipe, batch = tools.rollout.pipe, batch_of((0, 1))
    scale = tools.rollout.family.guidance
    images = decoded(pipe, sampled(pipe, batch.prompts, noise_of(batch), scale=scale))
    expected = torch.autograd.grad(-warmth(images, [*batch.prompts]).mean(), list(tools.lora.weights.values()))
    joined = torch.cat([part.flatten() for part in expected])
    for steps in ("all", STEPS, STEPS + 5):
        found = gradient(tools, DRaFT(truncation_steps=steps), batch)
        torch.testing.assert_close(found, joined, rtol=1e-8, atol=1e-10 * float(joined.norm()))
    assert not torch.allclose(gradient(tools, DRaFT(), batch), joined, rtol=1e-2)


def test_one_step_is_backpropagation_from_a_detached_prefix(double: TrainingContext) -> None:
    pipe, batch = double.rollout.pipe, batch_of((0, 1))
    prefix = sampled(pipe, batch.prompts, noise_of(batch), scale=1.0, last=1).detach()
    images = decoded(pipe, sampled(pipe, batch.prompts, prefix, scale=1.0, first=1))
    expected = torch.autograd.grad(-warmth(images, [*batch.prompts]).mean(), list(double.lora.weights.values()))
    joined = torch.cat([part.flatten() for part in expected])
    torch.testing.assert_close(gradient(double, DRaFT(), batch), joined, rtol=1e-8, atol=1e-10 * float(joined.norm()))


def test_parts_of_a_batch_add_up_to_it(double: TrainingContext) -> None:
    whole = gradient(double, DRaFT(), batch_of(range(3)))
    parts = [gradient(double, DRaFT(), batch_of([row])) for row in range(3)]
    torch.testing.assert_close(whole, torch.stack(parts).mean(dim=0), rtol=1e-9, atol=1e-12 * float(whole.norm()))


# ------------------------------------------------------------------------------------------------ checkpointing


class Calls:
    """How often the denoiser and the schedulers' `step` are called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tools: TrainingContext) -> None:
        self.denoised, self.stepped = 0, 0
        kind = type(tools.rollout.pipe.scheduler)
        step = kind.step

        def counted(*arguments: Any, **named: Any) -> Any:
            self.stepped += 1
            return step(*arguments, **named)

        monkeypatch.setattr(kind, "step", counted)
        self.handle = tools.lora.denoiser.register_forward_pre_hook(self._denoise)

    def _denoise(self, *_: Any) -> None:
        self.denoised += 1


def test_checkpointed_steps_are_denoised_again_but_never_stepped_again(
    double: TrainingContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools, calls = with_options(double, checkpointed=True), Calls(monkeypatch, double)
    (outcome,) = DRaFT(truncation_steps="all").losses(tools, batch_of(), 0, {})
    assert (calls.denoised, calls.stepped) == (STEPS, STEPS)
    outcome.loss.backward()
    assert (calls.denoised, calls.stepped) == (2 * STEPS, STEPS)
    calls.handle.remove()


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_checkpointing_changes_no_gradient(scheduler: Any) -> None:
    """Also with a history in the scheduler, with the denoiser's own checkpoints within ours, and with a penalty."""
    pipe = precise()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    plain = tools_of(pipe, double=True, call={**CALL, "num_inference_steps": 3}, penalty=0.3)
    algorithm, batch = DRaFT(truncation_steps=2), batch_of()
    expected = gradient(plain, algorithm, batch)
    for enable in (lambda: None, lambda: pipe.unet.enable_gradient_checkpointing(plain.lora.checkpoint)):
        enable()
        found = gradient(with_options(plain, penalty=0.3, checkpointed=True), algorithm, batch)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * float(expected.norm()))


# ------------------------------------------------------------------------------------------------ the loss


def test_a_ceiling_ends_the_gradient(double: TrainingContext) -> None:
    batch = batch_of((0, 1))
    (outcome,) = DRaFT().losses(double, batch, 0, {})
    low, high = sorted(outcome.measures["reward"].tolist())
    assert low < high
    between = with_options(double, ceiling=(low + high) / 2)
    lower = int(outcome.measures["reward"].argmin())
    only = gradient(double, DRaFT(), batch_of([lower])) / 2
    torch.testing.assert_close(gradient(between, DRaFT(), batch), only, rtol=1e-9, atol=1e-12 * float(only.norm()))
    assert float(gradient(with_options(double, ceiling=low - 1), DRaFT(), batch).abs().max()) == 0
    (capped,) = DRaFT().losses(between, batch, 0, {})
    assert capped.measures["reward"].tolist() == outcome.measures["reward"].tolist(), "what is told is not capped"
    assert float(capped.loss.detach()) == pytest.approx(-(low + between.ceiling) / 2)


def test_the_penalty_is_nothing_at_the_start() -> None:
    tools = tools_of(pipelines.stable_diffusion(), stirred=False, penalty=2.0)
    (outcome,) = DRaFT(truncation_steps="all").losses(tools, batch_of((0, 1)), 0, {})
    assert outcome.measures["kl"].tolist() == [0, 0]
    torch.testing.assert_close(outcome.loss, -outcome.measures["reward"].mean())
    (free,) = DRaFT().losses(with_options(tools, penalty=0.0), batch_of(), 0, {})
    assert "kl" not in free.measures, "what is not computed is not told"


@pytest.mark.parametrize("kept", [1, 2])
def test_the_penalty_is_the_mean_square_of_what_the_adapter_changes(double: TrainingContext, kept: int) -> None:
    """By differences too: the latents of a later step depend on the adapter, and so does the reference there."""
    tools = with_options(double, penalty=5.0, reward=lambda images, prompts: 0 * images.mean(dim=(1, 2, 3)))
    pipe, batch = tools.rollout.pipe, batch_of()

    def loss() -> float:
        latents, found = before, []
        for place, time in list(enumerate(pipe.scheduler.timesteps))[STEPS - kept :]:
            output, own = outputs(tools, latents, time, batch.prompts)
            found.append(float((output - own).square().mean()))
            latents = sampled(pipe, batch.prompts, latents, scale=1.0, first=place, last=place + 1)
        return 5.0 * sum(found) / len(found)

    with torch.no_grad():
        before = sampled(pipe, batch.prompts, noise_of(batch), scale=1.0, last=STEPS - kept)
        expected, value = slopes(tools, loss), loss()
    (outcome,) = DRaFT(truncation_steps=kept).losses(tools, batch, 0, {})
    assert float(outcome.loss.detach()) == pytest.approx(value, rel=1e-9) != 0
    found = gradient(tools, DRaFT(truncation_steps=kept), batch)
    for direction, slope in expected:
        assert float(found @ direction) == pytest.approx(slope, rel=1e-5)


def outputs(tools: TrainingContext, latents: Tensor, time: Tensor, prompts: Any) -> tuple[Tensor, Tensor]:
    """The denoiser's with the adapter and, by peft's own switch, without."""
    from finetuned import text

    unet, states = tools.rollout.pipe.unet, text(tools.rollout.pipe, prompts)
    with_adapter = unet(latents, time, encoder_hidden_states=states).sample
    unet.disable_adapters()
    without = unet(latents, time, encoder_hidden_states=states).sample
    unet.enable_adapters()
    return with_adapter, without


def test_images_that_are_not_finite_are_a_loss_that_is_not() -> None:
    """A Reward refuses to look at them, with an error that would not say which step it was."""
    tools = tools_of(pipelines.stable_diffusion(), lambda images, prompts: pytest.fail("was shown NaN"))
    tools.rollout.pipe.vae.decoder.register_forward_hook(lambda module, given, output: output * float("nan"))
    (outcome,) = DRaFT().losses(tools, batch_of(), 0, {})
    assert bool(outcome.loss.isnan())


def test_another_algorithm_is_named_to_rewards_without_gradients(double: TrainingContext) -> None:
    def numbers(images: Tensor, prompts: list[str]) -> Tensor:
        return warmth(images.detach(), prompts)

    for penalty in (0.0, 1.0):
        tools = with_options(double, reward=numbers, penalty=penalty)
        with pytest.raises(ValueError, match=r"^reward: .*numbers gives none.*DPO, DDPO or FlowGRPO"):
            next(DRaFT().losses(tools, batch_of(), 0, {}))


def test_bad_settings_are_told() -> None:
    for steps in (0, -1, 1.5, "some", True):
        with pytest.raises((TypeError, ValueError), match=r"^truncation_steps: expected"):
            DRaFT(truncation_steps=steps)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"^low_variance: expected"):
        DRaFT(low_variance=-1)
    with pytest.raises(ValueError, match=r"^low_variance: DRaFT-LV .* needs truncation_steps=1, got 2"):
        DRaFT(truncation_steps=2, low_variance=2)
