"""Models by name: the towers of each system, embedded or published, and the embedded weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from aigiqa_reward.assistants import Assistants, noun_phrases
from aigiqa_reward.encoders.blip import BLIPConfig, BLIPEncoder
from aigiqa_reward.encoders.compact import (
    MATCH_TOWER,
    QUALITY_TOWER,
    CompactEncoder,
    CompactImageTower,
    CompactTextTower,
)
from aigiqa_reward.encoders.open_clip import OpenCLIPConfig, OpenCLIPEncoder
from aigiqa_reward.encoders.timm import TimmConfig, TimmEncoder
from aigiqa_reward.models.base import QualityModel
from aigiqa_reward.models.compact import Compact, CompactConfig
from aigiqa_reward.models.cpa_iqa import CPAIQA, CPAIQAConfig
from aigiqa_reward.models.mst_clipiqa import MSTCLIPIQA, MSTCLIPIQAConfig
from aigiqa_reward.models.ocr import OCR
from aigiqa_reward.models.sc_agiqa import SCAGIQA, SCAGIQAConfig
from aigiqa_reward.models.tsp_mgs import TSPMGS, TSPMGSConfig
from aigiqa_reward.rewards.published import PUBLISHED
from aigiqa_reward.rewards.specs import SPECS, TOWER_FILES
from aigiqa_reward.utils.isolation import building
from aigiqa_reward.utils.weights import ASSETS, load_strictly, read_weights

Settings: TypeAlias = Mapping[str, Any]  # fields of a model's configuration
TowerConfig: TypeAlias = OpenCLIPConfig | TimmConfig | BLIPConfig
Tower: TypeAlias = OpenCLIPEncoder | TimmEncoder | BLIPEncoder | CompactEncoder
_B32, _B16 = (OpenCLIPConfig(architecture=name, pretrained="openai") for name in ("ViT-B-32", "ViT-B-16"))
_HALF = (0.5, 0.5, 0.5)  # the statistics that timm's ViTs of the AugReg recipe were trained with


def _vit(patch: int, blocks: tuple[int, ...]) -> TimmConfig:
    name = f"vit_base_patch{patch}_224"
    return TimmConfig(architecture=name, mean=_HALF, std=_HALF, pretrained=True, blocks=blocks)


PUBLISHED_TOWERS: dict[str, dict[str, TowerConfig]] = {
    "mst_clipiqa": {"coarse": _B32, "fine": _B16},
    "tsp_mgs": {"clip": _B32},
    # SC-AGIQA has ImageReward's BLIP, a pickle in another layout (see `BLIPConfig`); this is BLIP's own
    "sc_agiqa": {"vision": _vit(16, (8, 9, 10, 11)), "text": BLIPConfig(path_or_id="Salesforce/blip-itm-large-coco")},
    "ma_agiqa": {"vision": _vit(8, (6, 7, 8, 9))},
    "cpa_iqa": {"clip": _B16},
}
"""The towers of `preset="paper"`, by system and role."""


@dataclass(frozen=True, kw_only=True)
class System:
    """How one of the five systems is put together."""

    make: Callable[[Settings, Mapping[str, Any], Assistants], QualityModel]  # of settings, towers by role, assistants
    embedded: Settings  # on the compact towers
    roles: tuple[str, ...]  # its towers; the first is required, and is the compact one where it is embedded
    published: Settings = field(default_factory=dict)  # on other towers, where the paper differs from the defaults
    assistants: tuple[str, ...] = ()  # that it can use
    needs: tuple[str, ...] = ()  # that it requires on other towers; its embedded head cannot read their features


def _ma_agiqa(settings: Settings, towers: Mapping[str, Any], assistants: Assistants) -> QualityModel:
    from aigiqa_reward.models.ma_agiqa import MAAGIQA, MAAGIQAConfig  # imports torchvision, which takes seconds

    vision, semantics = towers["vision"], assistants.semantics
    if semantics is not None:
        settings = {**settings, "semantics_width": semantics.width}
    matcher = towers.get("matcher") or (vision if isinstance(vision, CompactEncoder) else None)
    config = MAAGIQAConfig(**settings)
    return MAAGIQA(config, vision, side=vision.level_side, matcher=matcher, semantics=semantics)


def _cpa_iqa(settings: Settings, towers: Mapping[str, Any], assistants: Assistants) -> QualityModel:
    clip, given = towers["clip"], {"segmenter": assistants.segmenter, "attributes": assistants.attributes}
    levels = isinstance(clip, CompactEncoder)
    return CPAIQA(CPAIQAConfig(**settings), clip, phrases=noun_phrases, levels=levels, **given)


_CROPS = {"crops": 9, "resolution": 512}

SYSTEMS: dict[str, System] = {
    "mst_clipiqa": System(
        make=lambda settings, towers, _: MSTCLIPIQA(MSTCLIPIQAConfig(**settings), towers["coarse"], towers.get("fine")),
        embedded={"width": 256, "coarse_side": 256, "fine_side": 512, "anchor": True, "dropout": 0.3},
        roles=("coarse", "fine"),
    ),
    "tsp_mgs": System(
        make=lambda settings, towers, _: TSPMGS(TSPMGSConfig(**settings), towers["clip"]),
        embedded={**_CROPS, "train_crops": 4, "adapter_rank": 64},
        published={"words_in_quality": True},
        roles=("clip",),
    ),
    "sc_agiqa": System(
        make=lambda settings, towers, assistants: SCAGIQA(
            SCAGIQAConfig(**settings), towers["vision"], towers.get("text"), assistants.captioner
        ),
        embedded={**_CROPS, "width": 128, "train_crops": 2, "anchor": True, "dropout": 0.3},
        published={"prompt_in_quality": True},
        roles=("vision", "text"),
        assistants=("captioner",),
    ),
    "ma_agiqa": System(
        make=_ma_agiqa,  # 1280: width of the compact tower's two features that replace a multimodal model's
        embedded={**_CROPS, "width": 128, "window": 7, "smooth": True, "semantics_width": 1280, "short_side": 512},
        roles=("vision", "matcher"),
        assistants=("semantics",),
        needs=("semantics",),
    ),
    "cpa_iqa": System(make=_cpa_iqa, embedded={"side": 448}, roles=("clip",), assistants=("segmenter", "attributes")),
}
"""The published systems. `compact`, which is ours, is built by `load_embedded` alone."""


@building()
def build_model(
    name: str,
    *,
    preset: str | None = None,
    towers: Mapping[str, TowerConfig] | None = None,
    assistants: Assistants | None = None,
    settings: Settings | None = None,
) -> QualityModel:
    """Build one of the five systems with its towers' weights and a fresh head, to be trained.

    Args:
        name: one of `SYSTEMS`.
        preset: None for the compact towers, offline; "paper" for the published ones.
        towers: other towers by role, in place of the preset's.
        assistants: assistants in place of the offline substitutes.
        settings: fields of the model's configuration that differ from the preset's.

    Example:
        >>> from aigiqa_reward.rewards.build import SYSTEMS, build_model
        >>> list(SYSTEMS)
        ['mst_clipiqa', 'tsp_mgs', 'sc_agiqa', 'ma_agiqa', 'cpa_iqa']
        >>> build_model("mst_clipiqa", settings={"width": 128}).config.width
        128
    """
    if name not in SYSTEMS:
        raise ValueError(f"name: expected one of {', '.join(SYSTEMS)}, got {name!r}")
    check_preset(preset)
    system, given = SYSTEMS[name], _usable_assistants(name, assistants)
    if preset is None and not towers:
        base, loaded = system.embedded, {system.roles[0]: load_compact_encoder()}
    else:
        base, loaded = system.published, _other_towers(name, preset, towers or {}, given)
    return _make(name, {**base, **(settings or {})}, loaded, given)


def check_preset(preset: str | None) -> None:
    """Refuse an unknown preset."""
    if preset not in (None, "paper"):
        raise ValueError(f"preset: expected None or 'paper', got {preset!r}")


def empty_model(name: str, description: Mapping[str, Any], assistants: Assistants | None = None) -> QualityModel:
    """Build a saved model from what its `describe` returned, with weights still to be loaded."""
    if name == "compact":
        return _empty_compact(description["config"])
    if name == "ocr":
        return OCR()
    if name in PUBLISHED:
        return PUBLISHED[name].model.from_description(description)
    given = _usable_assistants(name, assistants)
    for role in description.get("assistants", ()):
        if getattr(given, role) is None:
            raise ValueError(
                f"assistants: this {name} was trained with a {role}, which is not saved with it; "
                f"pass create_reward({name!r}, weights=..., assistants=Assistants({role}=...))"
            )
    towers = {role: _empty_tower(part) for role, part in description["towers"].items() if part is not None}
    return _make(name, description["config"], towers, given)


@building()
def load_embedded(
    name: str, *, assistants: Assistants | None = None, settings: Settings | None = None, folder: Path = ASSETS
) -> QualityModel:
    """Build "compact" or one of `SYSTEMS` with its embedded weights, or "ocr"; settings must not change shapes."""
    if name == "ocr":
        return OCR()
    if name != "compact":
        model = build_model(name, assistants=assistants, settings=settings)
        load_strictly(model.get_submodule("head"), embedded_weights(name, "model.head.", folder), source=name)
        return model
    if assistants is not None:
        raise ValueError("assistants: the compact reward has none; leave them out")
    model = _empty_compact(settings or {})
    # In this order: the reward's own file holds the text tower's last layer, which it trained.
    files = {"towers/text.safetensors": "text.", "compact/model.safetensors": ""}
    load_strictly(model, _read(files, SPECS[name].sha256, folder), source=str(folder))
    return model


def embedded_weights(name: str, prefix: str, folder: Path = ASSETS) -> dict[str, Tensor]:
    """Read the tensors of a system's embedded file whose names begin with `prefix`, without it."""
    tensors = _read({f"{name}/model.safetensors": ""}, SPECS[name].sha256, folder)
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


