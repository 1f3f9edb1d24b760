"""The towers: what the compact ones compute, and what the wrappers promise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aigiqa_reward.encoders import compact
from aigiqa_reward.encoders.compact import LITE0, load_text_tower
from aigiqa_reward.encoders.open_clip import OpenCLIPConfig, OpenCLIPEncoder
from aigiqa_reward.encoders.timm import SmoothReLU6, TimmConfig, TimmEncoder
from aigiqa_reward.rewards.factory import get_reward_spec
from aigiqa_reward.utils.weights import WeightsError

SHA256 = get_reward_spec("compact").sha256


def test_smooth_relu6_is_relu6_away_from_its_corners_and_differentiable_at_them() -> None:
    smooth = SmoothReLU6(0.02)
    inputs = torch.linspace(-2, 8, 10_001, dtype=torch.float64)
    away = (inputs.abs() > 0.02) & ((inputs - 6).abs() > 0.02)
    assert torch.allclose(smooth(inputs)[away], torch.nn.functional.relu6(inputs)[away], atol=1e-12)
    assert (smooth(inputs) - torch.nn.functional.relu6(inputs)).abs().max() <= 0.02 / 4 + 1e-12
    near = torch.linspace(-0.05, 0.05, 101, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(smooth, near)
    assert torch.autograd.gradcheck(smooth, (near.detach() + 6).requires_grad_())
    half = inputs.bfloat16()
    assert (smooth(half).float() - torch.nn.functional.relu6(half.float())).abs().max() <= 0.02


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
    with pytest.raises(ValueError, match="smooth"):
        TimmConfig(architecture=LITE0.architecture, smooth=-1.0)


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
