"""What calls of any diffusers pipeline have in common, when each image is to come from a seed of its own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from aigiqa_reward import images as pixels


def takes(pipe: Any, argument: str) -> bool:
    """Whether a pipeline's call has an argument of this name."""
    try:
        return argument in inspect.signature(pipe).parameters
    except ValueError:  # a callable without a signature
        return False


def generators_of(seeds: Sequence[int]) -> Any:
    """What a pipeline takes as `generator=`: one on the CPU for each image; a single one stands alone."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return generators if len(generators) > 1 else generators[0]


def images_of(result: Any, count: int) -> tuple[Tensor, list[Any]]:
    """Images (B, 3, H, W) of a pipeline's output, and whether its safety checker flagged them.

    Raises:
        TypeError: the output holds no tensor of images.
        ValueError: not `count` of them.
    """
    images = getattr(result, "images", None)
    if not isinstance(images, Tensor):
        raise TypeError(
            "pipe: expected an output whose .images is a tensor, as output_type='pt' asks for, got "
            f"{type(result).__name__} with {type(images).__name__}; "
            "pass a diffusers pipeline that makes images"
        )
    pixels.check(images, validate=False, argument="the pipeline's images")
    if images.shape[0] != count:
        raise ValueError(
            f"pipe: expected {count} images for {count} generators, got {images.shape[0]}; "
            "pass a pipeline that makes one image for each"
        )
    return images, getattr(result, "nsfw_content_detected", None) or [False] * count


def check_pipe_kwargs(pipe_kwargs: Mapping[str, Any], owner: str, owned: Mapping[str, str]) -> None:
    """Refuse arguments of a pipeline that its caller sets, and embeddings of several prompts.

    Args:
        pipe_kwargs: what a user passes on to the pipeline.
        owner: who calls it, for errors.
        owned: the arguments that it sets itself, and what to do instead.
    """
    for name, value in pipe_kwargs.items():
        if name in owned:
            raise ValueError(f"{name}: {owner} sets this argument of the pipeline itself; {owned[name]}")
        if name.endswith("prompt_embeds") and isinstance(value, Tensor) and value.shape[0] != 1:
            raise ValueError(
                f"{name}: expected embeddings of one prompt, (1, ...), got shape {tuple(value.shape)}; "
                "pass one prompt per call: loop"
            )
