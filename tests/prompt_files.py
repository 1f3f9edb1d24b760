"""Images whose prompts are written as each program's own code writes them."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

NEGATIVE = "blurry, (worst quality:1.4)"
USER_COMMENT, EXIF_IFD, MODEL, MAKE, MAKER_NOTE = 0x9286, 0x8769, 0x0110, 0x010F, 0x927C


def picture(seed: int = 0, side: int = 64) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (side // 8, side // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((side, side))


def png(file: Path, texts: Mapping[str, str], image: Image.Image | None = None) -> Path:
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    (image or picture()).save(file, "PNG", pnginfo=info)
    return file


def infotext(prompt: str, seed: int = 7, negative: str = NEGATIVE, more: str = "") -> str:
    """What AUTOMATIC1111's `create_infotext` makes."""
    settings = f"Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: {seed}, Size: 64x64, "
    settings += f'Model hash: 6ce0161689, Model: v1-5-pruned{more}, Lora hashes: "x: 1a2b, y: 3c4d", Version: v1.10.1'
    return f"{prompt}\nNegative prompt: {negative}\n{settings}"


def a1111_png(file: Path, prompt: str) -> Path:
    return png(file, {"parameters": infotext(prompt)})


def a1111_exif(file: Path, prompt: str) -> Path:
    """JPEG and WebP of AUTOMATIC1111 and Forge, by `piexif.helper.UserComment.dump(info, encoding="unicode")`."""
    exif = Image.Exif()
    exif.get_ifd(EXIF_IFD)[USER_COMMENT] = b"UNICODE\0" + infotext(prompt).encode("utf-16be")
    picture().save(file, exif=exif)
    return file


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}


def graph(positive: Mapping[str, dict[str, Any]], to: str = "6", output: int = 0) -> dict[str, Any]:
    """ComfyUI's default workflow in API format, with the nodes that make its positive conditioning, `to` the last."""
    settings = {"seed": 156680208700286, "steps": 20, "cfg": 8.0, "sampler_name": "euler", "scheduler": "normal"}
    links = {"model": ["4", 0], "positive": [to, output], "negative": ["7", 0], "latent_image": ["5", 0]}
    return {
        "3": node("KSampler", **settings, denoise=1.0, **links),
        "4": node("CheckpointLoaderSimple", ckpt_name="v1-5-pruned-emaonly.safetensors"),
        "5": node("EmptyLatentImage", width=512, height=512, batch_size=1),
        "7": node("CLIPTextEncode", text="text, watermark", clip=["4", 1]),
        **positive,
        "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        "9": node("SaveImage", filename_prefix="ComfyUI", images=["8", 0]),
    }


def encode(text: Any) -> dict[str, Any]:
    return node("CLIPTextEncode", text=text, clip=["4", 1])


