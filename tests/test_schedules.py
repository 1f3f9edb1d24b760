import copy
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import diffusers
import pipelines
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from diffusers import FlowMatchEulerDiscreteScheduler as FlowMatchEuler
from pipelines import _BETAS as BETAS
from pipelines import SIDE
from pipelines_current import pipeline
from torch import Tensor
from watched import assert_close, generators

from aigiqa_reward.sampling.ancestral import ancestral_step
from aigiqa_reward.sampling.rollout import Rollout, State
from aigiqa_reward.sampling.schedulers import SERVED, noise_level, predict_clean

PROMPTS = ["a cat on a mat", "a red apple", "two dogs"]
CALL = {"height": SIDE, "width": SIDE, "num_inference_steps": 4, "guidance_scale": 1.0}

Case = tuple[str, dict[str, Any], dict[str, Any]]

DISCRETE: dict[str, Case] = {
    "ddim": ("DDIMScheduler", {}, {}),
    "ddim eta": ("DDIMScheduler", {}, {"eta": 0.7}),
    "ddpm": ("DDPMScheduler", {}, {}),
    "ddpm own timesteps": ("DDPMScheduler", {}, {"timesteps": [901, 401, 101]}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}, {}),
    "pndm runge-kutta": ("PNDMScheduler", {"skip_prk_steps": False}, {}),
    "lcm": ("LCMScheduler", {}, {}),
    "tcd": ("TCDScheduler", {}, {"eta": 0.5}),
    "dpm++": ("DPMSolverMultistepScheduler", {}, {}),
    "dpm++ third order": ("DPMSolverMultistepScheduler", {"solver_order": 3}, {}),
    "dpm karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, {}),
    "dpm++ sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    "dpm++ singlestep": ("DPMSolverSinglestepScheduler", {}, {}),
    "unipc": ("UniPCMultistepScheduler", {}, {}),
    "unipc eps": ("UniPCMultistepScheduler", {"predict_x0": False, "final_sigmas_type": "sigma_min"}, {}),
    "deis": ("DEISMultistepScheduler", {}, {}),
    "sa": ("SASolverScheduler", {}, {}),
    "euler": ("EulerDiscreteScheduler", {}, {}),
    "euler leading": ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}, {}),
    "euler karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, {}),
    "euler ancestral": ("EulerAncestralDiscreteScheduler", {}, {}),
    "heun": ("HeunDiscreteScheduler", {}, {}),
    "heun leading": ("HeunDiscreteScheduler", {"timestep_spacing": "leading"}, {}),
    "lms": ("LMSDiscreteScheduler", {}, {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}, {}),
    "kdpm2 ancestral": ("KDPM2AncestralDiscreteScheduler", {}, {}),
}
SAMPLED_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
FLOW: dict[str, Case] = {
    "flow euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 1.0}, {}),
    "flow euler shifted": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, {}),
    "flow euler dynamic": ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, {}),
    "flow euler own sigmas": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, {"sigmas": [1.0, 0.7, 0.2]}),
    "flow euler stochastic": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, {}),
    "flow heun": ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, {}),
    "flow unipc": ("UniPCMultistepScheduler", SAMPLED_FLOW, {}),
    "flow dpm++": ("DPMSolverMultistepScheduler", SAMPLED_FLOW, {}),
    "flow dpm++ singlestep": ("DPMSolverSinglestepScheduler", SAMPLED_FLOW, {}),
    "flow deis": ("DEISMultistepScheduler", SAMPLED_FLOW, {}),
    "flow sa": ("SASolverScheduler", SAMPLED_FLOW, {}),
}
CASES = {**DISCRETE, **FLOW}
DRAWING = {"ddim eta", "ddpm", "ddpm own timesteps", "lcm", "tcd", "dpm++ sde", "sa", "flow sa", "euler ancestral"}
DRAWING |= {"kdpm2 ancestral", "flow euler stochastic"}  # noise between steps
FAST = {"ddim eta", "pndm", "lcm", "dpm++ sde", "unipc", "euler karras", "heun", "kdpm2"}
FAST |= {"flow euler shifted", "flow dpm++"}  # one for each kind of scheduler; the others are slow
V = {"ddim eta", "unipc", "euler karras"}  # of these, the ones that are tested fast with v_prediction, too


def marked(names: Iterable[str]) -> list[Any]:
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in names]


KINDS = [(case, "flow") if case in FLOW else (case, kind) for case in CASES for kind in ("epsilon", "v_prediction")]
KINDS = [
    pytest.param(case, kind, marks=[pytest.mark.slow] * (case not in (V if kind == "v_prediction" else FAST)))
    for case, kind in dict.fromkeys(KINDS)
]


