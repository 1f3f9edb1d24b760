"""The only place where pixels change layout, range or size. Every operation on a tensor is differentiable.

Inside the library an image batch is `(B, 3, H, W)`, RGB, nominally [0, 1], floating point. Nothing here clamps,
rounds or leaves the device, except `load` (files and PIL in) and `to_pil` (PIL out).
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from aigiqa_reward.types import Images

if TYPE_CHECKING:
    from PIL.Image import Image

ImageSource: TypeAlias = "Image | str | os.PathLike[str] | np.ndarray | Tensor"

Resized: TypeAlias = Float[Tensor, "batch 3 new_height new_width"]
"""`Images` of another size."""

MIN_SIDE = 16
"""Smallest accepted side in pixels: chosen here because below it every tower would judge interpolation, not content."""

MAX_PIXELS = 100_000_000
"""Largest file decoded: chosen here, above any generator's output and 1.2 GB as float32; guards against bombs."""

LOWEST, HIGHEST = -0.5, 1.5
"""Accepted values: [0, 1] with room for a decoder's small overshoot, which passes unclamped."""


class ImageError(ValueError):
    """An image that cannot be read or used; the message says which, why, and what to do."""


# --------------------------------------------------------------------------------------------- checks


def check(images: Tensor, *, validate: bool = True, argument: str = "images") -> Tensor:
    """Return `images` unchanged if it is a batch this library accepts.

    Args:
        images: expected (B, 3, H, W), floating, values in [-0.5, 1.5], sides of at least 16 px.
        validate: also look at the values; costs one device synchronisation per call.
        argument: the name to use in errors.

    Raises:
        TypeError: not a tensor, or not a floating-point one.
        ValueError: wrong rank, channels, size, range, or NaN/inf values.
    """
    if not isinstance(images, Tensor):
        raise TypeError(
            f"{argument}: expected a float tensor (B, 3, H, W) in [0, 1], got {type(images).__name__}; "
            "Scorer takes PIL images, paths and arrays"
        )
    shape = tuple(images.shape)
    if images.ndim != 4:
        hint = "; add a batch dimension with images[None]" if images.ndim == 3 else ""
        raise ValueError(f"{argument}: expected 4 dimensions (B, 3, H, W), got shape {shape}{hint}")
    if shape[1] != 3:
        if shape[-1] == 3:
            hint = "; channels-last tensors (ComfyUI, numpy) convert with images.from_bhwc"
        elif shape[1] == 4:
            hint = "; a VAE latent must be decoded first, and RGBA needs its alpha removed (images[:, :3])"
        else:
            hint = "; repeat a grey channel with images.expand(-1, 3, -1, -1)" if shape[1] == 1 else ""
        raise ValueError(f"{argument}: expected 3 channels (B, 3, H, W), got shape {shape}{hint}")
    if not images.is_floating_point():
        raise TypeError(
            f"{argument}: expected a floating-point tensor in [0, 1], got {images.dtype}; "
            "divide by 255 (images.float() / 255) for 8-bit values"
        )
    if shape[0] == 0:
        raise ValueError(f"{argument}: expected at least one image, got shape {shape}")
    if min(shape[2:]) < MIN_SIDE:
        raise ValueError(
            f"{argument}: expected sides of at least {MIN_SIDE} px, got {shape[3]} x {shape[2]} (width x height)"
        )
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
        raise ValueError(
            f"{argument}: NaN or infinite values in image(s) {bad}; expected finite values in [0, 1]. "
            "A half-precision VAE overflows easily: decode in float32 or bfloat16"
        )
    remedy = "pass the pixels from before any normalisation by a mean and a deviation"
    if float(low) >= LOWEST:
        remedy = "divide 8-bit values by 255"
    elif float(low) >= -1.5 and float(high) <= HIGHEST:
        remedy = "a decoder's [-1, 1] output converts with aigiqa_reward.images.from_vae"
    raise ValueError(
        f"{argument}: expected values in [0, 1], got [{float(low):.3g}, {float(high):.3g}]; {remedy} "
        "(validate=False skips this check)"
    )


# --------------------------------------------------------------------------------------------- layouts and ranges


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


# --------------------------------------------------------------------------------------------- loading


