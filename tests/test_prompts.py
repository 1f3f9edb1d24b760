"""`read_prompt` on files as the programs write them, and on made-up ones."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import prompt_files as files
import psutil
import pytest
from hostile_prompts import HOSTILE, write_hostile
from PIL import Image
from prompt_files import NEGATIVE, POSITIVE, encode, graph, node

from aigiqa_reward import images
from aigiqa_reward.images import ImageError, metadata, read_prompt

PROMPT = "a red fox in the snow"
RAW = "a (red:1.2) fox <lora:x:.8> in the snow"
Write = Callable[[Path, str], Path]

WRITERS: dict[str, tuple[str, Write]] = {
    "a1111 png": (".png", files.a1111_png), "a1111 jpeg": (".jpg", files.a1111_exif),
    "a1111 webp": (".webp", files.a1111_exif), "invokeai": (".png", files.invokeai_png),
    "invokeai 2": (".png", files.sd_metadata_png), "invokeai 1": (".png", files.dream_png),
    "fooocus png": (".png", files.fooocus_png), "fooocus jpeg": (".jpg", files.fooocus_exif),
    "novelai": (".png", files.novelai_png),
}  # fmt: skip


@pytest.mark.parametrize("program", WRITERS)
@pytest.mark.parametrize("raw", [PROMPT, RAW, "ein Füchslein, 赤い狐"])
def test_it_reads_what_a_program_writes(program: str, raw: str, tmp_path: Path) -> None:
    ending, write = WRITERS[program]
    found = read_prompt(write(tmp_path / f"image{ending}", raw))
    assert found is not None
    assert (found.raw, found.negative, found.source) == (raw, NEGATIVE, "embedded")
    assert found.text == (PROMPT if raw == RAW else raw)
    assert read_prompt(tmp_path / f"image{ending}", "sidecar") is None


@pytest.mark.parametrize("way", POSITIVE)
@pytest.mark.parametrize("window", [True, False])
def test_it_reads_the_text_that_reaches_comfyuis_sampler(way: str, window: bool, tmp_path: Path) -> None:
    prompt = graph(*POSITIVE[way](RAW))
    for file in (
        files.comfyui_png(tmp_path / "image.png", prompt, window=window),
        files.comfyui_webp(tmp_path / "image.webp", prompt),
    ):
        found = read_prompt(file)
        assert found == images.Prompt(PROMPT, RAW, "text, watermark", "embedded")


def with_nodes(**more: Any) -> dict[str, Any]:
    return graph({"6": encode(PROMPT)}) | more


def second_sampler(positive: str) -> dict[str, Any]:
    first = graph({"6": encode(PROMPT)})
    again = dict(first["3"]["inputs"], positive=["16", 0], latent_image=["3", 0])
    return first | {"16": encode(positive), "13": node("KSampler", **again), "8": node("VAEDecode", samples=["13", 0])}


COMBINED = {
    "6": node("ConditioningCombine", conditioning_1=["11", 0], conditioning_2=["12", 0]),
    "11": encode("a red fox"),
    "12": node("ConditioningSetArea", conditioning=["13", 0], width=64),
    "13": encode(["14", 0]),
    "14": node("Reroute", **{"": ["15", 0]}),
    "15": node("Text Multiline", text="snow"),
}
LOADER = node("Efficient Loader", ckpt_name="a.safetensors", positive=["11", 0], negative=["7", 0], batch_size=1)
SHOWN = node("ShowText|pysssss", text=["11", 0], text_0="shown before")
ORPHAN = {"20": node("KSampler", seed=1, positive=["21", 0], negative=["7", 0]), "21": encode("an orphan")}


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (files.flux_graph(PROMPT), PROMPT),
        (second_sampler(PROMPT), PROMPT),
        (with_nodes(**ORPHAN), PROMPT),
        (graph(COMBINED), "a red fox, snow"),
        (graph({"6": LOADER, "7": node("Text", text="bad"), "11": node("Text", text=PROMPT)}, output=1), PROMPT),
        (graph({"6": encode(["23", 0]), "23": SHOWN, "11": node("Text", text=PROMPT)}), PROMPT),
        (with_nodes(**{"7": node("ConditioningZeroOut", conditioning=["6", 0])}), PROMPT),
    ],
    ids=["guider", "two passes", "orphan", "combined", "loader", "shown", "zeroed"],
)
def test_it_follows_graphs(prompt: dict[str, Any], text: str, tmp_path: Path) -> None:
    found = read_prompt(files.comfyui_png(tmp_path / "image.png", prompt))
    assert found is not None
    assert found.text == text


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        (second_sampler("a blue car"), "several different prompts: 'a red fox in the snow', 'a blue car'"),
        (graph({"6": encode(["10", 0]), "10": node("OllamaGenerate", model="llama", prompt="x")}), "OllamaGenerate"),
        (graph({"6": node("ConditioningConcat", conditioning_to=["6", 0])}), "a cycle"),
    ],
)
def test_it_says_why_a_graph_has_no_one_prompt(prompt: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=reason) as raised:
        read_prompt(files.comfyui_png(tmp_path / "image.png", prompt))
    assert str(raised.value).startswith(str(tmp_path / "image.png"))


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("(red:1.2) fox", "red fox"),
        ("((red)) [fox], (snow: 0.5)", "red fox, snow"),
        ("fox, <lora:detail-v2:.8>, <hypernet:a b:1>, snow", "fox, snow"),
        ("a fox BREAK in the snow", "a fox in the snow"),
        ("fox, (embedding:style/ink.pt:1.1), embedding:bad snow", "fox, snow"),
        ("[cat:fox:0.5] and [snow:.3]", "fox and snow"),
        (r"rem \(re:zero\), c:\\d", r"rem (re:zero), c:\d"),
        ("a fox: 3 cubs, at 12:30", "a fox: 3 cubs, at 12:30"),
        ("unbalanced ((fox", "unbalanced fox"),
    ],
)
def test_it_takes_off_what_is_no_text(raw: str, text: str, tmp_path: Path) -> None:
    found = read_prompt(files.a1111_png(tmp_path / "image.png", raw))
    assert found is not None
    assert (found.text, found.raw) == (text, raw)


def test_it_takes_off_embeddings_marks_of_novelai_and_of_invokeai(tmp_path: Path) -> None:
    more = ', TI hashes: "ink-style: 1a2b, bad-hands: 3c4d"'
    embedded = files.png(tmp_path / "a.png", {"parameters": files.infotext("fox, (ink-style:0.9), ink", more=more)})
    novelai = files.novelai_png(tmp_path / "b.png", "{{red}} fox, 1.2::snow::, [old]", "girl, {hat}", "boy")
    invokeai = files.invokeai_png(tmp_path / "c.png", "(red)1.3 fox++, well-known (snow)-")
    found = [read_prompt(file) for file in (embedded, novelai, invokeai)]
    assert [each and each.text for each in found] == [
        "fox, ink",
        "red fox, snow, old, girl, hat, boy",
        "red fox, well-known snow",
    ]


def test_sidecars_come_first_and_must_agree(tmp_path: Path) -> None:
    file = files.a1111_png(tmp_path / "1.png", "in the file")
    assert read_prompt(file, "sidecar") is None
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "./1.png", "text": "listed"}\n\n{"file_name": "2.png"}\n')
    assert read_prompt(file) == images.Prompt("listed", "listed", None, "sidecar")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "of now"}\n')
    assert read_prompt(file) == images.Prompt("of now", "of now", None, "sidecar")
    (tmp_path / "1.caption").write_text("of now\n")
    assert read_prompt(file) == images.Prompt("of now", "of now", None, "sidecar")
    (tmp_path / "1.txt").write_text(files.infotext("with its settings"))  # as AUTOMATIC1111 saves texts
    with pytest.raises(ImageError, match="several different prompts beside it"):
        read_prompt(file)
    (tmp_path / "1.caption").unlink()
    (tmp_path / "metadata.jsonl").unlink()
    assert read_prompt(file) == images.Prompt("with its settings", "with its settings", NEGATIVE, "sidecar")
    assert read_prompt(file, "embedded") == images.Prompt("in the file", "in the file", NEGATIVE, "embedded")


def test_there_may_be_no_prompt(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif.get_ifd(files.EXIF_IFD)[files.USER_COMMENT] = b"ASCII\0\0\0" + b"a holiday"
    files.picture().save(tmp_path / "photo.jpg", exif=exif)
    files.picture().save(tmp_path / "plain.png")
    files.picture().save(tmp_path / "other.gif")
    files.png(tmp_path / "gimp.png", {"Comment": "Created with GIMP"})
    files.a1111_png(tmp_path / "empty.png", "  <lora:x:1> ")
    files.comfyui_png(tmp_path / "upscaled.png", {"1": node("LoadImage", image="a.png")})
    files.kohya(tmp_path, "blank.png", " \n")
    found = {file.name: read_prompt(file) for file in tmp_path.iterdir() if file.suffix != ".txt"}
    assert len(found) == 7
    assert set(found.values()) == {None}


def test_arguments_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="source: expected 'auto', 'embedded' or 'sidecar', got 'file'"):
        read_prompt("a.png", "file")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="path: expected the path of an image file, got Image; save the image first"):
        read_prompt(files.picture())  # pyright: ignore[reportArgumentType]
    with pytest.raises(ImageError, match=r"missing\.png: no such file"):
        read_prompt(tmp_path / "missing.png")


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused_or_have_no_prompt_within_bounds(kind: str, tmp_path: Path) -> None:
    file = write_hostile(tmp_path, kind)
    tracemalloc.start()
    try:
        assert read_prompt(file) is None
    except ImageError as error:
        assert str(file) in str(error)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 150_000_000
    assert sorted(path.name for path in tmp_path.iterdir() if "executed" in path.name) == []
    assert images.load(file).shape == (3, 64, 64)  # without prompts, the pixels as ever


def test_memory_stays_flat_over_all_hostile_files(tmp_path: Path) -> None:
    for number, kind in enumerate(HOSTILE):
        (tmp_path / str(number)).mkdir()
        write_hostile(tmp_path / str(number), kind)
    held = []
    for _ in range(3):
        for file in tmp_path.rglob("*.*"):
            with suppress(ImageError):
                read_prompt(file)
        held.append(psutil.Process().memory_info().rss)
    assert max(held[1:]) - held[0] < 10_000_000


@pytest.mark.parametrize("call", [{}, {"num_inference_steps": 20, "guidance_scale": 3.0, "negative_prompt": "a (car)"}])
def test_what_we_write_is_read_back_and_has_settings(call: dict[str, Any], tmp_path: Path) -> None:
    prompt = r"a fox (vulpes) [old], c:\d: 3"
    (tmp_path / "image.png").write_bytes(metadata.png(files.picture(), prompt, seed=3, call=call))
    found = read_prompt(tmp_path / "image.png")
    assert found is not None
    assert (found.text, found.negative) == (prompt, r"a \(car\)" if call else None)
    with Image.open(tmp_path / "image.png") as image:
        settings = image.info["parameters"].split("\n")[-1]
    expected = "Steps: 20, CFG scale: 3.0, " if call else ""
    assert settings == f"{expected}Seed: 3, Size: 64x64, Version: aigiqa-reward"
