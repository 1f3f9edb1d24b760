"""Images from files, PIL, arrays and tensors."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from aigiqa_reward.images.layout import ImageError, check

if TYPE_CHECKING:
    from PIL.Image import Image

ImageSource: TypeAlias = "Image | str | os.PathLike[str] | np.ndarray | Tensor"
"""What `load` reads: a PIL image, a path, an array or a tensor."""

MAX_PIXELS = 100_000_000
"""Largest image decoded, 1.2 GB as float32: a guard against decompression bombs."""


def load(source: ImageSource) -> Float[Tensor, "3 height width"]:
    """Read one image into a float32 tensor (3, H, W), RGB, [0, 1].

    EXIF rotation is applied, alpha is composited on white, grayscale is repeated, CMYK and palettes are converted,
    16 bits keep their precision where Pillow does, and of an animation the first frame is taken with a warning.

    Args:
        source: a PIL image, a path, or a uint8, uint16 or [0, 1] float array or tensor (H, W), (H, W, 1|3|4) or
            (1|3|4, H, W).

    Raises:
        ImageError: unreadable, truncated, empty, too large, smaller than 16 px, or out of range.

    Example:
        >>> from PIL import Image
        >>> from aigiqa_reward import images
        >>> Image.new("RGB", (48, 32), "red").save("red.png")
        >>> source: images.ImageSource = "red.png"
        >>> red = images.load(source)
        >>> red.shape, red[:, 0, 0]
        (torch.Size([3, 32, 48]), tensor([1., 0., 0.]))
        >>> red.numel() // 3 <= images.MAX_PIXELS  # larger files are refused before they are decoded
        True
    """
    if isinstance(source, Tensor | np.ndarray):
        image = _from_array(source)
    elif isinstance(source, str | os.PathLike):
        with _opened(source) as opened:
            image = _from_pil(opened, name=os.fsdecode(source))
    elif hasattr(source, "convert") and hasattr(source, "getbands"):
        with _reading("image"):  # Pillow decodes late: an opened file may still turn out to be truncated
            image = _from_pil(source, name="image")
    else:
        raise TypeError(f"source: expected a PIL image, a path, an array or a tensor, got {type(source).__name__}")
    try:
        check(image[None], argument="image")
    except (TypeError, ValueError) as error:
        name = f"{os.fsdecode(source)}: " if isinstance(source, str | os.PathLike) else ""
        raise ImageError(f"{name}{error}") from error
    return image


def load_batch(sources: Sequence[ImageSource] | np.ndarray | Tensor) -> Float[Tensor, "batch 3 height width"]:
    """Read images of one size into a batch (B, 3, H, W), RGB, [0, 1].

    Args:
        sources: a floating-point tensor (B, 3, H, W), which is returned as it is, with its graph and on its device; or
            an integer tensor (B, 3, H, W), an array (B, H, W, 3), or a list of what `load` takes.

    Example:
        >>> import numpy as np
        >>> from aigiqa_reward.images import load_batch
        >>> batch = load_batch(np.full((2, 32, 48, 3), 255, dtype=np.uint8))
        >>> batch.shape, float(batch.max())
        (torch.Size([2, 3, 32, 48]), 1.0)
    """
    if isinstance(sources, Tensor) and sources.is_floating_point():
        return check(sources, validate=False)
    if not isinstance(sources, list | tuple | np.ndarray | Tensor):
        raise TypeError(f"images: expected a tensor, an array or a list of images, got {type(sources).__name__}")
    if isinstance(sources, np.ndarray | Tensor) and sources.ndim != 4:
        shape = tuple(sources.shape)
        raise ValueError(f"images: expected a batch of 4 dimensions, got shape {shape}; put single images in a list")
    if len(sources) == 0:
        raise ValueError("images: expected at least one image, got none")
    loaded = []
    for position, source in enumerate(sources):
        try:
            loaded.append(load(source))
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ImageError
            raise kind(f"images[{position}]: {error}") from error
    if len({image.shape for image in loaded}) > 1:
        sizes = ", ".join(sorted({f"{image.shape[2]} x {image.shape[1]}" for image in loaded}))
        raise ImageError(f"images: expected all of one size, got {sizes} px; Scorer takes mixed sizes")
    return torch.stack(loaded)


def open_rgb(path: str | os.PathLike[str]) -> Image:
    """Read a file as a PIL image in RGB, without any other conversion."""
    with _opened(path) as image:
        return image.convert("RGB")


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Image]:
    """Open a file without decoding it; every error inside becomes an ImageError that names the file."""
    from PIL import Image as PILImage

    name = os.fsdecode(path)
    file = Path(name)
    with _reading(name), warnings.catch_warnings():
        if not name:
            raise ImageError("image: expected a path, got an empty text")
        if not file.exists():
            raise ImageError(f"{name}: no such file{'; download addresses first' * ('://' in name)}")
        if not file.is_file():
            raise ImageError(f"{name}: is a folder, a pipe or a device; pass a file")
        if file.stat().st_size == 0:
            raise ImageError(f"{name}: the file is empty")
        warnings.simplefilter("ignore", PILImage.DecompressionBombWarning)  # our own, lower limit follows
        with PILImage.open(file) as image:
            _check_size(image, name)
            yield image


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn what Pillow and the file system raise into an ImageError that names the image."""
    from PIL import Image as PILImage

    try:
        yield
    except ImageError:
        raise
    except PILImage.DecompressionBombError as error:
        raise ImageError(f"{name}: {_TOO_LARGE} ({error})") from error
    except PILImage.UnidentifiedImageError as error:
        raise ImageError(f"{name}: not an image file that Pillow can read") from error
    except Exception as error:  # Pillow lets through what its decoders raise: KeyError, TypeError, struct.error, ...
        raise ImageError(f"{name}: cannot be read, it may be damaged or truncated ({error})") from error


