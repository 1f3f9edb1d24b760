"""The contract every model keeps, and the base classes that hold the parts that are the same for all."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from aigiqa_reward.types import Context, Images, PromptFeatures

Seen: TypeAlias = Mapping[str, Tensor]
"""What a model's towers see of a batch: named tensors, first dimension B."""


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
    `needs_prompts`; one with assistants lists in `context_names` what `prepare` returns. Row i of the output may depend
    on image i and prompt i only.
    """

    name: str
    needs_prompts: bool = False
    context_names: tuple[str, ...] = ()

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
        with torch.no_grad():
            return self.read_prompts(prompts)

    def read_prompts(self, prompts: Sequence[str]) -> PromptFeatures:
        """`encode_prompts` without its checks, and with gradients, for trainings of the text tower."""
        texts, index = distinct_prompts(prompts)
        tensors = self.encode_texts(texts)
        device = next(iter(tensors.values())).device
        return PromptFeatures(texts=texts, index=index.to(device), tensors=tensors, model=self.name)


def distinct_prompts(prompts: Sequence[str]) -> tuple[tuple[str, ...], Tensor]:
    """The distinct prompts in order of first appearance, and (B,) which of them each row has."""
    texts = tuple(dict.fromkeys(prompts))
    place = {text: i for i, text in enumerate(texts)}
    return texts, torch.tensor([place[prompt] for prompt in prompts])


class TrainedModel(QualityModel):
    """A model of frozen towers and a `head` that is fitted to human scores.

    The towers' features of an image do not change while a head is trained: the output of `forward_features` can be
    stored, so that an epoch costs seconds. `forward_head` computes the scores from it.

    Attributes:
        head: what is trained; every parameter of it.
        crop_features: names of `forward_features`'s tensors whose second dimension counts crops; training draws some of them.
        feature_settings: fields of the configuration that change what `forward_features` gives.
    """

    head: Any
    crop_features: tuple[str, ...] = ()
    feature_settings: tuple[str, ...] = ()

    @property
    def standardized(self) -> Mapping[str, Standardize]:
        """Modules that take mean and deviation of the named tensor of `forward_features` from the training images."""
        return {}

    def start_at(self, quality: float, correspondence: float) -> None:
        """Let a fresh head answer about the training images' mean scores, where that is a bias of it."""
        del quality, correspondence

    @abstractmethod
    def forward_features(
        self, images: Images, *, generator: torch.Generator | None = None, crops: int | None = None
    ) -> Seen:
        """What the towers see of a batch: named tensors, first dimension B.

        Args:
            images: (B, 3, H, W).
            generator: draw crops from it, for training; None takes the evenly spaced ones.
            crops: how many; None is the number scored with.
        """

    def digest(self, seen: Seen) -> Seen:
        """Add to `seen` what the head computes from the image alone; `forward_head` computes it where it is missing.

        For a head whose work is mostly there, one digest serves several prompts.
        """
        return seen

    @abstractmethod
    def forward_head(self, seen: Seen, prompts: PromptFeatures | None, context: Context | None) -> ModelOutput:
        """Raw scores of what `forward_features` saw."""

    def forward(self, images: Images, prompts: PromptFeatures | None, context: Context | None = None) -> ModelOutput:
        """Run `forward_features`, then `forward_head`; without a context, prepare it without gradients."""
        if context is None:
            with torch.no_grad():
                context = self.prepare(images, prompts)
        return self.forward_head(self.forward_features(images), prompts, context)


class Standardize(FullPrecision):
    """(x - mean) / deviation of each channel over the training images; the identity until they are known.

    Args:
        width: channels.
        axis: dimension that counts them.
    """

    def __init__(self, width: int, *, axis: int = -1) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.mean: Tensor
        self.deviation: Tensor

    def fit(self, rows: Tensor) -> None:
        """Take mean and deviation from features of the training images."""
        flat = rows.movedim(self.axis, -1).flatten(0, -2).to(self.mean)
        self.mean.copy_(flat.mean(dim=0))
        deviation = flat.std(dim=0)
        # A channel that is hardly ever active would be blown up to where nothing was learnt.
        self.deviation.copy_(deviation + 0.1 * deviation.mean() + 1e-6)

    def forward(self, features: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Standardized features of the same shape."""
        shape = [1] * features.ndim
        shape[self.axis] = -1
        return (features - self.mean.view(shape)) / self.deviation.view(shape)


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
        license: of the code here and of the weights.
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
    license: str
    scale: str
    input_size: str
    differentiable: bool
    gradient_path: str
    needs_prompt: bool
    weights: str
    megabytes: float
    sha256: Mapping[str, str] = field(default_factory=dict)


def check_context(context: object, names: tuple[str, ...], batch: int) -> None:
    """Refuse what `prepare` cannot have returned for this many images.

    Raises:
        TypeError: not a mapping of tensors.
        ValueError: unknown names, or rows for another number of images.
    """
    if not isinstance(context, Mapping) or not all(isinstance(value, Tensor) for value in context.values()):
        raise TypeError(
            f"context: expected what reward.prepare(images, prompts) returned, got {type(context).__name__}"
        )
    if unknown := sorted(set(context) - set(names)):
        raise ValueError(f"context: expected some of {', '.join(names)}, got {unknown}; prepare it with this reward")
    for name, value in context.items():
        if value.ndim == 0 or len(value) != batch:
            raise ValueError(
                f"context: {name!r} has shape {tuple(value.shape)} for {batch} images; expected a row for each: "
                "call reward.prepare with these images"
            )


def warn_ignored_context(name: str) -> None:
    """Say that a model without assistants was given a context."""
    warnings.warn(f"context: {name} has no assistants; the context is ignored", UserWarning, stacklevel=3)
