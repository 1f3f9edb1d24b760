"""The node pack as ComfyUI loads it, what its nodes declare, and ComfyUI's own nodes that the workflows use."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

PACK = Path(__file__).resolve().parents[1] / "integrations" / "comfyui"
WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))

CORE: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "CheckpointLoaderSimple": ({"ckpt_name": str}, ("MODEL", "CLIP", "VAE")),
    "CLIPTextEncode": ({"text": "STRING", "clip": "CLIP"}, ("CONDITIONING",)),
    "EmptyLatentImage": ({"width": int, "height": int, "batch_size": int}, ("LATENT",)),
    "ImageBatch": ({"image1": "IMAGE", "image2": "IMAGE"}, ("IMAGE",)),
    "KSampler": (
        {
            "model": "MODEL",
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "latent_image": "LATENT",
            "seed": int,
            "steps": int,
            "cfg": float,
            "sampler_name": str,
            "scheduler": str,
            "denoise": float,
        },
        ("LATENT",),
    ),
    "LatentUpscaleBy": ({"samples": "LATENT", "upscale_method": str, "scale_by": float}, ("LATENT",)),
    "LoadImage": ({"image": str}, ("IMAGE", "MASK")),
    "PreviewAny": ({"source": "*"}, ()),
    "PreviewImage": ({"images": "IMAGE"}, ()),
    "PrimitiveStringMultiline": ({"value": str}, ("STRING",)),
    "SaveImage": ({"images": "IMAGE", "filename_prefix": str}, ()),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ("IMAGE",)),
}
"""Inputs and output types of ComfyUI's nodes; the slow test asks a real ComfyUI the same."""

_WIDGETS = {"STRING": str, "INT": int, "FLOAT": float, "BOOLEAN": bool}


def load_pack(folder: Path = PACK) -> ModuleType:
    """Import the folder as ComfyUI does: from its place, under a name that is its path."""
    name = str(folder).replace(".", "_x_")
    specification = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module


def read_workflow(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def workflow_faults(workflow: dict[str, Any], nodes: dict[str, Any]) -> list[str]:
    """What ComfyUI would refuse: unknown nodes and inputs, missing ones, links to nowhere or of another type."""
    faults = []
    for place, node in workflow.items():
        kind = node["class_type"]
        if kind not in nodes and kind not in CORE:
            faults.append(f"{place}: no node {kind}")
            continue
        required, optional = _inputs(kind, nodes)
        faults += [f"{place}: {kind} lacks {name}" for name in required.keys() - node["inputs"].keys()]
        for name, value in node["inputs"].items():
            expected = (required | optional).get(name)
            if expected is None:
                faults.append(f"{place}: {kind} has no input {name}")
            elif isinstance(value, list):
                faults += [f"{place}.{name}: {fault}" for fault in _link_faults(value, expected, workflow, nodes)]
            elif isinstance(expected, list):
                faults += [] if value in expected else [f"{place}.{name}: {value!r} is none of {expected}"]
            elif not isinstance(value, _WIDGETS.get(expected, expected) if isinstance(expected, str) else expected):
                faults.append(f"{place}.{name}: {value!r} is no {expected}")
    return faults


def _inputs(kind: str, nodes: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    if kind in CORE:
        return CORE[kind][0], {}
    declared = nodes[kind].INPUT_TYPES()
    required, optional = (
        {name: given[0] for name, given in declared.get(part, {}).items()} for part in ("required", "optional")
    )
    return required, optional


def _link_faults(link: list[Any], expected: Any, workflow: dict[str, Any], nodes: dict[str, Any]) -> list[str]:
    source, slot = link
    if source not in workflow:
        return [f"no node {source}"]
    kind = workflow[source]["class_type"]
    outputs = CORE[kind][1] if kind in CORE else nodes[kind].RETURN_TYPES if kind in nodes else ()
    if slot >= len(outputs):
        return [f"{kind} has no output {slot}"]
    accepted = "STRING" if expected is str else expected
    return [] if accepted in ("*", outputs[slot]) else [f"{outputs[slot]} of {kind} into {expected}"]
