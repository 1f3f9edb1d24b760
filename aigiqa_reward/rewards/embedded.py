"""The embedded weights: which files fill which part of which model, each held against its hash."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from aigiqa_reward.models.base import ModelSpec, QualityModel
from aigiqa_reward.rewards.build import SYSTEMS, build_model
from aigiqa_reward.rewards.reward import Reward
from aigiqa_reward.rewards.specs import SPECS, TOWER_FILES
from aigiqa_reward.utils.weights import ASSETS, load_strictly, read_weights

if TYPE_CHECKING:
    from aigiqa_reward.assistants import Assistants
    from aigiqa_reward.encoders.compact import CompactEncoder


COMPACT_FILES = {
    "towers/image.safetensors": "semantic.",
    "towers/text.safetensors": "text.",
    "compact/model.safetensors": "",
}
"""Embedded files of the compact reward, and which part of the model each one fills."""


def load_compact_encoder(folder: Path = ASSETS) -> CompactEncoder:
    """The compact towers as one contrastive encoder, with their embedded weights, frozen."""
    from aigiqa_reward.encoders.compact import CompactEncoder

    encoder = CompactEncoder()
    tensors: dict[str, Tensor] = {}
    for part in ("image", "text", "alignment"):
        file = f"towers/{part}.safetensors"
        read = read_weights(folder / file, expected_sha256=TOWER_FILES[file])
        tensors |= {f"{part}.{name}": tensor for name, tensor in read.items()}
    load_strictly(encoder, tensors, source=str(folder / "towers"))
    return encoder.requires_grad_(False).eval()


def load_embedded(
    name: str,
    *,
    assistants: Assistants | None = None,
    settings: Mapping[str, Any] | None = None,
    folder: Path = ASSETS,
    spec: ModelSpec | None = None,
) -> QualityModel:
    """One of the zoo's models with its embedded weights.

    Args:
        name: "compact" or one of `SYSTEMS`.
        assistants: in place of the offline substitutes.
        settings: fields of the configuration that do not change the weights' shapes.
        folder: of the assets.
        spec: whose hashes to hold the files against; None is the zoo's.
    """
    if name == "compact":
        if assistants is not None:
            raise ValueError("assistants: the compact reward asks none; leave them out")
        return build_compact(folder, spec, settings)
    model = build_model(name, assistants=assistants, settings=settings)
    load_strictly(model.get_submodule("head"), _part(name, "model.head.", folder, spec), source=name)
    return model


def load_calibration(reward: Reward, folder: Path = ASSETS, spec: ModelSpec | None = None) -> None:
    """The map from a system's raw scores to the human scale, which was fitted with its embedded head."""
    load_strictly(reward.calibration, _part(reward.name, "calibration.", folder, spec), source=reward.name)


def _part(name: str, prefix: str, folder: Path, spec: ModelSpec | None) -> dict[str, Tensor]:
    file = f"{name}/model.safetensors"
    tensors = read_weights(folder / file, expected_sha256=(spec or SPECS[name]).sha256[file])
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def build_compact(
    folder: Path = ASSETS, spec: ModelSpec | None = None, settings: Mapping[str, Any] | None = None
) -> QualityModel:
    """The compact model with the weights in `folder`, each file held against the hash in `spec`."""
    spec = spec or SPECS["compact"]
    model = empty_compact({"config": settings or {}})
    tensors = {}
    for file, prefix in COMPACT_FILES.items():
        part = read_weights(folder / file, expected_sha256=spec.sha256[file])
        tensors |= {prefix + name: tensor for name, tensor in part.items()}
    load_strictly(model, tensors, source=str(folder))
    return model


def empty_compact(description: Mapping[str, Any]) -> QualityModel:
    """The compact model with weights still to be loaded."""
    from aigiqa_reward.encoders.compact import LITE2, CompactImageTower, CompactTextTower
    from aigiqa_reward.encoders.timm import TimmEncoder
    from aigiqa_reward.models.compact import Compact, CompactConfig

    return Compact(
        CompactConfig(**description["config"]),
        semantic=CompactImageTower(),
        fine=TimmEncoder(LITE2),
        text=CompactTextTower(),
    )


__all__ = ["COMPACT_FILES", "SYSTEMS", "build_compact", "empty_compact", "load_compact_encoder", "load_embedded"]
