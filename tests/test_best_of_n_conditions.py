"""Pipelines that start from an image or are led by one: BestOfN only needs their call."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from PIL import Image
from pipelines import SIDE
from torch import Tensor

from aigiqa_reward import BestOfN

PROMPT = "a cat on a mat"


def corner(images: Tensor, prompts: list[str]) -> Tensor:
    assert len(prompts) == len(images)
    return images[:, 0, :4, :4].mean(dim=(1, 2))


@functools.cache
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8))


def image_to_image() -> tuple[Any, dict[str, Any]]:
    pipe = StableDiffusionImg2ImgPipeline(**pipelines.stable_diffusion().components, requires_safety_checker=False)
    return pipe, {"image": picture(), "strength": 0.8}


def inpainting() -> tuple[Any, dict[str, Any]]:
    pipe = StableDiffusionInpaintPipeline(**pipelines.stable_diffusion().components, requires_safety_checker=False)
    mask = Image.fromarray(np.full((SIDE, SIDE), 255, dtype=np.uint8))
    return pipe, {"image": picture(), "mask_image": mask, "height": SIDE, "width": SIDE}


def controlled() -> tuple[Any, dict[str, Any]]:
    parts = pipelines.stable_diffusion()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        control = ControlNetModel.from_unet(parts.unet, conditioning_embedding_out_channels=(8, 16))
        torch.nn.init.normal_(control.controlnet_down_blocks[0].weight)  # zeros would let the condition do nothing
    pipe = StableDiffusionControlNetPipeline(**parts.components, controlnet=control, requires_safety_checker=False)
    return pipe, {"image": picture()}


@pytest.mark.parametrize("build", [image_to_image, inpainting, controlled])
def test_winners_are_made_again_from_their_seeds(build):
    pipe, arguments = build()
    pipe.set_progress_bar_config(disable=True)
    arguments |= {"num_inference_steps": 3}
    one, many = (
        BestOfN(pipe, corner, n=5, top_k=2, batch_size=size, progress=False)(PROMPT, seed=3, **arguments)
        for size in (1, 4)
    )
    assert one.seeds == many.seeds
    assert max(one.all_scores) - min(one.all_scores) > 0.01
    for seed, image in zip(one.seeds, one.images, strict=True):
        again = pipe(PROMPT, generator=torch.Generator().manual_seed(seed), **arguments).images[0]
        assert np.array_equal(np.asarray(again), np.asarray(image))


def test_pruning_says_which_pipelines_it_knows():
    pipe, arguments = image_to_image()
    with pytest.raises(
        TypeError, match=r"^pipe: BestOfN\(pruning=\.\.\.\) .*got StableDiffusionImg2ImgPipeline\. Plain"
    ):
        BestOfN(pipe, corner, n=4, pruning="halving", progress=False)(PROMPT, **arguments)
