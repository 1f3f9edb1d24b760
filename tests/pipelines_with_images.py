"""Tiny pipelines that take images: image to image, inpainting, ControlNet and editing, of the families' parts."""

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pipelines
import torch
from diffusers import ControlNetModel, FluxControlNetModel, QwenImageControlNetModel, SD3ControlNetModel
from PIL import Image
from pipelines import SIDE
from pipelines_current import CALL, CURRENT_FAMILIES

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8))
MASK = Image.fromarray(np.full((SIDE, SIDE), 255, dtype=np.uint8))
_IMAGES = {
    "image": PICTURE, "mask_image": MASK, "control_image": PICTURE, "strength": 0.8, "control_mask": MASK,
    "max_sequence_length": 64, "_auto_resize": False, "max_area": SIDE**2,
}  # fmt: skip


def _other(part: Any, **config: Any) -> Any:
    """Return a part of the same class, with some settings changed, and other weights."""
    own = {name: value for name, value in part.config.items() if not name.startswith("_")}
    return type(part).from_config({**own, **config}).eval()


def _wider(channels: int) -> Callable[[Any], Any]:
    return lambda pipe: _other(pipe.transformer, in_channels=channels, out_channels=16)


def _controlnet(pipe: Any, extra: int = 0) -> Any:
    kind = type(pipe).__name__
    if "unet" in pipe.components:
        net: Any = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 16))
    elif kind == "StableDiffusion3Pipeline":
        config = {**pipe.transformer.config, "num_layers": 1, "extra_conditioning_channels": extra}
        net = SD3ControlNetModel.from_config(config)
    elif kind == "FluxPipeline":
        config = {**pipe.transformer.config, "num_layers": 1, "num_single_layers": 0}
        net = FluxControlNetModel.from_config(config)
    else:
        net = QwenImageControlNetModel.from_config({**pipe.transformer.config, "num_layers": 1})
    for weight in net.parameters():  # zero at first, so that the control image would not count
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.2)
    return net.eval()


# fmt: off
_SD, _SDXL, _KINDS = "sd StableDiffusion", "sdxl StableDiffusionXL", ("", "Img2Img", "Inpaint")
_PLAIN = [
    f"{family}{kind}" for kind in _KINDS[1:]
    for family in (_SD, _SDXL, "flux Flux", "qwen_image QwenImage", "z_image ZImage")
]
_PLAIN += ["sd3 StableDiffusion3Img2Img", "flux FluxKontext", "flux FluxKontextInpaint", "flux_2 Flux2"]
_PLAIN += ["flux_2_klein Flux2Klein", "flux_2_klein Flux2KleinInpaint"]
_WITH_CONTROLNET = [f"{family}ControlNet{kind}" for family in (_SD, _SDXL, "flux Flux") for kind in _KINDS]
_WITH_CONTROLNET += ["sd3 StableDiffusion3ControlNet", "qwen_image QwenImageControlNet"]
_OTHER: dict[str, dict[str, Callable[[Any], Any]]] = {
    **{f"{kind}InstructPix2Pix": {"unet": lambda pipe: _other(pipe.unet, in_channels=8)} for kind in (_SD, _SDXL)},
    f"{_SD}Upscale": {
        "unet": lambda pipe: _other(pipe.unet, in_channels=7, num_class_embeds=1000),
        "low_res_scheduler": lambda _: diffusers.DDPMScheduler(),
    },
    "sd3 StableDiffusion3Inpaint": {
        "transformer": _wider(16), "vae": lambda pipe: _other(pipe.vae, latent_channels=16),
    },
    "sd3 StableDiffusion3ControlNetInpainting": {"controlnet": lambda pipe: _controlnet(pipe, extra=1)},
    **{f"flux FluxControl{kind}": {"transformer": _wider(32)} for kind in _KINDS},
    "flux FluxFill": {"transformer": _wider(48)},
}
PARTS = {**{name: {} for name in _PLAIN}, **{name: {"controlnet": _controlnet} for name in _WITH_CONTROLNET}, **_OTHER}
"""The parts that are not those of the family's text-to-image pipeline, by family and class."""
# fmt: on


def pipeline_with_images(name: str) -> tuple[Any, dict[str, Any]]:
    """Return a pipeline of `PARTS`, and the arguments of its call."""
    family, kind = name.split()
    given = {**pipelines.FAMILIES, **CURRENT_FAMILIES}[family]()
    cls = getattr(diffusers, f"{kind}Pipeline")
    with pipelines._weights_of(seed=40):
        parts = {**given.components, **{part: build(given) for part, build in PARTS[name].items()}}
    wanted, parts["requires_safety_checker"] = inspect.signature(cls.__init__).parameters, False
    pipe = cls(**{part: parts[part] for part in wanted if part in parts})
    call = {**pipelines.FEW_STEPS, **CALL.get(family, {}), "num_inference_steps": 3, **_IMAGES}
    if family.startswith("flux_2"):
        call["image"] = PICTURE.resize((64, 64))  # the least that they take
    taken = inspect.signature(cls.__call__).parameters
    return pipelines._quiet(pipe), {argument: value for argument, value in call.items() if argument in taken}
