"""Channel order and range: VAE decoders, channels-last hosts, PIL."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


def from_vae(decoded: Tensor) -> Tensor:
    """A decoder's [-1, 1] to [0, 1], without clamping, so that gradients pass everywhere.

    Example:
        >>> import torch
        >>> from aigiqa_reward import images
        >>> images.from_vae(torch.tensor([-1.0, 0.0, 1.0, 1.2]))
        tensor([0.0000, 0.5000, 1.0000, 1.1000])
    """
    return decoded / 2 + 0.5


def to_vae(images: Tensor) -> Tensor:
    """[0, 1] to a VAE encoder's [-1, 1].

    Example:
        >>> import torch
        >>> from aigiqa_reward import images
        >>> images.to_vae(torch.tensor([0.0, 0.5, 1.0]))
        tensor([-1.,  0.,  1.])
    """
    return images * 2 - 1


def from_bhwc(images: Tensor) -> Tensor:
    """Channels-last (B, H, W, 3), as ComfyUI's IMAGE, to (B, 3, H, W).

    Example:
        >>> import torch
        >>> from aigiqa_reward import images
        >>> images.from_bhwc(torch.rand(2, 64, 48, 3)).shape
        torch.Size([2, 3, 64, 48])
    """
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images: expected (B, H, W, 3), got shape {tuple(images.shape)}")
    return images.permute(0, 3, 1, 2)


def to_bhwc(images: Tensor) -> Tensor:
    """(B, 3, H, W) to channels-last (B, H, W, 3).

    Example:
        >>> import torch
        >>> from aigiqa_reward import images
        >>> images.to_bhwc(torch.rand(2, 3, 64, 48)).shape
        torch.Size([2, 64, 48, 3])
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images: expected (B, 3, H, W), got shape {tuple(images.shape)}")
    return images.permute(0, 2, 3, 1)


def to_pil(images: Float[Tensor, "batch 3 height width"]) -> list[Image]:
    """A batch as PIL images, clamped and rounded to 8 bits as diffusers does.

    Example:
        >>> import torch
        >>> from aigiqa_reward import images
        >>> [picture] = images.to_pil(torch.full((1, 3, 32, 48), 1.1))
        >>> picture.size, picture.getpixel((0, 0))
        ((48, 32), (255, 255, 255))
    """
    from PIL import Image as PILImage

    pixels = (images.detach().float().clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return [PILImage.fromarray(image.numpy()) for image in pixels.permute(0, 2, 3, 1).contiguous()]
