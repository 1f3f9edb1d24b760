"""States, gradients and refusals of our own sampling loop, on tiny pipelines of diffusers' real classes."""

from __future__ import annotations

import copy
from dataclasses import FrozenInstanceError, replace
from typing import Any

import diffusers
import pipelines
import pytest
import torch
from diffusers import EDMEulerScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from pipelines import FAMILIES, FEW_STEPS
from pipelines_current import CALL, CURRENT_FAMILIES, GUIDED
from torch import Tensor

from aigiqa_reward.sampling.families import find_family
from aigiqa_reward.sampling.rollout import Rollout, State
from aigiqa_reward.sampling.schedulers import SERVED

PROMPTS = ["a cat on a mat", "a red apple", "two dogs"]
FOUR = {**FEW_STEPS, "num_inference_steps": 4}


@pytest.fixture(scope="module")
def sd() -> Any:
    """One to share by tests that change nothing."""
    return pipelines.stable_diffusion()


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds or (3, 4, 5)]


def started(rollout: Rollout, latents: Tensor | None = None) -> State:
    return rollout.start(rollout.encode(PROMPTS), generators(), latents)


def of_class(pipe: Any, cls: type) -> Any:
    return pipelines._quiet(cls(**pipe.components, requires_safety_checker=False))


# --------------------------------------------------------------------------------------------- states


@torch.no_grad()
def test_a_state_knows_where_it_is(sd):
    rollout = Rollout(sd, **FOUR)
    state = started(rollout)
    assert (len(state), state.step, state.steps, state.done) == (3, 0, 4, False)
    middle = rollout.run(state, until=3)
    assert (len(middle), middle.step, middle.done) == (3, 3, False)
    end = rollout.run(middle)
    assert (end.step, end.done) == (4, True)
    with pytest.raises(FrozenInstanceError):
        state.step = 1  # type: ignore[misc]


@torch.no_grad()
def test_second_calls_of_a_step_count_as_steps(sd):
    pipe = of_class(sd, StableDiffusionPipeline)
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(sd.scheduler.config)
    calls: list[int] = []
    hook = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    rollout = Rollout(pipe, **FOUR)
    state = rollout.run(started(rollout))
    hook.remove()
    assert len(calls) == state.steps == 7


@torch.no_grad()
def test_a_state_stays_good_when_others_come_of_it(sd):
    rollout = Rollout(sd, **FOUR)
    state = rollout.run(started(rollout), until=2)
    before, history = state.latents.clone(), copy.deepcopy(vars(state.scheduler))
    ends = [rollout.run(state).latents for _ in range(2)]
    rollout.run(state[[2, 0, 2]])
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(state.latents, before)
    assert_same(vars(state.scheduler), history)


@torch.no_grad()
def test_rows_bring_everything_that_is_theirs(sd):
    rollout = Rollout(sd, **FOUR)
    state = rollout.run(started(rollout), until=1)
    picked = state[[2, 0, 2]]
    for new, old in enumerate((2, 0, 2)):
        assert torch.equal(picked.latents[new], state.latents[old])
        assert picked.generators[new] is state.generators[old]
        for name, rows in state.conditioning.positive.items():
            assert torch.equal(picked.conditioning.positive[name][new], rows[old])
    assert picked.step == 1


@torch.no_grad()
def test_states_at_unequal_steps_cannot_be_joined(sd):
    rollout = Rollout(sd, **FOUR)
    state = started(rollout)
    later = rollout.run(state, until=2)
    with pytest.raises(ValueError, match=r"states: expected all at one step, got \[0, 2\]"):
        State.cat([state, later])


def test_a_detached_state_goes_on_without_the_past(sd):
    rollout = Rollout(sd, **FOUR)
    first = started(rollout).latents.requires_grad_()
    middle = rollout.run(started(rollout, first), until=2)
    assert middle.latents.requires_grad
    cut = middle.detach()
    assert not cut.latents.requires_grad
    assert middle.latents.requires_grad
    with torch.no_grad():
        assert torch.equal(rollout.run(cut).latents, rollout.run(middle).latents)


