"""The towers that the papers use, from their libraries' hubs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aigiqa_reward.encoders.blip import BLIPConfig
    from aigiqa_reward.encoders.open_clip import OpenCLIPConfig
    from aigiqa_reward.encoders.timm_levels import TimmLevelsConfig

    TowerConfig = OpenCLIPConfig | TimmLevelsConfig | BLIPConfig


def published_towers(name: str) -> dict[str, TowerConfig]:
    """The towers of `preset="paper"`, by role.

    SC-AGIQA's BLIP has ImageReward's weights in the paper; those are a pickle in another layout (see `BLIPConfig`), so
    the default is BLIP's own.
    """
    from aigiqa_reward.encoders.blip import BLIPConfig
    from aigiqa_reward.encoders.open_clip import OpenCLIPConfig
    from aigiqa_reward.encoders.timm import TimmConfig
    from aigiqa_reward.encoders.timm_levels import TimmLevelsConfig

    def clip(architecture: str) -> OpenCLIPConfig:
        return OpenCLIPConfig(architecture=architecture, pretrained="openai")

    def vit(architecture: str, blocks: tuple[int, ...]) -> TimmLevelsConfig:
        half = (0.5, 0.5, 0.5)  # the statistics that timm's ViTs of the AugReg recipe were trained with
        return TimmLevelsConfig(
            tower=TimmConfig(architecture=architecture, mean=half, std=half, pretrained=True), blocks=blocks
        )

    table: dict[str, dict[str, TowerConfig]] = {
        "mst_clipiqa": {"coarse": clip("ViT-B-32"), "fine": clip("ViT-B-16")},
        "tsp_mgs": {"clip": clip("ViT-B-32")},
        "sc_agiqa": {
            "vision": vit("vit_base_patch16_224", (8, 9, 10, 11)),
            "text": BLIPConfig(path_or_id="Salesforce/blip-itm-large-coco"),
        },
        "ma_agiqa": {"vision": vit("vit_base_patch8_224", (6, 7, 8, 9))},
        "cpa_iqa": {"clip": clip("ViT-B-16")},
    }
    return table[name]
