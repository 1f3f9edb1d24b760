"""The only place where pixels change layout, range or size. Every operation on a tensor is differentiable.

Inside the library an image batch is `(B, 3, H, W)`, RGB, nominally [0, 1], floating point. Nothing here clamps,
rounds or leaves the device, except `load` (files and PIL in) and `to_pil` (PIL out).
"""

from aigiqa_reward.images.layout import (
    HIGHEST,
    LOWEST,
    MIN_SIDE,
    ImageError,
    check,
    finite_rows,
    from_bhwc,
    from_vae,
    to_bhwc,
    to_pil,
    to_vae,
)
from aigiqa_reward.images.loading import MAX_PIXELS, ImageSource, load, load_batch
from aigiqa_reward.images.resize import (
    enlarge_to,
    even_crops,
    even_offsets,
    letterbox,
    normalize,
    random_crops,
    reduce_to,
    resize,
    resize_to_area,
    unletterbox,
)

__all__ = [
    "HIGHEST",
    "LOWEST",
    "MAX_PIXELS",
    "MIN_SIDE",
    "ImageError",
    "ImageSource",
    "check",
    "enlarge_to",
    "even_crops",
    "even_offsets",
    "finite_rows",
    "from_bhwc",
    "from_vae",
    "letterbox",
    "load",
    "load_batch",
    "normalize",
    "random_crops",
    "reduce_to",
    "resize",
    "resize_to_area",
    "to_bhwc",
    "to_pil",
    "to_vae",
    "unletterbox",
]
