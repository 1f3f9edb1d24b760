"""The contract of every model, and what all models share."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, get_args, get_origin, get_type_hints

import torch
from jaxtyping import Float
from torch import Tensor, nn

from aigiqa_reward.types import Context, Images, PromptFeatures

Seen: TypeAlias = Mapping[str, Tensor]
"""The towers' features of a batch: named tensors, first dimension B."""


class FullPrecision(nn.Module):
    """A module whose parameters and buffers never fall below float32, whatever the model around it is cast to.

    Heads, gates, similarities and calibration derive from it: `.to(torch.bfloat16)` leaves their numbers as they are.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FullPrecision:
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        return super()._apply(keep, recurse)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # parameters, buffers and submodules


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Base of the models' settings, which checks them by their types.

    Integers are at least 1, or at least 0 where that is the default; literals are listed ones; dropout is in [0, 1).
    """

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value, least = getattr(self, name), 0 if getattr(type(self), name) == 0 else 1
            if hint is int and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
            if get_origin(hint) is Literal and value not in get_args(hint):
                raise ValueError(f"{name}: expected one of {get_args(hint)}, got {value!r}")
            if name == "dropout" and not 0 <= value < 1:
                raise ValueError(f"dropout: expected a probability in [0, 1), got {value!r}")


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

    Row i of the output may depend on image i and prompt i only.

    Attributes:
        name: the model's name.
        needs_prompts: whether quality depends on the prompt.
        context_names: names of the tensors that `prepare` returns.
    """

    name: str
    needs_prompts: bool = False
    context_names: tuple[str, ...] = ()

    @abstractmethod
    def encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Encode P distinct texts into tensors (P, ...) on the model's device."""

    @abstractmethod
    def forward(self, images: Images, prompts: PromptFeatures | None, context: Context | None = None) -> ModelOutput:
        """Score a checked batch of float32 or float64 images."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what is needed besides the weights to build this model again, as JSON."""

    def prepare(self, images: Images, prompts: PromptFeatures | None) -> Context | None:
        """Return the assistants' outputs for a batch, which are fixed in gradients; None for a model without any."""
        del images, prompts
        return None

    def encode_prompts(self, prompts: Sequence[str]) -> PromptFeatures:
        """Encode each distinct prompt once, without gradients."""
        check_prompts(prompts)
        with torch.no_grad():
            return self.read_prompts(prompts)

    def read_prompts(self, prompts: Sequence[str]) -> PromptFeatures:
        """Encode prompts without checks and with gradients, for training a text tower."""
        texts, index = distinct_prompts(prompts)
        tensors = self.encode_texts(texts)
        device = next(iter(tensors.values())).device
        return PromptFeatures(texts=texts, index=index.to(device), tensors=tensors, model=self.name)


def distinct_prompts(prompts: Sequence[str]) -> tuple[tuple[str, ...], Tensor]:
    """Return the distinct prompts in order of first appearance, and (B,) the index of each row's."""
    texts = tuple(dict.fromkeys(prompts))
    place = {text: i for i, text in enumerate(texts)}
    return texts, torch.tensor([place[prompt] for prompt in prompts])


