"""Where published rewards come from: local copies, hashes, pickles, and what is wrong with them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from clip_models import write_tiny_clip
from safetensors.torch import save_file
from test_model_contract import PROMPTS, scenes
from tiny_published import tensors_of_clip, tiny_published, write_pickscore

from aigiqa_reward import create_reward
from aigiqa_reward.encoders.open_clip import OpenCLIPConfig
from aigiqa_reward.rewards import published
from aigiqa_reward.utils.weights import WeightsError, sha256

UNPICKLED: list[str] = []


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return UNPICKLED.append, ("code ran",)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny PickScore in the authors' layout."""
    return write_pickscore(tmp_path)


def test_the_file_or_its_folder_is_loaded(folder: Path) -> None:
    images = scenes(1, 48, 48)
    expected = tiny_published("pickscore")(images, PROMPTS[:1]).total
    for weights in (folder, str(folder), folder / "model.safetensors"):
        assert torch.equal(create_reward("pickscore", weights=weights)(images, PROMPTS[:1]).total, expected)
    low = create_reward("pickscore", weights=folder, dtype=torch.bfloat16).model.state_dict()
    assert {name for name, tensor in low.items() if tensor.dtype == torch.float32} == {"cosine.logit_scale"}


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_pickle_of_tensors_is_converted_once(folder: Path, wrapped: bool) -> None:
    own = tensors_of_clip()
    torch.save({"state_dict": own} if wrapped else own, folder / "model.pt")
    expected = create_reward("pickscore", weights=folder).model.state_dict()
    for _ in range(2):
        found = create_reward("pickscore", weights=folder / "model.pt").model.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    (converted,) = published.cache_folder().iterdir()
    assert converted.name == f"{sha256(folder / 'model.pt')}.safetensors"


def test_code_in_a_pickle_never_runs(folder: Path) -> None:
    torch.save({"state_dict": tensors_of_clip(), "more": Malicious()}, folder / "model.pt")
    with pytest.raises(WeightsError, match="never opened in a way that could run code"):
        create_reward("pickscore", weights=folder / "model.pt")
    assert UNPICKLED == []


@pytest.mark.parametrize("name", ["logit_scale", "visual_projection.weight"])
def test_loading_is_strict(folder: Path, name: str) -> None:
    own = tensors_of_clip()
    save_file({key: tensor for key, tensor in own.items() if key != name}, folder / "model.safetensors")
    with pytest.raises(WeightsError, match="1 missing"):
        create_reward("pickscore", weights=folder)
    save_file({**own, "other.weight": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"1 unknown \(first: .*other\.weight"):
        create_reward("pickscore", weights=folder)


def test_files_of_other_rewards_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WeightsError, match=r"no .*HPS_v2\.1_compressed\.pt"):
        create_reward("hpsv2.1", weights=folder)
    torch.save({"state_dict": {}}, folder / "HPS_v2_compressed.pt")
    with pytest.raises(WeightsError, match=r"by its name of hpsv2, not of hpsv2\.1"):
        create_reward("hpsv2.1", weights=folder / "HPS_v2_compressed.pt")
    (folder / "HPS_v2_compressed.pt").rename(folder / "HPS_v2.1_compressed.pt")
    digest = sha256(folder / "HPS_v2.1_compressed.pt")
    old = replace(published.PUBLISHED["hpsv2"], sha256=digest)
    monkeypatch.setitem(published.PUBLISHED, "hpsv2", old)
    with pytest.raises(WeightsError, match=r"holds hpsv2 by its hash, not hpsv2\.1"):
        create_reward("hpsv2.1", weights=folder)


def test_a_cut_file_of_the_published_sizes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "HPS_v2.1_compressed.pt").write_bytes(b"PK\x03\x04 the first part of a download")
    with pytest.raises(WeightsError, match=r"not whole, or not hpsv2\.1.*download"):
        create_reward("hpsv2.1", weights=tmp_path)


def test_a_cut_file_of_other_sizes_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        create_reward("pickscore", weights=folder)


def test_without_a_network_the_files_are_named() -> None:
    with pytest.raises(WeightsError, match=r"PickScore_v1/resolve/a4e4367.*model\.safetensors.*weights=FOLDER"):
        create_reward("pickscore")


def test_clipscore_takes_any_clip_and_a_prefix(tmp_path: Path) -> None:
    encoder = OpenCLIPConfig(architecture=f"local-dir:{write_tiny_clip(tmp_path / 'clip', seed=0)}")
    images = scenes(2, 48, 64)
    plain = create_reward("clipscore", encoder=encoder)
    prefixed = create_reward("clipscore", encoder=encoder, prefix="A photo depicts ")
    by_hand = plain(images, [f"A photo depicts {prompt}" for prompt in PROMPTS[:2]])
    assert torch.equal(prefixed(images, PROMPTS[:2]).total, by_hand.total)
    torch.testing.assert_close(by_hand.total, 2.5 * by_hand.details["raw"])
    prefixed.save_pretrained(tmp_path / "saved")
    again = create_reward("clipscore", weights=tmp_path / "saved")
    assert torch.equal(again(images, PROMPTS[:2]).total, by_hand.total)
    with pytest.raises(ValueError, match="weights, encoder"):
        create_reward("clipscore", encoder=encoder, weights=tmp_path / "clip")
    with pytest.raises(ValueError, match="prefix: expected only for clipscore"):
        create_reward("pickscore", prefix="x")
    for arguments in ({"encoder": encoder}, {"preset": "paper"}, {"quality_weight": 0.5}):
        with pytest.raises(ValueError, match="pickscore has no such choice"):
            create_reward("pickscore", **arguments)


_OPEN_CLIP = {"embed_dim": 16, "vision_cfg": {"width": 32}, "text_cfg": {"width": 16}}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_cfg": {**_OPEN_CLIP, "text_cfg": {"hf_model_name": "xlm-roberta-base"}}}, "got hf_model_name"),
        ({"model_cfg": {**_OPEN_CLIP, "vision_cfg": {"timm_model_name": "x"}}}, "got timm_model_name"),
        ({"model_cfg": {**_OPEN_CLIP, "text_cfg": {"width": 16, "no_causal_mask": True}}}, "got no_causal_mask"),
        ({"model_cfg": {**_OPEN_CLIP, "custom_text": True}}, "got custom_text"),
        ({"model_type": "vision-text-dual-encoder"}, "got 'vision-text-dual-encoder'"),
    ],
)
def test_a_clip_of_other_towers_is_refused(folder: Path, config: dict[str, object], named: str) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=f"CLIP.*own .*{named}"):
        create_reward("clipscore", weights=folder)


def test_another_clip_of_the_hub_brings_its_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub itself cannot be reached: this replaces its download by a copy of the files that are asked for."""
    hub, fetched = write_tiny_clip(tmp_path / "hub", seed=0), tmp_path / "fetched"
    fetched.mkdir()

    def snapshot_download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        for file in hub.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, fetched)
        return str(fetched)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    images = scenes(1, 48, 64)
    expected = create_reward("clipscore", weights=hub)(images, PROMPTS[:1]).total
    assert torch.equal(create_reward("clipscore", weights="me/tiny-clip")(images, PROMPTS[:1]).total, expected)
