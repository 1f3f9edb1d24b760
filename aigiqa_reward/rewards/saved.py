"""Rewards in folders and on the Hub: config.json and model.safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from aigiqa_reward import __version__
from aigiqa_reward.models.base import QualityModel
from aigiqa_reward.rewards.bounds import TooLarge, bounded
from aigiqa_reward.rewards.build import empty_model
from aigiqa_reward.rewards.reward import Reward, check_aspect_weights
from aigiqa_reward.rewards.specs import get_spec
from aigiqa_reward.utils.io import read_json, write_atomically
from aigiqa_reward.utils.weights import WeightsError, load_strictly, read_weights, write_weights

if TYPE_CHECKING:
    from aigiqa_reward.assistants import Assistants


_CONFIG_BYTES, _HEADER_BYTES = 20_000_000, 10_000_000
"""Most that config.json, which may hold a tokenizer, and the header of model.safetensors take: chosen here."""

_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


def save_reward(reward: Reward, folder: Path) -> None:
    """Write config.json and model.safetensors, from which `load_reward` makes the same reward again, to the bit.

    Example:
        >>> from pathlib import Path
        >>> from aigiqa_reward import create_reward

        >>> save_reward(create_reward("mst_clipiqa"), Path("mine"))
        >>> sorted(file.name for file in Path("mine").iterdir())
        ['config.json', 'model.safetensors']
    """
    config = {
        "name": reward.name,
        "library_version": __version__,
        "dtype": str(next(reward.model.parameters()).dtype).removeprefix("torch."),
        "quality_weight": reward.quality_weight,
        "correspondence_weight": reward.correspondence_weight,
        "model": reward.model.describe(),
    }
    write_weights(folder / "model.safetensors", reward.state_dict(), lossless=True)
    write_atomically(folder / "config.json", json.dumps(config, indent=2, sort_keys=True).encode())


def load_reward(
    source: str | Path,
    *,
    revision: str | None = None,
    hub: Mapping[str, Any] | None = None,
    expected: str | None = None,
    quality_weight: float | None = None,
    correspondence_weight: float | None = None,
    assistants: Assistants | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Reward:
    """Load what `Reward.save_pretrained` wrote, from a folder or a Hub id, in the dtype it was saved in.

    Args:
        source: the folder, or the id.
        revision: branch, tag or commit of the id.
        hub: further arguments of `huggingface_hub.snapshot_download`, such as token and cache_dir.
        expected: name that the reward must have.
        quality_weight: instead of the saved one.
        correspondence_weight: instead of the saved one.
        assistants: of a reward that was trained with some; they are not saved with it.
        settings: fields of the model's configuration that differ from the saved ones.

    Raises:
        WeightsError: the folder or id holds no whole reward, or one of another name than `expected`.

    Example:
        >>> from aigiqa_reward import create_reward

        >>> create_reward("mst_clipiqa").save_pretrained("mine")
        >>> load_reward("mine", quality_weight=0.8).quality_weight
        0.8
    """
    folder = _folder(source, revision, hub or {})
    try:
        config = read_json(folder / "config.json", most=_CONFIG_BYTES)
        name, description = config["name"], config["model"]
        shares = {key: float(config[key]) for key in ("quality_weight", "correspondence_weight")}
        dtype = _DTYPES[config["dtype"]]
        spec = get_spec(name)
        check_aspect_weights(**shares)
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise WeightsError(
            f"weights: {folder}/config.json does not describe a reward ({type(error).__name__}: {error}); "
            "expected a folder written by reward.save_pretrained"
        ) from error
    if expected is not None and name != expected:
        raise WeightsError(f"weights: {source} holds a {name!r} reward, expected {expected!r}")
    given = {"quality_weight": quality_weight, "correspondence_weight": correspondence_weight}
    shares |= {argument: value for argument, value in given.items() if value is not None}
    model = _described(folder, name, description, settings, assistants)
    reward = Reward(model, spec, **shares).to(dtype)
    most = sum(8 * tensor.numel() for tensor in reward.state_dict().values()) + _HEADER_BYTES
    tensors = read_weights(folder / "model.safetensors", most_bytes=most)
    load_strictly(reward, tensors, source=str(folder))
    return reward


def _described(
    folder: Path, name: str, description: Any, settings: Mapping[str, Any] | None, assistants: Assistants | None
) -> QualityModel:
    """The model that config.json describes, without weights; no larger than those in the folder can fill."""
    file = folder / "model.safetensors"
    try:
        size = file.stat().st_size
    except OSError as error:
        raise WeightsError(f"weights: cannot read {file}: {error.strerror}") from error
    try:
        if settings:
            description = {**description, "config": {**description["config"], **settings}}
        with torch.random.fork_rng(devices=[]), bounded(2 * size):  # a byte a number at least, and a copy of it
            return empty_model(name, description, assistants)
    except TooLarge as error:
        raise WeightsError(
            f"weights: {folder}/config.json describes a {name!r} larger than the {size:,} bytes of model.safetensors "
            "can fill; it was altered, or belongs to other weights"
        ) from error
    except Exception as error:  # a description of somebody else may break any library that builds from it
        raise WeightsError(f"weights: {folder}/config.json does not fit {name!r}: {error}") from error


def _folder(source: str | Path, revision: str | None, hub: Mapping[str, Any]) -> Path:
    folder = Path(os.path.expanduser(source))  # noqa: PTH111  (Path's own raises of a ~name that nobody has)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision: {source} is a local folder, which has no revisions; pass None")
        return folder
    if folder.exists() or folder.is_absolute() or len(folder.parts) != 2:
        raise WeightsError(
            f"weights: expected a folder written by reward.save_pretrained or a Hub id owner/name, got {str(source)!r}"
        )
    from huggingface_hub import snapshot_download

    try:
        files = ["config.json", "model.safetensors"]
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=files, **hub))
    except (OSError, ValueError) as error:
        raise WeightsError(f"weights: could not fetch {str(source)!r} from the Hub: {error}") from error
