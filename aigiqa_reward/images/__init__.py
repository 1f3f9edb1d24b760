"""The only place where pixels change layout, range or size; every operation on a tensor is differentiable.

An image batch is `(B, 3, H, W)`, RGB, nominally in [0, 1], floating point. Nothing here clamps, rounds or leaves the
device, except `load` (files and PIL in) and `to_pil` (PIL out).

Example:
    >>> import torch
    >>> from aigiqa_reward import images
    >>> batch = images.from_vae(2 * torch.rand(2, 3, 96, 64) - 1)  # the inverse of to_vae
    >>> torch.allclose(images.from_vae(images.to_vae(batch)), batch), bool(images.finite_rows(batch).all())
    (True, True)
    >>> images.to_bhwc(batch).shape, torch.equal(images.from_bhwc(images.to_bhwc(batch)), batch)
    (torch.Size([2, 96, 64, 3]), True)
    >>> images.to_pil(batch)[0].size
    (64, 96)
    >>> images.resize(batch, (48, 32)).shape, images.reduce_to(batch, 32).shape
    (torch.Size([2, 3, 48, 32]), torch.Size([2, 3, 48, 32]))
    >>> images.resize_to_area(batch, 32 * 32, least=16).shape
    torch.Size([2, 3, 39, 26])
    >>> images.center_crop(batch, 32).shape
    torch.Size([2, 3, 32, 32])
    >>> square = images.letterbox(batch, 96, fill=torch.zeros(3))
    >>> square.shape, images.unletterbox(square, (96, 64)).shape
    (torch.Size([2, 3, 96, 96]), torch.Size([2, 3, 96, 64]))
    >>> images.even_offsets(96, 64, side=48, count=4)
    [(0, 0), (0, 16), (48, 0), (48, 16)]
    >>> images.even_crops(batch, 48, 4).shape
    torch.Size([2, 4, 3, 48, 48])
    >>> images.random_crops(batch, 48, 5, generator=torch.Generator().manual_seed(0)).shape
    torch.Size([2, 5, 3, 48, 48])
    >>> images.normalize(torch.full((1, 3, 16, 16), 0.75), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))[0, :, 0, 0]
    tensor([1., 1., 1.])
"""

# fmt: off
# isort: off
from aigiqa_reward.images.layout import (
    HIGHEST, LOWEST, MIN_SIDE, ImageError, check, finite_rows, from_bhwc, from_vae, to_bhwc, to_pil, to_vae,
)
from aigiqa_reward.images.loading import MAX_PIXELS, ImageSource, decode, load, load_batch
from aigiqa_reward.images.metadata import Prompt, PromptSource, read_prompt
from aigiqa_reward.images.resize import (
    center_crop, even_crops, even_offsets, letterbox, normalize, random_crops, reduce_to, resize, resize_to_area,
    unletterbox,
)

__all__ = [
    "HIGHEST", "LOWEST", "MAX_PIXELS", "MIN_SIDE", "ImageError", "ImageSource", "Prompt", "PromptSource",
    "center_crop", "check", "decode", "even_crops", "even_offsets", "finite_rows", "from_bhwc", "from_vae", "letterbox",
    "load", "load_batch", "normalize", "random_crops", "read_prompt", "reduce_to", "resize", "resize_to_area",
    "to_bhwc", "to_pil", "to_vae", "unletterbox",
]