def scheduler_of(case: str, kind: str) -> Any:
    name, changes, _ = CASES[case]
    base = {} if case in FLOW else {**pipeline("sd").scheduler.config, "prediction_type": kind}
    return getattr(diffusers, name).from_config(base, **changes)


def pipe_of(case: str, kind: str) -> Any:
    scheduler = scheduler_of(case, kind)
    if case in FLOW:
        return pipelines._quiet(StableDiffusion3Pipeline(**{**pipeline("sd3").components, "scheduler": scheduler}))
    components = {**pipeline("sd").components, "scheduler": scheduler}
    return pipelines._quiet(StableDiffusionPipeline(**components, requires_safety_checker=False))


def rollout_of(case: str) -> Rollout:
    return Rollout(pipe_of(case, "flow" if case in FLOW else "epsilon"), **CALL, **CASES[case][2])


def with_fresh_generators(state: State) -> State:
    return replace(state, generators=tuple(generator.clone_state() for generator in state.generators))


def noise(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_every_served_scheduler_is_here():
    assert {name for name, _, _ in CASES.values()} == set(SERVED)


@pytest.mark.parametrize(("case", "kind"), [p for p in KINDS if p.values[0] not in FLOW or p.values[0] not in DRAWING])
@torch.no_grad()
def test_a_rollout_ends_where_the_pipeline_ends(case, kind):
    call = {**CALL, **CASES[case][2]}
    rollout = Rollout(pipe_of(case, kind), **call)
    state = rollout.run(rollout.start(rollout.encode(PROMPTS), generators()))
    expected = pipe_of(case, kind)(prompt=PROMPTS, generator=generators(), output_type="latent", **call).images
    assert_close(state.latents, expected)


def timed(case: str, kind: str, steps: int) -> Any:
    scheduler = scheduler_of(case, kind)
    scheduler.set_timesteps(steps, **({"mu": 0.8} if scheduler.config.get("use_dynamic_shifting") else {}))
    return scheduler


@pytest.mark.parametrize("case", marked(case for case in CASES if case != "flow sa"))  # whose noising ignores flow
def test_noise_levels_are_those_of_the_schedulers_own_noising(case):
    scheduler = timed(case, "flow" if case in FLOW else "epsilon", 4)
    clean, eps = noise(0), noise(1)
    seen = set()
    for step, time in enumerate(scheduler.timesteps):
        between = getattr(scheduler, "sigmas_interpol", None) is not None and step % 2 == 1
        if float(time) in seen or between:
            continue  # the points between two steps are tested below
        seen.add(float(time))
        alpha, sigma = noise_level(scheduler, step)
        if hasattr(scheduler, "scale_noise"):  # a copy, for Heun notes the first step that it was asked about
            time = time if case == "flow heun" else time[None]
            noised = copy.copy(scheduler).scale_noise(clean, time, eps)
        else:
            noised = scheduler.add_noise(clean, eps, time[None])
        assert_close(alpha * clean + sigma * eps, noised)
    assert len(seen) >= 3


@pytest.mark.parametrize(("case", "kind"), KINDS)
def test_clean_predictions_are_the_schedulers_own(case, kind):
    scheduler = timed(case, kind, 5)
    x, compared = noise(2), 0
    for step, time in enumerate(scheduler.timesteps):
        output = noise(3 + step)
        clean = predict_clean(scheduler, step, x, output)
        expected = _converted(scheduler, x, output, time)
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, time)
        drawing = "generator" in scheduler.step.__code__.co_varnames
        source = {"generator": torch.Generator().manual_seed(0)} if drawing else {}
        result = scheduler.step(output, time, x, **source)
        expected = getattr(result, "pred_original_sample", None) if expected is None else expected
        if expected is not None:
            assert_close(clean, expected.to(clean.dtype))
            compared += 1
        x = result.prev_sample
    without_x0 = ("PNDM", "LCM", "TCD", "FlowMatch")  # covered by the test above and the one below
    assert compared >= 5 or type(scheduler).__name__.startswith(without_x0)


def _converted(scheduler: Any, x: Tensor, output: Tensor, time: Tensor) -> Tensor | None:
    if not hasattr(scheduler, "convert_model_output"):
        return None
    asked = copy.copy(scheduler)
    if asked.step_index is None:
        asked._init_step_index(time)
    converted = asked.convert_model_output(output, sample=x)
    if type(scheduler).__name__.startswith("DEIS") or scheduler.config.get("predict_x0") is False:
        alpha, sigma = asked._sigma_to_alpha_sigma_t(asked.sigmas[asked.step_index])
        return (x - sigma * converted) / alpha  # these turn everything into noise
    return converted