def test_prompts_are_encoded_without_gradients_and_nothing_else_is(sd):
    rollout = Rollout(sd, **FEW_STEPS)
    conditioning = rollout.encode(PROMPTS)
    assert not conditioning.positive["encoder_hidden_states"].requires_grad
    state = rollout.start(conditioning, generators())
    assert not state.latents.requires_grad
    prediction = rollout.predict(state)  # the weights of the tiny UNet want gradients
    assert prediction.output.requires_grad
    assert prediction.clean.requires_grad


@torch.no_grad()
def test_clean_predictions_are_in_single_precision():
    pipe = pipelines.stable_diffusion().to(torch.bfloat16)
    rollout = Rollout(pipe, **FEW_STEPS)
    state = started(rollout)
    prediction = rollout.predict(state)
    assert state.latents.dtype == prediction.output.dtype == torch.bfloat16
    assert prediction.clean.dtype == torch.float32
    assert rollout.advance(state, prediction.output).latents.dtype == torch.bfloat16


# --------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler"])
def test_gradients_are_those_of_finite_differences(scheduler, checkpointed):
    pipe = pipelines.stable_diffusion().to(torch.float64)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    rollout = Rollout(pipe, **FEW_STEPS)
    conditioning = rollout.encode(PROMPTS[:2])
    weights = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def value(latents: Tensor) -> Tensor:
        state = rollout.start(conditioning, generators(3, 4), latents)
        while not state.done:
            state = rollout.advance(state, rollout.predict(state, checkpointed=checkpointed).output)
        return (rollout.decode(state.latents) * weights).sum()

    first = rollout.start(conditioning, generators(3, 4)).latents
    assert first.dtype == torch.float64
    direction = torch.randn(first.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaf = first.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    step = 1e-5
    with torch.no_grad():
        expected = (value(first + step * direction) - value(first - step * direction)) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(float(expected), rel=1e-5)


def test_gradients_reach_weights_that_want_them(sd):
    rollout = Rollout(sd, **FEW_STEPS)
    state = started(rollout)
    prediction = rollout.predict(state, checkpointed=True)
    weight = sd.unet.conv_in.weight
    (through,) = torch.autograd.grad(rollout.advance(state, prediction.output).latents.sum(), weight)
    plain = rollout.predict(state)
    (expected,) = torch.autograd.grad(rollout.advance(state, plain.output).latents.sum(), weight)
    assert through.abs().max() > 0
    torch.testing.assert_close(through, expected)


# --------------------------------------------------------------------------------------------- the pipeline stays


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_same(one[name], other[name])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    elif not callable(one):
        assert one == other or one is other


@pytest.mark.parametrize("family", [*FAMILIES, *CURRENT_FAMILIES])
def test_the_pipeline_is_left_as_it_was(family):
    pipe = {**FAMILIES, **CURRENT_FAMILIES}[family]()
    held = dict(vars(pipe))
    modules = [module for module in pipe.components.values() if isinstance(module, torch.nn.Module)]
    weights = [{name: tensor.clone() for name, tensor in module.state_dict().items()} for module in modules]
    modes = [[part.training for part in module.modules()] for module in modules]
    wanted = [[parameter.requires_grad for parameter in module.parameters()] for module in modules]
    schedule, randomness = copy.deepcopy(vars(pipe.scheduler)), torch.get_rng_state()
    rollout = Rollout(pipe, **{**CALL.get(family, FEW_STEPS), **GUIDED.get(family, {})})
    prompts = list(PROMPTS)
    state = rollout.start(rollout.encode(prompts), generators())
    first = state.latents.clone().requires_grad_()
    end = rollout.run(replace(state, latents=first))
    torch.autograd.grad(rollout.decode(end.latents).sum(), first)
    assert prompts == PROMPTS
    assert vars(pipe).keys() == held.keys()
    assert all(vars(pipe)[name] is value for name, value in held.items())
    assert_same(vars(pipe.scheduler), schedule)
    assert [[part.training for part in module.modules()] for module in modules] == modes
    assert not any(part._forward_hooks for part in rollout.family.denoiser.modules())
    assert [[parameter.requires_grad for parameter in module.parameters()] for module in modules] == wanted
    assert all(parameter.grad is None for module in modules for parameter in module.parameters())
    for module, before in zip(modules, weights, strict=True):
        assert_same(dict(module.state_dict()), before)
    assert torch.equal(torch.get_rng_state(), randomness)


# --------------------------------------------------------------------------------------------- refusals


class Renamed(StableDiffusionPipeline):
    """A user's own class with the same loop."""


class Rewritten(StableDiffusionPipeline):
    """A user's own class with a loop of its own."""

    def __call__(self, prompt: str, **arguments: Any) -> Any:
        return super().__call__(prompt, **arguments)


def test_other_pipelines_are_told_which_are_served(sd):
    pipe = of_class(sd, StableDiffusionImg2ImgPipeline)
    with pytest.raises(TypeError, match="pruning runs a pipeline's parts itself") as caught:
        Rollout(pipe, need="pruning")
    told = str(caught.value)
    assert all(name in told for name in ("StableDiffusionXLPipeline", "FluxPipeline", "PixArtSigmaPipeline"))
    assert "got StableDiffusionImg2ImgPipeline" in told
    assert "Plain BestOfN (pruning=None, search='random') works with any pipeline" in told


def test_a_users_subclass_is_served_unless_its_loop_is_another(sd):
    own = of_class(sd, Renamed)
    with torch.no_grad():
        rollout, plain = Rollout(own, **FEW_STEPS), Rollout(sd, **FEW_STEPS)
        assert torch.equal(rollout.run(started(rollout)).latents, plain.run(started(plain)).latents)
    with pytest.raises(TypeError, match="got Rewritten"):
        Rollout(of_class(sd, Rewritten), **FEW_STEPS)
    namesake = type("StableDiffusionPipeline", (Rewritten,), {"__call__": Rewritten.__call__})
    assert find_family(of_class(sd, namesake)) is None


def test_other_schedulers_are_told_which_are_served(sd):
    pipe = of_class(sd, StableDiffusionPipeline)
    pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(ValueError, match="steering cannot serve EDMEulerScheduler; it serves") as caught:
        Rollout(pipe, need="steering", **FEW_STEPS)
    assert all(name in str(caught.value) for name in SERVED)


@pytest.mark.parametrize("kind", ["sd3", "flux", "flux_2", "qwen_image", "z_image", "sana"])
def test_flow_models_are_not_sampled_by_schedulers_that_misread_them(kind):
    pipe = {**FAMILIES, **CURRENT_FAMILIES}[kind]()
    for other in (diffusers.DDIMScheduler(), diffusers.UniPCMultistepScheduler()):
        pipe.scheduler = other
        with pytest.raises(ValueError, match=r"for a model of flow matching; it serves FlowMatchEuler.*use_flow_sigma"):
            Rollout(pipe, **FEW_STEPS)
    pipe.scheduler = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    Rollout(pipe, **FEW_STEPS)


@pytest.mark.parametrize(
    ("name", "value"),
    [("ip_adapter_image", "image.png"), ("prompt_embeds", torch.zeros(1, 77, 32)), ("guidance_scal", 2.0)],
)
def test_arguments_that_the_loop_does_not_serve_are_named(sd, name, value):
    with pytest.raises(ValueError, match=rf"^{name}: .*StableDiffusionPipeline.*serves .*guidance_scale") as caught:
        Rollout(sd, **{**FEW_STEPS, name: value})
    assert "true_cfg_scale" not in str(caught.value).split("It serves")[1]
    Rollout(sd, **{**FEW_STEPS, name: None})  # as good as left out


def test_one_negative_prompt_for_all(sd):
    with pytest.raises(TypeError, match="negative_prompt: expected one text"):
        Rollout(sd, **FEW_STEPS, negative_prompt=["blurry", "dark"])


def test_own_steps_that_a_scheduler_does_not_take_are_told(sd):
    rollout = Rollout(sd, **FEW_STEPS, sigmas=[1.0, 0.5])
    with pytest.raises(ValueError, match="sigmas: DDIMScheduler does not take its own"):
        started(rollout)
