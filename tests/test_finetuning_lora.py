"""The trained adapter: what it changes, what it leaves alone, and that diffusers loads what it writes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from finetuned import stir
from peft import LoraConfig
from pipelines import FAMILIES, FEW_STEPS
from safetensors import safe_open
from torch import Tensor

from aigiqa_reward.finetuning.lora import FILE, LoRA
from aigiqa_reward.sampling.families import family_of
from aigiqa_reward.utils.weights import WeightsError

LAYERS = {"sd": "to_q", "sdxl": "to_v", "sd3": "add_k_proj", "flux": "to_add_out"}
"""A layer of each denoiser that must be adapted."""


def image(pipe: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return pipe(prompt="a red apple", generator=generator, output_type="pt", **FEW_STEPS).images


def lora_on(pipe: Any, **settings: Any) -> LoRA:
    return LoRA(family_of(pipe, {}, need="the test"), **{"rank": 3, **settings})


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in ("sdxl", "sd3"))) for n in FAMILIES])
def test_diffusers_loads_what_is_written(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = FAMILIES[name]()
    before = image(pipe)
    lora = lora_on(pipe, rank=2, alpha=5.0)
    assert any(LAYERS[name] in weight for weight in lora.weights)
    assert {weight.dtype for weight in lora.weights.values()} == {torch.float32}
    assert torch.equal(image(pipe), before), "an untrained adapter changes nothing"
    stir(lora)
    trained = image(pipe)
    assert float((trained - before).abs().max()) > 1e-3
    with lora.off():
        assert torch.equal(image(pipe), before)
    assert torch.equal(image(pipe), trained)

    assert lora.write(tmp_path) == tmp_path / FILE
    fresh = FAMILIES[name]()
    logging.getLogger("diffusers").addHandler(caplog.handler)
    with caplog.at_level(logging.WARNING):
        fresh.load_lora_weights(tmp_path)
    logging.getLogger("diffusers").removeHandler(caplog.handler)
    # Diffusers says of every file without layers for the text encoders that it found none for them.
    assert not [record for record in caplog.records if "No LoRA keys associated to CLIP" not in record.message]
    assert torch.equal(image(fresh), trained)
    lora.remove()
    assert torch.equal(image(pipe), before)


def test_half_the_scale_is_half_of_alpha() -> None:
    pipe, other = pipelines.stable_diffusion(), pipelines.stable_diffusion()
    lora, _ = stir(lora_on(pipe, alpha=4.0)), stir(lora_on(other, alpha=2.0))
    expected = image(other)
    assert not torch.equal(image(pipe), expected)
    with lora.scaled(0.5):
        assert torch.equal(image(pipe), expected)


def test_metadata_says_how_it_was_made(tmp_path: Path) -> None:
    lora = lora_on(pipelines.stable_diffusion(), rank=2, alpha=5.0, targets=("to_q", "to_out.0"))
    with safe_open(lora.write(tmp_path), "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
        names = set(file.keys())
    assert (metadata["unet.r"], metadata["unet.lora_alpha"]) == (2, 5.0)
    assert set(metadata["unet.target_modules"]) == {"to_q", "to_out.0"}
    assert {name.rpartition(".lora_")[0].rpartition("attn")[2][2:] for name in names} == {"to_q", "to_out.0"}
    with pytest.raises(ValueError, match=r"^target_modules: no layer of UNet2DConditionModel is named 'to_z'.*to_q"):
        lora_on(pipelines.stable_diffusion(), targets=("to_q", "to_z"))


def with_style(scale: float) -> Any:
    pipe = pipelines.stable_diffusion()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "ff.net.2"]), adapter_name="style")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in pipe.unet.named_parameters():
            if ".style." in name:
                weight.copy_(torch.randn(weight.shape, generator=generator))
    pipe.set_adapters("style", scale)
    return pipe


def test_another_adapter_stays_as_it_is(tmp_path: Path) -> None:
    pipe = with_style(0.5)
    before = image(pipe)
    assert not torch.equal(image(with_style(1.0)), before)
    lora = lora_on(pipe)
    assert torch.equal(image(pipe), before)
    assert set(pipe.unet.active_adapters()) == {"style", "reward"}
    assert {name for name, weight in pipe.unet.named_parameters() if weight.requires_grad} == set(lora.weights)
    stir(lora)
    both = image(pipe)
    assert not torch.equal(both, before)
    with lora.off():
        assert torch.equal(image(pipe), before)
    lora.write(tmp_path)
    with safe_open(tmp_path / FILE, "pt") as file:
        assert len(file.keys()) == len(lora.weights)
    again = with_style(0.5)
    again.load_lora_weights(tmp_path, adapter_name="mine")
    again.set_adapters(["style", "mine"], [0.5, 1.0])
    torch.testing.assert_close(image(again), both, rtol=0, atol=1e-5)
    lora.remove()
    assert torch.equal(image(pipe), before)


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_a_disabled_adapter_stays_off_and_every_layer_is_trained(family: str) -> None:
    pipe = FAMILIES[family]()
    denoiser: Any = pipe.unet if family == "sd" else pipe.transformer
    before = image(pipe)
    config = LoraConfig(r=2, lora_alpha=40, init_lora_weights=False, target_modules=["to_q", "to_k", "proj_out"])
    denoiser.add_adapter(config, adapter_name="style")
    assert not torch.equal(image(pipe), before)
    pipe.disable_lora()
    lora = lora_on(pipe)
    assert torch.equal(image(pipe), before)
    for name in lora.weights:
        layer = denoiser.get_submodule(name.partition(".lora_")[0])
        assert "reward" in layer.active_adapters and not layer.disable_adapters
    lora.remove()
    assert torch.equal(image(pipe), before)
    pipe.enable_lora()
    assert not torch.equal(image(pipe), before), "as before"


@pytest.mark.parametrize("family", ["sd", "sd3", "flux"])
def test_fused_projections_are_refused_until_they_are_undone(family: str) -> None:
    pipe = FAMILIES[family]()
    denoiser: Any = pipe.unet if family == "sd" else pipe.transformer
    denoiser.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"^pipe: expected .*projections, got fused .*unfuse_qkv_projections\(\)"):
        lora_on(pipe)
    denoiser.unfuse_qkv_projections()
    lora_on(pipe)


def test_initial_values_depend_on_the_seed_and_a_removed_adapter_leaves_no_trace() -> None:
    pipe, states = pipelines.stable_diffusion(), []
    for seed in (0, 0, 1):
        states.append(lora_on(pipe, rank=64, seed=seed).state())
        with pytest.raises(ValueError, match=r"^pipe: expected no adapter named 'reward' on its unet.*delete_adapters"):
            lora_on(pipe)
        pipe.delete_adapters("reward")
    downs = [torch.cat([t.flatten() for name, t in state.items() if "lora_A" in name]) for state in states]
    assert torch.equal(downs[0], downs[1])
    assert not torch.equal(downs[0], downs[2])
    assert float(downs[0].std()) * 64 == pytest.approx(1, abs=0.05)
    assert all(not tensor.any() for name, tensor in states[0].items() if "lora_B" in name)


def test_everything_else_is_frozen_and_half_precision_stays() -> None:
    pipe = pipelines.stable_diffusion().to(torch.bfloat16)
    lora = lora_on(pipe)
    assert {weight.dtype for weight in lora.weights.values()} == {torch.float32}
    others = [
        p for part in (pipe.unet, pipe.vae, pipe.text_encoder) for n, p in part.named_parameters() if "lora" not in n
    ]
    assert {(p.dtype, p.requires_grad) for p in others} == {(torch.bfloat16, False)}


def test_state_goes_there_and_back(tmp_path: Path) -> None:
    lora, other = lora_on(pipelines.stable_diffusion()), lora_on(pipelines.stable_diffusion(), seed=1)
    kept = stir(lora).state()
    lora.write(tmp_path)
    other.load(other.read(tmp_path))
    assert all(torch.equal(tensor, other.state()[name]) for name, tensor in kept.items())
    stir(lora, seed=5)  # a state is a copy
    lora.load(kept)
    assert all(torch.equal(tensor, lora.state()[name]) for name, tensor in kept.items())
    for settings in ({"rank": 4}, {"targets": ("to_q",)}):
        with pytest.raises(WeightsError, match=r"is of another adapter.*the rank and target_modules"):
            lora_on(pipelines.stable_diffusion(), **settings).load(kept)
