"""The towers: what the compact ones compute, and what the wrappers promise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aigiqa_reward.encoders import compact
from aigiqa_reward.encoders.compact import load_text_tower
from aigiqa_reward.encoders.open_clip import OpenCLIPConfig, OpenCLIPEncoder
from aigiqa_reward.encoders.timm import TimmConfig, TimmEncoder
from aigiqa_reward.rewards.factory import get_reward_spec
from aigiqa_reward.utils.weights import WeightsError

SHA256 = get_reward_spec("compact").sha256


def test_an_altered_tokenizer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (compact.TOWERS / "tokenizer.json").read_text(encoding="utf-8")
    assert '"red":2417' in text.replace(" ", "")
    (tmp_path / "tokenizer.json").write_text(text.replace("2417", "2418"), encoding="utf-8")
    tower = load_text_tower(sha256=SHA256["towers/text.safetensors"])
    monkeypatch.setattr(compact, "TOWERS", tmp_path)
    with pytest.raises(WeightsError, match=r"tokenizer\.json was altered"):
        tower.encode(["a red fox"])


def test_wrong_architectures_name_close_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tf_efficientnet_lite0"):
        TimmEncoder(TimmConfig(architecture="tf_efficientnet_lit0"))
    with pytest.raises(ValueError, match=r"ViT-B-32"):
        OpenCLIPEncoder(OpenCLIPConfig(architecture="ViT-B32"))
    with pytest.raises(ValueError, match="got the pickle"):
        OpenCLIPConfig(architecture="ViT-B-32", pretrained="model.pt")


def test_openai_weights_get_their_activation() -> None:
    """open_clip 3 loads weights that were trained with QuickGELU into GELU blocks, and only warns."""
    for architecture, tag, activation in (("ViT-B-32", "openai", "QuickGELU"), ("ViT-B-32", "laion2b_e16", "GELU")):
        with torch.device("meta"):
            encoder = OpenCLIPEncoder(OpenCLIPConfig(architecture=architecture, pretrained=tag), load_weights=False)
            again = OpenCLIPEncoder.from_description(encoder.describe())
        for tower in (encoder, again):
            kinds = {type(module).__name__ for module in tower.clip.modules()}
            assert kinds & {"GELU", "QuickGELU"} == {activation}
    other = OpenCLIPConfig(architecture="roberta-ViT-B-32", pretrained="laion2b_s12b_b32k")
    with pytest.raises(ValueError, match="has QuickGELU and 'laion2b_s12b_b32k' was trained with GELU"):
        OpenCLIPEncoder(other, load_weights=False)
