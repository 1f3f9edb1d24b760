"""One adapter per architecture, selected by the pipeline's class.

An adapter splits diffusers' text-to-image pipeline into encoding prompts, drawing noise, predicting, and decoding with
gradients; `sampling.rollout` puts the parts together. Best of N without pruning needs none of this.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from aigiqa_reward.sampling.families.base import Conditioning, Family, SamplingOptions
from aigiqa_reward.sampling.families.flux import Flux
from aigiqa_reward.sampling.families.flux_2 import Flux2, Flux2Klein
from aigiqa_reward.sampling.families.qwen_image import QwenImage
from aigiqa_reward.sampling.families.sana import PixArt, Sana
from aigiqa_reward.sampling.families.stable_diffusion import StableDiffusion, StableDiffusionXL
from aigiqa_reward.sampling.families.stable_diffusion_3 import StableDiffusion3
from aigiqa_reward.sampling.families.z_image import ZImage
from aigiqa_reward.sampling.pipeline_utils import diffusers_class

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

__all__ = ["FAMILIES", "Conditioning", "Family", "SamplingOptions", "family_of", "find_family"]

FAMILIES: tuple[type[Family], ...] = (
    *(StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux, Flux2, Flux2Klein),
    *(QwenImage, ZImage, Sana, PixArt),
)
"""Every architecture that our own loop runs."""


def find_family(pipe: object) -> type[Family] | None:
    """Return the adapter of a pipeline's class, or of the class whose `__call__` it inherits; None for any other."""
    name = diffusers_class(pipe)
    return next((family for family in FAMILIES if name in family.pipelines), None)


def family_of(pipe: DiffusionPipeline, pipe_kwargs: Mapping[str, Any] | None = None, *, need: str = "this") -> Family:
    """Return the adapter of a pipeline for calls `pipe(prompt, **pipe_kwargs)`; `need` names the caller in errors."""
    found = find_family(pipe)
    if found is None:
        names = ", ".join(name for family in FAMILIES for name in family.pipelines)
        raise TypeError(
            f"pipe: {need} runs a pipeline's parts itself and supports {names}; got {type(pipe).__name__}. "
            "Plain BestOfN (pruning=None, search='random') works with any pipeline"
        )
    return found(pipe, SamplingOptions.of(pipe, pipe_kwargs or {}))
