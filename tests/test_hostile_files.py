"""Every reader on damaged and made-up files: 2,000 cases in the slow suite, some of each in the fast one."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas
import pytest
import torch
import typer
from clip_models import CONFIG
from hostile import Target, attack, hold, lay
from PIL import Image
from safetensors.torch import save
from scipy.io import savemat
from typer.testing import CliRunner

from aigiqa_reward import images
from aigiqa_reward.assistants.cache import AssistantCache, key_of
from aigiqa_reward.cli.config_file import config_option
from aigiqa_reward.cli.evaluation_files import read_predicted, read_unreadable
from aigiqa_reward.cli.files import copy_ranked
from aigiqa_reward.cli.inputs import CommandError, attach_prompts
from aigiqa_reward.cli.notes import check_arguments
from aigiqa_reward.cli.prompts import read_prompts
from aigiqa_reward.datasets import (
    read_agiqa1k,
    read_agiqa3k,
    read_aigciqa2023,
    read_aigiqa20k,
    read_imagereward,
    read_pickapic,
    read_table,
    split_rows,
)
from aigiqa_reward.encoders.blip import BLIPConfig, _tokenizer
from aigiqa_reward.encoders.open_clip import OpenCLIPConfig, _architecture
from aigiqa_reward.evaluation import Predictions, ProtocolReport, score_split
from aigiqa_reward.finetuning.pairs import read_preference_pairs
from aigiqa_reward.models.cpa_iqa import UNIFORM, Preferences
from aigiqa_reward.sampling.batch_run import ResultsFolder
from aigiqa_reward.training import checkpoints as training
from aigiqa_reward.training.store import _left_by
from aigiqa_reward.utils.weights import read_weights

CASES = 2000
"""Of all targets together, in the slow suite."""

FEW = 8
"""Of each, in the fast one."""


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
        "rgb.png": picture("PNG", exif=exif),
        "palette.png": picture("PNG", "P"),
        "alpha.png": picture("PNG", "RGBA"),
        "gray.png": picture("PNG", "L"),
        "photo.jpg": picture("JPEG", exif=exif),
        "cmyk.jpg": picture("JPEG", "CMYK"),
        "animated.gif": picture("GIF", "P", **animated),
        "animated.webp": picture("WEBP", **animated),
        "scan.tif": picture("TIFF", exif=exif, compression="tiff_lzw"),
        "pages.tif": picture("TIFF", **animated),
        "float.tif": picture("TIFF", "F"),
        "bitmap.bmp": picture("BMP"),
        "plain.ppm": picture("PPM"),
        "targa.tga": picture("TGA"),
        "wavelet.jp2": picture("JPEG2000"),
        "next.avif": picture("AVIF"),
    }


def read_image(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> None:
        image = images.load(folder / name)
        assert image.shape[0] == 3
        assert image.dtype == torch.float32
        assert bool(torch.isfinite(image).all())

    return read


# --------------------------------------------------------------------------------------------- tables

PNG = picture("PNG")
SCORES = "name,prompt,mos_quality,std_quality,mos_align,std_align\n" + "".join(
    f"{name},{prompt},1.5,.1,2,.1\n" for name, prompt in (("a_1.jpg", "a fox"), ("b_2.jpg", "'é'"), ("c_3.jpg", "x y"))
)


def workbook(rows: list[list[Any]], header: list[str] | None) -> bytes:
    data = io.BytesIO()
    table = pandas.DataFrame(rows, columns=None if header is None else pandas.Index(header))
    table.to_excel(data, index=False, header=header is not None)
    return data.getvalue()


def matlab(**arrays: np.ndarray) -> bytes:
    data = io.BytesIO()
    savemat(data, arrays, do_compression=True)
    return data.getvalue()


def aigciqa2023_files() -> dict[str, bytes]:
    scores = {f"DATA/MOS/mosz{n}.mat": matlab(MOSz=np.random.default_rng(n).random((2400, 1))) for n in (1, 3)}
    table = {"AIGCIQA2023_Prompts.xlsx": workbook([[n, "x", f"prompt {n}"] for n in range(100)], None)}
    return scores | table


def parquet(columns: dict[str, list[Any]]) -> bytes:
    data = io.BytesIO()
    pandas.DataFrame(columns).to_parquet(data)
    return data.getvalue()


PICKED = {
    "caption": ["a fox", "a hen"] * 4,
    "jpg_0": [PNG] * 8,
    "jpg_1": [PNG] * 8,
    "label_0": [1.0, 0.0] * 4,
    "label_1": [0.0, 1.0] * 4,
    "ranking_id": list(range(8)),
}
PAIRS = {"prompt": ["a", "b"], "winner": ["images/1.png", "images/2.png"], "loser": ["images/2.png", "images/1.png"]}


def split_table(folder: Path) -> None:
    table = read_agiqa3k(folder)
    split_rows(table, mode="csv", seed=0, file=folder / "parts.csv")


# --------------------------------------------------------------------------------------------- what we wrote ourselves


def predictions() -> bytes:
    data, numbers = io.BytesIO(), np.linspace(0, 1, 6)
    names = np.array([f"{n}.png" for n in range(6)])
    columns = ("target_quality", "target_correspondence", "predicted_quality", "predicted_correspondence")
    texts = dict.fromkeys(("names", "prompts", "generators"), names)
    np.savez_compressed(data, format=np.asarray(1), folds=np.arange(6), **texts, **dict.fromkeys(columns, numbers))
    return data.getvalue()


def protocol_report(folder: Path) -> bytes:
    numbers = np.linspace(0, 1, 20)
    scores = score_split(
        0,
        "ours",
        task="quality",
        predicted=numbers,
        target=numbers**2,
        prompts=["a", "b"] * 10,
        generators=["x", "y"] * 10,
        same_generator=None,
    )
    report = ProtocolReport(title="t", protocol="p", scores=(scores,))
    return report.save(folder / "report.json").read_bytes()


def read_report(folder: Path) -> None:
    report = ProtocolReport.load(folder / "report.json")
    report.markdown()
    report.csv()


RECORD = {
    "prompt": "a fox",
    "finished": True,
    "error": None,
    "denoiser_calls": 20,
    "candidates": [
        {
            "seed": seed,
            "prompt": "a fox",
            "total": seed / 4,
            "quality": 0.5,
            "correspondence": 0.5,
            "error": None,
            "prompt_index": 0,
            "rank": 2 - seed,
            "image": f"images/00000_seed{seed}.png",
            "pruned": False,
        }
        for seed in range(2)
    ],
    "previews": {"0": [{"step": 1, "steps": 4, "total": 0.5, "quality": 0.5, "correspondence": None}]},
}
RUN = {"format": "aigiqa-reward best of n for many prompts, version 1", "settings": {"n": 2}, "prompts": ["a fox"]}


def read_results(folder: Path) -> None:
    results = ResultsFolder.open(folder)
    for result in results:
        assert result.output is None or all(isinstance(seed, int) for seed in result.output.all_seeds)
    results.failures()
    results.check({"n": 2})
    results.prepare({"n": 2}, overwrite=False)
    assert json.dumps([json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()])


def cached(form: Any, suffix: str, data: bytes) -> Target:
    def read(folder: Path) -> None:
        fresh = torch.zeros(3, 4) if form is torch.Tensor else "computed again"
        [found] = AssistantCache(folder).get_or_compute("who", ["what"], lambda rows: [fresh], form=form)
        assert isinstance(found, form)

    return Target(files={key_of("who", "what") + suffix: data}, read=read, errors=())


def read_ranking(folder: Path) -> None:
    """What an earlier ranking copied goes, and nothing else."""
    copy_ranked([], folder, originals=[], overwrite=True)
    assert (folder / "other.png").exists()
    assert (folder / "ranking.jsonl").read_text() == ""


def stepped() -> torch.optim.Optimizer:
    weight = torch.nn.Parameter(torch.ones(2, 3))
    weight.sum().backward()
    optimizer = torch.optim.AdamW([weight])
    optimizer.step()
    return optimizer


def checkpoint(*parts: str) -> dict[str, bytes]:
    state = {"step": 3, "epoch": 1, "settings": {"seed": 0}, "history": [0.5]}
    weights = save({"weight": torch.ones(2, 3), "half": torch.ones(3, dtype=torch.float16)})
    moments = save(training.moments_of(stepped()))
    return {"state.json": json.dumps(state).encode(), "optimizer.safetensors": moments} | dict.fromkeys(parts, weights)


def read_checkpoint(load: Callable[[Path, torch.optim.Optimizer], Any]) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        optimizer = stepped()
        load(folder, optimizer)
        optimizer.step()

    return read


def split_scores() -> bytes:
    data, numbers = io.BytesIO(), np.linspace(0, 1, 6)
    np.savez_compressed(data, quality=numbers, correspondence=numbers, rows=np.arange(6))
    return data.getvalue()


def array() -> bytes:
    data = io.BytesIO()
    np.save(data, np.zeros((3, 4), dtype=np.float16))
    return data.getvalue()


def tokenizer() -> bytes:
    """A BERT tokenizer of few words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = {word: number for number, word in enumerate(["[UNK]", "[CLS]", "[SEP]", "a", "fox", "##es", "é"])}
    made: Any = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return made.to_str().encode()


