"""Image towers of the timm library, as feature extractors on [0, 1] images."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from aigiqa_reward import images as pixels
from aigiqa_reward.types import Images


@dataclass(frozen=True, kw_only=True)
class TimmConfig:
    """Which timm model, and the statistics of its pretraining.

    Attributes:
        architecture: a timm model name, without a pretrained tag.
        mean: channel means of its pretraining images, in [0, 1].
        std: channel deviations of its pretraining images.
        pretrained: fetch timm's published weights from the Hub; False leaves them to a checkpoint.
        smooth: half width of the rounding put in place of the corners of ReLU6; 0 keeps the corners.
    """

    architecture: str
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    pretrained: bool = False
    smooth: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.smooth < 3:
            raise ValueError(f"smooth: expected a half width in [0, 3), got {self.smooth}")
        if min(self.std) <= 0:
            raise ValueError(f"std: expected positive deviations, got {self.std}")


class SmoothReLU6(nn.Module):
    """ReLU6 with its corners at 0 and 6 rounded to parabolas of half width `smooth`: continuously differentiable.

    (h(x) - h(x - 6) + 6) / 2 with h the Huber function; it differs from ReLU6 by at most smooth / 4, at the corners.
    """

    def __init__(self, smooth: float) -> None:
        super().__init__()
        self.smooth = smooth

    def forward(self, inputs: Tensor) -> Tensor:
        """Elementwise, any shape; computed in at least float32, since the two terms nearly cancel."""
        exact = inputs.float() if inputs.dtype in (torch.float16, torch.bfloat16) else inputs
        low, high = (exact.new_full((), corner).expand_as(exact) for corner in (0.0, 6.0))
        below = F.smooth_l1_loss(exact, low, reduction="none", beta=self.smooth)
        above = F.smooth_l1_loss(exact, high, reduction="none", beta=self.smooth)
        return below.sub_(above).add_(6).mul_(0.5).to(inputs.dtype)  # in place: a third of the time on a CPU


def _round_corners(module: nn.Module, smooth: float) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU6):
            setattr(module, name, SmoothReLU6(smooth))
        else:
            _round_corners(child, smooth)


class TimmEncoder(nn.Module):
    """A timm model's feature map and pooled features; frozen by its owner, differentiable in the pixels.

    Raises:
        ValueError: if timm does not know the architecture.
    """

    def __init__(self, config: TimmConfig) -> None:
        super().__init__()
        import timm

        if not timm.is_model(config.architecture):
            close = difflib.get_close_matches(config.architecture, timm.list_models(), n=3)
            meant = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists the names"
            raise ValueError(f"architecture: timm knows no {config.architecture!r}; {meant}")
        self.config = config
        self.trunk: Any = timm.create_model(config.architecture, pretrained=config.pretrained, num_classes=0)
        self.width = int(self.trunk.num_features)
        if config.smooth:
            _round_corners(self.trunk, config.smooth)

    def forward(self, images: Images) -> Float[Tensor, "batch channels *grid"]:
        """The last feature map: (B, width, h, w) of a convolutional model, (B, width, tokens) of a transformer."""
        weight = next(self.trunk.parameters())
        features = self.trunk.forward_features(
            pixels.normalise(images, self.config.mean, self.config.std).to(weight.dtype)
        )
        if features.ndim == 3:  # a transformer's (B, tokens, width)
            features = features.transpose(1, 2)
        return features.to(images.dtype)

    def pool(self, features: Float[Tensor, "batch channels *grid"]) -> Float[Tensor, "batch channels"]:
        """The mean over the map."""
        return features.flatten(2).mean(dim=2)
