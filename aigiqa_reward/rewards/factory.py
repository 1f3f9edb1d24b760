"""The rewards by name: `list_rewards`, `get_reward_spec` and `create_reward`."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from aigiqa_reward.assistants import Assistants
from aigiqa_reward.encoders.open_clip import OpenCLIPConfig
from aigiqa_reward.models.base import ModelSpec, QualityModel
from aigiqa_reward.models.clipscore import CLIPScore
from aigiqa_reward.models.cpa_iqa import Preferences
from aigiqa_reward.models.published import PublishedModel
from aigiqa_reward.rewards.build import SYSTEMS, build_model, check_preset, embedded_weights, load_embedded, load_tower
from aigiqa_reward.rewards.published import PUBLISHED, load_published
from aigiqa_reward.rewards.reward import Reward, is_saved_reward
from aigiqa_reward.rewards.specs import SPECS
from aigiqa_reward.types import RewardFunction
from aigiqa_reward.utils.checks import check_reward
from aigiqa_reward.utils.weights import load_strictly

__all__ = ["create_reward", "get_reward_spec", "list_rewards"]


def list_rewards(*, embedded: bool = False) -> list[str]:
    """List the names that `create_reward` knows; with `embedded`, those whose weights are included.

    Example:
        >>> from aigiqa_reward import list_rewards
        >>> list_rewards(embedded=True)
        ['compact', 'mst_clipiqa', 'tsp_mgs', 'sc_agiqa', 'ma_agiqa', 'cpa_iqa']
        >>> "pickscore" in list_rewards()
        True
    """
    return [name for name, spec in SPECS.items() if spec.embedded or not embedded]


def get_reward_spec(name: str) -> ModelSpec:
    """Look up what to know of a reward before choosing it: paper, license, scale, size, gradient path.

    Example:
        >>> from aigiqa_reward import get_reward_spec
        >>> get_reward_spec("tsp_mgs").title
        'TSP-MGS'
    """
    if isinstance(name, str) and name in SPECS:
        return SPECS[name]
    close = difflib.get_close_matches(str(name).lower().replace("-", "_"), SPECS, n=1, cutoff=0.5)
    meant = f"; did you mean {close[0]!r}?" if close else "."
    raise ValueError(f"name: no reward is called {name!r}{meant} The rewards are: {', '.join(SPECS)}")


def create_reward(
    name: str,
    *,
    preset: str | None = None,
    encoder: OpenCLIPConfig | None = None,
    prefix: str | None = None,
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
    gradient_checkpointing: bool = False,
    offload: bool = False,
) -> Reward:
    """Build a reward, ready to score.

    Args:
        name: one of `list_rewards()`.
        preset: None for the embedded weights; "paper" for published towers, zero-shot tsp_mgs only (train the others).
        encoder: open_clip model for clipscore or zero-shot tsp_mgs.
        prefix: text that clipscore puts before prompts; the paper's is "A photo depicts ".
        zero_shot: use tsp_mgs untrained, on `encoder` or else the compact towers.
        scenario: scenario of cpa_iqa; `aigiqa-reward scenarios` lists them.
        preferences: preference matrix of cpa_iqa, or its JSON file, in place of the uniform one.
        assistants: captioner, multimodal model, segmenter or attribute reader in place of the offline substitutes.
        device: None leaves it on the CPU.
        dtype: of the towers: float32, float64, bfloat16 or float16. Heads stay at least float32.
        weights: folder written by `reward.save_pretrained`, or its Hub id; for a published reward also the authors'
            file, its folder, or the Hub id of another copy or size.
        revision: branch, tag or commit of the Hub id.
        quality_weight: share of quality in `total`; None is 0.5, or the saved share.
        correspondence_weight: share of correspondence in `total`; None likewise.
        gradient_checkpointing: recompute a published reward's blocks in the backward pass: less memory, more time.
        offload: keep a published reward's weights on the CPU; each call copies them to `device`, where images must be
            as without it, and they stay there until the call's graph is freed.

    Example:
        >>> from aigiqa_reward import create_reward
        >>> create_reward("compact", quality_weight=0.7, correspondence_weight=0.3).quality_weight
        0.7
    """
    spec, settings = get_reward_spec(name), _scenario_settings(name, scenario, preferences)
    _check_choices(name, preset, prefix, assistants)
    _check_memory(name, gradient_checkpointing, offload, device)
    shares: dict[str, Any] = {"quality_weight": quality_weight, "correspondence_weight": correspondence_weight}
    shares = {argument: share for argument, share in shares.items() if share is not None}
    towers = {"preset": preset, "encoder": encoder, "zero_shot": zero_shot or None, "prefix": prefix}
    if name in PUBLISHED and not (weights is not None and is_saved_reward(weights, revision)):
        reward = _published(spec, weights, dtype, revision, {**towers, **shares, "assistants": assistants})
    elif weights is not None:
        reward = _saved(name, weights, towers, revision=revision, assistants=assistants, settings=settings, **shares)
    else:
        reward = _new(spec, towers, assistants, settings, shares, revision)
    return _moved(reward, device, dtype, gradient_checkpointing, offload)


def as_reward(reward: object, pipe: object = None, *, argument: str = "reward") -> RewardFunction:
    """Return a reward that can be called: itself, or the one of this name, on the device of the pipeline."""
    if not isinstance(reward, str):
        return check_reward(reward, pipe, argument=argument)
    try:
        name = get_reward_spec(reward).name
    except ValueError as error:
        raise ValueError(str(error).replace("name", argument, 1)) from None
    device = getattr(pipe, "device", None)
    return create_reward(name, device=None if str(device) == "meta" else device)  # meta: offloaded layer by layer


def _saved(name: str, weights: str | Path, towers: Mapping[str, Any], **options: Any) -> Reward:
    if any(given is not None for given in towers.values()):
        raise ValueError("weights: a saved reward has its own towers; pass neither preset, encoder nor prefix")
    return Reward.from_pretrained(weights, name=name, **options)


def _new(
    spec: ModelSpec, towers: Mapping[str, Any], assistants: Any, settings: Any, shares: Any, revision: str | None
) -> Reward:
    """Build a reward of the embedded weights, or tsp_mgs without trained ones."""
    if revision is not None:
        raise ValueError("revision: names a revision of `weights` on the Hub, but weights is None")
    name, preset, encoder = spec.name, towers["preset"], towers["encoder"]
    if name == "ocr" and (shares or preset is not None):
        raise ValueError(f"{', '.join(shares) or 'preset'}: ocr has no such choice; leave it out")
    zero_shot = encoder is not None or towers["zero_shot"] or (preset is not None and name == "tsp_mgs")
    untrained = _zero_shot(name, preset, encoder, assistants) if zero_shot else None
    reward = Reward(untrained or _embedded(name, preset, assistants, settings), spec, **shares)
    if name in SYSTEMS and not zero_shot:
        load_strictly(reward.calibration, embedded_weights(name, "calibration."), source=name)
    return reward


def _check_choices(name: str, preset: str | None, prefix: str | None, assistants: Assistants | None) -> None:
    check_preset(preset)
    if prefix is not None and name != "clipscore":
        raise ValueError(f"prefix: expected only for clipscore, got it for {name}; leave it out")
    if assistants is not None and not isinstance(assistants, Assistants):
        raise TypeError(f"assistants: expected Assistants(...) or None, got {type(assistants).__name__}")


def _published(
    spec: ModelSpec,
    weights: str | Path | None,
    dtype: torch.dtype | None,
    revision: str | None,
    choices: Mapping[str, Any],
) -> Reward:
    """Load a published reward; refuse arguments that it does not have."""
    own = ("encoder", "prefix") if spec.name == "clipscore" else ()
    if given := [argument for argument, value in choices.items() if value is not None and argument not in own]:
        raise ValueError(f"{', '.join(given)}: {spec.name} has no such choice; leave it out")
    if choices["encoder"] is None:
        model = load_published(spec.name, weights, dtype, revision)
    elif weights is None:
        tower: Any = load_tower(choices["encoder"])
        model = CLIPScore(tower)
    else:
        raise ValueError("weights, encoder: both name a CLIP; pass one of them")
    if isinstance(model, CLIPScore):
        model.prefix = choices["prefix"] or ""
    return Reward(model, spec)


def _check_memory(name: str, gradient_checkpointing: bool, offload: bool, device: torch.device | str | None) -> None:
    if name not in PUBLISHED and (gradient_checkpointing or offload):
        raise ValueError(
            f"gradient_checkpointing, offload: only published rewards have them, not {name}; leave them out"
        )
    if gradient_checkpointing and offload:
        raise ValueError(
            "gradient_checkpointing, offload: checkpointed blocks run again in the backward pass, after the call, when "
            "their weights are back on the CPU; pass one of them"
        )
    if offload and device is None:
        raise ValueError("offload: expected the device of the calls as well, got device=None; pass device='cuda'")


def _moved(
    reward: Reward, device: torch.device | str | None, dtype: torch.dtype | None, checkpointing: bool, offload: bool
) -> Reward:
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype: expected a floating-point torch.dtype such as torch.bfloat16, got {dtype!r}")
    if checkpointing and isinstance(reward.model, PublishedModel):
        reward.model.checkpoint_blocks()
        reward.train()
    try:
        if offload and device is not None:
            reward.call_device, device = torch.empty(0, device=device).device, None
        return reward.to(device=device, dtype=dtype)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: cannot use {str(device)!r} here ({reason}); pass 'cpu', or None") from error


def _scenario_settings(
    name: str, scenario: str | None, preferences: Preferences | str | os.PathLike[str] | None
) -> dict[str, Any]:
    """Return the fields of cpa_iqa's configuration that scenario and preferences set; refuse them for others."""
    settings: dict[str, Any] = {}
    if preferences is not None:
        matrix = Preferences(preferences) if isinstance(preferences, Mapping) else Preferences.load(preferences)
        settings["preferences"] = matrix
        if scenario is None and len(matrix) == 1:
            scenario = next(iter(matrix))
    if scenario is not None:
        settings["scenario"] = scenario
    if settings and name != "cpa_iqa":
        raise ValueError(f"{next(iter(settings))}: only cpa_iqa has scenarios, got it for {name}")
    return settings


