import math
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
from diffusers import LCMScheduler
from pipelines import FEW_STEPS, SIDE
from pipelines_current import pipeline
from scipy import stats
from torch import Tensor, nn
from watched import families

from aigiqa_reward.sampling.candidates import BestOfNOutput
from aigiqa_reward.sampling.noise_optimization import NoiseOptimizer, norm_log_likelihood

PROMPT = "a cat on a mat"
ONE_STEP = {"height": SIDE, "width": SIDE, "num_inference_steps": 1}


@pytest.fixture(scope="module")
def sd() -> Any:
    return pipeline("sd")


def corner(images: Tensor, prompts: list[str]) -> Tensor:
    return images[:, 0, :4, :4].mean(dim=(1, 2))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        return corner(images, prompts) * self.scale


def make(pipe: Any, reward: Any = corner, **arguments: Any) -> NoiseOptimizer:
    return NoiseOptimizer(pipe, reward, **{"iterations": 3, "clip": 1.0, "progress": False, **arguments})


def initial(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def image_of(pipe: Any, latents: Tensor, **arguments: Any) -> Tensor:
    return pipe(prompt=PROMPT, latents=latents, output_type="pt", **arguments).images


def test_the_regularizer_is_the_chi_density_of_the_norm():
    noise = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    others = [noise, 0.7 * noise, 2.0 * noise]
    expected = [stats.chi.logpdf(float(other.norm()), df=105) for other in others]
    found = [float(norm_log_likelihood(other)) for other in others]
    assert np.diff(found) == pytest.approx(np.diff(expected))
    (gradient,) = torch.autograd.grad(norm_log_likelihood(noise.requires_grad_()), noise)
    torch.testing.assert_close(gradient, (104 / noise.norm() ** 2 - 1) * noise)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_first_step_is_along_the_gradient(checkpointed):
    # in float64, against central differences of the pipeline's own images
    pipe = pipelines.stable_diffusion().to(torch.float64)
    pipe.vae.decoder.conv_out.weight.data *= 0.3  # paler, so that the pipeline has nothing to clamp
    rate, weight = 0.5, 0.002
    plan = {"learning_rate": rate, "regularization": weight, "clip": math.inf, "checkpointed": checkpointed}
    out = make(pipe, iterations=1, **plan)(PROMPT, **FEW_STEPS)
    start = initial((1, 4, 16, 16), dtype=torch.float64)
    assert out.history[1] > out.history[0]
    gradient = (out.noise - start) / (1.9 * rate)  # Nesterov's first step is (1 + momentum) gradients long
    direction = torch.randn(start.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def objective(noise: Tensor) -> float:
        image = image_of(pipe, noise, **FEW_STEPS)
        assert 0 < float(image[0, 0, :4, :4].min()) < float(image[0, 0, :4, :4].max()) < 1
        squared = float(noise.square().sum())
        return float(corner(image, [])) + weight * (1023 * math.log(squared) / 2 - squared / 2)

    small = 1e-5
    slope = (objective(start + small * direction) - objective(start - small * direction)) / (2 * small)
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-5)


def test_the_bar_ends_where_the_optimization_does(sd, capsys):
    make(sd, iterations=1, progress=True)(PROMPT, **ONE_STEP)
    assert "| 1/1 [" in capsys.readouterr().err


def test_the_gradient_is_clipped_as_a_whole(sd):
    out = make(sd, iterations=1, learning_rate=0.1, clip=0.01)(PROMPT, **ONE_STEP)
    moved = out.noise - initial((1, 4, 16, 16))
    assert float(moved.norm()) == pytest.approx(1.9 * 0.1 * 0.01, rel=1e-2)


@pytest.mark.parametrize(("optimizer", "steps"), [("sgd", 1), ("adam", 2)])
def test_the_reward_rises(sd, optimizer, steps):
    out = make(sd, iterations=4, optimizer=optimizer)(PROMPT, **{**FEW_STEPS, "num_inference_steps": steps})
    assert isinstance(out, BestOfNOutput) and len(out.history) == 5
    assert max(out.history) > out.history[0] + 0.05
    assert out.scores == out.all_scores == [max(out.history)]
    assert (out.seeds, out.winners, out.all_seeds) == ([None], [0], [0]) and out.denoiser_calls == 5 * steps
    pixels = torch.from_numpy(np.array(out.images[0])).permute(2, 0, 1)[None] / 255
    assert float(corner(pixels, [PROMPT])) == pytest.approx(out.scores[0], abs=1 / 255)
    if steps == 1:
        again = make(sd, iterations=4, optimizer=optimizer)(PROMPT, **ONE_STEP)
        assert again.history == out.history


@families("sdxl", "flux", "flux_2_klein", slow=("sd", "sd3"))
def test_the_pipeline_makes_the_image_again_from_the_noise(name):
    pipe = pipeline(name)
    out = make(pipe)(PROMPT, seed=5, **FEW_STEPS)
    generator = torch.Generator().manual_seed(5)
    plain = pipe(prompt=PROMPT, generator=generator, output_type="pt", **FEW_STEPS).images
    assert out.history[0] == pytest.approx(float(corner(plain, [])), abs=1e-4)
    assert max(out.history) > out.history[0] + 0.02
    shapes = {"flux": (1, 64, 16), "flux_2_klein": (1, 16, 8, 8)}
    assert tuple(out.noise.shape) == shapes.get(name, (1, 4, 16, 16)) and out.noise.device.type == "cpu"
    assert float(out.noise.std()) == pytest.approx(1, abs=0.1)
    image = (image_of(pipe, out.noise, **FEW_STEPS)[0] * 255).round().permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(out.images[0]) - image).max() <= 1


