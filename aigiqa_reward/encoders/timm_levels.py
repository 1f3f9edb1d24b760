"""Several blocks of a timm model as one tower."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from aigiqa_reward.encoders.timm import TimmConfig, TimmEncoder
from aigiqa_reward.types import Images


@dataclass(frozen=True, kw_only=True)
class TimmLevelsConfig:
    """Several blocks of a timm model, read together.

    Attributes:
        tower: which model; one of a fixed size, such as a ViT.
        blocks: numbers of the blocks, in the model's order.

    Example:
        >>> from aigiqa_reward.encoders.timm import TimmConfig
        >>> from aigiqa_reward.encoders.timm_levels import TimmLevelsConfig
        >>> TimmLevelsConfig(tower=TimmConfig(architecture="vit_base_patch8_224"), blocks=(6, 7, 8, 9)).blocks
        (6, 7, 8, 9)
    """

    tower: TimmConfig
    blocks: tuple[int, ...]


class TimmLevels(nn.Module):
    """A timm model of a fixed size as a tower whose last blocks are read together.

    Raises:
        ValueError: a model without a fixed size, or blocks that it does not have.
    """

    def __init__(self, config: TimmLevelsConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = TimmEncoder(config.tower)
        size = self.encoder.image_size
        if size is None:
            raise ValueError(
                f"tower: {config.tower.architecture!r} has no fixed size; choose a vision transformer such as "
                "vit_base_patch16_224"
            )
        self.image_size: int = size
        self.level_channels = self.encoder.level_channels(config.blocks)
        last = list(self.encoder.trunk.feature_info)[config.blocks[-1]]
        self.level_side = size // int(last["reduction"])

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> TimmLevels:
        """Build the tower that `describe` described, with weights still to be loaded."""
        tower = TimmEncoder.from_description(description["tower"]).config
        return cls(TimmLevelsConfig(tower=tower, blocks=tuple(description["blocks"])))

    def describe(self) -> dict[str, Any]:
        """The configuration as JSON, without where the weights came from."""
        return {"tower": self.encoder.describe(), "blocks": list(self.config.blocks)}

    def levels(self, images: Images) -> Float[Tensor, "batch channels rows columns"]:
        """The concatenated maps of the blocks, of images in [0, 1] of `image_size` px a side."""
        return self.encoder.levels(images, self.config.blocks)