class TrainedModel(QualityModel):
    """A model of frozen towers and a `head` that is fitted to human scores.

    The towers' features of an image do not change while a head is trained: the output of `forward_features` can be
    stored, so that an epoch costs seconds. `forward_head` computes the scores from it.

    Attributes:
        config: the settings.
        head: the trained part.
        crop_features: names of the features whose second dimension counts crops; training draws some of them.
        feature_settings: fields of the configuration that change the features.
        tower_roles: attribute of each tower, by its role.
        assistant_roles: attributes of the assistants, which are not saved with a reward.
    """

    config: Any
    head: Any
    crop_features: tuple[str, ...] = ()
    feature_settings: tuple[str, ...] = ()
    tower_roles: ClassVar[Mapping[str, str]] = {}
    assistant_roles: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        """Return settings, towers and the names of assistants."""
        towers = {role: getattr(self, attribute) for role, attribute in self.tower_roles.items()}
        described: dict[str, Any] = {
            "config": asdict(self.config),
            "towers": {role: None if tower is None else tower.describe() for role, tower in towers.items()},
        }
        if self.assistant_roles:
            described["assistants"] = [role for role in self.assistant_roles if getattr(self, role) is not None]
        return described

    @property
    def standardized(self) -> Mapping[str, Standardize]:
        """Modules that take mean and std of a feature, by its name, over the training images."""
        return {}

    def start_at(self, quality: float, correspondence: float) -> None:
        """Set a fresh head's biases to the mean scores of the training images."""
        del quality, correspondence

    @abstractmethod
    def forward_features(
        self, images: Images, *, generator: torch.Generator | None = None, crops: int | None = None
    ) -> Seen:
        """Compute the towers' features of a batch: named tensors, first dimension B.

        Args:
            images: (B, 3, H, W).
            generator: source of random crops, for training; None takes evenly spaced ones.
            crops: number of crops; None is the configured one.
        """

    def digest(self, seen: Seen) -> Seen:
        """Add to `seen` what the head computes from the image alone, to share it between several prompts."""
        return seen

    @abstractmethod
    def forward_head(self, seen: Seen, prompts: PromptFeatures | None, context: Context | None) -> ModelOutput:
        """Compute raw scores from the output of `forward_features` or `digest`."""

    def forward(self, images: Images, prompts: PromptFeatures | None, context: Context | None = None) -> ModelOutput:
        """Run `forward_features`, then `forward_head`; without a context, prepare it without gradients."""
        if context is None:
            with torch.no_grad():
                context = self.prepare(images, prompts)
        return self.forward_head(self.forward_features(images), prompts, context)


class Standardize(FullPrecision):
    """(x - mean) / std of each channel over the training images; the identity until `fit`.

    Args:
        width: number of channels.
        axis: dimension of the channels.
    """

    def __init__(self, width: int, *, axis: int = -1) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))

    def fit(self, rows: Tensor) -> None:
        """Take mean and std from features of the training images."""
        flat = rows.movedim(self.axis, -1).flatten(0, -2).to(self.mean)
        self.mean.copy_(flat.mean(dim=0))
        deviation = flat.std(dim=0)
        # Without the floor, a channel that is hardly ever active would dominate where it is.
        self.deviation.copy_(deviation + 0.1 * deviation.mean() + 1e-6)

    def forward(self, features: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Standardize features of any shape."""
        shape = [1] * features.ndim
        shape[self.axis] = -1
        return (features - self.mean.view(shape)) / self.deviation.view(shape)


def check_prompts(prompts: object) -> None:
    """Refuse anything but a list of prompts that are not blank.

    Raises:
        TypeError: one string, or something else than strings.
        ValueError: no prompts, or a blank one.
    """
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
    """Facts to know before choosing a reward.

    Attributes:
        name: name for `create_reward`.
        title: the system's own name.
        paper: its publication.
        license: of the code here and of the weights.
        scale: meaning of 0 and 1, and the range of scores.
        input_size: preprocessing of an image, in pixels.
        differentiable: whether pixel gradients exist.
        gradient_path: modules that carry them, and what is fixed.
        needs_prompt: whether quality depends on the prompt.
        weights: weights that `create_reward(name)` loads.
        megabytes: size of the embedded weights, 0 where none are.
        sha256: hash of each embedded file.
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
    """Refuse a context that `prepare` cannot have returned for this model and this number of images."""
    if not isinstance(context, Mapping) or not all(isinstance(value, Tensor) for value in context.values()):
        raise TypeError(
            f"context: expected what reward.prepare(images, prompts) returned, got {type(context).__name__}"
        )
    if unknown := sorted(set(context) - set(names)):
        raise ValueError(f"context: expected some of {', '.join(names)}, got {unknown}; prepare it with this reward")
    for name, value in context.items():
        if value.ndim == 0 or len(value) != batch:
            raise ValueError(
                f"context: {name!r} has shape {tuple(value.shape)} for {batch} images; expected one row per image: "
                "call reward.prepare with these images"
            )


def warn_ignored_context(name: str) -> None:
    """Warn that a model without assistants was given a context."""
    warnings.warn(f"context: {name} has no assistants; the context is ignored", UserWarning, stacklevel=3)
