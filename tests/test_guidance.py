import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback
from pipelines import FAMILIES
from pipelines_current import pipeline
from torch import Tensor, nn
from watched import PROMPT, STEPS, Recorder, assert_same, families, is_left_alone, redness, sample

from aigiqa_reward.sampling.callbacks import EarlyExit, RewardLogger
from aigiqa_reward.sampling.guidance import RewardGuidance

BOTH = pytest.mark.parametrize("through", [False, True], ids=["at_clean", "through_denoiser"])
SIZE = {"height": 32, "width": 32}
STRONG = {"scale": 3e4, "clip": 1e-4}
"""The gradient of a mean over an image has a norm of some 1e-3 here; so moved, latents of norm 32 go 3 at most."""


def guidance_of(pipe: Any, through: bool, reward: Any = redness, **more: Any) -> RewardGuidance:
    size = {**SIZE, **more.pop("call", {})}
    return RewardGuidance(pipe, reward, PROMPT, through_denoiser=through, **{**STRONG, **more}, **size)


AS_ASKED = {"use_resolution_binning": False, "clean_caption": False}


class Callback:
    tensor_inputs = ("latents",)

    def __init__(self, look: Callable[[Any, Tensor], None]) -> None:
        self.look = look

    def __call__(self, pipeline: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        self.look(pipeline, kwargs["latents"])
        return kwargs


@BOTH
@families("sd", "flux", "sana", slow=("sdxl", "sd3", "qwen_image", "z_image"))
def test_the_reward_rises_for_every_seed(name, through):
    pipe = pipeline(name)
    with guidance_of(pipe, through, call=AS_ASKED if name == "sana" else {}) as guidance:
        for seed in range(2 if name == "sd" else 1):
            alone = redness(sample(pipe, name, seed=seed), [PROMPT])
            guided = sample(pipe, name, seed=seed, callback_on_step_end=guidance)
            assert redness(guided, [PROMPT]) > alone + 1e-3
    assert is_left_alone(pipe)
    assert [entry.step for entry in guidance.history[: STEPS - through]] == list(range(STEPS - through))
    assert all(0 < norm < math.inf for entry in guidance.history for norm in entry.gradient_norm)


@BOTH
@families("sd", "sana", slow=("sdxl",))
def test_the_schedulers_state_and_all_parameters_are_untouched(name, through):
    pipe = pipeline(name)

    class Redness(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
            return redness(images, prompts) * self.weight

    def note(pipeline: Any, _: Tensor) -> None:
        held = vars(pipeline.scheduler).items()
        states.append(copy.deepcopy({name: value for name, value in held if name not in ("step", "_internal_dict")}))

    states: list[dict[str, Any]] = []
    reward, around = Redness(), Callback(note)
    with guidance_of(pipe, through, reward, call=AS_ASKED if name == "sana" else {}) as guidance:
        sample(pipe, name, callback_on_step_end=MultiPipelineCallbacks([around, guidance, around]))
    for before, after in zip(states[::2], states[1::2], strict=True):
        assert_same(before, after)
    modules = [module for module in pipe.components.values() if isinstance(module, nn.Module)]
    assert all(parameter.grad is None for module in [*modules, reward] for parameter in module.parameters())


@BOTH
def test_the_gradient_is_that_of_finite_differences(through):
    pipe = FAMILIES["sd"]().to(torch.float64)
    seen: list[Tensor] = []
    steps = {"start": 0.5, "stop": 0.75} if through else {"start": 0.75}
    watcher = Callback(lambda _, latents: seen.append(latents.clone()))
    with guidance_of(pipe, through, clip=math.inf, call={"guidance_scale": 1.0}, **steps) as guidance:
        callbacks = MultiPipelineCallbacks([watcher, guidance, watcher])
        sample(pipe, guidance_scale=1.0, callback_on_step_end=callbacks)
    before, after = seen[4:6] if through else seen[6:]  # around the last guided step
    direction = (after - before) / (after - before).norm()

    @torch.no_grad()
    def total(latents: Tensor) -> Tensor:
        clean = latents
        if through:
            time = pipe.scheduler.timesteps[3]
            text = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0]
            kept = pipe.scheduler.alphas_cumprod[time].double()
            noise = pipe.unet(latents, time, encoder_hidden_states=text).sample
            clean = (latents - (1 - kept).sqrt() * noise) / kept.sqrt()
        images = pipe.vae.decode(clean / pipe.vae.config.scaling_factor).sample / 2 + 0.5
        return redness(images.clamp(-0.5, 1.5), [PROMPT])  # what a Reward takes

    slope = (total(before + 1e-4 * direction) - total(before - 1e-4 * direction)) / 2e-4
    assert float(slope) == pytest.approx(guidance.history[0].gradient_norm[0], rel=1e-4)  # the steepest way there is


@BOTH
def test_clip_bounds_the_move_and_the_move_fades_with_the_noise(through):
    pipe = pipeline("sd3")
    for clip, reward in ((0.5, lambda images, prompts: 1e4 * redness(images, prompts)), (1e9, redness)):
        with guidance_of(pipe, through, reward, scale=2.0, clip=clip) as guidance:
            sample(pipe, "sd3", num_images_per_prompt=2, callback_on_step_end=guidance)
        sigmas = pipe.scheduler.sigmas.tolist()
        for entry in guidance.history:
            for norm, shift in zip(entry.gradient_norm, entry.shift_norm, strict=True):
                kept, (sigma, after) = min(norm, clip), sigmas[entry.step : entry.step + 2]
                size = math.hypot(sigma, 1 - sigma)
                expected = after if through else sigma / size * (1 - after)
                assert shift == pytest.approx(2.0 * kept * expected, rel=1e-3)
        assert (min(min(entry.gradient_norm) for entry in guidance.history) > clip) == (clip < 1)


@BOTH
def test_euler_and_ddim_are_guided_alike(through):
    # From one noise both go to the same x1, in latents of two scales; the guided step is of the same length, too.
    moves = []
    for euler in (False, True):
        pipe, scale = FAMILIES["sd"](), 1.0
        if euler:
            betas = {name: pipe.scheduler.config[name] for name in ("beta_start", "beta_end", "beta_schedule")}
            pipe.scheduler = EulerDiscreteScheduler(**betas, timestep_spacing="leading", steps_offset=1)
        with guidance_of(pipe, through, stop=0.2, clip=1.0) as guidance:
            sample(pipe, callback_on_step_end=guidance)
        (entry,) = guidance.history
        if euler:
            scale = float((1 + pipe.scheduler.sigmas[1] ** 2).sqrt())
        moves.append((entry.total[0], entry.gradient_norm[0], entry.shift_norm[0] / scale))
    assert moves[0] == pytest.approx(moves[1], rel=2e-3)


def test_beside_a_logger_and_the_users_own():
    pipe, recorder, seen = pipeline("sd"), Recorder(), []
    mine = Callback(lambda _, latents: seen.append(latents))
    with RewardLogger(pipe, recorder, PROMPT) as logger, guidance_of(pipe, False, every=2, stop=0.9) as guidance:
        image = sample(pipe, callback_on_step_end=MultiPipelineCallbacks([guidance, logger, mine]))
    assert [entry.step for entry in guidance.history] == [0, 2]
    assert len(seen) == len(logger.history) == STEPS
    assert torch.allclose(recorder.images[-1], image, atol=1e-3)
    with EarlyExit(pipe, recorder, PROMPT, above=-9.0) as exit_, guidance_of(pipe, False) as guidance:
        image = sample(pipe, callback_on_step_end=MultiPipelineCallbacks([exit_, guidance]))
    assert [entry.step for entry in guidance.history] == list(range(exit_.exited_at))
    assert torch.allclose(recorder.images[-1], image, atol=1e-4)


def test_a_batch_is_guided_image_by_image():
    pipe = pipeline("sd")
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    with guidance_of(pipe, True) as guidance:
        both = sample(pipe, num_images_per_prompt=2, generator=generators, callback_on_step_end=guidance)
        alone = [sample(pipe, seed=seed, callback_on_step_end=guidance)[0] for seed in (0, 1)]
    assert torch.allclose(both, torch.stack(alone), atol=1e-3)


@BOTH
@pytest.mark.parametrize(
    "reward", [torch.no_grad()(redness), lambda images, _: torch.ones(len(images), requires_grad=True)]
)
def test_a_reward_without_gradients_is_refused(reward, through):
    pipe = pipeline("sd")
    message = "RewardGuidance needs its gradient"
    with pytest.raises(ValueError, match=message), guidance_of(pipe, through, reward) as guidance:
        sample(pipe, callback_on_step_end=guidance)
    assert is_left_alone(pipe)


@families("sd", slow=("sdxl",))
def test_a_vae_that_overflows_in_half_precision_is_refused_on_entering_and_the_remedy_works(name):
    pipe = FAMILIES[name]().to(torch.float16)
    for through in (False, True):
        with pytest.raises(ValueError, match=r"load the whole pipeline in bfloat16 or float32"):
            guidance_of(pipe, through).__enter__()
        assert is_left_alone(pipe)
    for dtype in (torch.bfloat16, torch.float32):
        pipe.to(dtype)
        with guidance_of(pipe, False) as guidance:
            assert sample(pipe, name, callback_on_step_end=guidance).isfinite().all()
        assert max(entry.shift_norm[0] for entry in guidance.history) > 0


def test_errors_say_what_to_do():
    pipe = pipeline("sd")
    for name, value in {"scale": math.nan, "start": 1.0, "clip": 0.0, "every": 0, "stop": 2.0, "heigth": 2}.items():
        with pytest.raises(ValueError, match=name):
            RewardGuidance(pipe, redness, PROMPT, **{name: value})
    with pytest.raises(ValueError, match="within its with block"):
        sample(pipe, callback_on_step_end=guidance_of(pipe, False))
    flux = pipeline("flux")
    other_size = guidance_of(flux, True, call={"height": 64, "width": 16})
    with pytest.raises(ValueError, match="height, width"), other_size as guidance:
        sample(flux, "flux", callback_on_step_end=guidance)
    for given, called in (({}, {"guidance_scale": 1.0}), ({"guidance_scale": 3.0}, {})):
        message = "guidance_scale: the pipeline samples with"
        with pytest.raises(ValueError, match=message), guidance_of(pipe, True, call=given) as guidance:
            sample(pipe, callback_on_step_end=guidance, **called)
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    with guidance_of(pipe, True) as guidance:
        sample(pipe, callback_on_step_end=MultiPipelineCallbacks([cutoff, guidance]))
    assert len(guidance.history) == STEPS - 1
    nowhere = lambda images, _: (images * math.inf).mean(dim=(1, 2, 3))  # noqa: E731
    with pytest.raises(ValueError, match="NaN or infinite"), guidance_of(pipe, False, nowhere) as guidance:
        sample(pipe, callback_on_step_end=guidance)
    forbidden = torch.inference_mode(), pytest.raises(ValueError, match="inference_mode")
    with forbidden[0], forbidden[1], guidance_of(pipe, False) as guidance:
        sample(pipe, callback_on_step_end=guidance)
