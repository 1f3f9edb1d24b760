"""The published rewards: where their files come from, and how a file becomes a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from aigiqa_reward.models.clipscore import CLIPScore
from aigiqa_reward.models.hps import HPSv2, HPSv21
from aigiqa_reward.models.imagereward import CycleReward, ImageReward
from aigiqa_reward.models.laion_aesthetic import LAIONAesthetic
from aigiqa_reward.models.mps import MPS
from aigiqa_reward.models.pickscore import PickScore
from aigiqa_reward.models.published import PublishedModel
from aigiqa_reward.models.siglip2 import SigLIP2
from aigiqa_reward.utils.weights import WeightsError, load_strictly, sha256, write_weights

_PICKLES = (".pt", ".pth")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Files of a published reward on the Hub.

    Attributes:
        model: class of the model.
        family: what it was trained from; rewards of one family have errors in common.
        repo: Hub id of the repository.
        file: name of the weights there.
        revision: commit; None if none is known, for the newest.
        sha256: hash of the weights; None if none is known.
        other_files: configuration and tokenizer, in the same repository.
        other_names: names that copies of the weights have elsewhere.
    """

    model: type[PublishedModel]
    family: Literal["CLIP", "BLIP", "SigLIP", "Qwen-VL"]
    repo: str
    file: str
    revision: str | None = None
    sha256: str | None = None
    other_files: tuple[str, ...] = ()
    other_names: tuple[str, ...] = ()


_HPS = "697403c78157020a1ae59d23f111aa58ced35b0a"
_CLIP_L: dict[str, Any] = {
    "family": "CLIP",
    "repo": "openai/clip-vit-large-patch14",
    "file": "model.safetensors",
    "sha256": "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
}

PUBLISHED: dict[str, Source] = {
    "pickscore": Source(
        model=PickScore,
        family="CLIP",
        repo="yuvalkirstain/PickScore_v1",
        revision="a4e4367c6dfa7288a00c550414478f865b875800",
        file="model.safetensors",
        sha256="ef31ef6fc5ff4d9bb90dd232df4e145887ba62c5a03aa2841415f8c25f18d52e",
    ),
    "hpsv2.1": Source(
        model=HPSv21,
        family="CLIP",
        repo="xswu/HPSv2",
        revision=_HPS,
        file="HPS_v2.1_compressed.pt",
        sha256="c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837",
    ),
    "hpsv2": Source(
        model=HPSv2,
        family="CLIP",
        repo="xswu/HPSv2",
        revision=_HPS,
        file="HPS_v2_compressed.pt",
        sha256="07cb0d20626232204ca3a6ec53ff5984e7e53212a8a7b0e0ec2bac1bdaf125a1",
    ),
    "mps": Source(
        model=MPS,
        family="CLIP",
        repo="RE-N-Y/mpsv1",
        file="model.safetensors",
        other_names=("MPS_overall_state_dict.pt",),
    ),
    "imagereward": Source(
        model=ImageReward,
        family="BLIP",
        repo="THUDM/ImageReward",
        revision="5736be0",
        file="ImageReward.pt",
        sha256="d71dc8d4912bc633c06ab8ef1ef6a81e8199d4369f14b47b29baf1d19de561f6",
    ),
    "cyclereward": Source(
        model=CycleReward, family="BLIP", repo="carolineec/CycleReward-Combo", file="CycleReward-Combo.pth"
    ),
    "clipscore": Source(model=CLIPScore, other_names=("open_clip_model.safetensors",), **_CLIP_L),
    "siglip2": Source(
        model=SigLIP2,
        family="SigLIP",
        repo="google/siglip2-so400m-patch14-384",
        file="model.safetensors",
        other_files=("config.json", "tokenizer.json"),
    ),
    "laion_aesthetic": Source(model=LAIONAesthetic, **_CLIP_L),
}
"""The published rewards by name."""


def load_published(name: str, weights: str | Path | None = None, dtype: torch.dtype | None = None) -> PublishedModel:
    """Build a published reward's model and load the authors' weights strictly.

    Args:
        name: one of PUBLISHED.
        weights: a local copy of the authors' file, or the folder that holds it; None fetches it from the Hub. A
            `config.json` beside it gives the sizes, where they are not the published ones.
        dtype: dtype of the towers; None is float32.
    """
    from accelerate import init_empty_weights

    source = PUBLISHED[name]
    file = locate(name, weights)
    try:
        description = source.model.read_description(file.parent)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"weights: {file.parent} does not describe a {name} ({type(error).__name__}: {error}); expected the "
            f"authors' files of https://huggingface.co/{source.repo}"
        ) from error
    digest = sha256(file)
    _check_hash(name, file, digest)
    with init_empty_weights():
        model = source.model.from_description(description)
        if source.sha256 not in (None, digest):
            _check_sizes(name, file, model)
    model.to(dtype or torch.float32)
    expected = model.state_dict()
    tensors = source.model.rename(_read_all(source, file, digest))
    fitting = {
        key: tensor.to(expected[key].dtype, copy=True) if key in expected else tensor for key, tensor in tensors.items()
    }
    load_strictly(model, fitting, source=str(file))
    return model


