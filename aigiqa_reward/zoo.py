"""The rewards by name: a literal table, and `create_reward` over it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from aigiqa_reward import __version__
from aigiqa_reward.models.base import ModelSpec, QualityModel
from aigiqa_reward.reward import Reward
from aigiqa_reward.weights import (
    ASSETS,
    WeightsError,
    load_strictly,
    read_weights,
    write_atomically,
    write_weights,
)

if TYPE_CHECKING:
    from aigiqa_reward.encoders.open_clip import OpenCLIPConfig

COMPACT_FILES = {
    "towers/image.safetensors": "semantic.",
    "towers/text.safetensors": "text.",
    "compact/model.safetensors": "",
}
"""Embedded files of the compact reward, and which part of the model each one fills."""

_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}

SPECS: dict[str, ModelSpec] = {
    "compact": ModelSpec(
        name="compact",
        title="Compact (MST-CLIPIQA design on small towers)",
        paper="after MST-CLIPIQA: multi-scale two-stream CLIP for AI-generated image quality assessment",
        licence="Apache-2.0 (code and heads; towers Apache-2.0 and MIT; scores AGIQA-3K, MIT)",
        scale="[0, 1] on AGIQA-3K, 1 = its best human score; not clamped",
        input_size="whole image at 256 x 256 px area, 4 to 16 crops of 224 px at native resolution up to 512 px",
        differentiable=True,
        gradient_path="pixels through both image streams, the gate and the heads; prompts fixed",
        needs_prompt=False,
        weights="embedded",
        megabytes=39.2,
        sha256={
            "towers/image.safetensors": "fbf5ed7dabfe5b52242e45255c11d8fb4ecff851e79b193668c122a319029d80",
            "compact/model.safetensors": "89eaff08fdf83755a262ae8a17b2e217169446f9d01e6d952469ed2ea3c37e33",
            "towers/text.safetensors": "5c8ccd909081d4b56784254744148ef34833a92748690d06f78814d1ee5fe46b",
        },
    ),
    "tsp_mgs": ModelSpec(
        name="tsp_mgs",
        title="TSP-MGS, zero-shot",
        paper="Xia et al., AI-Generated Image Quality Assessment Based on Task-Specific Prompt and Multi-Granularity "
        "Similarity",
        licence="Apache-2.0 (code; weights as the chosen open_clip checkpoint's)",
        scale="[-0.5, 1], uncalibrated: expected level and word similarity of the CLIP model",
        input_size="whole image letterboxed to the encoder's size, 15 crops of it from at least 512 px",
        differentiable=True,
        gradient_path="pixels through the CLIP image tower and the similarities; prompts fixed",
        needs_prompt=False,
        weights="none embedded: pass encoder=OpenCLIPConfig(...), or preset='paper' to fetch OpenAI's ViT-B/32",
        megabytes=0.0,
    ),
}


def list_rewards() -> list[ModelSpec]:
    """Every reward of the zoo, with its paper, licence, scale, sizes and gradient path."""
    return list(SPECS.values())


def get_spec(name: str) -> ModelSpec:
    """The entry of one reward.

    Raises:
        ValueError: no such reward; names the ones that exist and the one probably meant.
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
        preset: None for the embedded weights, offline; "paper" for the published towers from the Hub.
        encoder: the open_clip model of a reward that takes one (tsp_mgs).
        device: where to put it; None leaves it on the CPU.
        dtype: of the towers: float32, float64, bfloat16 or float16. Heads and similarities stay at least float32.
        weights: a folder written by `reward.save_pretrained`, or a Hub id of one, instead of the embedded weights.
        revision: branch, tag or commit of the Hub id.
        quality_weight: share of quality in `total`; None is 0.5, or what a saved reward had.
        correspondence_weight: share of correspondence in `total`; None likewise.

    Raises:
        ValueError: unknown name or preset, arguments that do not go together, weights that are missing or altered.
    """
    spec = get_spec(name)
    if dtype is not None and (not isinstance(dtype, torch.dtype) or not dtype.is_floating_point):
        raise ValueError(f"dtype: expected a floating-point torch.dtype such as torch.bfloat16, got {dtype!r}")
    if revision is not None and weights is None:
        raise ValueError("revision: names a revision of `weights` on the Hub, but weights is None")
    given = {"quality_weight": quality_weight, "correspondence_weight": correspondence_weight}
    shares = {argument: value for argument, value in given.items() if value is not None}
    if weights is not None:
        if preset is not None or encoder is not None:
            raise ValueError("weights: a saved reward brings its own towers; pass neither preset nor encoder")
        reward = load_reward(
            weights,
            revision=revision,
            expected=name,
            quality_weight=quality_weight,
            correspondence_weight=correspondence_weight,
        )
    else:
        with torch.random.fork_rng(devices=[]):  # building modules draws initial weights that loading replaces
            reward = Reward(_build(name, preset, encoder), spec, **shares)
    try:
        return reward.to(device=device, dtype=dtype)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: cannot use {str(device)!r} here ({reason}); pass 'cpu', or None") from error


def _build(name: str, preset: str | None, encoder: OpenCLIPConfig | None) -> QualityModel:
    if preset not in (None, "paper"):
        raise ValueError(f"preset: expected None or 'paper', got {preset!r}")
    if name == "compact":
        if preset is not None or encoder is not None:
            raise ValueError("preset, encoder: the compact reward has its own embedded towers; pass neither")
        return build_compact()
    from aigiqa_reward.encoders.open_clip import OpenCLIPConfig, OpenCLIPEncoder
    from aigiqa_reward.models.tsp_mgs import TSPMGS, TSPMGSConfig

    if preset == "paper":
        if encoder is not None:
            raise ValueError("preset, encoder: 'paper' names the encoder already; pass one of them")
        encoder = OpenCLIPConfig(architecture="ViT-B-32", pretrained="openai")
    if encoder is None:
        raise ValueError(
            "encoder: tsp_mgs has no embedded weights; pass encoder=OpenCLIPConfig(architecture='ViT-B-32', "
            "pretrained=TAG_OR_SAFETENSORS_FILE), or preset='paper' to fetch OpenAI's ViT-B/32 from the Hub"
        )
    if encoder.pretrained is None and not encoder.architecture.startswith(("local-dir:", "hf-hub:")):
        raise ValueError(
            f"encoder: {encoder.architecture!r} without `pretrained` would score with random weights; "
            "pass a tag from open_clip.list_pretrained() or a .safetensors file"
        )
    return TSPMGS(TSPMGSConfig(), OpenCLIPEncoder(encoder))


def build_compact(folder: Path = ASSETS, spec: ModelSpec = SPECS["compact"]) -> QualityModel:
    """The compact model with the weights in `folder`, each file held against the hash in `spec`."""
    model = _empty("compact", {"config": {}})
    tensors = {}
    for file, prefix in COMPACT_FILES.items():
        part = read_weights(folder / file, expected_sha256=spec.sha256[file])
        tensors |= {prefix + name: tensor for name, tensor in part.items()}
    load_strictly(model, tensors, source=str(folder))
    return model


def save_reward(reward: Reward, folder: Path) -> None:
    """Write config.json and model.safetensors, from which `load_reward` makes the same reward again, to the bit."""
    config = {
        "name": reward.name,
        "library_version": __version__,
        "dtype": str(next(reward.model.parameters()).dtype).removeprefix("torch."),
        "quality_weight": reward.quality_weight,
        "correspondence_weight": reward.correspondence_weight,
        "model": reward.model.describe(),
    }
    write_weights(folder / "model.safetensors", reward.state_dict())
    write_atomically(folder / "config.json", json.dumps(config, indent=2, sort_keys=True).encode())


def load_reward(
    source: str | Path,
    *,
    revision: str | None = None,
    hub: Mapping[str, Any] | None = None,
    expected: str | None = None,
    quality_weight: float | None = None,
    correspondence_weight: float | None = None,
) -> Reward:
    """Load what `Reward.save_pretrained` wrote, from a folder or a Hub id, in the dtype it was saved in.

    Args:
        source: the folder, or the id.
        revision: branch, tag or commit of the id.
        hub: further arguments of `huggingface_hub.snapshot_download`, such as token and cache_dir.
        expected: name that the reward must have.
        quality_weight: instead of the saved one.
        correspondence_weight: instead of the saved one.

    Raises:
        WeightsError: the folder or id holds no whole reward, or one of another name than `expected`.
    """
    folder = _folder(source, revision, hub or {})
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name, description = config["name"], config["model"]
        shares = {key: float(config[key]) for key in ("quality_weight", "correspondence_weight")}
        dtype = _DTYPES[config["dtype"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"weights: {folder}/config.json does not describe a reward ({type(error).__name__}: {error}); "
            "expected a folder written by reward.save_pretrained"
        ) from error
    if expected is not None and name != expected:
        raise WeightsError(f"weights: {source} holds a {name!r} reward, expected {expected!r}")
    spec = get_spec(name)
    if quality_weight is not None:
        shares["quality_weight"] = quality_weight
    if correspondence_weight is not None:
        shares["correspondence_weight"] = correspondence_weight
    try:
        with torch.random.fork_rng(devices=[]):
            model = _empty(name, description)
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"weights: {folder}/config.json does not fit {name!r}: {error}") from error
    reward = Reward(model, spec, **shares).to(dtype)
    load_strictly(reward, read_weights(folder / "model.safetensors"), source=str(folder))
    return reward


def _folder(source: str | Path, revision: str | None, hub: Mapping[str, Any]) -> Path:
    folder = Path(source)
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


def _empty(name: str, description: dict[str, Any]) -> QualityModel:
    """The architecture of a saved model, with weights still to be loaded."""
    if name == "compact":
        from aigiqa_reward.encoders.compact import LITE0, CompactImageTower, CompactTextTower
        from aigiqa_reward.encoders.timm import TimmEncoder
        from aigiqa_reward.models.compact import Compact, CompactConfig

        return Compact(
            CompactConfig(**description["config"]),
            coarse=TimmEncoder(LITE0),
            fine=TimmEncoder(LITE0),
            semantic=CompactImageTower(),
            text=CompactTextTower(),
        )
    from aigiqa_reward.encoders.open_clip import OpenCLIPEncoder
    from aigiqa_reward.models.tsp_mgs import TSPMGS, TSPMGSConfig

    encoder = OpenCLIPEncoder.from_description(description["open_clip"])
    return TSPMGS(TSPMGSConfig(**description["config"]), encoder)
