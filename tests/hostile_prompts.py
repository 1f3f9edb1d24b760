"""Images of 64 px whose texts are damaged or made up: a reader finds no prompt, within bounds, and runs nothing."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from prompt_files import (
    EXIF_IFD,
    MODEL,
    USER_COMMENT,
    a1111_png,
    chunk,
    comfyui_png,
    encode,
    graph,
    infotext,
    kohya,
    node,
    picture,
    png,
    with_chunks,
)  # fmt: skip

BOMB = zlib.compress(bytes(2**26), 9)  # 64 MiB
MUCH = 17 * 2**20


def ztxt(packed: bytes, key: bytes = b"parameters") -> bytes:
    return chunk(b"zTXt", key + b"\0\0" + packed)


def itxt(packed: bytes) -> bytes:
    return chunk(b"iTXt", b"parameters\0\1\0\0\0" + packed)


def text(key: bytes, value: bytes) -> bytes:
    return chunk(b"tEXt", key + b"\0" + value)


def chunks(*parts: bytes) -> Callable[[Path], Path]:
    return lambda folder: with_chunks(folder / "image.png", *parts)


def comfy(prompt: Any) -> Callable[[Path], Path]:
    return lambda folder: png(folder / "image.png", {"prompt": json.dumps(prompt)})


def exif(ending: str, comment: bytes, tag: int = USER_COMMENT) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        found = Image.Exif()
        if tag == USER_COMMENT:
            found.get_ifd(EXIF_IFD)[tag] = comment
        else:
            found[tag] = comment.decode()
        picture().save(folder / f"image{ending}", exif=found)
        return folder / f"image{ending}"

    return write


def sidecar(ending: str, data: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        file = kohya(folder, "image.png", "", ending) if ending != "metadata.jsonl" else folder / "image.png"
        picture().save(file)
        (folder / ending if ending == "metadata.jsonl" else file.with_suffix(ending)).write_bytes(data)
        return file

    return write


def both_sidecars(folder: Path) -> Path:
    (folder / "image.caption").write_text("a blue car")
    return kohya(folder, "image.png", "a red fox")


def two_samplers(folder: Path) -> Path:
    prompt = graph({"6": encode("a red fox"), "16": encode("a blue car")})
    again = node("KSampler", **dict(prompt["3"]["inputs"], positive=["16", 0], latent_image=["3", 0]))
    return comfyui_png(folder / "image.png", prompt | {"13": again, "18": node("SaveLatent", samples=["13", 0])})


def ladder(count: int, kind: str, *names: str) -> dict[str, Any]:
    """Nodes that each read the next one several times."""
    steps = {f"s{i}": node(kind, **{name: [f"s{i + 1}", 0] for name in names}) for i in range(count)}
    return steps | {f"s{count}": node("PrimitiveString", value="x" * 1000)}


ladders = {
    "doubling text": graph({"6": encode(["s0", 0]), **ladder(60, "StringConcatenate", "string_a", "string_b")}),
    "doubling conditioning": graph(ladder(60, "ConditioningCombine", "conditioning_1", "conditioning_2"), "s0"),
    "deep": graph(ladder(5_000, "ConditioningSetArea", "conditioning"), "s0"),
}
CODE = "__import__('pathlib').Path('executed').touch()"

HOSTILE: dict[str, Callable[[Path], Path]] = {
    "zTXt bomb": chunks(ztxt(BOMB)),
    "iTXt bomb": chunks(itxt(BOMB)),
    "bomb of another key": chunks(ztxt(BOMB, b"workflow")),
    "many bombs": chunks(*[ztxt(zlib.compress(bytes(2**20), 9), b"k%d" % i) for i in range(64)]),
    "long tEXt": chunks(text(b"parameters", b"a" * MUCH)),
    "long iTXt": chunks(chunk(b"iTXt", b"parameters\0\0\0\0\0" + b"a" * MUCH)),
    "many long texts": chunks(*[text(b"k%d" % i, b"a" * 2**20) for i in range(20)]),
    "cut zTXt": chunks(ztxt(zlib.compress(b"a fox" * 1000)[:20])),
    "damaged zTXt": chunks(ztxt(b"no zlib at all")),
    "iTXt without its parts": chunks(chunk(b"iTXt", b"parameters\0\1")),
    "two texts": chunks(text(b"parameters", b"a red fox"), text(b"parameters", b"a blue car")),
    "graph that is no JSON": chunks(text(b"prompt", b'{"3": {"class_type": "KSam')),
    "nested JSON": chunks(text(b"prompt", b'{"a":' * 300_000)),
    "many values": chunks(text(b"prompt", b"[" + b"[]," * 2_000_000 + b"0]")),
    "graph that is a list": comfy([1, 2, 3]),
    "cycle of conditionings": comfy(graph({"6": node("ConditioningConcat", conditioning_to=["6", 0])})),
    "cycle of texts": comfy(graph({"6": encode(["10", 0]), "10": node("Text", text=["11", 0]),
                                   "11": node("Text", text=["10", 0])})),
    "cycle of samplers": comfy({"1": node("KSampler", seed=1, positive=["1", 0], latent_image=["1", 0])}),
    "doubling texts": comfy(ladders["doubling text"]),
    "doubling conditionings": comfy(ladders["doubling conditioning"]),
    "deep graph": comfy(ladders["deep"]),
    "two samplers": two_samplers,
    "links to nowhere": comfy(graph({"6": encode(["99", 0])})),
    "node that made its text": comfy(graph({"6": encode(["10", 0]), "10": node("RunPython", code=CODE)})),
    "half of a character": comfy(graph({"6": encode("a fox \ud800")})),
    "InvokeAI with numbers": lambda folder: png(folder / "image.png", {"invokeai_metadata": '{"positive_prompt": 3}'}),
    "Fooocus cut off": lambda folder: png(folder / "image.png", {"parameters": '{"prompt": "a red f'}),
    "sd-metadata of lists": lambda folder: png(folder / "image.png", {"sd-metadata": "[[[]]]"}),
    "EXIF of half characters": exif(".jpg", b"UNICODE\0" + b"Steps: 20"),
    "ComfyUI's EXIF cut off": exif(".webp", b'prompt:{"3": ', MODEL),
    "blank prompt": lambda folder: a1111_png(folder / "image.png", " (<lora:x:1>:1.2) "),
    "only a LoRA": lambda folder: png(folder / "image.png", {"parameters": infotext("<lora:x:1>", negative="a car")}),
    "long sidecar": sidecar(".txt", b"a" * MUCH),
    "sidecar of bytes": sidecar(".caption", bytes(range(128, 256))),
    "sidecars that differ": both_sidecars,
    "long line of metadata.jsonl": sidecar("metadata.jsonl", b'{"file_name": "image.png", "text": "' + b"a" * MUCH),
    "metadata.jsonl that is no JSON": sidecar("metadata.jsonl", b'{"file_name": "image.png", "text": '),
    "metadata.jsonl of numbers": sidecar("metadata.jsonl", b'{"file_name": 3, "text": {"a": 1}}'),
    "nothing at all": chunks(),
}  # fmt: skip
"""Writers of an image into a folder, by what is wrong with it."""


def write_hostile(folder: Path, kind: str) -> Path:
    return HOSTILE[kind](folder)