def load(source: ImageSource) -> Float[Tensor, "3 height width"]:
    """Read one image into a float32 tensor (3, H, W), RGB, [0, 1].

    Args:
        source: a PIL image; a path; a uint8/uint16 or [0, 1] float array (H, W), (H, W, 1|3|4) or (3, H, W);
            or a tensor of those layouts. EXIF rotation is applied, alpha is composited on white, greyscale is
            repeated, CMYK and palettes are converted, 16 bits keep their precision where Pillow does, and of an
            animation the first frame is taken with a warning.

    Raises:
        ImageError: unreadable, truncated, empty, too large, smaller than 16 px, or out of range.
        TypeError: `source` is of another type.
    """
    if isinstance(source, Tensor | np.ndarray):
        image = _from_array(source)
    elif isinstance(source, str | os.PathLike):
        image = _from_file(source)
    elif hasattr(source, "convert") and hasattr(source, "getbands"):
        with _reading("image"):  # Pillow decodes late: an opened file may still turn out to be truncated
            image = _from_pil(source)
    else:
        raise TypeError(f"source: expected a PIL image, a path, an array or a tensor, got {type(source).__name__}")
    try:
        check(image[None], argument="image")
    except (TypeError, ValueError) as error:
        name = f"{os.fspath(source)}: " if isinstance(source, str | os.PathLike) else ""
        raise ImageError(f"{name}{error}") from error
    return image


def _from_file(path: str | os.PathLike[str]) -> Tensor:
    from PIL import Image as PILImage

    text = os.fspath(path)
    if text.startswith(("http://", "https://")):
        raise ImageError(f"{text}: addresses are not fetched; download the image and pass its path")
    file = Path(text)
    with _reading(text), warnings.catch_warnings():
        if not file.exists():
            raise ImageError(f"{text}: no such file")
        if file.is_dir():
            raise ImageError(f"{text}: is a folder; pass the images in it")
        if file.stat().st_size == 0:
            raise ImageError(f"{text}: the file is empty")
        warnings.simplefilter("ignore", PILImage.DecompressionBombWarning)  # our own, lower limit follows
        with PILImage.open(file) as image:
            return _from_pil(image, name=text)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn what Pillow and the file system raise into an ImageError that names the image."""
    from PIL import Image as PILImage

    try:
        yield
    except ImageError:
        raise
    except PILImage.DecompressionBombError as error:
        raise ImageError(f"{name}: {_too_large()} ({error})") from error
    except PILImage.UnidentifiedImageError as error:
        raise ImageError(f"{name}: not an image file that Pillow can read") from error
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError) as error:
        raise ImageError(f"{name}: cannot be read, it may be damaged or truncated ({error})") from error


def _too_large() -> str:
    return f"more than {MAX_PIXELS:,} pixels; scale it down first"


def _from_pil(image: Any, *, name: str = "image") -> Tensor:
    from PIL import Image as PILImage
    from PIL import ImageOps

    width, height = image.size
    if width * height > MAX_PIXELS:  # before any pixel is decoded
        raise ImageError(f"{name}: {width} x {height} px is {_too_large()}")
    if getattr(image, "n_frames", 1) > 1:
        warnings.warn(f"{name}: animated image; the first of {image.n_frames} frames is scored", stacklevel=4)
        image.seek(0)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode == "I":  # 16-bit greyscale: keep its precision
        grey = torch.from_numpy(np.asarray(image).astype(np.float32) / 65535)
        return grey.expand(3, -1, -1).contiguous()
    if image.mode == "F":
        return torch.from_numpy(np.array(image, dtype=np.float32)).expand(3, -1, -1).contiguous()
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = PILImage.alpha_composite(PILImage.new("RGBA", rgba.size, "white"), rgba)
    pixels = np.array(image.convert("RGB"), dtype=np.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


_INTEGER_RANGE = {torch.uint8: 255.0, torch.uint16: 65535.0}


def _from_array(source: np.ndarray | Tensor) -> Tensor:
    channels_first = isinstance(source, Tensor)
    if isinstance(source, np.ndarray):
        try:
            # a copy in this machine's byte order, because PIL's arrays are read-only and torch shares memory
            source = torch.from_numpy(np.array(source, dtype=source.dtype.newbyteorder("="), order="C"))
        except TypeError as error:
            raise ImageError(f"array: expected numbers, got dtype {source.dtype}") from error
    image = source.detach().cpu()
    if image.dtype in _INTEGER_RANGE:
        image = image.float() / _INTEGER_RANGE[image.dtype]
    elif not image.is_floating_point():
        raise ImageError(f"array: expected uint8, uint16 or floats in [0, 1], got {image.dtype}")
    image = _channels_first(image.float(), prefer_first=channels_first)
    if image.shape[0] == 4:
        image = image[:3] * image[3:] + (1 - image[3:])
    return image.expand(3, -1, -1).contiguous()


def _channels_first(image: Tensor, *, prefer_first: bool) -> Tensor:
    """(H, W), (C, H, W) or (H, W, C) to (C, H, W); a tensor's first and an array's last axis are tried first."""
    if image.ndim == 2:
        return image[None]
    if image.ndim == 3:
        for axis in (0, 2) if prefer_first else (2, 0):
            if image.shape[axis] in (1, 3, 4):
                return image.movedim(axis, 0)
    raise ImageError(
        f"array: expected (H, W), (H, W, C) or (C, H, W) with C of 1, 3 or 4, got shape {tuple(image.shape)}"
    )


# --------------------------------------------------------------------------------------------- sizes


def resize(images: Images, size: tuple[int, int]) -> Resized:
    """Antialiased bicubic to `size` = (height, width): Pillow's BICUBIC, but differentiable, unclamped and unrounded.

    It equals Pillow's on float images; on 8-bit ones Pillow also rounds and clips between its two passes, which
    moves single pixels beside saturated edges by more than 1/255. Half precision is interpolated, and returned, as
    float32.
    """
    if images.dtype in (torch.float16, torch.bfloat16):
        images = images.float()
    if tuple(images.shape[2:]) == size:
        return images
    return F.interpolate(images, size=size, mode="bicubic", align_corners=False, antialias=True)


def resize_to_area(images: Images, area: int, *, least: int) -> Resized:
    """Scale to about `area` pixels, keeping the aspect ratio; no side falls below `least` px."""
    height, width = images.shape[2:]
    scale = math.sqrt(area / (height * width))
    return resize(images, (max(least, round(height * scale)), max(least, round(width * scale))))


def enlarge_to(images: Images, short_side: int) -> Resized:
    """Bring the short side up to `short_side` px, keeping the aspect ratio; larger images pass unchanged."""
    height, width = images.shape[2:]
    if min(height, width) >= short_side:
        return images
    scale = short_side / min(height, width)
    return resize(images, (max(short_side, round(height * scale)), max(short_side, round(width * scale))))


def letterbox(images: Images, side: int, *, fill: Float[Tensor, " 3"]) -> Float[Tensor, "batch 3 side side"]:
    """The whole image inside a `side` x `side` square: aspect kept, centred, the rest filled with the colour `fill`."""
    height, width = images.shape[2:]
    scale = side / max(height, width)
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    small = resize(images, (new_height, new_width))
    if new_height == side and new_width == side:
        return small
    top, left = (side - new_height) // 2, (side - new_width) // 2
    colour = fill.to(small).view(1, 3, 1, 1)
    padding = (left, side - new_width - left, top, side - new_height - top)
    return F.pad(small - colour, padding) + colour


def normalise(images: Images, mean: Sequence[float], std: Sequence[float]) -> Images:
    """Subtract the channel means and divide by the channel deviations of a tower's pretraining."""
    return (images - images.new_tensor(mean).view(1, 3, 1, 1)) / images.new_tensor(std).view(1, 3, 1, 1)


