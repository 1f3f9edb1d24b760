"""What goes into a denoiser: options of a call, conditioning by the prompts, initial latents."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Rows: TypeAlias = Mapping[str, Tensor | list[Tensor] | None]
"""Named inputs of a denoiser of which row i belongs to candidate i: tensors, or lists of tensors of unequal length."""


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """The arguments of a pipeline's call that a family serves, named as the pipelines name them.

    Where the caller gave none, a pipeline's own default stands; None where the pipeline has no such argument.
    """

    num_inference_steps: int = 50
    timesteps: list[int] | None = None
    sigmas: list[float] | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    guidance_rescale: float = 0.0
    cfg_normalization: bool | float = False
    cfg_truncation: float | None = None
    eta: float = 0.0
    height: int | None = None
    width: int | None = None
    use_resolution_binning: bool = False
    negative_prompt: str | None = None
    clip_skip: int | None = None
    max_sequence_length: int | None = None
    clean_caption: bool | None = None
    complex_human_instruction: list[str] | None = None
    text_encoder_out_layers: tuple[int, ...] | None = None
    original_size: tuple[int, int] | None = None
    crops_coords_top_left: tuple[int, int] = (0, 0)
    target_size: tuple[int, int] | None = None
    cross_attention_kwargs: dict[str, Any] | None = None
    joint_attention_kwargs: dict[str, Any] | None = None
    attention_kwargs: dict[str, Any] | None = None

    @classmethod
    def of(cls, pipe: Any, given: Mapping[str, Any]) -> SamplingOptions:
        """Options for a call of `pipe` with the arguments `given`.

        Raises:
            ValueError: an argument that our own loop does not know how to serve.
        """
        known = {field.name for field in fields(cls)}
        parameters = inspect.signature(type(pipe).__call__).parameters
        served = sorted(known & set(parameters))
        for name, value in given.items():
            if name not in served and value is not None:
                raise ValueError(
                    f"{name}: this way of sampling runs the loop of {type(pipe).__name__} itself and does not serve "
                    f"that argument; leave it out, or sample with plain best of N. It serves {', '.join(served)}"
                )
        values = {name: parameters[name].default for name in served if parameters[name].default is not None}
        values |= {name: value for name, value in given.items() if value is not None}
        options = cls(**values)
        if isinstance(options.negative_prompt, list | tuple):
            raise TypeError("negative_prompt: expected one text for all candidates, got a list")
        return options


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What a denoiser is told of the prompts, one row a candidate.

    Attributes:
        positive: named inputs for the prompts.
        negative: the same names for the negative prompts; None without classifier-free guidance.
    """

    positive: Rows
    negative: Rows | None = None

    def __getitem__(self, rows: Sequence[int]) -> Conditioning:
        """The rows at these places; a place may come several times."""
        return Conditioning(
            positive=_at(self.positive, rows),
            negative=None if self.negative is None else _at(self.negative, rows),
        )

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Rows of several conditionings of one call, in order."""
        negatives = [part.negative for part in parts if part.negative is not None]
        return Conditioning(
            positive=joined([part.positive for part in parts]),
            negative=joined(negatives) if negatives else None,
        )


def _at(rows: Rows, places: Sequence[int]) -> Rows:
    def take(value: Tensor | list[Tensor] | None) -> Tensor | list[Tensor] | None:
        return (
            [value[place] for place in places]
            if isinstance(value, list)
            else value
            if value is None
            else value[torch.as_tensor(places, dtype=torch.long, device=value.device)]
        )

    return {name: take(value) for name, value in rows.items()}


def joined(parts: Sequence[Rows]) -> dict[str, Any]:
    """Several rows one after the other, name by name.

    Texts of unequal length are padded with zeros, which their mask (NAME_mask, None for "all of it") then hides.

    Raises:
        ValueError: texts of unequal length without a mask.
    """
    result: dict[str, Any] = {}
    for name, first in parts[0].items():
        values: list[Any] = [part[name] for part in parts]
        if name.endswith("_mask") and name.removesuffix("_mask") in parts[0]:
            values = _masks(parts, name)
        if isinstance(first, list):
            result[name] = [entry for value in values for entry in value]
        elif all(value is None for value in values):
            result[name] = None
        else:
            if len({value.shape[1:] for value in values}) > 1 and f"{name.removesuffix('_mask')}_mask" not in parts[0]:
                raise ValueError(f"{name}: expected equal shapes to join, got {[tuple(v.shape) for v in values]}")
            result[name] = torch.cat(_padded(values))
    return result


def _masks(parts: Sequence[Rows], name: str) -> list[Any]:
    """Masks of all parts; all None where there is nothing to hide."""
    texts: list[Any] = [part[name.removesuffix("_mask")] for part in parts]
    masks = [part[name] for part in parts]
    if all(mask is None for mask in masks) and len({text.shape[1] for text in texts}) == 1:
        return masks
    whole = [text.new_ones(text.shape[:2], dtype=torch.int64) for text in texts]
    return [whole[place] if mask is None else mask for place, mask in enumerate(masks)]


def _padded(values: Sequence[Tensor]) -> list[Tensor]:
    """Tensors (B, L, ...) with zeros at the end of the shorter ones."""
    if values[0].ndim < 2:
        return list(values)
    longest = max(value.shape[1] for value in values)
    return [F.pad(v, (*[0] * 2 * (v.ndim - 2), 0, longest - v.shape[1])) for v in values]


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where sampling starts.

    Attributes:
        latents: (B, ...) noise, in the layout in which the pipeline's scheduler sees it.
        shared: named inputs of the denoiser that all candidates have in common (places of the latents' tokens).
    """

    latents: Tensor
    shared: Mapping[str, Tensor]
