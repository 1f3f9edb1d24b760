"""The rewards by name: a literal table, and `create_reward` over it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from aigiqa_reward.models.base import QualityModel
from aigiqa_reward.rewards.build import SYSTEMS, build_model
from aigiqa_reward.rewards.embedded import load_calibration, load_embedded
from aigiqa_reward.rewards.reward import Reward
from aigiqa_reward.rewards.saved import load_reward, save_reward
from aigiqa_reward.rewards.specs import SPECS, get_spec, list_rewards

if TYPE_CHECKING:
    from aigiqa_reward.assistants import Assistants
    from aigiqa_reward.encoders.open_clip import OpenCLIPConfig
    from aigiqa_reward.models.cpa_iqa import Preferences
    from aigiqa_reward.rewards.build import TowerConfig


__all__ = [
    "SPECS",
    "SYSTEMS",
    "build_model",
    "create_reward",
    "get_spec",
    "list_rewards",
    "load_reward",
    "save_reward",
]


def create_reward(
    name: str,
    *,
    preset: str | None = None,
    encoder: OpenCLIPConfig | None = None,
    zero_shot: bool = False,
    scenario: str | None = None,
    preferences: Preferences | str | os.PathLike[str] | None = None,
    assistants: Assistants | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    weights: str | Path | None = None,
    revision: str | None = None,
    quality_weight: float | None = None,
    correspondence_weight: float | None = None,
) -> Reward:
    """Build a reward, ready to score.

    Args:
        name: one of `list_rewards()`.
        preset: None for the embedded weights, offline; "paper" for the published towers from the Hub. The authors
            publish no weights that may be used here, so of the trained systems only zero-shot tsp_mgs scores like this;
            train the others (`aigiqa-reward train NAME --preset paper`) and pass the result as `weights`.
        encoder: the open_clip model of zero-shot tsp_mgs.
        zero_shot: tsp_mgs without anything trained, on `encoder` or, without one, on the compact towers.
        scenario: of cpa_iqa; `aigiqa-reward scenarios` lists them.
        preferences: of cpa_iqa: a preference matrix, or the JSON file of one, instead of the uniform one.
        assistants: captioner, multimodal model, segmenter or attribute reader, instead of the offline substitutes of
            the systems that have a place for them.
        device: where to put it; None leaves it on the CPU.
        dtype: of the towers: float32, float64, bfloat16 or float16. Heads and similarities stay at least float32.
        weights: a folder written by `reward.save_pretrained`, or a Hub id of one, instead of the embedded weights.
        revision: branch, tag or commit of the Hub id.
        quality_weight: share of quality in `total`; None is 0.5, or what a saved reward had.
        correspondence_weight: share of correspondence in `total`; None likewise.

    Raises:
        ValueError: unknown name or preset, arguments that do not go together, weights that are missing or altered.

    Example:
        >>> from aigiqa_reward import create_reward
        >>> create_reward("compact", quality_weight=0.7, correspondence_weight=0.3).quality_weight
        0.7
    """
    spec = get_spec(name)
    _check_types(dtype, revision, weights, zero_shot, assistants)
    settings = _scenario_settings(name, scenario, preferences)
    shares: dict[str, Any] = {"quality_weight": quality_weight, "correspondence_weight": correspondence_weight}
    if weights is not None:
        _refuse_beside_weights(preset, encoder, zero_shot)
        reward = load_reward(
            weights, revision=revision, expected=name, assistants=assistants, settings=settings, **shares
        )
    else:
        given = {argument: value for argument, value in shares.items() if value is not None}
        with torch.random.fork_rng(devices=[]):  # building modules draws initial weights that loading replaces
            reward = Reward(_build(name, preset, encoder, zero_shot, assistants, settings), spec, **given)
        if name in SYSTEMS and not getattr(reward.model, "zero_shot", False):
            load_calibration(reward)
    return _placed(reward, device, dtype)


def _placed(reward: Reward, device: torch.device | str | None, dtype: torch.dtype | None) -> Reward:
    try:
        return reward.to(device=device, dtype=dtype)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: cannot use {str(device)!r} here ({reason}); pass 'cpu', or None") from error


def _check_types(dtype: object, revision: str | None, weights: object, zero_shot: object, assistants: object) -> None:
    from aigiqa_reward.assistants import Assistants

    if not isinstance(zero_shot, bool):
        raise TypeError(f"zero_shot: expected True or False, got {zero_shot!r}")
    if assistants is not None and not isinstance(assistants, Assistants):
        raise TypeError(f"assistants: expected Assistants(...) or None, got {type(assistants).__name__}")
    if dtype is not None and (not isinstance(dtype, torch.dtype) or not dtype.is_floating_point):
        raise ValueError(f"dtype: expected a floating-point torch.dtype such as torch.bfloat16, got {dtype!r}")
    if revision is not None and weights is None:
        raise ValueError("revision: names a revision of `weights` on the Hub, but weights is None")


def _refuse_beside_weights(preset: str | None, encoder: object, zero_shot: bool) -> None:
    if preset is not None or encoder is not None or zero_shot:
        raise ValueError("weights: a saved reward brings its own towers; pass neither preset nor encoder")


def _scenario_settings(
    name: str, scenario: str | None, preferences: Preferences | str | os.PathLike[str] | None
) -> dict[str, Any]:
    from aigiqa_reward.models.cpa_iqa import Preferences

    given: dict[str, Any] = {}
    if preferences is not None and not isinstance(preferences, Mapping | str | os.PathLike):
        raise TypeError(f"preferences: expected a matrix or the path of one, got {type(preferences).__name__}")
    if preferences is not None:
        matrix = Preferences(preferences) if isinstance(preferences, Mapping) else Preferences.load(preferences)
        given["preferences"] = matrix
        if scenario is None and len(matrix) == 1:
            scenario = next(iter(matrix))
    if scenario is not None:
        given["scenario"] = scenario
    if given and name != "cpa_iqa":
        raise ValueError(f"{next(iter(given))}: only cpa_iqa has scenarios, got it for {name}")
    return given


def _build(
    name: str,
    preset: str | None,
    encoder: OpenCLIPConfig | None,
    zero_shot: bool,
    assistants: Assistants | None,
    settings: Mapping[str, Any],
) -> QualityModel:
    if preset not in (None, "paper"):
        raise ValueError(f"preset: expected None or 'paper', got {preset!r}")
    if name == "compact":
        if preset is not None or encoder is not None or zero_shot or assistants is not None:
            raise ValueError(
                "preset, encoder: the compact reward has its own embedded towers; pass neither, nor zero_shot or "
                "assistants"
            )
        return load_embedded("compact")
    if (encoder is not None or zero_shot) and name != "tsp_mgs":
        raise ValueError(
            f"encoder, zero_shot: only tsp_mgs scores without training, got them for {name}; "
            f"to train on other towers, use aigiqa_reward.training or `aigiqa-reward train {name}`"
        )
    if name == "tsp_mgs" and (preset is not None or encoder is not None or zero_shot):
        if preset is not None and encoder is not None:
            raise ValueError("preset, encoder: 'paper' names the encoder already; pass one of them")
        towers: dict[str, TowerConfig] = {} if encoder is None else {"clip": encoder}
        untrained = {"zero_shot": True, "adapter_rank": 0, "words_in_quality": False}
        return build_model(name, preset=preset, towers=towers, assistants=assistants, settings=untrained)
    if preset == "paper":
        raise ValueError(
            f"preset: {name} on the published towers has no trained head to load: its authors publish none that may be "
            f"used here. Train one with `aigiqa-reward train {name} --preset paper --data ...` and pass its folder as "
            "weights, or leave preset at None for the embedded weights"
            + (f"; {name} needs TrainingPlan(assistants=...) in Python" if SYSTEMS[name].needs else "")
        )
    if assistants is not None:
        _warn_untrained(name, assistants)
    return load_embedded(name, assistants=assistants, settings=settings)


def _warn_untrained(name: str, assistants: Assistants) -> None:
    if any(getattr(assistants, role) is not None for role in SYSTEMS[name].needs):
        raise ValueError(
            f"assistants: {name}'s embedded head reads the offline substitute's features, not a multimodal model's; "
            "train one with aigiqa_reward.benchmark.TrainingPlan(assistants=...) and pass it as weights"
        )
    warnings.warn(
        f"assistants: {name}'s embedded head was trained with the offline substitutes and knows no others; train one "
        "with aigiqa_reward.benchmark.TrainingPlan(assistants=...) before trusting its scores",
        UserWarning,
        stacklevel=4,
    )
