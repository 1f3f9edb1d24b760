"""Readers of users' files on damaged and made-up ones: many in the slow suite, some in the fast one."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from clip_models import CONFIG
from hostile import Target, attack, hold, lay
from PIL import Image
from safetensors.torch import save

from aigiqa_reward import images
from aigiqa_reward.datasets import read_pickapic, read_table
from aigiqa_reward.encoders.blip import BLIPConfig, _tokenizer
from aigiqa_reward.encoders.open_clip import OpenCLIPConfig, _architecture
from aigiqa_reward.finetuning.pairs import read_preference_pairs
from aigiqa_reward.models.cpa_iqa import UNIFORM, Preferences
from aigiqa_reward.utils.weights import read_weights

CASES, FEW = 60, 8
FAST = ("image rgb.png", "image photo.jpg", "table", "preferences", "weights")


def picture(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)
    data = io.BytesIO()
    image = Image.fromarray(pixels[..., 0] / np.float32(255)) if mode == "F" else Image.fromarray(pixels).convert(mode)
    image.save(data, kind, **options)
    return data.getvalue()


def image_files() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    animated = {"save_all": True, "append_images": [Image.new("RGB", (48, 40), "red")] * 2}
    return {
        "rgb.png": picture("PNG", exif=exif), "palette.png": picture("PNG", "P"), "alpha.png": picture("PNG", "RGBA"),
        "photo.jpg": picture("JPEG", exif=exif), "cmyk.jpg": picture("JPEG", "CMYK"),
        "animated.gif": picture("GIF", "P", **animated), "animated.webp": picture("WEBP", **animated),
        "scan.tif": picture("TIFF", exif=exif, compression="tiff_lzw"), "float.tif": picture("TIFF", "F"),
        "plain.ppm": picture("PPM"), "wavelet.jp2": picture("JPEG2000"), "next.avif": picture("AVIF"),
    }  # fmt: skip


def read_image(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> None:
        image = images.load(folder / name)
        assert image.shape[0] == 3
        assert image.dtype == torch.float32
        assert bool(torch.isfinite(image).all())

    return read


PNG = picture("PNG")


def parquet(columns: dict[str, list[Any]]) -> bytes:
    data = io.BytesIO()
    pandas.DataFrame(columns).to_parquet(data)
    return data.getvalue()


PICKED = {
    "caption": ["a fox", "a hen"] * 4, "jpg_0": [PNG] * 8, "jpg_1": [PNG] * 8, "label_0": [1.0, 0.0] * 4,
    "label_1": [0.0, 1.0] * 4, "ranking_id": list(range(8)),
}  # fmt: skip
PAIRS = {"prompt": ["a", "b"], "winner": ["images/1.png", "images/2.png"], "loser": ["images/2.png", "images/1.png"]}


def tokenizer() -> bytes:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = {word: number for number, word in enumerate(["[UNK]", "[CLS]", "[SEP]", "a", "fox", "##es", "é"])}
    made: Any = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return made.to_str().encode()


def targets() -> dict[str, Target]:
    image = {f"image {name}": Target(files={name: data}, read=read_image(name)) for name, data in image_files().items()}
    pictures = {f"images/{name}.png": PNG for name in (1, 2)}
    rows = "path,prompt,quality\nimages/1.png,a fox,1.5\nimages/2.png,'b',2\n"
    return image | {
        "table": Target(
            files={"t.csv": rows.encode(), **pictures},
            kept=frozenset(pictures),
            read=lambda home: read_table(home / "t.csv"),
        ),
        "pickapic": Target(files={"p.parquet": parquet(PICKED)}, read=lambda home: read_pickapic(home / "p.parquet")),
        "pairs": Target(
            files={"pairs.parquet": parquet(PAIRS), **pictures}, kept=frozenset(pictures), read=read_preference_pairs
        ),
        "preferences": Target(
            files={"p.json": json.dumps({name: list(row) for name, row in UNIFORM.items()}).encode()},
            read=lambda home: Preferences.load(home / "p.json"),
        ),
        "weights": Target(
            files={"w.safetensors": save({"a": torch.ones(4, 4), "b": torch.ones(3, dtype=torch.bfloat16)})},
            read=lambda home: read_weights(home / "w.safetensors"),
        ),
        "tokenizer": Target(
            files={"tokenizer.json": tokenizer()},
            read=lambda home: _tokenizer(BLIPConfig(path_or_id=str(home))).encode("a fox"),
            named="folder",
        ),
        "architecture": Target(
            files={"open_clip_config.json": json.dumps(CONFIG).encode()},
            read=lambda home: _architecture(OpenCLIPConfig(architecture=f"local-dir:{home}")),
        ),
    }


EVERY = targets()


@pytest.mark.parametrize("name", EVERY)
def test_whole_files_are_read(tmp_path: Path, name: str) -> None:
    lay(EVERY[name], tmp_path / "folder")
    (tmp_path / "elsewhere").mkdir()
    assert hold(EVERY[name], tmp_path / "folder", name, tmp_path / "elsewhere") is None


@pytest.mark.parametrize("name", FAST)
def test_damaged_files_are_read_or_refused(tmp_path: Path, name: str) -> None:
    attack(EVERY[name], tmp_path, FEW, repeatable=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_many_damaged_files_are_read_or_refused(tmp_path: Path, name: str) -> None:
    attack(EVERY[name], tmp_path, CASES, repeatable=False)