def _zero_shot(
    name: str, preset: str | None, encoder: OpenCLIPConfig | None, assistants: Assistants | None
) -> QualityModel:
    """Build tsp_mgs without anything trained."""
    if name != "tsp_mgs":
        raise ValueError(
            f"encoder, zero_shot: only tsp_mgs scores without training, got them for {name}; to train another system "
            "on other towers, use aigiqa_reward.training or `aigiqa-reward train`"
        )
    if preset is not None and encoder is not None:
        raise ValueError("preset, encoder: 'paper' names the encoder already; pass one of them")
    settings = {"zero_shot": True, "adapter_rank": 0, "words_in_quality": False}
    towers = {} if encoder is None else {"clip": encoder}
    return build_model(name, preset=preset, towers=towers, assistants=assistants, settings=settings)


def _embedded(
    name: str, preset: str | None, assistants: Assistants | None, settings: Mapping[str, Any]
) -> QualityModel:
    """Build a model with its embedded weights; warn or raise where these do not fit the arguments."""
    needs = SYSTEMS[name].needs if name in SYSTEMS else ()
    remedy = "train one with TrainingPlan(assistants=...)"
    if name == "compact" and preset is not None:
        raise ValueError("preset: the compact reward has its own embedded towers; leave it out")
    if preset == "paper":
        raise ValueError(
            f"preset: {name} on the published towers has no trained head to load: its authors publish none that may be "
            f"used here. Train one with `aigiqa-reward train {name} --preset paper --data ...` and pass its folder as "
            "weights, or leave preset at None for the embedded weights"
            + (f"; {name} needs TrainingPlan(assistants=...) in Python" if needs else "")
        )
    if any(getattr(assistants, role, None) is not None for role in needs):
        raise ValueError(
            f"assistants: {name}'s embedded head reads the offline substitute's features, not a multimodal model's; "
            f"{remedy} and pass it as weights"
        )
    if assistants is not None and name in SYSTEMS:
        warnings.warn(
            f"assistants: {name}'s embedded head was trained with the offline substitutes and knows no others; "
            f"{remedy} before trusting its scores",
            UserWarning,
            stacklevel=4,
        )
    return load_embedded(name, assistants=assistants, settings=settings)
