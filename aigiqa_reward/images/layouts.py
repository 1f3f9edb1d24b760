"""Channel order and range: VAE decoders, channels-last hosts, PIL."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


def from_vae(decoded: Tensor) -> Tensor:
    """A decoder's [-1, 1] to [0, 1], without clamping, so that gradients pass everywhere."""
    return decoded / 2 + 0.5


def to_vae(images: Tensor) -> Tensor:
    """[0, 1] to a VAE encoder's [-1, 1]."""
    return images * 2 - 1


def from_bhwc(images: Tensor) -> Tensor:
    """Channels-last (B, H, W, 3), as ComfyUI's IMAGE, to (B, 3, H, W)."""
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images: expected (B, H, W, 3), got shape {tuple(images.shape)}")
    return images.permute(0, 3, 1, 2)


def to_bhwc(images: Tensor) -> Tensor:
    """(B, 3, H, W) to channels-last (B, H, W, 3)."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images: expected (B, 3, H, W), got shape {tuple(images.shape)}")
    return images.permute(0, 2, 3, 1)


def to_pil(images: Float[Tensor, "batch 3 height width"]) -> list[Image]:
    """A batch as PIL images, clamped and rounded to 8 bits as diffusers does."""
    from PIL import Image as PILImage

    pixels = (images.detach().float().clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return [PILImage.fromarray(image.numpy()) for image in pixels.permute(0, 2, 3, 1).contiguous()]
