"""States, gradients and refusals of our own sampling loop, on tiny pipelines of diffusers' real classes."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import accelerate
import diffusers
import pipelines
import pytest
import torch
from diffusers import EDMEulerScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from pipelines import FAMILIES, FEW_STEPS
from pipelines_current import CALL, CURRENT_FAMILIES, GUIDED, pipeline
from torch import Tensor
from watched import assert_same, generators, redness

from aigiqa_reward import BestOfN
from aigiqa_reward.finetuning import DPO, FinetuneConfig, finetune
from aigiqa_reward.sampling import NoiseOptimizer, ParticleSteering, RewardLogger
from aigiqa_reward.sampling.families import find_family
from aigiqa_reward.sampling.rollout import Rollout, State
from aigiqa_reward.sampling.schedulers import FLOW, SERVED

PROMPTS = ["a cat on a mat", "a red apple", "two dogs"]
FOUR = {**FEW_STEPS, "num_inference_steps": 4}
ALL = {**FAMILIES, **CURRENT_FAMILIES}
FLOW_UNI_PC = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")


@pytest.fixture(scope="module")
def sd() -> Any:
    return pipeline("sd")


def started(rollout: Rollout, latents: Tensor | None = None) -> State:
    return rollout.start(rollout.encode(PROMPTS), generators(), latents)


def of_class(pipe: Any, cls: type) -> Any:
    return pipelines._quiet(cls(**pipe.components, requires_safety_checker=False))


@torch.no_grad()
def test_a_state_counts_its_steps_and_stays_valid_when_others_come_of_it(sd):
    rollout = Rollout(sd, **FOUR)
    start = started(rollout)
    assert (len(start), start.step, start.steps, start.done) == (3, 0, 4, False)
    state = rollout.run(start, until=2)
    assert (len(state), state.step, state.done) == (3, 2, False)
    before, history = state.latents.clone(), copy.deepcopy(vars(state.scheduler))
    ends = [rollout.run(state) for _ in range(2)]
    rollout.run(state[[2, 0, 2]])
    assert (ends[0].step, ends[0].done) == (4, True)
    assert torch.equal(ends[0].latents, ends[1].latents)
    assert torch.equal(state.latents, before)
    assert_same(vars(state.scheduler), history)
    with pytest.raises(ValueError, match=r"states: expected all at one step, got \[0, 2\]"):
        State.cat([start, state])


@torch.no_grad()
def test_second_calls_of_a_step_count_as_steps(sd):
    pipe = of_class(sd, StableDiffusionPipeline)
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(sd.scheduler.config)
    calls: list[int] = []
    hook = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    state = (rollout := Rollout(pipe, **FOUR)).run(started(rollout))
    hook.remove()
    assert len(calls) == state.steps == 7


@torch.no_grad()
def test_rows_bring_everything_that_is_theirs(sd):
    rollout, places = Rollout(sd, **FOUR), [2, 0, 2]
    state = rollout.run(started(rollout), until=1)
    picked = state[places]
    assert torch.equal(picked.latents, state.latents[places]) and picked.step == 1
    assert all(picked.generators[new] is state.generators[old] for new, old in enumerate(places))
    for name, rows in state.conditioning.positive.items():
        assert torch.equal(picked.conditioning.positive[name], rows[places])


def test_a_detached_state_continues_without_the_past(sd):
    rollout = Rollout(sd, **FOUR)
    first = started(rollout).latents.requires_grad_()
    middle = rollout.run(started(rollout, first), until=2)
    cut = middle.detach()
    assert middle.latents.requires_grad and not cut.latents.requires_grad
    with torch.no_grad():
        assert torch.equal(rollout.run(cut).latents, rollout.run(middle).latents)


@torch.no_grad()
def test_clean_predictions_are_in_single_precision():
    rollout = Rollout(pipelines.stable_diffusion().to(torch.bfloat16), **FEW_STEPS)
    state = started(rollout)
    prediction = rollout.predict(state)
    assert state.latents.dtype == prediction.output.dtype == torch.bfloat16
    assert prediction.clean.dtype == torch.float32
    assert rollout.advance(state, prediction.output).latents.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("scheduler", "checkpointed"),
    [
        ("DDIMScheduler", True),
        ("UniPCMultistepScheduler", False),
        *(pytest.param("HeunDiscreteScheduler", flag, marks=pytest.mark.slow) for flag in (False, True)),
    ],
)
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
    with torch.no_grad():
        expected = (value(first + 1e-5 * direction) - value(first - 1e-5 * direction)) / 2e-5
    assert float((gradient * direction).sum()) == pytest.approx(float(expected), rel=1e-5)


def test_gradients_reach_weights_that_want_them_but_not_the_prompts(sd):
    rollout = Rollout(sd, **FEW_STEPS)
    state = started(rollout)
    assert not state.latents.requires_grad
    assert not state.conditioning.positive["encoder_hidden_states"].requires_grad
    weight = sd.unet.conv_in.weight
    found = []
    for checkpointed in (True, False):
        prediction = rollout.predict(state, checkpointed=checkpointed)
        assert prediction.clean.requires_grad
        found.append(torch.autograd.grad(rollout.advance(state, prediction.output).latents.sum(), weight)[0])
    assert found[0].abs().max() > 0
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[pytest.mark.slow] * (f not in ("sdxl", "flux", "z_image"))) for f in ALL]
)
def test_the_pipeline_is_left_as_it_was(family):
    pipe = ALL[family]()
    held = dict(vars(pipe))
    modules = [module for module in pipe.components.values() if isinstance(module, torch.nn.Module)]

    def flags() -> list[bool]:
        modes = [part.training for module in modules for part in module.modules()]
        return [*modes, *(weight.requires_grad for module in modules for weight in module.parameters())]

    weights = [{name: tensor.clone() for name, tensor in module.state_dict().items()} for module in modules]
    before, schedule, randomness = flags(), copy.deepcopy(vars(pipe.scheduler)), torch.get_rng_state()
    rollout = Rollout(pipe, **{**CALL.get(family, FEW_STEPS), **GUIDED.get(family, {})})
    state = started(rollout)
    first = state.latents.clone().requires_grad_()
    end = rollout.run(replace(state, latents=first))
    torch.autograd.grad(rollout.decode(end.latents).sum(), first)
    assert vars(pipe).keys() == held.keys()
    assert all(vars(pipe)[name] is value for name, value in held.items())
    assert_same(vars(pipe.scheduler), schedule)
    assert flags() == before
    assert not any(part._forward_hooks for part in rollout.family.denoiser.modules())
    assert all(parameter.grad is None for module in modules for parameter in module.parameters())
    assert_same([dict(module.state_dict()) for module in modules], weights)
    assert torch.equal(torch.get_rng_state(), randomness)


class Rewritten(StableDiffusionPipeline):
    def __call__(self, prompt: str, **arguments: Any) -> Any:
        return super().__call__(prompt, **arguments)


def test_a_users_subclass_is_supported_unless_its_loop_is_another(sd):
    own = of_class(sd, type("Renamed", (StableDiffusionPipeline,), {}))
    with torch.no_grad():
        rollout, plain = Rollout(own, **FEW_STEPS), Rollout(sd, **FEW_STEPS)
        assert torch.equal(rollout.run(started(rollout)).latents, plain.run(started(plain)).latents)
    with pytest.raises(TypeError, match="got Rewritten"):
        Rollout(of_class(sd, Rewritten), **FEW_STEPS)
    namesake = type("StableDiffusionPipeline", (Rewritten,), {"__call__": Rewritten.__call__})
    assert find_family(of_class(sd, namesake)) is None


def test_other_pipelines_schedulers_and_arguments_are_refused(sd):
    with pytest.raises(TypeError, match="pruning runs a pipeline's parts itself") as caught:
        Rollout(of_class(sd, StableDiffusionImg2ImgPipeline), need="pruning")
    for text in ("FluxPipeline", "PixArtSigmaPipeline", "got StableDiffusionImg2ImgPipeline", "Plain BestOfN"):
        assert text in str(caught.value)
    pipe = of_class(sd, StableDiffusionPipeline)
    pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(ValueError, match="steering cannot serve EDMEulerScheduler; it serves") as refused:
        Rollout(pipe, need="steering", **FEW_STEPS)
    assert all((name in str(refused.value)) != (name in FLOW) for name in SERVED)
    with pytest.raises(TypeError, match="negative_prompt: expected one prompt"):
        Rollout(sd, **FEW_STEPS, negative_prompt=["blurry", "dark"])
    with pytest.raises(ValueError, match=r"DDIMScheduler.* does not support custom sigmas"):
        started(Rollout(sd, **FEW_STEPS, sigmas=[1.0, 0.5]))


@pytest.mark.parametrize("kind", ["sd3", "flux", "flux_2", "qwen_image", "z_image", "sana"])
def test_flow_models_are_not_sampled_by_schedulers_that_misread_them(kind):
    pipe = copy.copy(pipeline(kind))
    left_over = diffusers.DDIMScheduler.from_config(FLOW_UNI_PC.config)  # which keeps settings that it does not have
    for other in (diffusers.DDIMScheduler(), diffusers.UniPCMultistepScheduler(), left_over):
        pipe.scheduler = other
        with pytest.raises(ValueError, match=r"for a model of flow matching; it serves FlowMatchEuler.*use_flow_sigma"):
            Rollout(pipe, **FEW_STEPS)
    pipe.scheduler = FLOW_UNI_PC
    Rollout(pipe, **FEW_STEPS)


@pytest.mark.parametrize("kind", ["sd", pytest.param("sdxl", marks=pytest.mark.slow), "pixart_sigma"])
@pytest.mark.parametrize(
    "other", [diffusers.FlowMatchEulerDiscreteScheduler(), diffusers.FlowMatchLCMScheduler(), FLOW_UNI_PC]
)
def test_other_models_are_not_sampled_by_schedulers_of_flow_matching(kind, other):
    pipe, own = copy.copy(pipeline(kind)), pipeline(kind).scheduler
    pipe.scheduler = other
    methods: list[Callable[[], Any]] = [lambda: Rollout(pipe, **FEW_STEPS), lambda: ParticleSteering(pipe, redness)]
    if kind != "pixart_sigma":
        methods.append(RewardLogger(pipe, redness, "a cat").__enter__)
    for method in methods:
        with pytest.raises(ValueError, match=rf"{type(other).__name__}, of flow matching.*Set .*subfolder") as caught:
            method()
        assert "FlowMatchEuler" not in str(caught.value).split("it serves")[1]
    pipe.scheduler = diffusers.DDIMScheduler.from_config({**own.config, "use_flow_sigmas": True})
    Rollout(pipe, **FEW_STEPS)  # DDIM has no such setting


CACHES = [diffusers.FirstBlockCacheConfig(), diffusers.TaylorSeerCacheConfig()]
CACHES.append(diffusers.PyramidAttentionBroadcastConfig(2, current_timestep_callback=int))


@pytest.mark.parametrize("config", [*CACHES, None])
def test_a_denoiser_with_a_cache_is_refused_before_it_is_called(config, tmp_path):
    pipe = pipelines.flux()
    if config is None:
        diffusers.hooks.apply_first_block_cache(pipe.transformer, CACHES[0])
    else:
        pipe.transformer.enable_cache(config)
    search = BestOfN(pipe, redness, n=2, pruning="halving", progress=False)
    optimizer, steering = (kind(pipe, redness, progress=False) for kind in (NoiseOptimizer, ParticleSteering))
    pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("was called"))
    for method in (search, optimizer, steering):
        with pytest.raises(ValueError, match=r"pipe: its transformer has a cache .* pipe\.transformer\.disable_cache"):
            method("a cat", **FEW_STEPS)
    with pytest.raises(ValueError, match="fine-tuning calls it"):
        finetune(pipe, redness, ["a cat"], DPO(candidates=2), tmp_path, FinetuneConfig(sampling=FEW_STEPS))


def sequentially(pipe: Any) -> None:  # as enable_sequential_cpu_offload does on a GPU
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        accelerate.cpu_offload(part, execution_device=torch.device("cpu"))


def grouped(pipe: Any) -> None:
    pipe.unet.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


@pytest.mark.parametrize("offload", [sequentially, grouped, lambda pipe: pipe.enable_model_cpu_offload(device="cpu")])
def test_fine_tuning_refuses_offloading_before_anything_is_sampled(offload, tmp_path):
    pipe = pipelines.stable_diffusion()
    offload(pipe)
    pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("was called"))
    with pytest.raises(ValueError, match=r"pipe: expected all parts on one device, .*offload.*pipe\.to\(device\)"):
        finetune(pipe, redness, ["a cat"], DPO(candidates=2), tmp_path, FinetuneConfig(sampling=FEW_STEPS))


def test_sequential_offloading_changes_nothing_where_weights_are_not_trained():
    plain, offloaded = pipelines.stable_diffusion(), pipelines.stable_diffusion()
    sequentially(offloaded)
    for search in (
        lambda pipe: BestOfN(pipe, redness, n=2, pruning="halving", progress=False)("a cat", **FOUR).scores,
        lambda pipe: NoiseOptimizer(pipe, redness, iterations=1, progress=False)("a cat", **FOUR).history,
    ):
        assert search(offloaded) == search(plain)


@pytest.mark.parametrize(("name", "value"), [("prompt_embeds", torch.zeros(1, 77, 32)), ("guidance_scal", 2.0)])
def test_unsupported_arguments_are_named(sd, name, value):
    with pytest.raises(ValueError, match=rf"^{name}: .*StableDiffusionPipeline.*serves .*guidance_scale") as caught:
        Rollout(sd, **{**FEW_STEPS, name: value})
    assert "true_cfg_scale" not in str(caught.value).split("It serves")[1]
    Rollout(sd, **{**FEW_STEPS, name: None})  # as good as left out
