"""The embedded generator: a Stable Diffusion pipeline small enough to travel with the package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from aigiqa_reward.utils.isolation import building
from aigiqa_reward.utils.weights import ASSETS, read_checked

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]

GENERATOR = ASSETS / "generator"
"""The pipeline's folder; a plain `StableDiffusionPipeline.from_pretrained` loads it too."""

_SHA256 = {
    "text_encoder/model.safetensors": "3be0be65984640d1651f38a13af281d51ebf1b05511dc164b1f1fd12a4e6ee88",
    "tokenizer/tokenizer.json": "046d51ea116a3c89c156edc517a6b5fb115b9c3ddb77fed355eba21bee4fb1ad",
    "unet/diffusion_pytorch_model.safetensors": "420354088b72c0f172a3946e2dc765883ccf37d8d01c579a3ebc47d9cefa6133",
    "vae/diffusion_pytorch_model.safetensors": "4313784ba0d1ddd6cd62308b8eb93fd79d66df63518a73a7fa2d81c61fd33ace",
}


def load_embedded_pipeline(
    *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> StableDiffusionPipeline:
    """Load the embedded text-to-image pipeline: 64 x 64 px, offline, 20 MB.

    A stock `StableDiffusionPipeline` (CLIPTextModel, UNet2DConditionModel, AutoencoderTiny, DDIM with v-prediction),
    trained from scratch on 64 emoji in front of 8 background colors (`aigiqa_reward.toy.world` lists the words), for
    `num_inference_steps=20, guidance_scale=3`. `aigiqa_reward.toy.judge` measures its pictures.

    Example:
        >>> import torch
        >>> from aigiqa_reward import load_embedded_pipeline
        >>> pipe = load_embedded_pipeline()
        >>> generator = torch.Generator("cpu").manual_seed(0)
        >>> image = pipe("a red apple on a blue background", num_inference_steps=4, generator=generator).images[0]
        >>> image.size
        (64, 64)
    """
    from diffusers import StableDiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]

    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating-point type such as torch.float32, got {dtype!r}")
    for name, expected in _SHA256.items():  # diffusers only logs missing files
        read_checked(GENERATOR / name, expected_sha256=expected)
    with building(), quiet_libraries():  # diffusers warns of an AutoencoderTiny as a pipeline's `vae`, which works
        pipe = StableDiffusionPipeline.from_pretrained(GENERATOR, use_safetensors=True).to(device=device, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep diffusers and transformers from logging and showing progress bars."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    libraries: tuple[Any, ...] = (of_diffusers, of_transformers)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (verbosity, bars) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()