@pytest.mark.parametrize("case", marked(case for case in CASES if case not in DRAWING))
def test_a_model_that_always_knows_the_noise_sees_the_clean_latents_everywhere(case):
    rollout = rollout_of(case)
    state = rollout.start(rollout.encode(PROMPTS), generators())
    drawn = [generator.get_state() for generator in state.generators]
    clean, eps = (torch.randn(state.latents.shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    alpha, sigma = noise_level(state.scheduler, 0)
    state = replace(state, latents=alpha * clean + sigma * eps)
    output = eps - clean if case in FLOW else eps
    while not state.done:
        assert_close(predict_clean(state.scheduler, state.step, state.latents, output), clean, 1e-3)
        state = rollout.advance(state, output)
    if "deis" not in case and not case.startswith(("ddim", "pndm", "unipc eps")):  # which stop before there is none
        assert_close(state.latents, clean, 1e-3)
    assert all(torch.equal(g.get_state(), b) for g, b in zip(state.generators, drawn, strict=True))


@pytest.mark.parametrize("case", marked(CASES))
@torch.no_grad()
def test_candidates_keep_their_histories(case):
    rollout = rollout_of(case)
    start = rollout.start(rollout.encode(PROMPTS), generators())
    middle = rollout.run(start, until=start.steps // 2)
    # One step later, solvers that call the denoiser twice per step are in the other half of one.
    for state in (middle, rollout.run(with_fresh_generators(middle), until=middle.step + 1)):
        picked = with_fresh_generators(state[[2, 0, 2]])
        first, last = with_fresh_generators(state[[2]]), with_fresh_generators(state[[0, 1]])
        joined = with_fresh_generators(State.cat([first, last]))
        assert len(joined) == 3
        ahead = (rollout.run(first, until=state.step + 1), rollout.run(last, until=state.step + 1))
        rest = rollout.run(with_fresh_generators(state)).latents
        assert_close(rollout.run(picked).latents, rest[[2, 0, 2]])
        assert_close(rollout.run(joined).latents, rest[[2, 0, 1]])
        assert_close(rollout.run(with_fresh_generators(State.cat(ahead))).latents, rest[[2, 0, 1]])
        again = rollout.run(with_fresh_generators(state)).latents  # the state is as good as it was
        assert torch.equal(again, rest)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("DDIM", {"prediction_type": "score"}, "expected epsilon, v_prediction, sample"),
        ("DPMSolverMultistep", {"use_flow_sigmas": True, "prediction_type": "epsilon"}, "belong together"),
        ("DPMSolverMultistep", {"prediction_type": "flow_prediction"}, "belong together"),
    ],
)
def test_other_kinds_of_predictions_are_refused(name, config, message):
    scheduler = getattr(diffusers, f"{name}Scheduler")()
    scheduler.register_to_config(**config)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=rf"^scheduler: {name}Scheduler has prediction_type=.*{message}"):
        predict_clean(scheduler, 0, noise(0), noise(1))


@pytest.mark.parametrize(
    ("scheduler", "eta", "source"),
    [
        *((DDIMScheduler(**BETAS, clip_sample=False), eta, {"eta": eta}) for eta in (0.0, 0.4, 1.0)),
        (FlowMatchEuler(shift=3.0), 0.0, {}),
        (EulerDiscreteScheduler(**BETAS), 0.0, {}),
        (EulerDiscreteScheduler(**BETAS, prediction_type="v_prediction", timestep_spacing="trailing"), 0.0, {}),
        (EulerAncestralDiscreteScheduler(**BETAS), 1.0, {"generator": torch.Generator()}),
    ],
)
def test_the_ancestral_sampler_is_diffusers_own(scheduler, eta, source):
    scheduler.set_timesteps(5)
    latents, output, fresh = (noise(seed, torch.float32) for seed in (0, 1, 7))
    for step, time in enumerate(scheduler.timesteps):
        given = {"variance_noise": fresh} if "eta" in source else {}
        source.get("generator", torch.Generator()).manual_seed(7)
        clean = predict_clean(scheduler, step, latents, output)
        expected = scheduler.step(output, time, latents, **source, **given).prev_sample
        found = ancestral_step(scheduler, step, latents, clean, eta, fresh)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        latents = expected


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_with_any_noise_latents_keep_their_mean_and_variance(eta):
    scheduler = FlowMatchEuler(shift=3.0)
    scheduler.set_timesteps(4)
    count, clean = 200_000, torch.tensor(1.7)
    before, fresh = torch.randn(2, count, generator=torch.Generator().manual_seed(0))
    for step in range(3):
        alpha, sigma = noise_level(scheduler, step)
        after = ancestral_step(scheduler, step, alpha * clean + sigma * before, clean.expand(count), eta, fresh)
        alpha, sigma = noise_level(scheduler, step + 1)
        assert float(after.mean()) == pytest.approx(float(alpha * clean), abs=5 * float(sigma) / math.sqrt(count))
        assert float(after.std()) == pytest.approx(float(sigma), rel=0.01)
