import copy
import functools
from collections.abc import Iterable
from typing import Any

import pipelines
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, LCMScheduler, PixArtSigmaPipeline, StableDiffusionPipeline
from pipelines import FAMILIES, FEW_STEPS
from pipelines_current import CALL, CURRENT_FAMILIES, GUIDED, _pixart
from pipelines_current import pipeline as built
from torch import Tensor
from watched import assert_close, generators

from aigiqa_reward import load_embedded_pipeline
from aigiqa_reward.sampling.families import Conditioning
from aigiqa_reward.sampling.rollout import Rollout

PROMPTS = ("a cat on a mat", "a cat on a mat", "a red apple, two pears and a bunch of grapes")
SEEDS = [3, 4, 5]
EARLIER: dict[str, tuple[str, dict[str, Any]]] = {
    "sd guided": ("sd", {"guidance_scale": 5.0}),
    "sd unguided": ("sd", {"guidance_scale": 1.0}),
    "sd rescaled": ("sd", {"guidance_scale": 5.0, "guidance_rescale": 0.7, "negative_prompt": "blurry"}),
    "sd stochastic": ("sd", {"eta": 0.8}),
    "lcm": ("lcm", {"guidance_scale": 8.5}),
    "sdxl guided": ("sdxl", {"guidance_scale": 5.0}),
    "sdxl unguided": ("sdxl", {"guidance_scale": 1.0}),
    "sdxl negative": ("sdxl", {"negative_prompt": "blurry", "guidance_rescale": 0.5, "timesteps": [801, 301]}),
    "sdxl cropped": ("sdxl", {"original_size": (64, 48), "crops_coords_top_left": (8, 4), "target_size": (40, 40)}),
    "sd3 guided": ("sd3", {"guidance_scale": 5.0}),
    "sd3 unguided": ("sd3", {"guidance_scale": 1.0}),
    "sd3 negative": ("sd3", {"negative_prompt": "blurry", "max_sequence_length": 64}),
    "flux embedded": ("flux", {"guidance_scale": 2.0, "max_sequence_length": 64}),
    "flux guided": ("flux", {"true_cfg_scale": 3.0, "negative_prompt": "blurry", "max_sequence_length": 64}),
}
UNGUIDED = {name: {"guidance_scale": 0.0 if name == "z_image" else 1.0} for name in GUIDED if name != "qwen_image"}
CURRENT = {
    **{f"{name} plain": (name, CALL[name]) for name in ("flux_2", "qwen_image")},
    **{f"{name} guided": (name, {**CALL[name], **more}) for name, more in GUIDED.items()},
    **{f"{name} unguided": (name, {**CALL[name], **more}) for name, more in UNGUIDED.items()},
    "z_image truncated": ("z_image", {**CALL["z_image"], "cfg_truncation": 0.2, "cfg_normalization": True}),
}
CASES = {**{case: (name, {**FEW_STEPS, **more}) for case, (name, more) in EARLIER.items()}, **CURRENT}
KINDS = [*FAMILIES, *CURRENT_FAMILIES]
FAST = {"sd rescaled", "sd stochastic", "lcm", "sdxl negative", "sd3 negative", "flux guided", "flux_2 plain"}
FAST |= {"flux_2_klein guided", "qwen_image guided", "z_image truncated", "sana guided", "pixart_alpha guided"}
FAST |= {"sd", "flux", "qwen_image", "sana"}


def marked(names: Iterable[str]) -> list[Any]:
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in names]


@functools.cache
def pipeline(kind: str) -> Any:
    if kind == "lcm":  # a UNet that gets the guidance scale, and its scheduler, which draws noise at each step
        pipe = pipelines.stable_diffusion()
        with pipelines._weights_of(seed=4):
            unet = pipelines._unet(cross_attention_dim=32, time_cond_proj_dim=8)
        parts = {**pipe.components, "unet": unet, "scheduler": LCMScheduler.from_config(pipe.scheduler.config)}
        return pipelines._quiet(StableDiffusionPipeline(**parts, requires_safety_checker=False))
    if kind == "pixart binned":  # whose sample size, 32, is among those that have a list of trained sizes
        with pipelines._weights_of(seed=17):
            return _pixart(PixArtSigmaPipeline, sample_size=32)
    return built(kind)


@functools.cache
def reference(kind: str) -> Any:
    pipe = copy.copy(pipeline(kind))
    pipe.scheduler = copy.deepcopy(pipe.scheduler)
    return pipe


def rollout_of(case: str) -> Rollout:
    kind, call = CASES[case]
    return Rollout(pipeline(kind), **call)


@functools.cache
@torch.no_grad()
def sampled(case: str) -> tuple[Tensor, Tensor]:
    rollout = rollout_of(case)
    state = rollout.run(rollout.start(rollout.encode(PROMPTS), generators()))
    return state.latents, rollout.decode(state.latents)


def called(case: str, output_type: str) -> Tensor:
    kind, call = CASES[case]
    if "negative_prompt" in call:  # which some pipelines want once per prompt
        call = {**call, "negative_prompt": [call["negative_prompt"]] * len(PROMPTS)}
    return reference(kind)(prompt=list(PROMPTS), generator=generators(), output_type=output_type, **call).images