# --------------------------------------------------------------------------------------------- crops


def even_crops(images: Images, side: int, count: int) -> Float[Tensor, "batch count 3 side side"]:
    """`count` square crops of `side` px at native resolution, evenly spaced over the image, border to border.

    The crops lie on a grid whose rows and columns follow the aspect ratio; if the grid has more places than
    `count`, evenly spaced ones of them in reading order are taken. An image with a side below `side` is cropped to
    squares of its short side, which are then enlarged.
    """
    height, width = images.shape[2:]
    return _crops(images, side, even_offsets(height, width, min(side, height, width), count))


def random_crops(
    images: Images, side: int, count: int, *, generator: torch.Generator
) -> Float[Tensor, "batch count 3 side side"]:
    """`count` square crops of `side` px at native resolution, at places drawn from `generator`, one set for all."""
    height, width = images.shape[2:]
    native = min(side, height, width)
    tops = torch.randint(height - native + 1, (count,), generator=generator).tolist()
    lefts = torch.randint(width - native + 1, (count,), generator=generator).tolist()
    return _crops(images, side, list(zip(tops, lefts, strict=True)))


def even_offsets(height: int, width: int, side: int, count: int) -> list[tuple[int, int]]:
    """Top left corners (top, left) of `count` evenly spaced squares of `side` px in a height x width image."""
    rows = min(count, max(1, round(math.sqrt(count * height / width))))
    columns = math.ceil(count / rows)
    tops = [round(step * (height - side)) for step in _evenly(rows)]
    lefts = [round(step * (width - side)) for step in _evenly(columns)]
    grid = [(top, left) for top in tops for left in lefts]
    return [grid[round(step * (len(grid) - 1))] for step in _evenly(count)]


def _evenly(count: int) -> list[float]:
    return [0.5] if count == 1 else [step / (count - 1) for step in range(count)]


def _crops(images: Tensor, side: int, offsets: list[tuple[int, int]]) -> Tensor:
    native = min(side, *images.shape[2:])
    crops = torch.stack([images[:, :, t : t + native, le : le + native] for t, le in offsets], dim=1)
    if native == side:
        return crops
    return resize(crops.flatten(0, 1), (side, side)).unflatten(0, crops.shape[:2])
