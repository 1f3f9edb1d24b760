"""The embedded generator: a Stable Diffusion pipeline small enough to travel with the package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from aigiqa_reward.weights import ASSETS

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]

GENERATOR = ASSETS / "generator"
"""The pipeline's folder; a plain `StableDiffusionPipeline.from_pretrained` loads it too."""


def load_embedded_pipeline(
    *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> StableDiffusionPipeline:
    """Load the embedded text-to-image pipeline: 64 x 64 px, offline, 20 MB.

    A stock `StableDiffusionPipeline` (CLIPTextModel, UNet2DConditionModel, AutoencoderTiny, DDIM with v-prediction),
    trained from nothing on 64 emoji in front of 8 background colours. It knows prompts such as "a red apple on a blue
    background" (`aigiqa_reward.embedded.world` lists the words) and is made for `num_inference_steps=20,
    guidance_scale=3`; the pipeline's own defaults are Stable Diffusion's. Its pictures are for trying things out and
    for tests, where a judge knows what is right (`aigiqa_reward.embedded.judge`).

    Args:
        device: where to put it.
        dtype: of its parts; the files hold float16.

    Returns:
        A new pipeline, with its progress bar off.

    Raises:
        FileNotFoundError: the package was installed without its assets.
        TypeError: `dtype` is not a floating-point type.
    """
    from diffusers import StableDiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]

    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating-point type such as torch.float32, got {dtype!r}")
    if not (GENERATOR / "model_index.json").is_file():
        raise FileNotFoundError(f"no embedded pipeline in {GENERATOR}; install aigiqa-reward again")
    with quiet_libraries():  # diffusers warns of an AutoencoderTiny as a pipeline's `vae`, which works
        pipe = StableDiffusionPipeline.from_pretrained(GENERATOR, use_safetensors=True).to(device=device, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep diffusers and transformers from logging and showing bars, until it ends."""
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