@pytest.mark.parametrize("case", marked(CASES))
def test_a_rollout_ends_where_the_pipeline_ends(case):
    latents, images = sampled(case)
    assert_close(images.clamp(0, 1), called(case, "pt"))
    if case in ("sd rescaled", "sana guided"):
        assert_close(latents, called(case, "latent"))
    assert (latents[0] - latents[1]).abs().max() > 0.5  # seeds differ far more than that


@pytest.mark.parametrize("case", marked(CASES))
@torch.no_grad()
def test_prompts_encoded_and_sampled_together_are_those_alone(case):
    rollout = rollout_of(case)
    for row in (0, 2):  # shorter and longer than one another: padding must not count
        alone = rollout.run(rollout.start(rollout.encode([PROMPTS[row]]), generators(SEEDS[row]))).latents
        assert_close(alone, sampled(case)[0][row : row + 1])


@pytest.mark.parametrize("case", marked(["sd3 negative", "qwen_image guided", "z_image truncated", "sana guided"]))
@torch.no_grad()
def test_prompts_encoded_apart_can_be_joined(case):
    rollout, rows = rollout_of(case), [0, 2, 1, 2]
    joined = Conditioning.cat([rollout.encode([PROMPTS[row] for row in group]) for group in ([0], [2], [1, 2])])
    state = rollout.run(rollout.start(joined, generators(*(SEEDS[row] for row in rows))))
    assert_close(state.latents, sampled(case)[0][rows])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_prompts_make_a_difference_and_each_row_may_have_a_time_of_its_own(kind):
    rollout = Rollout(pipeline(kind), **CALL.get(kind, FEW_STEPS))
    conditioning = Conditioning(positive=rollout.encode(PROMPTS).positive)
    state = rollout.start(conditioning, generators(7, 7, 7))
    times = state.scheduler.timesteps.new_tensor([900, 500, 20])
    together = rollout.family.predict(state.latents, times, conditioning, state.shared)
    for row in range(3):
        one = (state.latents[row : row + 1], times[row], conditioning[[row]], state.shared)
        assert_close(together[row : row + 1], rollout.family.predict(*one))
    same = rollout.family.predict(state.latents, times[0], conditioning, state.shared)
    assert (together[2] - same[2]).abs().max() > 1e-4  # the time counts
    assert_close(same[0], same[1])
    assert (same[0] - same[2]).abs().max() > 5e-4


@pytest.mark.parametrize("kind", marked(KINDS))
def test_gradients_reach_all_latents_and_checkpointing_changes_nothing(kind):
    rollout = Rollout(pipeline(kind), **{**CALL.get(kind, FEW_STEPS), **GUIDED.get(kind, {})})
    conditioning = rollout.encode(PROMPTS[1:])
    noise = rollout.start(conditioning, generators(*SEEDS[1:])).latents
    found = []
    for checkpointed in (False, True):
        first = noise.clone().requires_grad_()
        state = rollout.start(conditioning, generators(*SEEDS[1:]), first)
        while not state.done:
            state = rollout.advance(state, rollout.predict(state, checkpointed=checkpointed).output)
        found.append(torch.autograd.grad(rollout.decode(state.latents).sum(), (first, state.latents)))
    (plain, last), (again, _) = found
    assert (last != 0).float().mean() > 0.9
    for gradient in (plain, last):
        assert gradient.isfinite().all()
        assert (gradient.flatten(1).abs().amax(dim=1) > 0).all()
    torch.testing.assert_close(again, plain, atol=1e-6 * float(plain.abs().max()), rtol=1e-5)


def test_a_vae_that_overflows_in_half_precision_is_cast_and_restored():
    pipe = pipelines.stable_diffusion_xl()
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    rollout = Rollout(pipe, **FEW_STEPS)
    with torch.no_grad():
        exact = rollout.family.encode_images(images)
        pipe.vae.to(torch.float16)
        state = rollout.run(rollout.start(rollout.encode(PROMPTS), generators()))
        decoded = rollout.decode(state.latents)
        torch.testing.assert_close(rollout.family.encode_images(images), exact, atol=5e-3, rtol=5e-2)
        with pytest.raises(RuntimeError):
            rollout.decode(torch.zeros(1, 5, 16, 16))
    assert {tensor.dtype for tensor in pipe.vae.parameters()} == {torch.float16}
    assert decoded.dtype == torch.float32
    expected = pipe(prompt=list(PROMPTS), generator=generators(), output_type="pt", **FEW_STEPS).images
    assert_close(decoded.clamp(0, 1), expected.float())
    with pytest.raises(ValueError, match=r"VAE overflows in float16.*bfloat16, or call pipe.vae.to\(torch.float32\)"):
        rollout.decode(state.latents.requires_grad_())
    assert pipe.vae.dtype == torch.float16


