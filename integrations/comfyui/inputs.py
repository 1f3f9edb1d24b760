"""ComfyUI's inputs: batches and lists of images, prompts that may be empty, sockets that nodes share."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

REWARD = ("AIGIQA_REWARD", {"tooltip": "From Load Reward (AIGIQA)."})

PROMPT = (
    "STRING",
    {
        "multiline": True,
        "default": "",
        "dynamicPrompts": False,  # {a|b} drawn here would differ from what was drawn for the sampler
        "tooltip": "The text the images were made from: connect the sampler's string. Empty: quality alone counts.",
    },
)


def in_comfyui(message: str) -> str:
    """Replace the package's advice on pixel values by what a user of ComfyUI can do."""
    advice = "; an IMAGE holds values in [0, 1]: scale or clamp them before this node, or decode with VAE Decode"
    message = re.sub(r"(expected values in \[0, 1\], got \[[^]]*\]); [^;]*", rf"\1{advice}", message)
    return message.replace("decode in float32 or bfloat16", "start ComfyUI with --fp32-vae or --bf16-vae")


@contextmanager
def logged_warnings() -> Iterator[None]:
    """Log warnings to ComfyUI's console in every run; Python would show them once per session."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        finally:
            for message in dict.fromkeys(str(warning.message) for warning in caught):
                logging.warning("AIGIQA: %s", in_comfyui(message))


def image_rows(images: Sequence[Any]) -> list[Tensor]:
    """Split IMAGE batches into single images (H, W, C)."""
    rows: list[Tensor] = []
    for batch in images:
        if not isinstance(batch, Tensor) or not batch.is_floating_point():
            kind = batch.dtype if isinstance(batch, Tensor) else type(batch).__name__
            raise TypeError(f"images: expected an IMAGE, a float tensor (B, H, W, 3), got {kind}; decode latents first")
        if batch.ndim != 4 or batch.shape[-1] not in (3, 4):
            raise ValueError(f"images: expected an IMAGE (B, H, W, 3), got shape {tuple(batch.shape)}")
        rows.extend(batch)
    if not rows:
        raise ValueError("images: expected at least one image, got none; check the input of this node")
    return rows


def image_batches(rows: Sequence[Tensor]) -> list[Tensor]:
    """Join images into one batch if their sizes agree, else into a list of batches of one."""
    if len({row.shape for row in rows}) == 1:
        return [torch.stack(list(rows))]
    return [row[None] for row in rows]


def prompt_or_none(prompt: Any) -> str | None:
    """Return a text, or None for an empty one."""
    if prompt is not None and not isinstance(prompt, str):
        raise TypeError(f"prompt: expected a text, got {type(prompt).__name__}; connect a STRING")
    return prompt if prompt and prompt.strip() else None


def grouped(images: Sequence[Any], prompts: Sequence[Any]) -> list[tuple[list[Tensor], str | None]]:
    """Group the images that compete: all of them under one prompt, or each batch under its own prompt."""
    if len(prompts) == 1:
        return [(image_rows(images), prompt_or_none(prompts[0]))]
    if len(prompts) == len(images):
        return [(image_rows([batch]), prompt_or_none(text)) for batch, text in zip(images, prompts, strict=True)]
    raise ValueError(
        f"prompt: expected one, or one for each of the {len(images)} image batches, got {len(prompts)} prompts"
    )


def only(name: str, values: Sequence[Any]) -> Any:
    """Return the value of an input that a node takes once."""
    if len(values) != 1:
        raise ValueError(f"{name}: expected one value, got a list of {len(values)}; connect a single one")
    return values[0]
