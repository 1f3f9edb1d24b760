"""Heat maps of images: where a reward finds distortions, or where its score reacts to the pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from aigiqa_reward import images as pixels
from aigiqa_reward.rewards.bound import device_of
from aigiqa_reward.types import RewardOutput, as_reward_output

KINDS = ("auto", "distortion", "gradient")

_SMOOTHING = 64
"""The longer side over half the window in which gradients are averaged: chosen here, since single pixels are noise."""


@dataclass(frozen=True, kw_only=True)
class HeatMaps:
    """One heat map an image.

    Attributes:
        kind: "distortion" or "gradient", see `heat_maps`.
        maps: (B, H, W) float32 in [0, 1], on the CPU, of the images' size.
    """

    kind: str
    maps: Float[Tensor, "batch height width"]


def heat_maps(reward: Any, images: Tensor, prompts: Sequence[str] | str | None = None, kind: str = "auto") -> HeatMaps:
    """Where in each image the reward finds something.

    "distortion": of a reward that gives `details["distortion_maps"]` (cpa_iqa), the highest of its maps at each place.
    The values are the model's own, so that two images can be compared; they were learned from whole-image scores.
    "gradient": the length of the gradient of `total` in the pixels, averaged over a small window, as a share of the
    image's own highest. It shows where a change would move the score most, not whether the place is good or bad, and
    says nothing across images. It costs about twice what scoring does.

    Args:
        reward: a Reward, or another RewardFunction that gives what `kind` needs.
        images: (B, 3, H, W) floating point in [0, 1]; worked on one at a time, on the reward's device.
        prompts: B strings, one for all, or None.
        kind: "distortion", "gradient", or "auto": distortion maps where the reward gives them, else gradients.

    Raises:
        TypeError, ValueError: images or prompts that the reward refuses; an unknown kind; a reward without distortion
            maps, or through which no gradient passes.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    pixels.check(images)
    texts = [prompts] * len(images) if prompts is None or isinstance(prompts, str) else list(prompts)
    if len(texts) != len(images):
        raise ValueError(f"prompts: expected one per image, got {len(texts)} prompts for {len(images)} images")
    found: list[Tensor] = []
    for image, text in zip(images, texts, strict=True):
        given = None if text is None else [text]
        if kind != "gradient":
            maps = _distortion(reward, image[None], given)
            if maps is None and kind == "distortion":
                raise ValueError(
                    "kind: this reward gives no distortion maps; use a reward that does (cpa_iqa), or kind='gradient'"
                )
            kind = "gradient" if maps is None else "distortion"
            if maps is not None:
                found.append(maps)
                continue
        found.append(_gradient(reward, image[None], given))
    return HeatMaps(kind=kind, maps=torch.cat(found))


def draw_heat_maps(images: Tensor, heat: HeatMaps, *, opacity: float = 0.6) -> Tensor:
    """Lay heat maps over the images in gray: dark violet at 0, over red, to light yellow at 1 (magma).

    Args:
        images: (B, 3, H, W) in [0, 1], of which the maps are.
        heat: what `heat_maps` returned.
        opacity: of the colors, in [0, 1].

    Returns:
        (B, 3, H, W) float32 in [0, 1] on the CPU, for eyes and not for rewards.

    Raises:
        ValueError: images and maps of different sizes, or an opacity out of range.
    """
    import matplotlib

    pixels.check(images)
    expected = (len(heat.maps), 3, *heat.maps.shape[1:])
    if tuple(images.shape) != expected:
        raise ValueError(f"images: expected {expected}, as the maps have it, got {tuple(images.shape)}")
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity: expected a number in [0, 1], got {opacity!r}")
    shades = torch.from_numpy(matplotlib.colormaps["magma"](range(256))[:, :3]).float()
    colors = shades[(heat.maps * 255).round().long()].permute(0, 3, 1, 2)
    seen = images.detach().to("cpu", torch.float32).clamp(0, 1)
    return (1 - opacity) * seen.mean(dim=1, keepdim=True) + opacity * colors


def _distortion(reward: Any, image: Tensor, prompts: list[str] | None) -> Tensor | None:
    """(1, H, W) of one image, or None where the reward gives no maps."""
    with torch.no_grad():
        output = _called(reward, image, prompts)
    if "distortion_maps" not in output.details:
        return None
    highest = output.details["distortion_maps"].float().amax(dim=1, keepdim=True)
    return pixels.unletterbox(highest, (image.shape[2], image.shape[3]))[:, 0].clamp(0, 1).cpu()


def _gradient(reward: Any, image: Tensor, prompts: list[str] | None) -> Tensor:
    """(1, H, W) of one image, also where the caller is in inference mode."""
    if isinstance(reward, nn.Module) and any(weight.is_inference() for weight in reward.parameters()):
        raise ValueError(
            "reward: its weights were made within torch.inference_mode, where no gradient passes; make it outside, or "
            "within `with torch.inference_mode(False)`"
        )
    with torch.inference_mode(False), torch.enable_grad():
        leaf = image.detach().clone().requires_grad_()
        total = _called(reward, leaf, prompts).total
        if not total.requires_grad:
            raise ValueError("kind: no gradient passes through this reward; use one whose scores are differentiable")
        (gradient,) = torch.autograd.grad(total.sum(), leaf)
    size = gradient.detach().float().norm(dim=1, keepdim=True)
    window = max(1, max(image.shape[2:]) // _SMOOTHING) * 2 + 1
    even = F.avg_pool2d(size, window, stride=1, padding=window // 2, count_include_pad=False)
    highest = even.amax()
    if not bool(torch.isfinite(highest) & (highest > 0)):
        raise ValueError(f"kind: the gradient of this reward is {float(highest):.3g} everywhere or not finite")
    return (even / highest)[:, 0].cpu()


def _called(reward: Any, image: Tensor, prompts: list[str] | None) -> RewardOutput:
    device = device_of(reward)
    return as_reward_output(reward(image if device is None else image.to(device), prompts), len(image))
