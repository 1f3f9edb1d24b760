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

from aigiqa_reward.encoders.qwen_vl import CHAT_FILES
from aigiqa_reward.models.clipscore import CLIPScore
from aigiqa_reward.models.hps import HPSv2, HPSv21
from aigiqa_reward.models.hpsv3 import CHAT_REPO, HPSv3
from aigiqa_reward.models.imagereward import CycleReward, ImageReward
from aigiqa_reward.models.laion_aesthetic import LAIONAesthetic
from aigiqa_reward.models.mps import MPS
from aigiqa_reward.models.pickscore import PickScore
from aigiqa_reward.models.published import PublishedModel
from aigiqa_reward.models.siglip2 import SigLIP2
from aigiqa_reward.models.vqascore import VQAScore
from aigiqa_reward.utils.io import read_json
from aigiqa_reward.utils.isolation import building
from aigiqa_reward.utils.weights import WeightsError, load_strictly, sha256, write_weights

_PICKLES = (".pt", ".pth")
_INDEX = ".safetensors.index.json"
_QWEN_FILES = ("config.json", "preprocessor_config.json", "chat_template.json")


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
        other_files: configuration and tokenizer, in the same repository; "*" stands for the numbers of shards.
        other_names: names that the weights have in other copies or sizes of the model.
        chat: Hub id of the tokenizer and chat template, if they are in another repository.
    """

    model: type[PublishedModel]
    family: Literal["CLIP", "BLIP", "SigLIP", "Qwen-VL"]
    repo: str
    file: str
    revision: str | None = None
    sha256: str | None = None
    other_files: tuple[str, ...] = ()
    other_names: tuple[str, ...] = ()
    chat: str = ""


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
    "vqascore": Source(
        model=VQAScore,
        family="Qwen-VL",
        repo="Qwen/Qwen2.5-VL-3B-Instruct",
        file=f"model{_INDEX}",
        other_files=("model-*-of-*.safetensors", *_QWEN_FILES, *CHAT_FILES),
        other_names=("model.safetensors",),
    ),
    "hpsv3": Source(model=HPSv3, family="Qwen-VL", repo="MizzenAI/HPSv3", file="HPSv3.safetensors", chat=CHAT_REPO),
}
"""The published rewards by name."""


@building()
def load_published(
    name: str, weights: str | Path | None = None, dtype: torch.dtype | None = None, revision: str | None = None
) -> PublishedModel:
    """Build a published reward's model and load the authors' weights strictly.

    Args:
        name: one of PUBLISHED.
        weights: a local copy of the authors' file, the folder that holds it, or the Hub id of another copy or size of
            the model; None fetches the authors' from the Hub. A `config.json` beside it gives the sizes, where they
            are not the published ones.
        dtype: dtype of the towers; None is float32.
        revision: branch, tag or commit of the Hub id.
    """
    from accelerate import init_empty_weights

    source = PUBLISHED[name]
    file = locate(name, weights, revision)
    try:
        description = source.model.read_description(file.parent)
        with init_empty_weights():
            model = source.model.from_description(description)
            digest = sha256(file) if source.sha256 or file.suffix in _PICKLES else ""
            _check_hash(name, file, digest)
            if source.sha256 not in (None, digest):
                _check_sizes(name, file, model)
    except WeightsError:
        raise
    except Exception as error:  # strangers' files: whatever library reads or builds from them raises what it likes
        raise WeightsError(
            f"weights: {file.parent} does not describe a {name} ({type(error).__name__}: {error}); expected the "
            f"authors' files of https://huggingface.co/{source.repo}"
        ) from error
    model.to(dtype or torch.float32)
    expected = model.state_dict()
    tensors = source.model.rename(_read_all(source, file, digest))
    fitting = {
        key: tensor.to(expected[key].dtype, copy=True) if key in expected else tensor for key, tensor in tensors.items()
    }
    load_strictly(model, fitting, source=str(file))
    return model


def locate(name: str, weights: str | Path | None = None, revision: str | None = None) -> Path:
    """Return the authors' file: a local copy, given it or its folder, or fetched from the Hub, also from another id."""
    hub = weights is not None and is_hub_id(weights)
    if revision is not None and not hub:
        raise ValueError(f"revision: expected only for a Hub id, got it for weights={weights!r}; leave it out")
    if weights is None or hub:
        return _fetch(name, str(weights) if hub else None, revision)
    return _local(name, Path(weights).expanduser())


def cached_weights(name: str) -> Path | None:
    """Find the weights of a published reward in the Hub's cache, without a network; None if they are not there."""
    from huggingface_hub import try_to_load_from_cache

    source = PUBLISHED[name]
    found = try_to_load_from_cache(source.repo, source.file, revision=source.revision)
    return Path(found) if isinstance(found, str) else None


def cache_folder() -> Path:
    """Return the folder of converted weights."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aigiqa-reward" / "weights"


def is_hub_id(weights: str | Path) -> bool:
    """Whether this is no local path but may be owner/name on the Hub."""
    path = Path(os.path.expanduser(weights))  # noqa: PTH111  (Path's own raises for an unknown ~name)
    named = path.suffix in (".safetensors", ".json", ".bin", ".ckpt", *_PICKLES)
    return not path.exists() and not path.is_absolute() and len(path.parts) == 2 and not named


def _fetch(name: str, repo: str | None = None, revision: str | None = None) -> Path:
    """Download the files of a reward, or find them in the Hub's cache."""
    from huggingface_hub import hf_hub_download, snapshot_download

    source = PUBLISHED[name]
    repo, revision = (repo, revision) if repo else (source.repo, source.revision)
    files = [source.file, *source.other_files]
    sizes = (
        ["config.json", "open_clip_config.json"] if repo != source.repo else []
    )  # of another model than the authors'
    try:
        folder = snapshot_download(repo, revision=revision, allow_patterns=[*files, *source.other_names, *sizes])
        for file in CHAT_FILES if source.chat else ():
            hf_hub_download(source.chat, file)
        return _local(name, Path(folder))
    except (OSError, ValueError) as error:
        listed = [f"{repo}/resolve/{revision or 'main'}/{file}" for file in files]
        listed += [f"{source.chat}/resolve/main/{file}" for file in CHAT_FILES if source.chat]
        wanted = name if repo == source.repo else f"{repo!r}, which is no local path, for {name}"
        raise WeightsError(
            f"weights: could not fetch {wanted} ({type(error).__name__}); download "
            f"{' '.join(f'https://huggingface.co/{file}' for file in listed)} on a machine with a network, put the "
            f"files into one folder and pass create_reward({name!r}, weights=FOLDER), on the command line "
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
            f"weights: no {' or '.join(map(str, places))}; expected {source.file} of "
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
    """Read safetensors by mmap; a pickle of tensors is converted once, without running code, into the cache."""
    if file.name.endswith(_INDEX):
        return _read_shards(file)
    if file.suffix in _PICKLES:
        converted = cache_folder() / f"{digest}.safetensors"
        if not converted.is_file():
            write_weights(converted, _unpickle(file))
        file = converted
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"weights: {file} is not a whole safetensors file ({error}); download it again") from error


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Read the files that an index names, which lie beside it."""
    try:
        shards = sorted({index.parent / Path(shard).name for shard in read_json(index)["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"weights: {index} is not an index of safetensors files ({type(error).__name__})") from error
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise WeightsError(f"weights: {index.parent} lacks {', '.join(missing)}, which {index.name} names; add it")
    return {name: tensor for shard in shards for name, tensor in _read(shard, "").items()}


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
