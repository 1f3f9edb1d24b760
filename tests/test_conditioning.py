"""Stock pipelines in BestOfN and PromptScorer: a candidate is the image of its seed, as the pipeline shows it."""

from typing import Any

import diffusers
import numpy as np
import pipelines
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from pipelines import FEW_STEPS, SIDE
from pipelines_current import pipeline
from pipelines_with_images import PARTS, PICTURE, pipeline_with_images
from test_best_of_n import corner, farthest

from aigiqa_reward import BestOfN, BestOfNOutput
from aigiqa_reward.sampling import PromptScorer
from aigiqa_reward.sampling.pipeline_utils import Sampler

FAST = {"sd StableDiffusionImg2Img", "sd StableDiffusionInpaint", "sd StableDiffusionControlNet", "flux FluxImg2Img"}
FAST |= {"sd3 StableDiffusion3Img2Img", "sd3 StableDiffusion3ControlNet"}


def best(pipe: Any, call: dict[str, Any], size: int) -> BestOfNOutput:
    return BestOfN(pipe, corner, n=3, top_k=3, batch_size=size, progress=False)("a cat", seed=3, **call)


def own_image(pipe: Any, seed: int, call: dict[str, Any]) -> np.ndarray:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        image = pipe(prompt="a cat", generator=torch.Generator().manual_seed(seed), **call).images[0]
    return np.asarray(image).astype(int)


def assert_images_of_their_seeds(pipe: Any, call: dict[str, Any]) -> None:
    state = torch.get_rng_state()
    one, three = (best(pipe, call, size) for size in (1, 3))
    assert torch.equal(torch.get_rng_state(), state)
    assert one.seeds == three.seeds
    assert three.all_scores == pytest.approx(one.all_scores, abs=1e-4)
    assert max(one.all_scores) - min(one.all_scores) > 1e-3
    own = [own_image(pipe, seed, call) for seed in one.seeds]
    assert farthest(one.images, own) == 0
    assert farthest(three.images, own) <= 2


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in PARTS])
def test_images_that_condition_a_pipeline_leave_every_seed_its_image(name):
    pipe, call = pipeline_with_images(name)
    assert_images_of_their_seeds(pipe, call)
    scorers = [PromptScorer(pipe, corner, batch_size=size, **call) for size in (1, 2)]
    alone, together = ([s.total for s in scorer.score(["a cat", "a dog"], seed=3)] for scorer in scorers)
    assert together == pytest.approx(alone, abs=1e-4)


def test_noise_from_the_global_random_state_belongs_to_the_candidate():
    pipe = pipelines.flux()  # which gives its scheduler no generator
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    assert_images_of_their_seeds(pipe, {**FEW_STEPS, "num_inference_steps": 4})


@pytest.mark.parametrize(
    ("arguments", "together"),
    [
        ({"image": PICTURE}, False),
        ({"image": torch.zeros(1, 3, 8, 8)}, False),
        ({"control": {"pose": [np.zeros((8, 8, 3))]}}, False),
        ({"prompt_embeds": torch.zeros(1, 77, 32), "negative_prompt_embeds": torch.zeros(1, 77, 32)}, True),
        ({"ip_adapter_image": PICTURE, "sigmas": np.linspace(1, 0.1, 4), "timesteps": [999, 1], "guidance": 2.0}, True),
    ],
)
def test_what_counts_as_an_image(arguments, together):
    assert Sampler(pipeline("flux"), arguments).together is together
    own = type("Rewritten", (StableDiffusionImg2ImgPipeline,), {"__call__": lambda self, prompt, **more: None})
    assert Sampler(object.__new__(own), arguments).together is together  # no longer the call that is known


@pytest.mark.parametrize("by_function", [False, True])
def test_a_cache_in_the_denoiser_decides_for_each_candidate_alone(by_function):
    pipe, call = pipelines.flux(), {**FEW_STEPS, "num_inference_steps": 8}
    for name, weight in pipe.transformer.named_parameters():  # so that the skipped blocks count
        if weight.ndim == 2 and ("transformer_blocks" in name or "proj_out" in name):
            weight.data *= 3.5
    config = diffusers.FirstBlockCacheConfig(0.575)  # at which a batch of these three decides otherwise
    if by_function:
        diffusers.hooks.apply_first_block_cache(pipe.transformer, config)
    else:
        pipe.transformer.enable_cache(config)
    assert_images_of_their_seeds(pipe, call)


def test_a_call_that_failed_leaves_nothing_in_a_cache():
    pipe, call = pipelines.flux(), {**FEW_STEPS, "num_inference_steps": 6}
    pipe.transformer.enable_cache(diffusers.TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2))
    scores, left = best(pipe, call, 3).all_scores, [None] * 3  # calls that succeed
    hook = pipe.transformer.register_forward_pre_hook(lambda *_: left.pop())
    with pytest.raises(IndexError):
        best(pipe, call, 3)
    hook.remove()
    assert best(pipe, call, 3).all_scores == scores


def test_the_reward_sees_what_the_pipeline_shows():
    with pipelines._weights_of(seed=6):  # DeepFloyd IF: whose "pt" is in [-1, 1], as that of the Kandinsky pipelines
        config = {n: v for n, v in pipelines._unet(cross_attention_dim=32).config.items() if not n.startswith("_")}
        config |= {"in_channels": 3, "out_channels": 6, "sample_size": SIDE, "encoder_hid_dim": 32}
        pipe = diffusers.IFPipeline(
            pipelines._t5_tokenizer(), pipelines._t5(width=32), UNet2DConditionModel.from_config(config).eval(),
            diffusers.DDPMScheduler(variance_type="learned_range"), None, None, None, requires_safety_checker=False,
        )  # fmt: skip
    assert pipelines._quiet(pipe)("a cat", **FEW_STEPS, output_type="pt").images.min() < -0.1
    result = best(pipe, FEW_STEPS, 3)
    own = [own_image(pipe, seed, FEW_STEPS) for seed in result.seeds]
    assert farthest(result.images, own) <= 1
    assert result.scores == pytest.approx([image[:4, :4, 0].mean() / 255 for image in own], abs=1 / 255)
