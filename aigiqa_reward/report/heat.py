"""Heat maps of images: where a reward finds distortions, or where its score reacts to the pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from aigiqa_reward import images as pixels
from aigiqa_reward.rewards.bound import BoundReward
from aigiqa_reward.rewards.factory import as_reward
from aigiqa_reward.types import RewardFunction
from aigiqa_reward.utils.isolation import without_autocast

Kind = Literal["auto", "distortion", "gradient"]
_SMOOTHING = 64  # longer side by half the window in which gradients are averaged, since those of pixels are noisy


@dataclass(frozen=True, kw_only=True)
class HeatMaps:
    """One map per image, "distortion" or "gradient": (B, H, W) float32 in [0, 1], on the CPU, of the images' size."""

    kind: str
    maps: Float[Tensor, "batch height width"]


@without_autocast()
def heat_maps(
    reward: RewardFunction | str, images: Tensor, prompts: Sequence[str] | str | None = None, kind: Kind = "auto"
) -> HeatMaps:
    """Compute where in each image the reward finds distortions, or where its score reacts to the pixels.

    "distortion": for a reward with `details["distortion_maps"]` (cpa_iqa), the highest of its maps at each place. The
    values are the model's own, so that two images can be compared; they were learned from whole-image scores.
    "gradient": the norm of the gradient of `total` with respect to the pixels, averaged over a small window, relative
    to the image's highest. It shows where a change would move the score most, not whether the place is good or bad, and
    does not compare images. It costs about twice as much as scoring.

    Args:
        reward: a Reward, its name, or another RewardFunction with what `kind` needs.
        images: (B, 3, H, W) floating point in [0, 1], processed one at a time on the reward's device.
        prompts: B prompts, one for all, or None.
        kind: "distortion", "gradient", or "auto": distortion maps if the reward has them, else gradients.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind: expected one of {', '.join(get_args(Kind))}, got {kind!r}")
    reward = as_reward(reward)
    pixels.check(images)
    texts = [prompts] * len(images) if prompts is None or isinstance(prompts, str) else list(prompts)
    if len(texts) != len(images):
        raise ValueError(f"prompts: expected one per image, got {len(texts)} prompts for {len(images)} images")
    given = [None if text is None else [text] for text in texts]
    if kind != "gradient":
        maps: list[Tensor] = []
        for image, text in zip(images, given, strict=True):
            if (found := _distortion(reward, image[None], text)) is None:
                break
            maps.append(found)
        else:
            return HeatMaps(kind="distortion", maps=torch.cat(maps))
        if kind == "distortion":
            raise ValueError("kind: this reward gives no distortion maps; use one that does, or kind='gradient'")
    maps = [_gradient(reward, image[None], text) for image, text in zip(images, given, strict=True)]
    return HeatMaps(kind="gradient", maps=torch.cat(maps))


def draw_heat_maps(images: Tensor, heat: HeatMaps, *, opacity: float = 0.6) -> Tensor:
    """Lay heat maps over their images (B, 3, H, W) in gray, from dark violet at 0 to light yellow at 1 (magma).

    `opacity` of the colors is in [0, 1]. The pictures are (B, 3, H, W) float32 in [0, 1] on the CPU.
    """
    import matplotlib

    pixels.check(images)
    expected = (len(heat.maps), 3, *heat.maps.shape[1:])
    if tuple(images.shape) != expected:
        raise ValueError(f"images: expected {expected}, as the maps, got {tuple(images.shape)}")
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity: expected a number in [0, 1], got {opacity!r}")
    shades = torch.from_numpy(matplotlib.colormaps["magma"](range(256))[:, :3]).float()
    colors = shades[(heat.maps * 255).round().long()].permute(0, 3, 1, 2)
    seen = images.detach().to("cpu", torch.float32).clamp(0, 1)
    return (1 - opacity) * seen.mean(dim=1, keepdim=True) + opacity * colors


def _distortion(reward: RewardFunction, image: Tensor, prompts: list[str] | None) -> Tensor | None:
    """Return the map (1, H, W) of one image, or None if the reward has none."""
    with torch.no_grad():
        output = BoundReward(reward)(image, prompts)
    if "distortion_maps" not in output.details:
        return None
    highest = output.details["distortion_maps"].float().amax(dim=1, keepdim=True)
    return pixels.unletterbox(highest, (image.shape[2], image.shape[3]))[:, 0].clamp(0, 1).cpu()


def _gradient(reward: RewardFunction, image: Tensor, prompts: list[str] | None) -> Tensor:
    """Return the map (1, H, W) of one image, even if the caller is in inference mode."""
    if isinstance(reward, nn.Module) and any(weight.is_inference() for weight in reward.parameters()):
        raise ValueError(
            "reward: its weights were made within torch.inference_mode, without gradients; make it outside"
        )
    with torch.inference_mode(False), torch.enable_grad():
        leaf = image.detach().clone().requires_grad_()
        total = BoundReward(reward)(leaf, prompts).total
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