def test_a_stochastic_sampler_continues_with_the_generator():
    pipe = pipelines.stable_diffusion()
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    out = make(pipe, iterations=2)(PROMPT, seed=5, **FEW_STEPS)
    assert out.history[-1] > out.history[0]
    generator = torch.Generator().manual_seed(5)
    plain = pipe(PROMPT, generator=generator, output_type="pt", **FEW_STEPS).images
    assert out.history[0] == pytest.approx(float(corner(plain, [])), abs=1e-4)
    generator.manual_seed(5)
    torch.randn(out.noise.shape, generator=generator)
    image = image_of(pipe, out.noise, generator=generator, **FEW_STEPS)
    assert float(corner(image, [])) == pytest.approx(out.scores[0], abs=1e-4)


def test_weights_are_left_as_they_were():
    pipe, reward = pipelines.stable_diffusion(), Scaled()
    pipe.vae.requires_grad_(False)
    modules = [reward, pipe.unet, pipe.vae, pipe.text_encoder]
    asked = [[weight.requires_grad for weight in module.parameters()] for module in modules]
    make(pipe, reward, iterations=1)(PROMPT, **ONE_STEP)
    assert [[weight.requires_grad for weight in module.parameters()] for module in modules] == asked
    assert all(weight.grad is None for module in modules for weight in module.parameters())


def test_totals_or_gradients_that_are_not_finite_stop_it_with_the_best_so_far(sd):
    factors = iter([1, 1, 1, 1, math.nan])  # each image is scored, then differentiated
    reward = lambda images, prompts: corner(images, prompts) * next(factors)  # noqa: E731
    with pytest.warns(UserWarning, match="stopped after 2 images because of the reward gave NaN"):
        out = make(sd, reward, iterations=6)(PROMPT, **ONE_STEP)
    assert len(out.history) == 2 and out.scores == [max(out.history)]
    with pytest.warns(UserWarning, match="because of NaN or infinite gradients"):
        # at 0 the square root of what never is below 0 has an infinite slope
        out = make(sd, lambda images, prompts: corner(images - images, prompts).sqrt())(PROMPT, **ONE_STEP)
    assert out.history == [0.0] and len(out.images) == 1


def test_flagged_images_are_not_returned_and_no_image_at_all_is_an_error():
    pipe = pipelines.stable_diffusion(safety_checker=True)
    assert len(make(pipe, iterations=1)(PROMPT, **ONE_STEP).images) == 1
    with torch.no_grad():
        pipe.safety_checker.concept_embeds_weights[0] = -1.0
    with pytest.raises(RuntimeError, match="flagged by the pipeline's safety checker"):
        make(pipe, iterations=1)(PROMPT, **ONE_STEP)
    pipe.vae.decoder.register_forward_hook(lambda module, args, output: output * math.nan)
    with pytest.raises(RuntimeError, match=r"none of the 1 candidates could be ranked.*NaN"):
        make(pipe)(PROMPT, **ONE_STEP)


def test_rewards_without_gradients_and_many_steps_are_refused(sd):
    for reward in (lambda images, prompts: corner(images.detach(), prompts), lambda images, prompts: torch.ones(1)):
        with pytest.raises(ValueError, match="reward: NoiseOptimizer needs its gradient"):
            make(sd, reward)(PROMPT, **ONE_STEP)
    with pytest.raises(ValueError, match=r"num_inference_steps: expected at most longest=4 .* got 50; the gradient"):
        make(sd)(PROMPT)
    with pytest.raises(ValueError, match="longest=1 calls of the denoiser, got 2"):
        make(sd, longest=1)(PROMPT, **FEW_STEPS)


def test_bad_arguments_are_refused(sd):
    refused = {
        "iterations": 0, "learning_rate": 0.0, "regularization": -1.0, "clip": 0.0, "optimizer": "lbfgs", "longest": 0,
        "reward_prompt": " ",
    }  # fmt: skip
    for name, value in refused.items():
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            make(sd, **{name: value})
    with pytest.raises(TypeError, match="clip: expected a number above 0"):
        make(sd, clip="none")
    with pytest.raises(TypeError, match="one prompt per call"):
        make(sd)([PROMPT], **ONE_STEP)
    with pytest.raises(ValueError, match=r"seed: expected an integer in .* got 18446744073709551616"):
        make(sd)(PROMPT, seed=2**64, **ONE_STEP)
    with pytest.raises(ValueError, match=r"inference_mode\(\) forbids gradients"), torch.inference_mode():
        make(sd)(PROMPT, **ONE_STEP)
