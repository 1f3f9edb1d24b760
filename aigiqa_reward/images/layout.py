"""Channel order and range: VAE decoders, channels-last hosts, PIL."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


MIN_SIDE = 16
"""Smallest accepted side in px: below it, a tower would see interpolation instead of content."""

LOWEST, HIGHEST = -0.5, 1.5
"""Accepted values: [0, 1] with room for a decoder's overshoot, which passes unclamped."""


class ImageError(ValueError):
    """An image that cannot be read or used.

    Example:
        >>> from aigiqa_reward import images
        >>> try:
        ...     images.load("missing.png")
        ... except images.ImageError as error:
        ...     print("left out:", error)
        left out: missing.png: no such file
    """


def check(images: Tensor, *, validate: bool = True, argument: str = "images") -> Tensor:
    """Return `images` unchanged if they are a floating-point batch (B, 3, H, W) with sides of at least 16 px.

    With `validate`, values must lie in [-0.5, 1.5], which costs one device synchronization. `argument` is the name in
    errors.

    Example:
        >>> import torch
        >>> from aigiqa_reward import images
        >>> images.check(torch.rand(2, 3, 64, 48)).shape
        torch.Size([2, 3, 64, 48])
        >>> images.check(torch.rand(2, 64, 48, 3))
        Traceback (most recent call last):
            ...
        ValueError: images: expected 3 channels (B, 3, H, W), got shape (2, 64, 48, 3); ...
        >>> images.LOWEST, images.HIGHEST, images.MIN_SIDE
        (-0.5, 1.5, 16)
    """
    if not isinstance(images, Tensor):
        kind = type(images).__name__
        raise TypeError(f"{argument}: expected a tensor (B, 3, H, W), got {kind}; Scorer takes images and paths")
    shape = tuple(images.shape)
    if images.ndim != 4:
        hint = "; add a batch dimension with images[None]" if images.ndim == 3 else ""
        raise ValueError(f"{argument}: expected 4 dimensions (B, 3, H, W), got shape {shape}{hint}")
    if shape[1] != 3:
        hints = {
            1: "; repeat a gray channel with images.expand(-1, 3, -1, -1)",
            4: "; a VAE latent must be decoded first, and RGBA needs its alpha removed (images[:, :3])",
        }
        hint = "; channels-last tensors convert with images.from_bhwc" if shape[-1] == 3 else hints.get(shape[1], "")
        raise ValueError(f"{argument}: expected 3 channels (B, 3, H, W), got shape {shape}{hint}")
    if not images.is_floating_point():
        raise TypeError(f"{argument}: expected a floating-point tensor, got {images.dtype}; divide 8-bit values by 255")
    if shape[0] == 0:
        raise ValueError(f"{argument}: expected at least one image, got shape {shape}")
    if min(shape[2:]) < MIN_SIDE:
        raise ValueError(f"{argument}: expected sides of at least {MIN_SIDE} px, got {shape[3]} x {shape[2]}")
    if validate:
        _check_values(images.detach(), argument)
    return images


def _check_values(images: Tensor, argument: str) -> None:
    low, high = torch.aminmax(images)  # NaN propagates through both, so one comparison covers it
    if bool((low >= LOWEST) & (high <= HIGHEST)):
        return
    finite = torch.isfinite(images)
    if not bool(finite.all()):
        bad = torch.nonzero(~finite.flatten(1).all(dim=1)).flatten().tolist()
        raise ValueError(f"{argument}: NaN or infinite values in image(s) {bad}; decode in float32 or bfloat16")
    remedy = "pass pixels that are not normalized by mean and std"
    if float(low) >= LOWEST:
        remedy = "divide 8-bit values by 255"
    elif float(low) >= -1.5 and float(high) <= HIGHEST:
        remedy = "a decoder's [-1, 1] output converts with aigiqa_reward.images.from_vae"
    raise ValueError(f"{argument}: expected values in [0, 1], got [{float(low):.3g}, {float(high):.3g}]; {remedy}")


def from_vae(decoded: Tensor) -> Tensor:
    """Map a decoder's [-1, 1] to [0, 1], without clamping, so that gradients pass everywhere."""
    return decoded / 2 + 0.5


def to_vae(images: Tensor) -> Tensor:
    """Map [0, 1] to a VAE encoder's [-1, 1]."""
    return images * 2 - 1


def from_bhwc(images: Tensor) -> Tensor:
    """Bring channels-last (B, H, W, 3), such as ComfyUI's IMAGE, to (B, 3, H, W)."""
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images: expected (B, H, W, 3), got shape {tuple(images.shape)}")
    return images.permute(0, 3, 1, 2)


def to_bhwc(images: Tensor) -> Tensor:
    """Bring (B, 3, H, W) to channels-last (B, H, W, 3)."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images: expected (B, 3, H, W), got shape {tuple(images.shape)}")
    return images.permute(0, 2, 3, 1)


def to_pil(images: Float[Tensor, "batch 3 height width"]) -> list[Image]:
    """Convert a batch to PIL images, clamped and rounded to 8 bits as diffusers does."""
    from PIL import Image as PILImage

    pixels = (images.detach().float().clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return [PILImage.fromarray(image.numpy()) for image in pixels.permute(0, 2, 3, 1).contiguous()]


def finite_rows(images: Tensor) -> Tensor:
    """Return (B,) booleans: whether all pixels of an image are finite."""
    return images.isfinite().flatten(1).all(dim=1)