def locate(name: str, weights: str | Path | None = None) -> Path:
    """Return the authors' file of a published reward: a local copy, given it or its folder, or fetched from the Hub."""
    return _fetch(name) if weights is None else _local(name, Path(weights).expanduser())


def cached_weights(name: str) -> Path | None:
    """Find the weights of a published reward in the Hub's cache, without a network; None if they are not there."""
    from huggingface_hub import try_to_load_from_cache

    source = PUBLISHED[name]
    found = try_to_load_from_cache(source.repo, source.file, revision=source.revision)
    return Path(found) if isinstance(found, str) else None


def cache_folder() -> Path:
    """Return the folder of converted weights."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aigiqa-reward" / "weights"


def _fetch(name: str) -> Path:
    """Download the files of a reward, or find them in the Hub's cache."""
    from huggingface_hub import hf_hub_download

    source = PUBLISHED[name]
    try:
        for other in source.other_files:
            hf_hub_download(source.repo, other, revision=source.revision)
        return Path(hf_hub_download(source.repo, source.file, revision=source.revision))
    except (OSError, ValueError) as error:
        address = f"https://huggingface.co/{source.repo}/resolve/{source.revision or 'main'}"
        files = " ".join(f"{address}/{file}" for file in (source.file, *source.other_files))
        raise WeightsError(
            f"weights: could not fetch {name} ({type(error).__name__}); download {files} on a machine with a network, "
            f"put the files into one folder and pass create_reward({name!r}, weights=FOLDER), on the command line "
            "--weights FOLDER"
        ) from error


def _local(name: str, path: Path) -> Path:
    """Return the authors' file, given it or its folder."""
    source = PUBLISHED[name]
    names = (source.file, *source.other_names)
    places = [path / file for file in names] if path.is_dir() else [path]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise WeightsError(
            f"weights: no {' or '.join(str(place) for place in places)}; expected {source.file} of "
            f"https://huggingface.co/{source.repo}, or its folder"
        )
    owners = [owner for owner, other in PUBLISHED.items() if other.file == file.name]
    if owners and file.name not in names:
        raise WeightsError(
            f"weights: {file} is by its name of {' or '.join(owners)}, not of {name}; pass {source.file}"
        )
    return file


def _check_hash(name: str, file: Path, digest: str) -> None:
    """Refuse the file of another reward."""
    owners = [owner for owner, source in PUBLISHED.items() if source.sha256 == digest]
    if owners and name not in owners:
        raise WeightsError(
            f"weights: {file} holds {' or '.join(owners)} by its hash, not {name}; pass {PUBLISHED[name].file}"
        )


def _check_sizes(name: str, file: Path, model: PublishedModel) -> None:
    """Refuse a file without the published hash for a model of the published sizes."""
    source = PUBLISHED[name]
    published = source.model.from_description(source.model.read_description(None))
    sizes, others = ({key: t.shape for key, t in m.state_dict().items()} for m in (model, published))
    if sizes == others:
        assert source.sha256 is not None
        raise WeightsError(
            f"weights: {file} is not whole, or not {name}: its sha256 is not {source.sha256[:12]}...; download "
            f"{source.file} of https://huggingface.co/{source.repo} again"
        )


def _read_all(source: Source, file: Path, digest: str) -> dict[str, Tensor]:
    """Read the weights, and those of the model's head if they lie beside them in a file of their own."""
    tensors = _read(file, digest)
    head = None if source.model.head_file is None else file.parent / source.model.head_file
    if head is not None and head.is_file():
        tensors |= {f"head.{name}": tensor for name, tensor in _read(head, sha256(head)).items()}
    return tensors


def _read(file: Path, digest: str) -> dict[str, Tensor]:
    """Read safetensors; a pickle of tensors is converted once, without running code, into the cache."""
    if file.suffix in _PICKLES:
        converted = cache_folder() / f"{digest}.safetensors"
        if not converted.is_file():
            write_weights(converted, _unpickle(file))
        file = converted
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"weights: {file} is not a whole safetensors file ({error}); download it again") from error


def _unpickle(file: Path) -> dict[str, Tensor]:
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # strangers' bytes: pickle, zipfile and torch raise what they like
        raise WeightsError(
            f"weights: {file} is not a whole file of tensors alone ({type(error).__name__}); it is never opened in a "
            "way that could run code: download it again"
        ) from error
    tensors = stored.get("state_dict", stored) if isinstance(stored, Mapping) else stored
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise WeightsError(f"weights: {file} holds no tensors by name; expected the authors' state dict")
    return {str(name): tensor.contiguous().clone() for name, tensor in tensors.items()}
