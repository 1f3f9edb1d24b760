"""The contract every model keeps, and the base classes that hold the parts that are the same for all."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from aigiqa_reward.types import Context, Images, PromptFeatures


class FullPrecision(nn.Module):
    """A module whose parameters and buffers never fall below float32, whatever the model around it is cast to.

    Heads, gates, similarities and calibration derive from it: `.to(torch.bfloat16)` leaves their numbers as they are.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FullPrecision:
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype in (torch.float16, torch.bfloat16):
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep, recurse)


@dataclass(frozen=True, kw_only=True)
class ModelOutput:
    """Raw scores of a model, before calibration.

    Attributes:
        quality: (B,) higher is better.
        correspondence: (B,) higher is better, or None without prompts.
        details: named tensors, first dimension B.
    """

    quality: Tensor
    correspondence: Tensor | None
    details: Mapping[str, Tensor] = field(default_factory=dict)


class QualityModel(nn.Module, ABC):
    """A quality model: images and encoded prompts in, raw quality and correspondence out.

    A subclass gives `name`, `encode_texts` and `forward`; one whose scores need prompts for quality as well sets
    `needs_prompts`. Row i of the output may depend on image i and prompt i only.
    """

    name: str
    needs_prompts: bool = False

    @abstractmethod
    def encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Features of P distinct texts, each tensor (P, ...), on the model's device."""

    @abstractmethod
    def forward(self, images: Images, prompts: PromptFeatures | None, context: Context | None = None) -> ModelOutput:
        """Score a checked batch of float32 or float64 images."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What is needed besides the weights to build this model again, as JSON."""

    def prepare(self, images: Images, prompts: PromptFeatures | None) -> Context | None:
        """What assistants say about a batch, to be held fixed in gradients; None where a model has none."""
        del images, prompts
        return None

    def encode_prompts(self, prompts: Sequence[str]) -> PromptFeatures:
        """Encode each distinct prompt once, without gradients.

        Raises:
            TypeError: if `prompts` is one string, or holds something else than strings.
            ValueError: if it is empty or a prompt is blank.
        """
        check_prompts(prompts)
        texts = tuple(dict.fromkeys(prompts))
        place = {text: i for i, text in enumerate(texts)}
        with torch.no_grad():
            tensors = self.encode_texts(texts)
        device = next(iter(tensors.values())).device
        index = torch.tensor([place[prompt] for prompt in prompts], device=device)
        return PromptFeatures(texts=texts, index=index, tensors=tensors, model=self.name)


def check_prompts(prompts: object) -> None:
    """Refuse what cannot be a list of prompts, saying which entry and why."""
    if isinstance(prompts, str):
        raise TypeError(
            "prompts: expected a list with one prompt per image, got one string; "
            "use [prompt] * len(images), or Scorer, which takes one prompt for all"
        )
    if not isinstance(prompts, Sequence):
        raise TypeError(f"prompts: expected a list of strings, got {type(prompts).__name__}")
    if not prompts:
        raise ValueError("prompts: expected one prompt per image, got an empty list; pass None to score without")
    for position, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise TypeError(f"prompts[{position}]: expected a string, got {type(prompt).__name__}")
        if not prompt.strip():
            raise ValueError(
                f"prompts[{position}] is empty: correspondence to nothing has no meaning; "
                "pass the prompt, or prompts=None for quality alone"
            )


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One entry of the zoo: what a user should know before choosing it.

    Attributes:
        name: what `create_reward` calls it.
        title: the system's own name.
        paper: where it was published.
        licence: of the code here and of the weights.
        scale: what 0 and 1 mean, and the range scores take.
        input_size: what it does to an image, in pixels.
        differentiable: whether pixel gradients exist.
        gradient_path: what carries them, and what is held fixed.
        needs_prompt: whether quality alone can be had without prompts.
        weights: what `create_reward(name)` loads without further arguments.
        megabytes: size of the embedded weights, 0 where none are.
        sha256: of each embedded file.
    """

    name: str
    title: str
    paper: str
    licence: str
    scale: str
    input_size: str
    differentiable: bool
    gradient_path: str
    needs_prompt: bool
    weights: str
    megabytes: float
    sha256: Mapping[str, str] = field(default_factory=dict)


def warn_ignored_context(name: str) -> None:
    """Say that a model without assistants was given a context."""
    warnings.warn(f"context: {name} has no assistants; the context is ignored", UserWarning, stacklevel=3)