def test_latents_of_the_caller_replace_the_noise_and_leave_the_generators_in_step():
    rollout = rollout_of("sd guided")
    conditioning = rollout.encode(PROMPTS)
    own = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    plain, replaced = generators(), generators()
    state = rollout.start(conditioning, replaced, own)
    rollout.start(conditioning, plain)
    assert torch.equal(state.latents, own)
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(plain, replaced, strict=True))
    with torch.no_grad():
        state = rollout.run(state)
    call = {**CASES["sd guided"][1], "latents": own}
    assert_close(state.latents, reference("sd")(prompt=list(PROMPTS), output_type="latent", **call).images)


def test_a_size_that_was_not_trained_is_sampled_at_the_nearest_and_cropped():
    call = {"height": 250, "width": 270, "num_inference_steps": 1, "guidance_scale": 1.0}
    rollout = Rollout(pipeline("pixart binned"), **call, use_resolution_binning=True)
    with torch.no_grad():
        state = rollout.run(rollout.start(rollout.encode(PROMPTS[:1]), generators(3)))
    latents = state.latents.clone().requires_grad_()
    images = rollout.decode(latents)
    pipe = reference("pixart binned")
    expected = pipe(prompt=list(PROMPTS[:1]), generator=generators(3), output_type="pt", **call).images
    assert images.shape == (1, 3, 250, 270)
    assert_close(images.detach().clamp(0, 1), expected)
    assert torch.autograd.grad(images.sum(), latents)[0].isfinite().all()
    without = Rollout(pipeline("pixart_sigma"), **{**CALL["pixart_sigma"], "use_resolution_binning": True})
    with pytest.raises(ValueError, match=r"use_resolution_binning: .* sample size 16; pass use_resolution_binning=Fal"):
        without.start(without.encode(PROMPTS), generators())


def test_earlier_calls_of_the_pipeline_do_not_count():
    # Euler scales its noise by the first of its steps, not by that of the call before.
    pipe = reference("sdxl")
    pipe(prompt=PROMPTS[0], generator=generators(0), **{**FEW_STEPS, "timesteps": [301, 101]})
    rollout = Rollout(pipe, **CASES["sdxl guided"][1])
    with torch.no_grad():
        state = rollout.run(rollout.start(rollout.encode(PROMPTS), generators()))
    assert_close(state.latents, called("sdxl guided", "latent"))


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_has_the_layout_of_decoding(kind):
    rollout = Rollout(pipeline(kind), **CALL.get(kind, FEW_STEPS))
    with torch.no_grad():
        latents = rollout.start(rollout.encode(PROMPTS), generators()).latents
        encoded = rollout.family.encode_images(rollout.show(latents))
    assert encoded.shape == latents.shape and encoded.dtype == torch.float32
    assert (encoded[0] - encoded[1]).abs().max() > 0
    exact = latents.double()
    again = rollout.family.pack(rollout.family.normalize(rollout.family.denormalize(rollout.family.unpack(exact))))
    torch.testing.assert_close(again, exact, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
@torch.no_grad()
def test_images_are_encoded_as_diffusers_scripts_do(kind):
    pipe = pipeline(kind)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    family, config = Rollout(pipe, **FEW_STEPS).family, pipe.vae.config
    expected = (pipe.vae.encode(images * 2 - 1).latent_dist.mode() - (config.shift_factor or 0)) * config.scaling_factor
    if kind == "flux":
        expected = FluxImg2ImgPipeline(**pipe.components)._pack_latents(expected, 2, 4, 16, 16)
    torch.testing.assert_close(family.encode_images(images), expected)
    for shape in [(1, 3, 32, 48), (3, 32, 32), (1, 4, 32, 32)]:
        with pytest.raises(ValueError, match=r"images: expected \(B, 3, 32, 32\).*got shape.*resize them"):
            family.encode_images(torch.zeros(shape))


def test_means_of_a_vaes_latents_are_subtracted():
    pipe = pipelines.stable_diffusion_xl()
    pipe.vae.register_to_config(latents_mean=[0.5, -1.0, 0.0, 2.0], latents_std=[2.0, 1.0, 0.5, 4.0])
    family = Rollout(pipe, **FEW_STEPS).family
    encoded = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.5, -1.0, 0.0, 2.0]), torch.tensor([2.0, 1.0, 0.5, 4.0])
    expected = (encoded - mean.view(1, 4, 1, 1)) / std.view(1, 4, 1, 1) * pipe.vae.config.scaling_factor
    torch.testing.assert_close(family.normalize(encoded), expected)
    torch.testing.assert_close(family.denormalize(expected), encoded)


@torch.no_grad()
def test_encoders_without_a_distribution_are_used_as_they_are():
    rollout = Rollout(load_embedded_pipeline(), num_inference_steps=10, guidance_scale=3.0)
    state = rollout.run(rollout.start(rollout.encode(["a red apple on a blue background"]), generators(0)))
    again = rollout.family.encode_images(rollout.show(state.latents))
    assert (again - state.latents).std() < 0.3 * state.latents.std()  # trained: it recovers what it decoded
    assert (rollout.show(again) - rollout.show(state.latents)).abs().mean() < 0.03
