"""The LoRA layers that a fine-tuning trains: put onto a denoiser, switched off, written in diffusers' format.

Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models": a frozen layer W gets beside it (alpha / r) B A
with A (r, in) and B (out, r); B starts at zero, so that the untrained adapter changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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

ADAPTER = "reward"
"""Name of the trained adapter in the pipeline."""

FILE = "pytorch_lora_weights.safetensors"
"""Where `pipe.load_lora_weights(folder)` looks."""

ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
JOINT_ATTENTION = (*ATTENTION, "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")
"""The attention's projections, as in diffusers' own LoRA scripts: UNets, and transformers that mix text and image."""


class LoRA:
    """One trained adapter on a pipeline's denoiser.

    Args:
        family: of the pipeline. Its denoiser gets the adapter, in float32; all else of the pipeline is frozen.
        rank: r, at least 1.
        alpha: scale of the adapter times r; None is r.
        targets: ends of the names of layers to adapt; None is the attention's projections.
        seed: of A's initial values, normal with deviation 1 / r.

    Raises:
        ValueError: no layer has such a name, or the pipeline holds an adapter of this name already.
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

        # torch.compile(pipe.unet) puts a module around it, whose names nobody else knows.
        self.denoiser: Any = getattr(family.denoiser, "_orig_mod", family.denoiser)
        self.prefix = family.denoiser_name
        self._pipe = family.pipe
        if ADAPTER in getattr(self.denoiser, "peft_config", {}):
            raise ValueError(
                f"pipe: its {self.prefix} holds an adapter named {ADAPTER!r} already, of an earlier training; load the "
                f"pipeline anew, or call pipe.delete_adapters({ADAPTER!r}) (pipe.fuse_lora() first keeps what it does)"
            )
        names = tuple(targets) if targets is not None else self._attention()
        self._check(names)
        _freeze(family.pipe)
        config = LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=list(names))  # pyright: ignore[reportArgumentType]
        others = (
            list(getattr(self.denoiser, "active_adapters", list)()) if hasattr(self.denoiser, "peft_config") else []
        )
        self.denoiser.add_adapter(config, adapter_name=ADAPTER)
        self._layers: list[Any] = [layer for layer in self.denoiser.modules() if isinstance(layer, BaseTunerLayer)]
        for layer in self._layers:
            layer.set_adapter([*others, ADAPTER])  # the denoiser's own method would set their scales back to 1
        for name, weight in self.denoiser.named_parameters():
            weight.requires_grad_(f".{ADAPTER}." in name)
        with torch.no_grad():
            for place, (name, weight) in enumerate(self.weights.items()):
                weight.data = weight.data.float()
                if "lora_A" in name:
                    drawn = torch.randn(weight.shape, generator=generator_of(seed, "lora", place))
                    weight.copy_(drawn / rank)

    def _attention(self) -> tuple[str, ...]:
        kinds = {name.rpartition(".")[2] for name, _ in self.denoiser.named_modules()}
        return tuple(n for n in JOINT_ATTENTION if n.partition(".")[0] in kinds)

    def _check(self, names: Sequence[str]) -> None:
        plain = [n for n, m in self.denoiser.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        layers = [n.removesuffix(".base_layer") for n in plain if ".lora_" not in n]  # with or without other adapters
        missing = [name for name in names if not any(n == name or n.endswith(f".{name}") for n in layers)]
        if missing or not names:
            ends = sorted({n.rpartition(".")[2] for n in layers} - {"0", "1", "2"})
            raise ValueError(
                f"target_modules: no layer of {type(self.denoiser).__name__} is named "
                f"{', '.join(map(repr, missing)) or 'as an attention projection'}; its layers end in {', '.join(ends)}"
            )

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The trained parameters by their names in the denoiser."""
        return {name: weight for name, weight in self.denoiser.named_parameters() if f".{ADAPTER}." in name}

    @contextmanager
    def off(self) -> Iterator[None]:
        """Without this adapter: the pipeline as it was before, other adapters included."""
        with self.scaled(0.0):
            yield

    @contextmanager
    def scaled(self, factor: float) -> Iterator[None]:
        """With this adapter's scale times `factor`."""
        with self._at([{**s, ADAPTER: s[ADAPTER] * factor} if ADAPTER in s else s for s in self._scales()]):
            yield

    def checkpoint(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function, and for the backward pass again, with the adapters' scales as they are now."""
        scales = self._scales()

        def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            return nullcontext(), self._at(scales)

        return checkpoint(function, *arguments, use_reentrant=False, context_fn=contexts)

    def _scales(self) -> list[dict[str, float]]:
        return [dict(layer.scaling) for layer in self._layers]

    @contextmanager
    def _at(self, scales: Sequence[Mapping[str, float]]) -> Iterator[None]:
        before = self._scales()
        try:
            for layer, scale in zip(self._layers, scales, strict=True):
                layer.scaling.update(scale)
            yield
        finally:
            for layer, scale in zip(self._layers, before, strict=True):
                layer.scaling.update(scale)

    def remove(self) -> None:
        """Take the adapter off the pipeline."""
        self.denoiser.delete_adapters(ADAPTER)

    # ----------------------------------------------------------------------------------------- files

    def state(self) -> dict[str, Tensor]:
        """A copy of the weights, by the names that diffusers' files have."""
        return {self._stored(name): w.detach().clone() for name, w in self.weights.items()}

    def load(self, state: Mapping[str, Tensor], *, source: str = "the checkpoint") -> None:
        """Take weights back.

        Raises:
            WeightsError: they are of another adapter.
        """
        expected = {self._stored(name): weight for name, weight in self.weights.items()}
        wrong = {n for n in expected.keys() & state.keys() if expected[n].shape != state[n].shape}
        wrong |= expected.keys() ^ state.keys()
        if wrong:
            raise WeightsError(
                f"weights: {source} is of another adapter: {len(wrong)} names missing, unknown or of another shape "
                f"(first: {min(wrong)}); rank and target_modules must be those that it was trained with"
            )
        with torch.no_grad():
            for name, weight in expected.items():
                weight.copy_(state[name])

    def write(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> Path:
        """Write `pytorch_lora_weights.safetensors`, whole or not at all, for `pipe.load_lora_weights(folder)`.

        Args:
            folder: where to put it.
            state: of `state()`; None is what the weights are now.
        """
        config = self.denoiser.peft_config[ADAPTER].to_dict()
        metadata = {f"{self.prefix}.{name}": _plain(value) for name, value in config.items()}
        state = self.state() if state is None else state
        data = save(
            {name: tensor.float().cpu().contiguous() for name, tensor in state.items()},
            metadata={"format": "pt", "lora_adapter_metadata": json.dumps(metadata, indent=2, sort_keys=True)},
        )
        write_atomically(folder / FILE, data)
        return folder / FILE

    def read(self, folder: Path) -> dict[str, Tensor]:
        """What `write` wrote."""
        return read_weights(folder / FILE)

    def _stored(self, name: str) -> str:
        return f"{self.prefix}.{name.replace(f'.{ADAPTER}.', '.')}"


def _freeze(pipe: Any) -> None:
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.requires_grad_(False).eval()


def _plain(value: Any) -> Any:
    """A setting of peft's as JSON has it."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value if value is None or isinstance(value, bool | int | float | str | list | dict) else str(value)
