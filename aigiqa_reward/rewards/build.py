"""Models from names: which towers each system has, embedded or published, under a head that is still to be trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from aigiqa_reward.models.base import QualityModel

if TYPE_CHECKING:
    from aigiqa_reward.assistants import Assistants
    from aigiqa_reward.encoders.blip import BLIPConfig
    from aigiqa_reward.encoders.open_clip import OpenCLIPConfig
    from aigiqa_reward.encoders.timm import TimmConfig

    TowerConfig = OpenCLIPConfig | TimmConfig | BLIPConfig


def published_towers(name: str) -> dict[str, TowerConfig]:
    """The towers of `preset="paper"`, by role.

    SC-AGIQA's BLIP has ImageReward's weights in the paper; those are a pickle in another layout (see `BLIPConfig`), so
    the default is BLIP's own.
    """
    from aigiqa_reward.encoders.blip import BLIPConfig
    from aigiqa_reward.encoders.open_clip import OpenCLIPConfig
    from aigiqa_reward.encoders.timm import TimmConfig

    def clip(architecture: str) -> OpenCLIPConfig:
        return OpenCLIPConfig(architecture=architecture, pretrained="openai")

    def vit(architecture: str, blocks: tuple[int, ...]) -> TimmConfig:
        half = (0.5, 0.5, 0.5)  # the statistics that timm's ViTs of the AugReg recipe were trained with
        return TimmConfig(architecture=architecture, mean=half, std=half, pretrained=True, blocks=blocks)

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


MULTIMODAL_WIDTH = 1280
"""Width of the compact tower's two features that stand for a multimodal model's."""


@dataclass(frozen=True)
class System:
    """How one of the five systems is put together.

    Attributes:
        embedded: settings of its configuration on the compact towers.
        published: settings on other towers that differ from the configuration's defaults, as the paper has them.
        roles: names of its towers where they are not the compact ones.
        assistants: which assistants it can have.
        needs: which of them it cannot do without on other towers than the compact ones, and whose features its embedded
            head cannot read.
        make: from configuration settings, towers by role (None: the compact ones) and assistants to the model.
    """

    embedded: Mapping[str, Any]
    published: Mapping[str, Any]
    roles: tuple[str, ...]
    assistants: tuple[str, ...]
    needs: tuple[str, ...]
    make: Callable[[Mapping[str, Any], Mapping[str, Any], Any], QualityModel]


def _mst_clipiqa(settings: Mapping[str, Any], towers: Mapping[str, Any], assistants: Any) -> QualityModel:
    from aigiqa_reward.models.mst_clipiqa import MSTCLIPIQA, MSTCLIPIQAConfig

    del assistants
    return MSTCLIPIQA(MSTCLIPIQAConfig(**settings), towers["coarse"], towers.get("fine"))


def _tsp_mgs(settings: Mapping[str, Any], towers: Mapping[str, Any], assistants: Any) -> QualityModel:
    from aigiqa_reward.models.tsp_mgs import TSPMGS, TSPMGSConfig

    del assistants
    return TSPMGS(TSPMGSConfig(**settings), towers["clip"])


def _sc_agiqa(settings: Mapping[str, Any], towers: Mapping[str, Any], assistants: Any) -> QualityModel:
    from aigiqa_reward.models.sc_agiqa import SCAGIQA, SCAGIQAConfig

    return SCAGIQA(SCAGIQAConfig(**settings), towers["vision"], towers.get("text"), assistants.captioner)


def _ma_agiqa(settings: Mapping[str, Any], towers: Mapping[str, Any], assistants: Any) -> QualityModel:
    from aigiqa_reward.models.ma_agiqa import MAAGIQA, MAAGIQAConfig

    vision = towers["vision"]
    matcher = towers.get("matcher") or (vision if _is_compact(vision) else None)
    if assistants.semantics is not None:
        settings = {**settings, "semantics_width": assistants.semantics.width}
    return MAAGIQA(
        MAAGIQAConfig(**settings),
        vision,
        side=vision.level_side,
        matcher=matcher,
        semantics=assistants.semantics,
    )


def _cpa_iqa(settings: Mapping[str, Any], towers: Mapping[str, Any], assistants: Any) -> QualityModel:
    from aigiqa_reward.assistants import noun_phrases
    from aigiqa_reward.models.cpa_iqa import CPAIQA, CPAIQAConfig

    encoder = towers["clip"]
    return CPAIQA(
        CPAIQAConfig(**settings),
        encoder,
        phrases=noun_phrases,
        levels=_is_compact(encoder),
        segmenter=assistants.segmenter,
        attributes=assistants.attributes,
    )


SYSTEMS: dict[str, System] = {
    "mst_clipiqa": System(
        embedded={"width": 256, "coarse_side": 256, "fine_side": 512, "anchor": True, "dropout": 0.3},
        published={},
        roles=("coarse", "fine"),
        assistants=(),
        needs=(),
        make=_mst_clipiqa,
    ),
    "tsp_mgs": System(
        embedded={"crops": 9, "train_crops": 4, "resolution": 512, "adapter_rank": 64},
        published={"words_in_quality": True},
        roles=("clip",),
        assistants=(),
        needs=(),
        make=_tsp_mgs,
    ),
    "sc_agiqa": System(
        embedded={"width": 128, "crops": 9, "train_crops": 2, "resolution": 512, "anchor": True, "dropout": 0.3},
        published={"prompt_in_quality": True},
        roles=("vision", "text"),
        assistants=("captioner",),
        needs=(),
        make=_sc_agiqa,
    ),
    "ma_agiqa": System(
        embedded={
            "width": 128,
            "window": 7,
            "smooth": True,
            "semantics_width": MULTIMODAL_WIDTH,
            "crops": 9,
            "short_side": 512,
            "resolution": 512,
        },
        published={},
        roles=("vision", "matcher"),
        assistants=("semantics",),
        needs=("semantics",),
        make=_ma_agiqa,
    ),
    "cpa_iqa": System(
        embedded={"side": 448},
        published={},
        roles=("clip",),
        assistants=("segmenter", "attributes"),
        needs=(),
        make=_cpa_iqa,
    ),
}
"""The published systems. `compact`, which is not one of them, has a builder of its own."""


def build_model(
    name: str,
    *,
    preset: str | None = None,
    towers: Mapping[str, TowerConfig] | None = None,
    assistants: Assistants | None = None,
    settings: Mapping[str, Any] | None = None,
) -> QualityModel:
    """One of the five systems with its towers' weights and a fresh head, to be trained.

    Args:
        name: one of `SYSTEMS`.
        preset: None for the compact towers, offline; "paper" for the published ones.
        towers: other towers by role, in place of the preset's.
        assistants: in place of the offline substitutes.
        settings: fields of the model's configuration that differ from the preset's.

    Raises:
        ValueError: unknown name, preset, role or setting; an assistant that the system cannot use; towers that cannot
            be loaded.

    Example:
        >>> list(SYSTEMS)
        ['mst_clipiqa', 'tsp_mgs', 'sc_agiqa', 'ma_agiqa', 'cpa_iqa']
        >>> build_model("mst_clipiqa", settings={"width": 128}).config.width
        128
    """
    system = _system(name)
    if preset not in (None, "paper"):
        raise ValueError(f"preset: expected None or 'paper', got {preset!r}")
    given = dict(towers or {})
    if unknown := sorted(given.keys() - set(system.roles)):
        raise ValueError(f"towers: {name} has the towers {', '.join(system.roles)}, got {', '.join(unknown)}")
    chosen = _checked_assistants(name, assistants)
    base: dict[str, Any] = {}
    if preset is None and not given:
        from aigiqa_reward.rewards.embedded import load_compact_encoder

        base = dict(system.embedded)
        loaded: dict[str, Any] = {system.roles[0]: load_compact_encoder()}
    else:
        base = dict(system.published)
        if missing := [role for role in system.needs if getattr(chosen, role) is None]:
            raise ValueError(
                f"assistants: {name} on other towers than the compact ones needs a multimodal model; pass "
                f"assistants=Assistants({missing[0]}=LMMSemantics(...)) to build_model or TrainingPlan"
            )
        wanted = (published_towers(name) if preset == "paper" else {}) | given
        loaded = {role: _load_tower(config) for role, config in wanted.items()}
        if system.roles[0] not in loaded:
            raise ValueError(f"towers: {name} needs {system.roles[0]!r}, got {sorted(loaded)}; or pass preset='paper'")
    return _make(name, base | dict(settings or {}), loaded, chosen)


def empty_model(name: str, description: Mapping[str, Any], assistants: Assistants | None = None) -> QualityModel:
    """The architecture of a saved model, with weights still to be loaded."""
    if name == "compact":
        from aigiqa_reward.rewards.embedded import empty_compact

        return empty_compact(description)
    chosen = _checked_assistants(name, assistants)
    for role in description.get("assistants", ()):
        if getattr(chosen, role) is None:
            raise ValueError(
                f"assistants: this {name} was trained with a {role}, which is not saved with it; "
                f"pass create_reward({name!r}, weights=..., assistants=Assistants({role}=...))"
            )
    described = description["towers"]
    towers = {role: _empty_tower(part) for role, part in described.items() if part is not None}
    return _make(name, description["config"], towers, chosen)


def _system(name: str) -> System:
    if name not in SYSTEMS:
        raise ValueError(f"name: expected one of {', '.join(SYSTEMS)}, got {name!r}")
    return SYSTEMS[name]


def _make(name: str, settings: Mapping[str, Any], towers: Mapping[str, Any], assistants: Any) -> QualityModel:
    for tower in towers.values():
        if isinstance(tower, nn.Module):
            tower.requires_grad_(False).eval()
    try:
        return SYSTEMS[name].make(settings, towers, assistants)
    except TypeError as error:
        raise ValueError(f"settings: not ones of {name} ({error}); models/{name}.py lists its fields") from error


def _checked_assistants(name: str, assistants: Assistants | None) -> Assistants:
    from aigiqa_reward.assistants import Assistants

    given = assistants or Assistants()
    useless = [
        role
        for role in ("captioner", "semantics", "segmenter", "attributes")
        if getattr(given, role) is not None and role not in _system(name).assistants
    ]
    if useless:
        possible = ", ".join(_system(name).assistants) or "none"
        raise ValueError(f"assistants: {name} can use {possible}, got {', '.join(useless)}")
    return replace(given)


def _is_compact(tower: object) -> bool:
    from aigiqa_reward.encoders.compact import CompactEncoder

    return isinstance(tower, CompactEncoder)


def _load_tower(config: Any) -> Any:
    from aigiqa_reward.encoders.blip import BLIPConfig, BLIPEncoder
    from aigiqa_reward.encoders.open_clip import OpenCLIPConfig, OpenCLIPEncoder
    from aigiqa_reward.encoders.timm import TimmConfig, TimmEncoder

    if isinstance(config, OpenCLIPConfig):
        if config.pretrained is None and not config.architecture.startswith(("local-dir:", "hf-hub:")):
            raise ValueError(
                f"encoder: {config.architecture!r} without `pretrained` would score with random weights; "
                "pass a tag from open_clip.list_pretrained() or a .safetensors file"
            )
        return OpenCLIPEncoder(config)
    if isinstance(config, BLIPConfig):
        return BLIPEncoder(config)
    if isinstance(config, TimmConfig):
        return TimmEncoder(config)
    raise ValueError(f"towers: expected an OpenCLIPConfig, BLIPConfig or TimmConfig, got {type(config).__name__}")


def _empty_tower(description: Mapping[str, Any]) -> Any:
    from aigiqa_reward.encoders.blip import BLIPEncoder
    from aigiqa_reward.encoders.compact import CompactEncoder
    from aigiqa_reward.encoders.open_clip import OpenCLIPEncoder
    from aigiqa_reward.encoders.timm import TimmEncoder

    if "compact" in description:
        return CompactEncoder()
    builders: dict[str, Any] = {"model_cfg": OpenCLIPEncoder, "blip": BLIPEncoder, "architecture": TimmEncoder}
    for key, builder in builders.items():
        if key in description:
            return builder.from_description(dict(description))
    raise KeyError(f"no tower is described by {sorted(description)}")