_TOO_LARGE = f"more than {MAX_PIXELS:,} pixels; scale it down first"


def _check_size(image: Image, name: str) -> None:
    if math.prod(image.size) > MAX_PIXELS:
        raise ImageError(f"{name}: {image.width} x {image.height} px is {_TOO_LARGE}")


def _from_pil(image: Image, *, name: str) -> Tensor:
    from PIL import Image as PILImage
    from PIL import ImageOps

    _check_size(image, name)  # before any pixel is decoded
    if getattr(image, "is_animated", False):  # n_frames would read every frame
        warnings.warn(f"{name}: animated image; only its first frame is used", stacklevel=4)
        image.seek(0)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode in "IF":  # 16-bit or float grayscale: keep its precision
        gray = np.array(image, dtype=np.float32) / np.float32(1 if image.mode == "F" else 65535)
        return torch.from_numpy(gray).expand(3, -1, -1).contiguous()
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = PILImage.alpha_composite(PILImage.new("RGBA", rgba.size, "white"), rgba)
    pixels = np.array(image.convert("RGB"), dtype=np.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


_INTEGER_RANGE = {torch.uint8: 255.0, torch.uint16: 65535.0}


def _from_array(source: np.ndarray | Tensor) -> Tensor:
    axes = (0, 2) if isinstance(source, Tensor) else (2, 0)  # where channels are expected first
    if isinstance(source, Tensor) and (source.is_nested or source.layout != torch.strided or source.is_meta):
        raise ImageError("array: expected a dense tensor with values, got a nested, sparse or meta one")
    if math.prod(source.shape) > 4 * MAX_PIXELS:  # a view may be larger than the memory behind it
        raise ImageError(f"array: shape {tuple(source.shape)} holds {_TOO_LARGE}")
    if isinstance(source, np.ndarray):
        try:  # a copy in native byte order, because PIL's arrays are read-only and torch shares memory
            source = torch.from_numpy(np.array(source, dtype=source.dtype.newbyteorder("="), order="C"))
        except TypeError as error:
            raise ImageError(f"array: expected numbers, got dtype {source.dtype}") from error
    image = source.detach().cpu()
    if image.dtype in _INTEGER_RANGE:
        image = image.float() / _INTEGER_RANGE[image.dtype]
    elif not image.is_floating_point():
        raise ImageError(f"array: expected uint8, uint16 or floats in [0, 1], got {image.dtype}")
    image = image.float()[None] if image.ndim == 2 else image.float()
    found = (0,) if source.ndim == 2 else [axis for axis in axes if image.ndim == 3 and image.shape[axis] in (1, 3, 4)]
    if not found:
        raise ImageError(f"array: expected (H, W), (H, W, 1|3|4) or (1|3|4, H, W), got shape {tuple(image.shape)}")
    image = image.movedim(found[0], 0)
    if image.shape[0] == 4:
        image = image[:3] * image[3:] + (1 - image[3:])
    return image.expand(3, -1, -1).contiguous()
