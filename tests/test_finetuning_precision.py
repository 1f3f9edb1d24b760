"""Half precision without a GPU: what float16 is too narrow for, and gradients that are scaled."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from finetuned import CALL, stir
from safetensors.torch import load_file
from test_finetuning_loop import train
from torch import Tensor

from aigiqa_reward.finetuning import FinetuneConfig
from aigiqa_reward.finetuning.lora import FILE, LoRA
from aigiqa_reward.finetuning.optimizers import MOST_SKIPPED, FinetuningError, Optimization
from aigiqa_reward.sampling.rollout import Rollout

SCALE = 2.0**10


def test_a_decoder_that_float16_is_too_narrow_for_is_not_narrowed() -> None:
    pipe = pipelines.stable_diffusion_xl()
    assert pipe.vae.config.force_upcast
    with torch.no_grad():
        pipe.vae.decoder.conv_in.weight.mul_(1e6)
        pipe.vae.decoder.conv_out.weight.mul_(1e-2)
    rollout = Rollout(pipe, **CALL)
    latents = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(0), requires_grad=True)
    expected = rollout.decode(latents)
    (slope,) = torch.autograd.grad(expected.sum(), latents)
    with torch.autocast("cpu", dtype=torch.float16):
        narrow = pipe.vae.decode(latents, return_dict=False)[0]
        images = rollout.decode(latents)
        assert torch.is_autocast_enabled("cpu")
    assert not narrow.isfinite().all(), "or this shows nothing"
    assert torch.equal(images, expected)
    assert torch.equal(torch.autograd.grad(images.sum(), latents)[0], slope)
    pipe.vae.register_to_config(force_upcast=False)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        assert Rollout(pipe, **CALL).decode(latents).dtype == torch.float16, "left to autocast"


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_8_bit_adam_goes_on_where_it_was(tmp_path: Path) -> None:
    eight = {"use_8bit_adam": True, "rank": 128, "checkpointing_steps": 2}
    train(tmp_path / "whole", max_train_steps=4, **eight)
    train(tmp_path / "parts", max_train_steps=2, **eight)
    state = torch.load(tmp_path / "parts" / "checkpoint-2" / "training_state.pt", weights_only=True)
    moments = state["optimization"]["optimizer"]["state"].values()
    assert any(entry["__bnb_optimizer_quant_state__"]["state1"].dtype == torch.uint8 for entry in moments)
    train(tmp_path / "parts", max_train_steps=4, resume_from_checkpoint="latest", **eight)
    train(tmp_path / "plain", max_train_steps=4, rank=128)
    whole, parts, plain = (load_file(tmp_path / name / FILE) for name in ("whole", "parts", "plain"))
    assert not [name for name in whole if not torch.equal(whole[name], parts[name])]
    assert [name for name in whole if not torch.equal(whole[name], plain[name])], "or it was not used"


def scaling(monkeypatch: pytest.MonkeyPatch) -> Accelerator:
    accelerator = Accelerator(cpu=True)
    monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp16")
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    return accelerator


def optimization_of(accelerator: Accelerator, **settings: Any) -> Optimization:
    lora = stir(LoRA(Rollout(pipelines.stable_diffusion(), **CALL).family, rank=2))
    return Optimization(lora, accelerator, FinetuneConfig(**settings), 1e-2)


def weights(optimization: Optimization) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in optimization.weights])


def backward(optimization: Optimization, factor: float = 1.0) -> None:
    loss = factor * sum((weight * (place + 1)).sum() for place, weight in enumerate(optimization.weights))
    optimization.accelerator.backward(loss)


def test_gradients_are_clipped_in_their_own_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = optimization_of(Accelerator(cpu=True), max_grad_norm=0.5)
    plain.accelerator.native_amp = False  # accelerators share their state, also with those of tests before
    half = optimization_of(scaling(monkeypatch), max_grad_norm=0.5, mixed_precision="fp16")
    for _ in range(3):
        backward(plain)
        backward(half)
        length = plain.step()
        assert length > 0.5
        assert half.step() == pytest.approx(length, rel=1e-5)
    torch.testing.assert_close(weights(half), weights(plain), rtol=1e-5, atol=1e-7)
    assert half.inner.state_dict()["state"][0]["exp_avg"].abs().max() <= 0.5


def test_a_step_that_overflows_is_skipped_and_is_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    scaled = scaling(monkeypatch)
    half = optimization_of(scaled, mixed_precision="fp16", lr_scheduler="linear", max_train_steps=10)
    before, rate = weights(half), half.learning_rate
    backward(half, float("inf"))
    assert not torch.tensor(half.step()).isfinite()
    assert torch.equal(weights(half), before)
    assert half.learning_rate == rate
    assert float(scaled.scaler.get_scale()) == SCALE / 2
    backward(half)
    half.step()
    assert not torch.equal(weights(half), before)
    assert half.learning_rate < rate
    for _ in range(MOST_SKIPPED):
        backward(half, float("nan"))
        half.step()
    backward(half, float("nan"))
    with pytest.raises(FinetuningError, match=f"NaN or infinite {MOST_SKIPPED + 1} times in a row.*'bf16'"):
        half.step()