@building()
def load_compact_encoder(folder: Path = ASSETS) -> CompactEncoder:
    """Load the compact towers as one contrastive encoder, frozen."""
    encoder = CompactEncoder()
    tensors = _read({file: f"{Path(file).stem}." for file in TOWER_FILES}, TOWER_FILES, folder)
    load_strictly(encoder, tensors, source=str(folder / "towers"))
    return encoder.requires_grad_(False).eval()


def _read(prefixes: Mapping[str, str], sha256: Mapping[str, str], folder: Path) -> dict[str, Tensor]:
    """Read embedded files; the names of each file's tensors get its prefix."""
    read = {file: read_weights(folder / file, expected_sha256=sha256[file]) for file in prefixes}
    return {prefixes[file] + name: tensor for file, tensors in read.items() for name, tensor in tensors.items()}


def _empty_compact(settings: Settings) -> QualityModel:
    config = CompactConfig(**settings)
    quality, match = TimmEncoder(QUALITY_TOWER), CompactImageTower(MATCH_TOWER)
    return Compact(config, quality=quality, match=match, text=CompactTextTower())


def _usable_assistants(name: str, assistants: Assistants | None) -> Assistants:
    given = assistants or Assistants()
    usable = SYSTEMS[name].assistants
    useless = [role.name for role in fields(given) if getattr(given, role.name) is not None and role.name not in usable]
    if useless:
        raise ValueError(f"assistants: {name} can use {', '.join(usable) or 'none'}, got {', '.join(useless)}")
    return given


