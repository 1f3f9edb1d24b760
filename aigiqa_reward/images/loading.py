"""Images from files, PIL, arrays and tensors."""

from __future__ import annotations

import io
import math
import os
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

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

    The pixels are those that a viewer shows: EXIF rotation is applied, 8-bit colors are converted from the embedded
    profile to sRGB, alpha is composited on white, grayscale is repeated, CMYK and palettes are converted, 16 bits keep
    their precision where Pillow does, and of an animation the first frame is taken with a warning.

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
    return _checked(image, os.fsdecode(source) if isinstance(source, str | os.PathLike) else "")


def decode(data: bytes, name: str) -> Float[Tensor, "3 height width"]:
    """Read the content of an image file as `load` reads the file.

    Args:
        data: content of the file.
        name: name of the image in errors.

    Raises:
        ImageError: as of `load`.

    Example:
        >>> import io
        >>> from PIL import Image
        >>> from aigiqa_reward.images import decode
        >>> file = io.BytesIO()
        >>> Image.new("RGB", (48, 32), "red").save(file, format="PNG")
        >>> decode(file.getvalue(), "red.png").shape
        torch.Size([3, 32, 48])
    """
    with _reading(name):
        if not data:
            raise ImageError(f"{name}: the file is empty")
        with _identified(io.BytesIO(data), name) as opened:
            image = _from_pil(opened, name=name)
    return _checked(image, name)


def _checked(image: Tensor, name: str) -> Tensor:
    try:
        check(image[None], argument="image")
    except (TypeError, ValueError) as error:
        raise ImageError(f"{name}: {error}" if name else str(error)) from error
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
    """Open a file; every error inside becomes an ImageError that names the file."""
    name = os.fsdecode(path)
    with _reading(name), existing_file(name).open("rb") as stream, _identified(stream, name) as image:
        yield image


def existing_file(name: str) -> Path:
    """Return the path of an image file that is there; an ImageError else."""
    file = Path(name)
    with _reading(name):
        if not name:
            raise ImageError("image: expected a path, got an empty text")
        if not file.exists():
            raise ImageError(f"{name}: no such file{'; download addresses first' * ('://' in name)}")
        if not file.is_file():
            raise ImageError(f"{name}: is a folder, a pipe or a device; pass a file")
        if file.stat().st_size == 0:
            raise ImageError(f"{name}: the file is empty")
    return file


def fault(name: str) -> str | None:
    """Return why there is no image file of that name; None where there is one, whatever it holds."""
    try:
        existing_file(name)
    except ImageError as error:
        return str(error)
    return None


def _identified(stream: BinaryIO, name: str) -> Image:
    """Open a file of any format; a PNG whose texts or profile Pillow finds too long is opened without them."""
    try:
        image = _first_that_opens(stream, name)
        if image.format == "PNG":
            image.load()  # texts may follow the pixels
        return image
    except ValueError as error:
        stream.seek(0)
        if isinstance(error, ImageError) or stream.read(8) != _PNG:
            raise
        rest, profile = _without_texts(stream.read(_LARGEST_PNG))
        image = _first_that_opens(io.BytesIO(rest), name)
        image.info["icc_profile"] = profile
        return image


def _first_that_opens(stream: BinaryIO, name: str) -> Image:
    """Open a file as `PIL.Image.open` does, whose limit of the size is a variable and a warning of the process."""
    from PIL import Image as PILImage

    prefix, tried = stream.read(16), set[str]()
    for register in (PILImage.preinit, PILImage.init):
        register()
        for kind in [kind for kind in PILImage.ID if kind not in tried]:
            tried.add(kind)
            factory, accepts = PILImage.OPEN[kind]
            if isinstance(accepted := accepts is None or accepts(prefix), str) or not accepted:
                continue  # a text says what Pillow was built without
            try:
                stream.seek(0)
                image = factory(stream, name)
            except (SyntaxError, IndexError, TypeError, struct.error):  # as Pillow: another format
                continue
            _check_size(image, name)
            return image
    raise PILImage.UnidentifiedImageError


_PNG = b"\x89PNG\r\n\x1a\n"
_LARGEST_PNG, _LARGEST_PROFILE = 2**30, 2**24


def _without_texts(chunks: bytes) -> tuple[bytes, bytes | None]:
    """Return a PNG without its texts and color profile, and the profile."""
    kept, start, profile = [_PNG], 0, None
    while start < len(chunks):
        end = start + 12 + int.from_bytes(chunks[start : start + 4])
        kind = chunks[start + 4 : start + 8]
        if kind == b"iCCP":  # a name, a zero, the method, the packed profile
            packed = chunks[chunks.find(b"\0", start + 8) + 2 : end - 4]
            profile = zlib.decompressobj().decompress(packed, _LARGEST_PROFILE)
        elif kind not in (b"tEXt", b"zTXt", b"iTXt"):
            kept.append(chunks[start:end])
        start = end
    return b"".join(kept), profile


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
    several = getattr(image, "is_animated", False)  # n_frames would read every frame
    if several and image.format != "MPO":  # a photograph of a phone, with its preview
        warnings.warn(f"{name}: animated image; only its first frame is used", stacklevel=4)
        image.seek(0)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode in "IF":  # 16-bit or float grayscale: keep its precision
        gray = np.array(image, dtype=np.float32)
        is_8_bit = image.mode == "I" and image.format is None and gray.max() <= 255  # as convert("I") makes of 8 bits
        see_through = gray == image.info.get("transparency", np.nan)  # one value of a 16-bit PNG
        gray /= np.float32(1 if image.mode == "F" else 255 if is_8_bit else 65535)
        gray[see_through] = 1
        return torch.from_numpy(gray).expand(3, -1, -1).contiguous()
    shown = _in_srgb(image, name)
    if image.has_transparency_data:  # no band A of mode LAB
        rgba = image.convert("RGBA")
        if shown is not image:
            shown.putalpha(rgba.getchannel("A"))
            rgba = shown
        shown = PILImage.alpha_composite(PILImage.new("RGBA", rgba.size, "white"), rgba)
    pixels = np.array(shown.convert("RGB"), dtype=np.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


_UNSEEN = 2  # levels of 255; profiles of sRGB by other programs differ by so much, and change no pixel


def _in_srgb(image: Image, name: str) -> Image:
    """Convert an 8-bit image by its embedded color profile to RGB; return it unchanged without one, or if that is sRGB.

    A profile of another kind of colors than the image's is ignored, as viewers do.
    """
    from PIL import Image as PILImage
    from PIL import ImageCms

    if not (embedded := image.info.get("icc_profile")):
        return image
    own = {"CMYK": "CMYK", "1": "L", "L": "L", "LA": "L", "La": "L"}.get(image.mode, "RGB")
    try:
        profile: Any = ImageCms.ImageCmsProfile(io.BytesIO(embedded))
        colors = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(profile.profile.xcolor_space.strip())
        if colors is None or (colors != own and (own, colors) != ("L", "RGB")):
            return image
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), colors, "RGB")
        steps = np.indices((6,) * len(colors), dtype=np.uint8).reshape(len(colors), 1, -1) * 51
        sample = PILImage.merge(colors, [PILImage.fromarray(band) for band in steps])
        changed = np.asarray(transform.apply(sample)).astype(int) - np.asarray(sample.convert("RGB"))
        return image if np.abs(changed).max() <= _UNSEEN else transform.apply(image.convert(colors))
    except (ImageCms.PyCMSError, OSError) as error:
        warnings.warn(f"{name}: its color profile cannot be read, so sRGB is assumed ({error})", stacklevel=5)
        return image


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
