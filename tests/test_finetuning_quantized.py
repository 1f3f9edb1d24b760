"""LoRA above a base in 4 or 8 bits, or with text encoders that are offloaded."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from commands import only_error, run
from finetuned import PROMPTS, warmth
from safetensors.torch import load_file
from torch import Tensor, nn

from aigiqa_reward import load_embedded_pipeline
from aigiqa_reward.cli._pipelines import load_pipeline
from aigiqa_reward.finetuning import DRaFT, FinetuneConfig, FinetuneResult, finetune
from aigiqa_reward.finetuning.lora import FILE
from aigiqa_reward.sampling.rollout import Rollout

CALL: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 1.0}


def train(pipe: Any, folder: Path, steps: int = 10, **sampling: Any) -> FinetuneResult:
    settings: dict[str, Any] = {"rank": 4, "train_batch_size": 1, "max_train_steps": steps, "kl_coeff": 0.0}
    settings |= {"learning_rate": 1e-2, "checkpointing_steps": 0, "sampling": {**CALL, **sampling}}
    return finetune(pipe, warmth, PROMPTS, DRaFT(), folder, FinetuneConfig(**settings), progress=False)


def losses(result: FinetuneResult) -> list[float]:
    return [line["loss"] for line in result.history]


def linears(pipe: Any) -> dict[str, Any]:
    """The linear layers of a base, also within an adapter."""
    layers = {n: m for n, m in pipe.unet.named_modules() if isinstance(m, nn.Linear) and ".lora_" not in n}
    return {name.removesuffix(".base_layer"): layer for name, layer in layers.items()}


def nf4() -> tuple[Any, Callable[[Any], Tensor]]:
    """The embedded pipeline in nf4, and what gives a layer's weights in float32."""
    functional = pytest.importorskip("bitsandbytes").functional
    pipe = load_pipeline("embedded", "cpu", "float32", quantize="nf4")
    return pipe, lambda layer: functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def int8() -> tuple[Any, Callable[[Any], Tensor]]:
    quantization = pytest.importorskip("torchao").quantization
    pipe = load_embedded_pipeline()
    quantization.quantize_(pipe.unet, quantization.Int8WeightOnlyConfig())
    return pipe, lambda layer: layer.weight.dequantize()


def gguf() -> tuple[Any, Callable[[Any], Tensor]]:
    quants = pytest.importorskip("gguf").quants
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter, dequantize_gguf_tensor

    pipe, kind = load_embedded_pipeline(), pytest.importorskip("gguf").GGMLQuantizationType.Q8_0
    for name, layer in linears(pipe).items():
        new = GGUFLinear(layer.in_features, layer.out_features, layer.bias is not None, torch.float32)
        packed = torch.from_numpy(quants.quantize(layer.weight.detach().numpy(), kind))
        new.weight, new.bias = GGUFParameter(packed, quant_type=kind), layer.bias
        pipe.unet.set_submodule(name, new)
    return pipe, lambda layer: dequantize_gguf_tensor(layer.weight)


@pytest.mark.parametrize("make", [nf4, int8, gguf])
def test_a_quantized_base_trains_as_the_same_weights_in_float32(make: Any, tmp_path: Path) -> None:
    quantized, in_full = make()
    before = {name: in_full(layer) for name, layer in linears(quantized).items()}
    same = load_embedded_pipeline()
    for name, layer in linears(same).items():
        assert not torch.equal(before[name], layer.weight), "or this shows nothing"
        layer.weight.data.copy_(before[name])
    first = losses(train(quantized, tmp_path / "quantized", steps=3))
    assert first == pytest.approx(losses(train(same, tmp_path / "same", steps=3)), rel=1e-4)
    weights = load_file(tmp_path / "quantized" / FILE)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    torch.testing.assert_close(weights, load_file(tmp_path / "same" / FILE), rtol=1e-2, atol=1e-3)
    assert not [name for name, layer in linears(quantized).items() if not torch.equal(in_full(layer), before[name])]


def prediction(pipe: Any) -> Tensor:
    rollout = Rollout(pipe, **CALL)
    state = rollout.start(rollout.encode(PROMPTS[:1]), [torch.Generator().manual_seed(0)])
    with torch.no_grad():
        return rollout.predict(state).output


def test_an_nf4_base_trains_like_the_unquantized_one_and_takes_the_weights_again(tmp_path: Path) -> None:
    pipe, _ = nf4()
    assert {w.dtype for m in pipe.unet.modules() if isinstance(m, nn.Conv2d) for w in m.parameters()} == {torch.float32}
    assert {layer.weight.dtype for layer in linears(pipe).values()} == {torch.uint8}
    quantized = losses(train(pipe, tmp_path / "nf4"))
    assert quantized == pytest.approx(losses(train(load_embedded_pipeline(), tmp_path / "plain")), rel=0.1)

    fresh, _ = nf4()
    for layer in linears(fresh).values():
        layer.train()  # else bitsandbytes packs weights, on some CPUs, which needs widths that 64 divides
    bare = prediction(fresh)
    fresh.load_lora_weights(tmp_path / "nf4")
    torch.testing.assert_close(prediction(fresh), prediction(pipe))
    assert float((prediction(fresh) - bare).abs().max()) > 1e-3


def test_weights_that_a_sampling_has_packed_are_refused(tmp_path: Path) -> None:
    pipe, _ = nf4()
    layer = next(layer for layer in linears(pipe).values() if layer.in_features == 192)
    with torch.no_grad():
        layer(torch.zeros(1, 192))
    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes packs no weights for this CPU")
    with pytest.raises(ValueError, match=r"^pipe: .* packed for this CPU .*; load it again"):
        train(pipe, tmp_path)


def test_the_command_quantizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: list[object] = ["--model", "embedded", "--prompt", "a red apple", "--num-inference-steps", 1, "--rank", 2]
    options += ["--quantize", "nf4", "--train-batch-size", 1, "--max-train-steps", 1, "--output-dir", tmp_path]
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "bitsandbytes", None)
        assert "--quantize: needs bitsandbytes: pip install" in only_error(run("finetune", "draft", *options))
    assert "--fsdp: shards no quantized weights" in only_error(run("finetune", "draft", *options, "--fsdp"))
    pytest.importorskip("bitsandbytes")
    result = run("finetune", "draft", *options)
    assert result.exit_code == 0, result.output
    state = (tmp_path / "checkpoint-1" / "state.json").read_text()
    assert '"step": 1' in state
    assert {weight.dtype for weight in load_file(tmp_path / FILE).values()} == {torch.float32}


def test_text_encoders_may_be_offloaded_by_groups_and_the_denoiser_not(tmp_path: Path) -> None:
    offload: dict[str, Any] = {"onload_device": torch.device("cpu"), "offload_type": "leaf_level"}
    from diffusers.hooks import apply_group_offloading

    pipe = pipelines.flux()
    apply_group_offloading(pipe.text_encoder_2, **offload)
    small = {"height": 32, "width": 32}
    offloaded = losses(train(pipe, tmp_path / "offloaded", steps=2, **small))
    assert offloaded == losses(train(pipelines.flux(), tmp_path / "plain", steps=2, **small))
    for part in ("transformer", "vae"):
        pipe = pipelines.flux()
        getattr(pipe, part).enable_group_offload(**offload)
        with pytest.raises(ValueError, match=r"^pipe: .* group offload, .*--quantize nf4"):
            train(pipe, tmp_path / part, **small)