def workflow(prompt: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the window's format that names the links between a graph's nodes."""
    links = []
    for target, each in prompt.items():
        for slot, value in enumerate(each["inputs"].values()):
            if isinstance(value, list):
                kind = "CLIP" if value == ["4", 1] else "CONDITIONING"
                links.append([len(links), int(value[0]), value[1], int(target), slot, kind])
    return {"last_node_id": 9, "nodes": [], "links": links, "groups": [], "config": {}, "extra": {}, "version": 0.4}


def comfyui_png(file: Path, prompt: Mapping[str, Any], *, window: bool = True) -> Path:
    """ComfyUI's `SaveImage`; a graph sent to its API, without its window, has no workflow."""
    metadata = {"prompt": json.dumps(prompt)}
    for name, value in ({"workflow": workflow(prompt)} if window else {}).items():
        metadata[name] = json.dumps(value)
    info = PngInfo()
    for key, text in metadata.items():
        info.add_text(key, text)
    picture().save(file, pnginfo=info, compress_level=4)
    return file


def comfyui_webp(file: Path, prompt: Mapping[str, Any]) -> Path:
    """ComfyUI's `SaveAnimatedWEBP`."""
    exif = Image.Exif()
    exif[MODEL] = f"prompt:{json.dumps(prompt)}"
    exif[MAKE] = f"workflow:{json.dumps(workflow(prompt))}"
    picture().save(file, save_all=True, duration=100, append_images=[], exif=exif, lossless=True)
    return file


def invokeai_png(file: Path, prompt: str, **more: Any) -> Path:
    found = {"app_version": "5.6.0", "generation_mode": "sdxl_txt2img", "positive_prompt": prompt}
    found |= {"negative_prompt": NEGATIVE, "seed": 7, "cfg_scale": 7.5, "steps": 30, "scheduler": "euler"} | more
    return png(file, {"invokeai_metadata": json.dumps({k: v for k, v in found.items() if v is not None})})


def dream_png(file: Path, prompt: str) -> Path:
    return png(file, {"Dream": f'"{prompt} [{NEGATIVE}]" -s 50 -S 7 -W 512 -H 512 -C 7.5 -A k_lms'})


def sd_metadata_png(file: Path, prompt: str) -> Path:
    image = {"prompt": [{"prompt": f"{prompt} [{NEGATIVE}]", "weight": 1.0}], "steps": 50, "sampler": "k_lms"}
    return png(file, {"sd-metadata": json.dumps({"model": "stable diffusion", "image": image})})


def fooocus_texts(prompt: str) -> str:
    found = {"prompt": prompt, "negative_prompt": NEGATIVE, "full_prompt": [f"cinematic still {prompt}"], "steps": 30}
    found |= {"base_model": "juggernautXL", "base_model_hash": "1a2b", "sampler": "dpmpp_2m_sde_gpu", "seed": "7"}
    found |= {"scheduler": "karras", "guidance_scale": 4.0, "sharpness": 2.0, "version": "Fooocus v2.5.5"}
    return json.dumps(found)


def fooocus_png(file: Path, prompt: str) -> Path:
    return png(file, {"parameters": fooocus_texts(prompt), "fooocus_scheme": "fooocus"})


def fooocus_exif(file: Path, prompt: str) -> Path:
    """Fooocus's `get_exif`, which writes a text into the first directory."""
    exif = Image.Exif()
    exif[USER_COMMENT], exif[0x0131], exif[MAKER_NOTE] = fooocus_texts(prompt), "Fooocus v2.5.5", "fooocus"
    picture().save(file, exif=exif)
    return file


def novelai_png(file: Path, prompt: str, *characters: str) -> Path:
    comment: dict[str, Any] = {
        "prompt": prompt,
        "steps": 28,
        "sampler": "k_euler_ancestral",
        "seed": 7,
        "scale": 5.0,
        "uc": NEGATIVE,
    }
    captions = [{"char_caption": text, "centers": [{"x": 0.5, "y": 0.5}]} for text in characters]
    comment |= {"v4_prompt": {"caption": {"base_caption": prompt, "char_captions": captions}}}
    texts = {"Title": "NovelAI generated image", "Description": prompt, "Software": "NovelAI"}
    texts |= {"Source": "NovelAI Diffusion V4 37442FCA", "Comment": json.dumps(comment)}
    return png(file, texts)


def kohya(folder: Path, name: str, caption: str, ending: str = ".txt") -> Path:
    picture().save(folder / name)
    (folder / name).with_suffix(ending).write_text(caption, encoding="utf-8")
    return folder / name


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunks(file: Path, *chunks: bytes) -> Path:
    """A PNG with further chunks after its header."""
    picture().save(file, "PNG")
    data = file.read_bytes()
    file.write_bytes(data[:33] + b"".join(chunks) + data[33:])
    return file


POSITIVE: dict[str, Callable[[str], tuple[dict[str, Any], str]]] = {
    "encode": lambda text: ({"6": encode(text)}, "6"),
    "primitive": lambda text: ({"6": encode(["10", 0]), "10": node("PrimitiveStringMultiline", value=text)}, "6"),
    "concatenate": lambda text: (
        {
            "6": encode(["12", 0]),
            "10": node("PrimitiveString", value=text.split(" ", 1)[0]),
            "12": node("StringConcatenate", string_a=["10", 0], string_b=text.split(" ", 1)[1], delimiter=" "),
        },
        "6",
    ),
    "controlnet": lambda text: (
        {
            "6": encode(text),
            "10": node("ControlNetApplyAdvanced", strength=1.0, positive=["6", 0], negative=["7", 0], image=["11", 0]),
            "11": node("LoadImage", image="pose.png"),
        },
        "10",
    ),
    "sdxl": lambda text: (
        {"6": node("CLIPTextEncodeSDXL", width=1024, height=1024, text_g=text, text_l=text, clip=["4", 1])},
        "6",
    ),
    "flux": lambda text: (
        {
            "6": node("CLIPTextEncodeFlux", clip_l=text, t5xxl=text, guidance=3.5, clip=["4", 1]),
            "10": node("FluxGuidance", guidance=3.5, conditioning=["6", 0]),
        },
        "10",
    ),
}
"""Ways to write the positive conditioning of a ComfyUI graph: its nodes, and the one that the sampler reads."""


def flux_graph(text: str) -> dict[str, Any]:
    """ComfyUI's example for FLUX: a sampler whose guider reads the conditioning."""
    return {
        "6": encode(text),
        "4": node("DualCLIPLoader", clip_name1="t5xxl_fp16.safetensors", clip_name2="clip_l.safetensors", type="flux"),
        "13": node(
            "SamplerCustomAdvanced",
            noise=["25", 0], guider=["22", 0], sampler=["16", 0], sigmas=["17", 0], latent_image=["27", 0],
        ),
        "16": node("KSamplerSelect", sampler_name="euler"),
        "17": node("BasicScheduler", scheduler="simple", steps=20, denoise=1.0, model=["12", 0]),
        "12": node("UNETLoader", unet_name="flux1-dev.safetensors", weight_dtype="default"),
        "22": node("BasicGuider", model=["12", 0], conditioning=["26", 0]),
        "25": node("RandomNoise", noise_seed=219670278747233),
        "26": node("FluxGuidance", guidance=3.5, conditioning=["6", 0]),
        "27": node("EmptySD3LatentImage", width=1024, height=1024, batch_size=1),
        "8": node("VAEDecode", samples=["13", 0], vae=["10", 0]),
        "10": node("VAELoader", vae_name="ae.safetensors"),
        "9": node("SaveImage", filename_prefix="ComfyUI", images=["8", 0]),
    }  # fmt: skip