def read_options(folder: Path) -> None:
    command = typer.Typer()

    @command.command()
    def go(
        config: Annotated[Path | None, config_option("options")] = None,
        rate: float = 1.0,
        prompt: Annotated[list[str] | None, typer.Option()] = None,
    ) -> None:
        pass

    result = CliRunner().invoke(command, ["--config", str(folder / "options.yaml")])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception


def targets(folder: Path) -> dict[str, Target]:
    """Every reader of files."""
    image = {f"image {name}": Target(files={name: data}, read=read_image(name)) for name, data in image_files().items()}
    pictures = {f"images/{name}.png": PNG for name in (1, 2)}
    jpegs = {f"images/{name}.jpg": b"" for name in ("a_1", "b_2", "c_3")}
    usage = (CommandError,)
    rows = "path,prompt,quality\nimages/1.png,a fox,1.5\nimages/2.png,'b',2\n"
    ranked = [{"id": "1", "prompt": "p", "generations": ["1.png", "2.png"], "ranking": [1, 2]}]
    tables = {
        "table": Target(
            files={"t.csv": rows.encode(), **pictures},
            kept=frozenset(pictures),
            read=lambda home: read_table(home / "t.csv"),
        ),
        "agiqa3k": Target(files={"data.csv": SCORES.encode(), **jpegs}, kept=frozenset(jpegs), read=read_agiqa3k),
        "split": Target(
            files={
                "parts.csv": b"name,split\na_1.jpg,train\nb_2.jpg,test\nc_3.jpg,val\n",
                "data.csv": SCORES.encode(),
                **jpegs,
            },
            kept=frozenset(["data.csv", *jpegs]),
            read=split_table,
        ),
        "aigiqa20k": Target(
            files={"info_train.csv": b"name,prompt,mos\nX_1.png,p,2\n", "train/X_1.png": b""},
            kept=frozenset(["train/X_1.png"]),
            read=read_aigiqa20k,
        ),
        "agiqa1k": Target(
            files={
                "AIGC_MOS_Zscore.xlsx": workbook(
                    [["deepai_0_0_0_0.jpg", "a, b, c, d", 1.5]], ["Image", "Prompt", "MOS"]
                ),
                "file/deepai_0_0_0_0.jpg": b"",
            },
            kept=frozenset(["file/deepai_0_0_0_0.jpg"]),
            read=read_agiqa1k,
        ),
        "aigciqa2023": Target(files=aigciqa2023_files(), read=aigciqa2023(folder / "2400")),
        "imagereward": Target(
            files={"train.json": json.dumps(ranked).encode(), **pictures},
            kept=frozenset(pictures),
            read=read_imagereward,
        ),
        "pickapic": Target(files={"p.parquet": parquet(PICKED)}, read=lambda home: read_pickapic(home / "p.parquet")),
        "pairs": Target(
            files={"pairs.parquet": parquet(PAIRS), **pictures}, kept=frozenset(pictures), read=read_preference_pairs
        ),
    }
    written = {
        "predictions": Target(files={"p.npz": predictions()}, read=lambda home: Predictions.load(home / "p.npz")),
        "report": Target(files={"report.json": protocol_report(folder)}, read=read_report),
        "preferences": Target(
            files={"p.json": json.dumps({name: list(row) for name, row in UNIFORM.items()}).encode()},
            read=lambda home: Preferences.load(home / "p.json"),
        ),
        "results": Target(
            files={
                "settings.json": json.dumps(RUN).encode(),
                "prompts/00000.json": json.dumps(RECORD).encode(),
                **{f"images/00000_seed{seed}.png": PNG for seed in range(2)},
                "noises/00000.safetensors": save({str(seed): torch.ones(4, 8, 8) for seed in range(2)}),
            },
            read=read_results,
            named="folder",
        ),
        "cached tensor": cached(torch.Tensor, ".safetensors", save({"value": torch.arange(12.0).view(3, 4)})),
        "cached text": cached(str, ".json", b'"an answer"'),
        "weights": Target(
            files={"w.safetensors": save({"a": torch.ones(4, 4), "b": torch.ones(3, dtype=torch.bfloat16)})},
            read=lambda home: read_weights(home / "w.safetensors"),
        ),
    }
    checkpoints = {
        "epoch": Target(
            files=checkpoint("model.safetensors", "average.safetensors", "best.safetensors"),
            read=read_checkpoint(lambda home, optimizer: training.load_checkpoint(home, optimizer, {"step": 3})),
            named="folder",
        ),
        "store": Target(
            files={
                "progress.json": b'{"done": 3, "unreadable": [[1, "damaged"]], "arrays": ["image"]}',
                "image.npy": array(),
            },
            read=lambda home: _left_by(home, 3),
            errors=(),
        ),
    }
    towers = {
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
    commands = {
        "ranking": Target(
            files={
                "ranking.jsonl": b'{"path": "a.png", "error": null}\n{"path": "b.png", "error": "damaged"}\n',
                "001_a.png": PNG,
                "other.png": PNG,
            },
            kept=frozenset(["001_a.png", "other.png"]),
            read=read_ranking,
            errors=(),
        ),
        "predicted": Target(
            files={"seed0.npz": split_scores()}, read=lambda home: read_predicted(home / "seed0.npz", 6), errors=usage
        ),
        "unreadable": Target(
            files={"unreadable.json": b'[{"path": "a.png", "reason": "damaged"}]'},
            read=lambda home: read_unreadable(home / "unreadable.json"),
            errors=usage,
        ),
        "options": Target(files={"options.yaml": b"rate: 0.5\nprompt:\n- a\n- 'b'\n"}, read=read_options, errors=usage),
        "prompts": Target(
            files={"prompts.txt": "a fox\n\nün chien\n".encode()},
            read=lambda home: read_prompts(home / "prompts.txt", "--prompts"),
            errors=usage,
        ),
        "prompts.jsonl": Target(
            files={"prompts.jsonl": b'{"prompt": "a fox"}\n{"prompt": "b"}\n'},
            read=lambda home: read_prompts(home / "prompts.jsonl", "--prompts"),
            errors=usage,
        ),
        "prompts by path": Target(
            files={"rows.jsonl": b'{"path": "1.png", "prompt": "a fox"}\n'},
            read=lambda home: attach_prompts([str(home / "1.png")], None, home / "rows.jsonl"),
            errors=usage,
        ),
        "prompts by name": Target(
            files={"rows.csv": b"name,prompt\n1.png,a fox\n"},
            read=lambda home: attach_prompts([str(home / "1.png")], None, home / "rows.csv"),
            errors=usage,
        ),
        "arguments": Target(
            files={"arguments.json": b'{"MODEL": "compact", "--seed": 1}', "report.json": b"{}"},
            kept=frozenset(["report.json"]),
            read=lambda home: check_arguments(
                home, home / "report.json", {"MODEL": "compact", "--seed": 1}, "--report"
            ),
            errors=usage,
            named="folder",
        ),
    }
    return image | tables | written | checkpoints | towers | commands


def aigciqa2023(images: Path) -> Callable[[Path], Any]:
    """Its reader, on 2,400 images that are made once."""
    (images / "allimg").mkdir(parents=True)
    for number in range(2400):
        (images / "allimg" / f"{number}.png").touch()

    def read(folder: Path) -> None:
        (folder / "Image").symlink_to(images)
        read_aigciqa2023(folder)

    return read


TARGETS = tuple(
    [f"image {name}" for name in image_files()]
    + ["table", "agiqa3k", "split", "aigiqa20k", "agiqa1k", "aigciqa2023", "imagereward", "pickapic", "pairs"]
    + ["predictions", "report", "preferences", "results", "cached tensor", "cached text"]
    + ["weights", "epoch", "store", "tokenizer", "architecture", "ranking", "predicted", "unreadable"]
    + ["options", "prompts", "prompts.jsonl", "prompts by path", "prompts by name", "arguments"]
)


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return targets(tmp_path_factory.mktemp("whole"))


def test_all_of_them_are_attacked(every: dict[str, Target]) -> None:
    assert tuple(every) == TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_whole_files_are_read(every: dict[str, Target], tmp_path: Path, name: str) -> None:
    lay(every[name], tmp_path / "folder")
    (tmp_path / "elsewhere").mkdir()
    assert hold(every[name], tmp_path / "folder", name, tmp_path / "elsewhere") is None


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_are_read_or_refused(every: dict[str, Target], tmp_path: Path, name: str) -> None:
    attack(every[name], tmp_path, FEW, repeatable=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_many_damaged_files_are_read_or_refused(every: dict[str, Target], tmp_path: Path, name: str) -> None:
    attack(every[name], tmp_path, -(-CASES // len(TARGETS)), repeatable=False)
