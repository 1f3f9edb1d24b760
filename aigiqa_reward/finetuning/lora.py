"""The trained LoRA adapter: added to a denoiser, switched off, saved in diffusers' format.

Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models": a frozen layer W gets an addition (alpha / r) B A
with A (r, in) and B (out, r). B starts at zero, so that the untrained adapter changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aigiqa_reward.finetuning.batch import generator_of
from aigiqa_reward.sampling.families import Family
from aigiqa_reward.utils.io import write_atomically
from aigiqa_reward.utils.weights import WeightsError, read_weights

ADAPTER = "reward"  # name in the pipeline
FILE = "pytorch_lora_weights.safetensors"  # loaded by `pipe.load_lora_weights(folder)`

ATTENTION = ("to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")
"""Attention projections, as in diffusers' LoRA scripts; the last four are those of joint attention."""


class LoRA:
    """One trained adapter on a pipeline's denoiser, in float32. All other weights of the pipeline are frozen.

    A is initialized from a normal distribution with standard deviation 1 / rank.
    """

    def __init__(
        self,
        family: Family,
        *,
        rank: int = 8,
        alpha: float | None = None,
        targets: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        from peft import LoraConfig
        from peft.tuners.tuners_utils import BaseTunerLayer

        # torch.compile(pipe.unet) wraps the module, which changes the names of its parameters.
        self.denoiser: Any = getattr(family.denoiser, "_orig_mod", family.denoiser)
        self.prefix = family.denoiser_name
        if ADAPTER in getattr(self.denoiser, "peft_config", {}):
            raise ValueError(
                f"pipe: expected no adapter named {ADAPTER!r} on its {self.prefix}, found one of an earlier training; "
                f"call pipe.delete_adapters({ADAPTER!r}), or pipe.fuse_lora() first to keep its effect"
            )
        if any(map(_fused, self.denoiser.modules())):
            raise ValueError(
                f"pipe: expected a {self.prefix} with separate attention projections, got fused ones, beside which the "
                f"adapted ones are not used; call pipe.{self.prefix}.unfuse_qkv_projections() first"
            )
        states = [getattr(getattr(layer, "weight", None), "quant_state", None) for layer in self.denoiser.modules()]
        if any(getattr(state, "packing_format_for_cpu", False) for state in states):
            raise ValueError(
                f"pipe: expected a {self.prefix} that was not called yet, got one in 4 bits whose weights bitsandbytes "
                "packed for this CPU in a sampling, so that no gradient passes through them; load it again"
            )
        self._aside: dict[str, Tensor] = {}  # the trained weights, while others replace them
        names = self._targets(targets)
        for module in family.pipe.components.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()
        for layer in self.denoiser.modules():
            if getattr(layer, "support_avx512bf16_for_cpu", False):  # bitsandbytes on a CPU
                layer.train()  # else a call without gradients packs the weights, and no gradient passes through them
        config = LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=names)  # pyright: ignore[reportArgumentType]
        before: list[Any] = [layer for layer in self.denoiser.modules() if isinstance(layer, BaseTunerLayer)]
        self._disabled = [layer for layer in before if layer.disable_adapters]
        active = {layer: [] if layer.disable_adapters else list(layer.active_adapters) for layer in before}
        self.denoiser.add_adapter(config, adapter_name=ADAPTER)
        self._layers: list[Any] = [layer for layer in self.denoiser.modules() if isinstance(layer, BaseTunerLayer)]
        for layer in self._layers:
            layer.enable_adapters(True)  # also where pipe.disable_lora() was called, with the trained one alone
            layer.set_adapter([*active.get(layer, ()), ADAPTER])  # the denoiser's would reset the others' scales to 1
        for name, weight in self.denoiser.named_parameters():
            weight.requires_grad_(f".{ADAPTER}." in name)
        for place, (name, weight) in enumerate(self.weights.items()):
            weight.data = weight.data.float()
            if "lora_A" in name:
                random = torch.randn(weight.shape, generator=generator_of(seed, "lora", place), dtype=torch.float32)
                weight.data.copy_(random / rank)

    def _targets(self, names: Sequence[str] | None) -> list[str]:
        """Return the names of the layers to adapt, by default the attention projections."""
        modules = dict(self.denoiser.named_modules())
        if names is None:
            kinds = {name.rpartition(".")[2] for name in modules}
            names = [n for n in ATTENTION if n.partition(".")[0] in kinds]
        plain = [n for n, m in modules.items() if isinstance(m, nn.Linear | nn.Conv2d) and ".lora_" not in n]
        layers = [n.removesuffix(".base_layer") for n in plain]  # with or without other adapters
        missing = [name for name in names if not any(n == name or n.endswith(f".{name}") for n in layers)]
        if missing or not names:
            ends = sorted({n.rpartition(".")[2] for n in layers} - {"0", "1", "2"})
            raise ValueError(
                f"target_modules: no layer of {type(self.denoiser).__name__} is named "
                f"{', '.join(map(repr, missing)) or 'as an attention projection'}; its layers end in {', '.join(ends)}"
            )
        return list(names)

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The trained parameters by their names in the denoiser."""
        return {name: weight for name, weight in self.denoiser.named_parameters() if f".{ADAPTER}." in name}

    def unused(self) -> list[str]:
        """Return the names of the adapted layers that no gradient has reached; called after a backward pass."""
        kept = {name.partition(".lora_")[0] for name, weight in self.weights.items() if weight.grad is not None}
        return [name for name in dict.fromkeys(n.partition(".lora_")[0] for n in self.weights) if name not in kept]

    def off(self) -> AbstractContextManager[None]:
        """Context without this adapter; other adapters stay active."""
        return self.scaled(0.0)

    def scaled(self, factor: float) -> AbstractContextManager[None]:
        """Context with this adapter's scale times `factor`."""
        return self._at([{**s, ADAPTER: s[ADAPTER] * factor} if ADAPTER in s else s for s in self._scales()])

    def checkpoint(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function with gradient checkpointing; its second run sees the adapters' scales of the first."""
        contexts = partial(lambda scales: (nullcontext(), self._at(scales)), self._scales())
        return checkpoint(function, *arguments, use_reentrant=False, context_fn=contexts)

    def _scales(self) -> list[dict[str, float]]:
        return [dict(layer.scaling) for layer in self._layers]

    def _set(self, scales: Sequence[Mapping[str, float]]) -> None:
        for layer, scale in zip(self._layers, scales, strict=True):
            layer.scaling.update(scale)

    @contextmanager
    def _at(self, scales: Sequence[Mapping[str, float]]) -> Iterator[None]:
        before = self._scales()
        try:
            self._set(scales)
            yield
        finally:
            self._set(before)

    def remove(self) -> None:
        """Remove the adapter from the pipeline."""
        self.denoiser.delete_adapters(ADAPTER)
        for layer in self._disabled:
            layer.enable_adapters(False)

    @contextmanager
    def replaced(self, state: Mapping[str, Tensor]) -> Iterator[None]:
        """Context with other weights of `state()` in the adapter; `state` returns the trained ones within it too."""
        self._aside = self.state()
        try:
            self.load(state)
            yield
        finally:
            self.load(self._aside)
            self._aside = {}

    def state(self) -> dict[str, Tensor]:
        """Return a copy of the trained weights by their names in diffusers' files."""
        if self._aside:
            return {name: weight.clone() for name, weight in self._aside.items()}
        return {self._stored(name): w.detach().clone() for name, w in self.weights.items()}

    def load(self, state: Mapping[str, Tensor], *, source: str = "the checkpoint") -> None:
        """Copy weights of `state()` into the adapter."""
        expected = {self._stored(name): weight for name, weight in self.weights.items()}
        if {n: w.shape for n, w in expected.items()} != {n: w.shape for n, w in state.items()}:
            raise WeightsError(
                f"weights: {source} is of another adapter; pass the rank and target_modules that it was trained with"
            )
        with torch.no_grad():
            for name, weight in expected.items():
                weight.copy_(state[name])

    def write(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> Path:
        """Write the weights for `pipe.load_lora_weights(folder)`, atomically."""
        config = self.denoiser.peft_config[ADAPTER].to_dict()
        named = {f"{self.prefix}.{name}": sorted(v) if isinstance(v, set) else v for name, v in config.items()}
        metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(named, indent=2, sort_keys=True, default=str)}
        state = self.state() if state is None else state
        tensors = {name: tensor.float().cpu().contiguous() for name, tensor in state.items()}
        write_atomically(folder / FILE, save(tensors, metadata=metadata))
        return folder / FILE

    def read(self, folder: Path) -> dict[str, Tensor]:
        """Read the weights that `write` wrote."""
        return read_weights(folder / FILE)

    def _stored(self, name: str) -> str:
        return f"{self.prefix}.{name.replace(f'.{ADAPTER}.', '.')}"


def _fused(layer: Any) -> bool:
    """Whether an attention layer uses one projection for query, key and value; some keep the mark when it is undone."""
    marked = getattr(layer, "fused_projections", False) and hasattr(layer, "unfuse_projections")
    return marked or type(getattr(layer, "processor", None)).__name__.startswith("Fused")