def _other_towers(
    name: str, preset: str | None, given: Mapping[str, TowerConfig], assistants: Assistants
) -> dict[str, Tower]:
    """Load the published towers, or the given ones in their place."""
    system = SYSTEMS[name]
    if unknown := sorted(given.keys() - set(system.roles)):
        raise ValueError(f"towers: {name} has the towers {', '.join(system.roles)}, got {', '.join(unknown)}")
    if missing := [role for role in system.needs if getattr(assistants, role) is None]:
        raise ValueError(
            f"assistants: {name} on other towers than the compact ones needs a multimodal model; pass "
            f"assistants=Assistants({missing[0]}=LMMSemantics(...)) to build_model or TrainingPlan"
        )
    configs = {**(PUBLISHED_TOWERS[name] if preset == "paper" else {}), **given}
    if system.roles[0] not in configs:
        raise ValueError(f"towers: {name} needs {system.roles[0]!r}, got {sorted(configs)}; or pass preset='paper'")
    return {role: load_tower(config) for role, config in configs.items()}


def _make(name: str, settings: Settings, towers: Mapping[str, Tower], assistants: Assistants) -> QualityModel:
    for tower in towers.values():
        tower.requires_grad_(False).eval()
    try:
        return SYSTEMS[name].make(settings, towers, assistants)
    except TypeError as error:
        raise ValueError(f"settings: not ones of {name} ({error}); models/{name}.py lists its fields") from error


@building()
def load_tower(config: TowerConfig) -> Tower:
    """Load a tower's published weights, or those of a local file."""
    if isinstance(config, BLIPConfig):
        return BLIPEncoder(config)
    if isinstance(config, TimmConfig):
        return TimmEncoder(config)
    if not isinstance(config, OpenCLIPConfig):
        raise ValueError(f"towers: expected an OpenCLIPConfig, BLIPConfig or TimmConfig, got {type(config).__name__}")
    if config.pretrained is None and not config.architecture.startswith(("local-dir:", "hf-hub:")):
        raise ValueError(
            f"encoder: {config.architecture!r} without `pretrained` would score with random weights; "
            "pass a tag from open_clip.list_pretrained() or a .safetensors file"
        )
    return OpenCLIPEncoder(config)


def _empty_tower(description: Mapping[str, Any]) -> Tower:
    if "compact" in description:
        return CompactEncoder()
    for key, tower in {"model_cfg": OpenCLIPEncoder, "blip": BLIPEncoder, "architecture": TimmEncoder}.items():
        if key in description:
            return tower.from_description(dict(description))
    raise KeyError(f"no tower is described by {sorted(description)}")
