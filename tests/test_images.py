"""Images: loading, resizing and cropping compared with Pillow and numpy, and every refusal."""

from __future__ import annotations

import io
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hostile import png_chunk, png_that_claims
from PIL import Image, ImageCms
from torch import Tensor

from aigiqa_reward import images as pixels
from aigiqa_reward.images import ImageError

COLORS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [250, 180, 20]], dtype=np.uint8)


def natural(height: int, width: int, seed: int, *, contrast: float = 0.9) -> np.ndarray:
    rng = np.random.default_rng(seed)
    blocks = rng.random((-(-height // 8), -(-width // 8), 3)).repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
    image = 0.5 + contrast * (blocks - 0.5) + 0.03 * rng.normal(size=blocks.shape)
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


def tensor_of(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255


def array_of(image: Tensor) -> np.ndarray:
    return image[0].permute(1, 2, 0).numpy()


def pillow_float(array: np.ndarray, height: int, width: int) -> np.ndarray:
    bands = [
        Image.fromarray(band.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
        for band in np.moveaxis(array, -1, 0)
    ]
    return np.stack([np.asarray(band) for band in bands], axis=-1).clip(0, 255) / 255


SIZES = [
    ((256, 256), (112, 112)),
    ((333, 257), (149, 97)),  # odd sizes, down
    ((64, 48), (129, 97)),  # up
    ((257, 400), (31, 400)),  # one axis only
]


@pytest.mark.parametrize(("size", "target"), SIZES)
def test_resize_is_pillows_antialiased_bicubic(size, target):
    image = natural(*size, seed=0)
    ours = array_of(pixels.resize(tensor_of(image), target).clamp(0, 1))
    assert np.abs(ours - pillow_float(image, *target)).max() < 1e-4
    # Pillow rounds 8-bit images twice: half a level after each pass, the first one spread by the second pass's kernel.
    image = natural(*size, seed=2, contrast=0.4)  # nothing clips between the passes
    ours = array_of(pixels.resize(tensor_of(image), target))
    pillow = np.asarray(Image.fromarray(image).resize(target[::-1], Image.Resampling.BICUBIC))
    error = np.abs(ours * 255 - pillow)
    assert np.quantile(error, 0.995) < 1
    assert error.max() < 1.3


def test_resize_keeps_overshoot_and_double_precision_and_lifts_half():
    edge = torch.zeros(1, 3, 32, 32)
    edge[..., 16:] = 1
    larger = pixels.resize(edge, (96, 96))
    assert larger.min() < -0.01
    assert larger.max() > 1.01
    assert pixels.resize(edge.double(), (20, 20)).dtype == torch.float64
    for dtype in (torch.float16, torch.bfloat16):
        assert pixels.resize(edge.to(dtype), (20, 20)).dtype == torch.float32
        assert pixels.resize(edge.to(dtype), (32, 32)).dtype == torch.float32


def test_scaling_keeps_the_aspect_ratio():
    image = torch.rand(1, 3, 60, 120)
    assert pixels.reduce_to(image, 60) is image
    assert pixels.reduce_to(image, 30).shape == (1, 3, 30, 60)
    assert pixels.reduce_to(image, 90) is image
    assert pixels.resize_to_area(image, 200 * 400, least=32).shape == (1, 3, 200, 400)
    assert pixels.resize_to_area(image, 16 * 32, least=20).shape == (1, 3, 20, 32)


FILL = torch.tensor([0.3, 0.5, 0.7])

OPERATIONS = {
    "resize down": lambda x: pixels.resize(x, (4, 5)),
    "resize up": lambda x: pixels.resize(x, (9, 13)),
    "resize to area": lambda x: pixels.resize_to_area(x, 20, least=3),
    "letterbox down": lambda x: pixels.letterbox(x, 6, fill=FILL),
    "even crops enlarged": lambda x: pixels.even_crops(x, 9, 2),
    "random crops": lambda x: pixels.random_crops(x, 4, 2, generator=torch.Generator().manual_seed(0)),
    "normalize": lambda x: pixels.normalize(x, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)),
    "from VAE": pixels.from_vae,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_equal_finite_differences_and_no_pixel_is_read_on_the_host(name):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, 3, 6, 8, dtype=torch.float64, generator=generator) * 2 - 0.5  # also outside [0, 1]
    assert torch.autograd.gradcheck(OPERATIONS[name], (images.requires_grad_(),))
    OPERATIONS[name](torch.empty(2, 3, 20, 27, device="meta"))  # has no values, so that reading one raises


def test_letterbox_shows_the_whole_image_centered_on_the_fill():
    image = torch.rand(2, 3, 20, 40, generator=torch.Generator().manual_seed(0))
    boxed = pixels.letterbox(image, 40, fill=FILL)
    torch.testing.assert_close(boxed[:, :, 10:30], image, atol=1e-6, rtol=0)
    border = torch.cat([boxed[:, :, :10], boxed[:, :, 30:]], dim=2)
    torch.testing.assert_close(border, FILL.view(1, 3, 1, 1).expand_as(border), atol=1e-6, rtol=0)
    upright = pixels.letterbox(image.transpose(2, 3), 40, fill=FILL)
    torch.testing.assert_close(upright, boxed.transpose(2, 3))
    assert pixels.letterbox(torch.rand(1, 3, 16, 2048), 32, fill=FILL).shape == (1, 3, 32, 32)


def test_vae_range_and_channels_last_round_trips():
    image = torch.rand(2, 3, 20, 24, dtype=torch.float64)
    torch.testing.assert_close(pixels.from_vae(pixels.to_vae(image)), image, atol=1e-12, rtol=0)
    assert pixels.to_vae(torch.tensor([0.0, 0.5, 1.2])).tolist() == pytest.approx([-1, 0, 1.4])
    assert torch.equal(pixels.from_bhwc(pixels.to_bhwc(image)), image)
    assert pixels.to_bhwc(image)[1, 4, 7].tolist() == image[1, :, 4, 7].tolist()
    with pytest.raises(ValueError, match=r"expected \(B, H, W, 3\), got shape \(1, 3, 20, 24\)"):
        pixels.from_bhwc(torch.rand(1, 3, 20, 24))
    with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\), got shape \(1, 20, 24, 3\)"):
        pixels.to_bhwc(torch.rand(1, 20, 24, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_to_pil_of_load_is_exact_on_8_bits(dtype):
    values = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    for image in (natural(33, 47, seed=0), values):
        [back] = pixels.to_pil(pixels.load(Image.fromarray(image))[None].to(dtype))
        assert np.array_equal(np.asarray(back), image)
    overshoot = torch.tensor([1.2, -0.2, 1.2]).view(1, 3, 1, 1).expand(-1, -1, 16, 16)
    assert pixels.to_pil(overshoot.to(dtype))[0].getpixel((3, 3)) == (255, 0, 255)


def aspect_ratios() -> Iterator[tuple[int, int, int]]:
    for exponent in range(-7, 8):
        for odd in (0, 5):
            long = 24 * 2 ** abs(exponent) + odd
            yield (long, 24, 24) if exponent > 0 else (24, long, 24)
    yield from ((512, 512, 224), (300, 517, 224), (1001, 640, 224), (225, 224, 224))


@pytest.mark.parametrize("count", [1, 2, 5, 15])
def test_even_offsets_lie_inside_in_number_and_reach_the_borders(count):
    for height, width, side in aspect_ratios():
        offsets = pixels.even_offsets(height, width, side, count)
        tops, lefts = zip(*offsets, strict=True)
        assert len(offsets) == count
        assert all(0 <= top <= height - side for top in tops)
        assert all(0 <= left <= width - side for left in lefts)
        rows, columns = (min(x) == 0 and max(x) == long - side for x, long in ((tops, height), (lefts, width)))
        if count == 1:
            assert offsets == [(round((height - side) / 2), round((width - side) / 2))]
        else:
            assert (rows or height < 2 * width) and (columns or width < 2 * height) and (rows or columns)
        assert count < 4 or height != width or (rows and columns)


def test_random_crops_repeat_with_their_generator_only():
    images = torch.arange(2 * 3 * 60 * 50, dtype=torch.float32).reshape(2, 3, 60, 50)
    before = torch.get_rng_state()
    first = pixels.random_crops(images, 16, 6, generator=torch.Generator().manual_seed(3))
    again = pixels.random_crops(images, 16, 6, generator=torch.Generator().manual_seed(3))
    other = pixels.random_crops(images, 16, 6, generator=torch.Generator().manual_seed(4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    for crop in first.flatten(0, 1):  # each value states its own place in the batch
        corner = int(crop[0, 0, 0])
        row, column = corner // 50 % 60, corner % 50
        assert torch.equal(crop, images.flatten(0, 1)[corner // 3000 :][:3, row : row + 16, column : column + 16])


def batch(**values: Any) -> Tensor:
    images = torch.full((2, 3, 20, 24), 0.5)
    images[1, 2, 3, 4] = values.get("value", 0.5)
    return images


BAD = {
    "NaN": (batch(value=float("nan")), ValueError, r"NaN or infinite values in image\(s\) \[1\].*float32 or bfloat16"),
    "infinite": (batch(value=float("inf")), ValueError, r"NaN or infinite values in image\(s\) \[1\]"),
    "[-1, 1]": (torch.linspace(-1, 1, 3 * 256).view(1, 3, 16, 16), ValueError, r"\[-1, 1\]; .*images\.from_vae"),
    "0..255": (torch.linspace(0, 255, 3 * 256).view(1, 3, 16, 16), ValueError, r"\[0, 255\]; divide 8-bit .* by 255"),
    "normalized": (torch.linspace(-2.1, 2.6, 768).view(1, 3, 16, 16), ValueError, "pixels that are not normalized"),
    "integers": (torch.ones(1, 3, 16, 16, dtype=torch.uint8), TypeError, r"floating-point.*torch\.uint8.*by 255"),
    "latent": (torch.rand(1, 4, 16, 16), ValueError, "3 channels.*VAE latent must be decoded"),
    "channels last": (torch.rand(1, 16, 16, 3), ValueError, r"images\.from_bhwc"),
    "one image": (torch.rand(3, 16, 16), ValueError, r"4 dimensions.*\(3, 16, 16\).*images\[None\]"),
    "gray": (torch.rand(1, 1, 16, 16), ValueError, r"expand\(-1, 3, -1, -1\)"),
    "empty": (torch.rand(0, 3, 16, 16), ValueError, "at least one image"),
    "15 px wide": (torch.rand(1, 3, 16, 15), ValueError, "at least 16 px, got 15 x 16"),
    "a list": ([torch.rand(3, 16, 16)], TypeError, r"a tensor \(B, 3, H, W\), got list"),
}


@pytest.mark.parametrize("name", BAD)
def test_check_refuses(name):
    images, error, message = BAD[name]
    with pytest.raises(error, match=message):
        pixels.check(images)
    with pytest.raises(error, match=r"^pictures: "):
        pixels.check(images, argument="pictures")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_check_passes_the_same_tensor_with_a_decoders_overshoot(dtype):
    images = torch.linspace(-0.25, 1.25, 3 * 256, dtype=dtype).view(1, 3, 16, 16).requires_grad_()
    assert pixels.check(images) is images


def test_only_values_are_left_unchecked_without_validation():
    valueless = torch.empty(2, 3, 16, 16, device="meta")  # reading a value raises
    assert pixels.check(valueless, validate=False) is valueless
    with pytest.raises(ValueError, match="3 channels"):
        pixels.check(valueless[:, :2], validate=False)


def jpeg_bytes(**options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(natural(64, 64, seed=0)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def test_files_that_hold_no_image_are_named_with_the_reason(tmp_path):
    whole = jpeg_bytes()
    contents = {
        "empty.png": (b"", "the file is empty"),
        "truncated.jpg": (whole[: len(whole) // 2], "truncated"),
        "header_only.jpg": (whole[:30], "cannot be read|not an image"),
        "text.png": (b"this is not an image", "not an image file"),
        "broken.png": (png_that_claims(64, 64), "truncated|cannot be read"),
    }
    for name, (content, message) in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=f"{re.escape(name)}: .*({message})"):
            pixels.load(tmp_path / name)
    with Image.open(io.BytesIO(whole[:800])) as opened, pytest.raises(ImageError, match="truncated"):
        pixels.load(opened)
    with pytest.raises(ImageError, match=r"absent\.png: no such file"):
        pixels.load(tmp_path / "absent.png")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("", "image: expected a path, got an empty text"),
        ("https://example.org/a.png", "no such file; download addresses first"),
        ("half \ud800.png", "no such file"),
        ("a" * 5000, "aaa: cannot be read"),
        (".", "is a folder"),
        ("/dev/zero", "a pipe or a device"),
        ("pipe.png", r"pipe\.png: is a folder, a pipe or a device"),
    ],
)
def test_paths_of_no_image_are_image_errors(tmp_path, monkeypatch, path, reason):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.png")
    with pytest.raises(ImageError, match=reason):
        pixels.load(path)


def test_a_header_that_claims_too_many_pixels_is_refused(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_that_claims(30_000, 30_000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match=r"bomb\.png.*100,000,000 pixels"):
            pixels.load(path)


def mosaic(height: int = 18, width: int = 26) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 9, columns * 7, (rows > 4) * (columns < 9) * 200], axis=-1).astype(np.uint8)


def assert_is(image: Tensor, expected: np.ndarray, *, atol: float = 1e-6) -> None:
    assert image.dtype == torch.float32
    assert image.device.type == "cpu"
    assert tuple(image.shape) == (3, *expected.shape[:2])
    np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), expected / 255, atol=atol)


def test_png_and_path_types(tmp_path):
    image = mosaic()
    path = tmp_path / "image.png"
    Image.fromarray(image).save(path)
    with os.scandir(os.fsencode(tmp_path)) as entries, warnings.catch_warnings():
        warnings.simplefilter("error")  # of Pillow's read-only arrays, or of an animation
        opened = Image.open(path)
        for source in (path, str(path), next(entries), Image.fromarray(image), opened, np.asarray(opened)):
            assert_is(pixels.load(source), image)


def test_grayscale_bilevel_and_palettes_give_their_colors(tmp_path):
    gray = mosaic()[..., 0]
    Image.fromarray(gray).save(tmp_path / "gray.png")
    assert_is(pixels.load(tmp_path / "gray.png"), np.repeat(gray[..., None], 3, axis=-1))
    bilevel = Image.fromarray((mosaic()[..., 2] > 0).astype(np.uint8) * 255).convert("1")
    assert_is(pixels.load(bilevel), np.repeat((mosaic()[..., 2:] > 0) * 255, 3, axis=-1))
    indices = np.arange(400, dtype=np.uint8).reshape(20, 20) % 4
    image = Image.fromarray(indices).convert("L")
    image.putpalette(COLORS.flatten().tolist())
    image.save(tmp_path / "palette.png")
    assert_is(pixels.load(tmp_path / "palette.png"), COLORS[indices])


@pytest.mark.parametrize("gray", [True, False])
def test_alpha_is_composited_on_white(tmp_path, gray):
    color = mosaic()[..., :1] if gray else mosaic()
    alpha = np.broadcast_to(np.linspace(0, 255, 26).astype(np.uint8)[None, :, None], (18, 26, 1))
    Image.fromarray(np.concatenate([color, alpha], axis=-1)).save(tmp_path / "alpha.png")
    expected = (color * (alpha / 255.0) + 255 * (1 - alpha / 255.0)).repeat(3 if gray else 1, axis=-1)
    loaded = pixels.load(tmp_path / "alpha.png")
    assert_is(loaded, expected, atol=1.01 / 255)  # Pillow composites in 8 bits
    assert loaded[:, :, 0].min() == 1


def test_cmyk_inks_subtract_from_white(tmp_path):
    inks = np.zeros((20, 20, 4), np.uint8)
    inks[:, 10:, 0] = 255  # cyan
    inks[10:, :10, 3] = 255  # black
    image = Image.fromarray(inks, mode="CMYK")
    image.save(tmp_path / "inks.tif")
    image.save(tmp_path / "inks.jpg", quality=100, subsampling=0)
    for suffix, atol in (("tif", 1e-6), ("jpg", 0.05)):
        loaded = pixels.load(tmp_path / f"inks.{suffix}")
        for place, color in (((3, 3), [1, 1, 1]), ((3, 16), [0, 1, 1]), ((16, 3), [0, 0, 0])):
            assert loaded[:, place[0], place[1]].tolist() == pytest.approx(color, abs=atol)


def test_16_bit_grayscale_keeps_its_precision(tmp_path):
    values = (30_000 + np.arange(400)).astype(np.uint16).reshape(20, 20)  # two gray levels of 8 bits
    values[0, 0], values[19, 19] = 0, 65535
    Image.fromarray(values).save(tmp_path / "deep.png")
    loaded = pixels.load(tmp_path / "deep.png")
    np.testing.assert_allclose(loaded[1].numpy(), values / 65535, atol=1e-7)
    assert len(loaded[0].unique()) == 400
    assert torch.equal(loaded[0], loaded[2])
    Image.fromarray(values).save(tmp_path / "holes.png", transparency=30_005)
    holes = pixels.load(tmp_path / "holes.png")
    assert holes[:, 0, 5].tolist() == [1, 1, 1] and (holes != loaded).sum() == 3


def test_lab_has_no_alpha():
    srgb, image = ImageCms.createProfile("sRGB"), Image.fromarray(mosaic()).resize((32, 32))
    lab = ImageCms.profileToProfile(image, srgb, ImageCms.createProfile("LAB"), outputMode="LAB")
    assert_is(pixels.load(lab), np.asarray(lab.convert("RGB")))
    assert np.asarray(lab.convert("RGB")).std() > 10


def test_32_bit_grayscale_holds_the_8_bits_it_was_converted_from_or_16(tmp_path):
    values = np.arange(400, dtype=np.uint16).reshape(20, 20)
    loaded = pixels.load(Image.fromarray(values.astype(np.uint8)).convert("I"))[0].numpy()
    np.testing.assert_allclose(loaded, values.astype(np.uint8) / 255, atol=1e-7)
    deep = values.astype(np.int32) * 160
    np.testing.assert_allclose(pixels.load(Image.fromarray(deep))[0].numpy(), deep / 65535, atol=1e-7)
    Image.fromarray(values % 256).save(tmp_path / "dark.png")  # a file says that it has 16 bits
    assert pixels.load(tmp_path / "dark.png").max() == np.float32(255 / 65535)


WIDE = np.array([[0.6097, 0.2053, 0.1492], [0.3111, 0.6257, 0.0632], [0.0195, 0.0609, 0.7445]])  # Adobe RGB to XYZ, D50
NARROW = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])  # sRGB to XYZ, D50


def color_profile(space: bytes, gamma: float) -> bytes:
    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = b"curv\0\0\0\0" + struct.pack(">IH2x", 1, round(gamma * 256))
    named = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"made\0" + bytes(79)
    tags = {b"desc": named, b"wtpt": xyz(0.9642, 1, 0.8249), b"kTRC": curve}
    if space == b"RGB ":
        tags |= {bytes([name]) + b"XYZ": xyz(*WIDE[:, place]) for place, name in enumerate(b"rgb")}
        tags |= {bytes([name]) + b"TRC": curve for name in b"rgb"}
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4xI4s4s4s12x4s28x", start + len(body), 0x02100000, b"mntr", space, b"XYZ ", b"acsp")
    return head + xyz(0.9642, 1, 0.8249)[8:] + bytes(48) + struct.pack(">I", len(tags)) + table + body


def displayed(stored: np.ndarray, gamma: float, to_xyz: np.ndarray) -> np.ndarray:
    linear = (np.linalg.inv(NARROW) @ to_xyz @ ((stored / 255) ** gamma)[..., None])[..., 0].clip(0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055) * 255


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_colors_are_shown_by_the_files_profile(tmp_path, suffix):
    stored = np.random.default_rng(0).integers(60, 200, (2, 2, 3)).repeat(16, 0).repeat(16, 1).astype(np.uint8)
    options = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {"lossless": True} if suffix == "webp" else {}
    path = tmp_path / f"wide.{suffix}"
    Image.fromarray(stored).save(path, icc_profile=color_profile(b"RGB ", 2.2), **options)
    with Image.open(path) as opened:
        plain = np.asarray(opened.convert("RGB"))
    wanted = displayed(plain, 2.2, WIDE)
    assert np.abs(wanted - plain).max() > 8
    for source in (path, Image.open(path)):
        assert np.abs(pixels.load(source).permute(1, 2, 0).numpy() * 255 - wanted).max() < 2


def test_profiles_reach_every_kind_of_image_but_16_bits(tmp_path):
    wide, gray = color_profile(b"RGB ", 2.2), color_profile(b"GRAY", 1.0)
    stored = np.array([[[200, 60, 60], [60, 200, 60]]], np.uint8).repeat(16, 0).repeat(8, 1)
    shown = displayed(stored, 2.2, WIDE)
    level = displayed(np.full(3, 50.0), 1.0, NARROW)
    color = Image.fromarray(stored)
    cases: dict[str, tuple[Image.Image, bytes, np.ndarray]] = {
        "alpha": (color.copy(), wide, shown * 0.2 + 255 * 0.8),
        "palette": (color.quantize(4), wide, shown),
        "gray": (Image.new("L", (16, 16), 50), gray, np.broadcast_to(level, shown.shape)),
        "gray by colors": (Image.new("L", (16, 16), 50), wide, displayed(np.full((16, 16, 3), 50), 2.2, WIDE)),
        "another kind": (color, gray, stored),
        "sRGB": (color, ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), stored),
        "deep": (Image.fromarray(np.full((16, 16), 12800, np.uint16)), gray, np.full((16, 16, 3), 12800 / 257)),
    }
    cases["alpha"][0].putalpha(51)
    for name, (image, profile, wanted) in cases.items():
        image.save(tmp_path / f"{name}.png", icc_profile=profile)
        found = pixels.load(tmp_path / f"{name}.png").permute(1, 2, 0).numpy() * 255
        assert np.abs(found - wanted).max() < (1e-3 if name in ("another kind", "sRGB", "deep") else 2), name
    color.save(tmp_path / "broken.png", icc_profile=wide[:100])
    with pytest.warns(UserWarning, match=r"broken\.png: its color profile cannot be read, so sRGB is assumed"):
        assert_is(pixels.load(tmp_path / "broken.png"), stored)


@pytest.mark.parametrize("after", [False, True], ids=["before the pixels", "after the pixels"])
def test_pngs_with_long_texts_are_read(tmp_path, after):
    profile = color_profile(b"RGB ", 2.2)
    stored = np.full((20, 20, 3), (200, 60, 60), np.uint8)
    file = io.BytesIO()
    Image.fromarray(stored).save(file, format="PNG", icc_profile=profile)
    data, packed = file.getvalue(), zlib.compress(b"x" * 20_000_000)
    texts = png_chunk(b"zTXt", b"workflow\0\0" + packed) + png_chunk(b"iTXt", b"parameters\0\1\0\0\0" + packed)
    texts += png_chunk(b"tEXt", b"prompt\0" + b"y" * 3_000_000) * 25
    place = len(data) - 12 if after else 33
    (tmp_path / "long.png").write_bytes(data[:place] + texts + data[place:])
    found = pixels.load(tmp_path / "long.png").permute(1, 2, 0).numpy() * 255
    assert np.abs(found - displayed(stored, 2.2, WIDE)).max() < 2
    (tmp_path / "cut.png").write_bytes(data[:33] + texts + data[33:-40])
    with pytest.raises(ImageError, match=r"cut\.png: cannot be read"):
        pixels.load(tmp_path / "cut.png")


@pytest.mark.parametrize("stripped", [False, True])
def test_a_photograph_with_its_preview_is_no_animation(tmp_path, stripped, recwarn):
    photograph = Image.fromarray(natural(48, 64, seed=0))
    path = tmp_path / "phone.jpg"
    photograph.save(path, format="MPO", save_all=True, append_images=[photograph.resize((16, 12))], quality=95)
    if stripped:  # the index of previews is left
        data = path.read_bytes()
        path.write_bytes(data[: data.rindex(b"\xff\xd8\xff")])
    plain = io.BytesIO()
    photograph.save(plain, format="JPEG", quality=95)
    assert torch.equal(pixels.load(path), pixels.load(Image.open(plain)))
    assert not recwarn.list


def test_loading_in_threads_leaves_the_filters_of_warnings(tmp_path, monkeypatch):
    files = [tmp_path / f"{number}.png" for number in range(30)]
    for file in files:
        Image.fromarray(natural(64, 64, seed=0)).save(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # a program that opens small files only
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        before, filters = list(warnings.filters), warnings.filters
        with ThreadPoolExecutor(8) as pool:
            shapes = {tuple(image.shape) for image in pool.map(pixels.load, files)}
        assert warnings.filters is filters
        assert warnings.filters == before
    assert shapes == {(3, 64, 64)}


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_animations_give_their_first_frame_with_a_warning(tmp_path, suffix):
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "lime", "blue")]
    path = tmp_path / f"moving.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, **options)
    with pytest.warns(UserWarning, match=rf"moving\.{suffix}: animated.*only its first frame"):
        loaded = pixels.load(path)
    assert loaded[:, 5, 5].tolist() == [1, 0, 0]
    with Image.open(path) as opened:
        opened.seek(2)
        with pytest.warns(UserWarning, match="first frame"):
            assert torch.equal(pixels.load(opened), loaded)


UPRIGHT = {
    1: lambda stored: stored,
    3: lambda stored: np.rot90(stored, 2),
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    8: lambda stored: np.rot90(stored, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_rotation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(mosaic()).save(tmp_path / "turned.png", exif=exif)
    assert_is(pixels.load(tmp_path / "turned.png"), UPRIGHT[orientation](mosaic()))


def array_layouts() -> dict[str, tuple[Any, np.ndarray]]:
    image = mosaic()
    gray = np.repeat(image[..., :1], 3, axis=-1)
    alpha = np.full((18, 26, 1), 51, np.uint8)
    faded = image * 0.2 + 255 * 0.8
    unit = image / 255
    return {
        "uint8 CHW": (image.transpose(2, 0, 1), image),
        "uint8 HW": (image[..., 0], gray),
        "uint8 RGBA": (np.concatenate([image, alpha], axis=-1), faded),
        "uint16 HWC": (image.astype(np.uint16) * 257, image),
        "float16 HWC": (unit.astype(np.float16), unit.astype(np.float16).astype(np.float64) * 255),
        "float32 HWC": (unit.astype(np.float32), image),
        "big-endian 16 bits": (image.astype(">u2") * 257, image),
        "mirrored view": (image[::-1, ::-1], image[::-1, ::-1]),
        "tensor CHW": (torch.from_numpy(unit).permute(2, 0, 1).float(), image),
        "tensor uint8": (torch.from_numpy(image).permute(2, 0, 1), image),
        "tensor RGBA": (torch.from_numpy(np.concatenate([unit, alpha / 255], axis=-1)).permute(2, 0, 1), faded),
        "tensor with gradient": (torch.from_numpy(unit).requires_grad_(), image),
    }


@pytest.mark.parametrize("name", array_layouts())
def test_arrays_and_tensors_of_every_layout(name):
    source, expected = array_layouts()[name]
    loaded = pixels.load(source)
    assert_is(loaded, expected)
    assert not loaded.requires_grad
    held = source.detach().numpy() if isinstance(source, Tensor) else source
    before = held.copy()
    loaded.zero_()
    assert np.array_equal(held, before), "no memory is shared"


BAD_ARRAYS = {
    "int64": (np.zeros((20, 20, 3), np.int64), r"uint8, uint16 or floats.*int64"),
    "objects": (np.array([[None] * 20] * 20), "expected numbers, got dtype object"),
    "two channels": (np.zeros((20, 20, 2), np.uint8), r"\(H, W, 1\|3\|4\).*got shape \(20, 20, 2\)"),
    "a batch": (np.zeros((1, 20, 20, 3), np.uint8), r"got shape \(1, 20, 20, 3\)"),
    "0..255 floats": (np.full((20, 20, 3), 200.0), "divide 8-bit values by 255"),
    "NaN": (np.full((20, 20, 3), np.nan), "NaN or infinite"),
    "no pixels": (np.zeros((0, 0, 3), np.uint8), "at least 16 px"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_arrays_that_hold_no_image_are_refused(name):
    source, message = BAD_ARRAYS[name]
    with pytest.raises(ImageError, match=message):
        pixels.load(source)
