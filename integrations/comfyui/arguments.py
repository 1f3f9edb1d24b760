"""ComfyUI's inputs and outputs: batches and lists of images, prompts that may be empty, sockets that nodes share."""

from __future__ import annotations

import logging
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
        "tooltip": "What the images should show: the text that they were made from. Connect the same string. Empty: "
        "quality alone counts.",
    },
)


_REMEDIES = {
    "divide 8-bit values by 255 (validate=False skips this check)": "an IMAGE holds values in [0, 1]: scale or clamp "
    "them in the node that gives this image",
    "a decoder's [-1, 1] output converts with aigiqa_reward.images.from_vae (validate=False skips this check)": "an "
    "IMAGE holds values in [0, 1]: decode with VAE Decode, or scale them in the node that gives this image",
    "pass the pixels from before any normalization by a mean and a deviation (validate=False skips this check)": "an "
    "IMAGE holds values in [0, 1]: connect it from before the node that normalizes it",
    "decode in float32 or bfloat16": "start ComfyUI with --fp32-vae or --bf16-vae",
}
"""What the package tells a programmer to do, and what a user of ComfyUI can."""


def in_comfyui(message: str) -> str:
    """A message of the package, with remedies that ComfyUI has."""
    for remedy, here in _REMEDIES.items():
        message = message.replace(remedy, here)
    return message


@contextmanager
def logged_warnings() -> Iterator[None]:
    """What is warned of within goes to ComfyUI's console, once a run, where Python would show it once a session."""
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        finally:
            for message in dict.fromkeys(str(warning.message) for warning in noted):
                logging.warning("AIGIQA: %s", in_comfyui(message))


def image_rows(images: Sequence[Any]) -> list[Tensor]:
    """The single images (H, W, C) of IMAGE batches, one batch after the other.

    Raises:
        TypeError: not float tensors.
        ValueError: not (B, H, W, 3), or no images.
    """
    rows: list[Tensor] = []
    for batch in images:
        if not isinstance(batch, Tensor) or not batch.is_floating_point():
            kind = batch.dtype if isinstance(batch, Tensor) else type(batch).__name__
            raise TypeError(f"images: expected an IMAGE, a float tensor (B, H, W, 3), got {kind}; decode latents first")
        if batch.ndim != 4 or batch.shape[-1] not in (3, 4):
            raise ValueError(f"images: expected an IMAGE (B, H, W, 3), got shape {tuple(batch.shape)}")
        rows.extend(batch)
    if not rows:
        raise ValueError("images: expected at least one image, got none; check what feeds this node")
    return rows


def image_batches(rows: Sequence[Tensor]) -> list[Tensor]:
    """Images of one size as one batch; of several sizes, which no batch can hold, as a list of single ones."""
    if len({row.shape for row in rows}) == 1:
        return [torch.stack(list(rows))]
    return [row[None] for row in rows]


def prompt_or_none(prompt: Any) -> str | None:
    """A text, or None for an empty one.

    Raises:
        TypeError: not a text.
    """
    if prompt is None or (isinstance(prompt, str) and not prompt.strip()):
        return None
    if not isinstance(prompt, str):
        raise TypeError(f"prompt: expected a text, got {type(prompt).__name__}; connect a STRING")
    return prompt


def grouped(images: Sequence[Any], prompts: Sequence[Any]) -> list[tuple[list[Tensor], str | None]]:
    """Which images compete, and for which prompt.

    Args:
        images: the list of IMAGE batches that reached a node, usually one.
        prompts: the list of texts that reached it, usually one.

    Returns:
        With one prompt all images in one group; with as many prompts as batches one group a batch.

    Raises:
        ValueError: other numbers.
    """
    if len(prompts) == 1:
        return [(image_rows(images), prompt_or_none(prompts[0]))]
    if len(prompts) == len(images):
        return [(image_rows([batch]), prompt_or_none(text)) for batch, text in zip(images, prompts, strict=True)]
    raise ValueError(
        f"prompt: expected one, or one for each of the {len(images)} image batches, got {len(prompts)} prompts"
    )


def only(name: str, values: Sequence[Any]) -> Any:
    """The one value of an input that a node takes once.

    Raises:
        ValueError: several of them.
    """
    if len(values) != 1:
        raise ValueError(f"{name}: expected one value, got a list of {len(values)}; connect a single one")
    return values[0]
