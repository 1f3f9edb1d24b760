"""The contract of every model, and what all models share."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, get_args, get_origin, get_type_hints

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from aigiqa_reward.types import Context, Images, PromptError, PromptFeatures, RewardOutput
from aigiqa_reward.utils.checks import lone_surrogate

Seen: TypeAlias = Mapping[str, Tensor]
"""The towers' features of a batch: named tensors, first dimension B."""


class FullPrecision(nn.Module):
    """A module whose parameters and buffers never fall below float32, whatever the model around it is cast to."""

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
    """Raw scores (B,) of a model before calibration, higher is better, and named details (B, ...)."""

    quality: Tensor
    correspondence: Tensor | None
    details: Mapping[str, Tensor] = field(default_factory=dict)


class QualityModel(nn.Module, ABC):
    """A quality model: images and encoded prompts in, raw quality and correspondence out.

    Row i of the output may depend on image i and prompt i only.
    """

    name: str
    needs_prompts: bool = False
    """Whether quality depends on the prompt."""
    context_names: tuple[str, ...] = ()
    """Names of the tensors that `prepare` returns."""

    @abstractmethod
    def encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Encode P distinct texts into tensors (P, ...) on the model's device."""

    @abstractmethod
    def forward(
        self, images: Images, prompts: PromptFeatures | None, context: Context | None = None
    ) -> ModelOutput | RewardOutput:
        """Score a checked batch of float32 or float64 images: raw, or already on the reward's scale."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what is needed besides the weights to build this model again, as JSON."""

    def prepare(self, images: Images, prompts: PromptFeatures | None) -> Context | None:
        """Return the assistants' outputs for a batch, which are fixed in gradients; None for a model without any."""
        return None

    def encode_prompts(self, prompts: Sequence[str]) -> PromptFeatures:
        """Encode each distinct prompt once, without gradients."""
        check_prompts(prompts)
        with torch.no_grad():
            return self.read_prompts(prompts)

    def read_prompts(self, prompts: Sequence[str]) -> PromptFeatures:
        """Encode prompts without checks and with gradients, for training a text tower."""
        texts, index = distinct_prompts(prompts)
        check_readable(texts)
        tensors = self.encode_texts(texts)
        index = index.to(next(iter(tensors.values())).device)
        return PromptFeatures(texts=texts, index=index, tensors=tensors, model=self.name)


def check_readable(prompts: Sequence[str]) -> None:
    """Refuse texts that cannot be encoded, which tokenizers refuse without saying which."""
    for prompt in prompts:
        if fault := lone_surrogate(prompt):
            raise PromptError(prompt, fault=fault)


def distinct_prompts(prompts: Sequence[str]) -> tuple[tuple[str, ...], Tensor]:
    """Return the distinct prompts in order of first appearance, and (B,) the index of each row's."""
    texts = tuple(dict.fromkeys(prompts))
    place = {text: i for i, text in enumerate(texts)}
    return texts, torch.tensor([place[prompt] for prompt in prompts], device="cpu")


class TrainedModel(QualityModel):
    """A model of frozen towers and a `head` that is fitted to human scores.

    Training stores the output of `forward_features`, which does not change; `forward_head` scores it.
    """

    config: Any
    head: Any
    crop_features: tuple[str, ...] = ()
    """Features whose second dimension counts crops; training draws some of them."""
    feature_settings: tuple[str, ...] = ()
    """Fields of the configuration that change the features."""
    tower_roles: ClassVar[Mapping[str, str]] = {}
    """Attribute of each tower, by its role."""
    assistant_roles: tuple[str, ...] = ()
    """Attributes of the assistants, which are not saved with a reward."""

    def describe(self) -> dict[str, Any]:
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

    @abstractmethod
    def forward_features(self, images: Images, *, generator: Generator | None = None, crops: int | None = None) -> Seen:
        """Compute the towers' features of a batch, of random crops if a generator is given, else evenly spaced ones."""

    def digest(self, seen: Seen) -> Seen:
        """Add to `seen` what the head computes from the image alone, to share it between several prompts."""
        return seen

    @abstractmethod
    def forward_head(self, seen: Seen, prompts: PromptFeatures | None, context: Context | None) -> ModelOutput:
        """Compute raw scores from the output of `forward_features` or `digest`."""

    def forward(self, images: Images, prompts: PromptFeatures | None, context: Context | None = None) -> ModelOutput:
        if context is None:
            with torch.no_grad():
                context = self.prepare(images, prompts)
        return self.forward_head(self.forward_features(images), prompts, context)


class Standardize(FullPrecision):
    """(x - mean) / std of the channels in dimension `axis`, over the training images; the identity until `fit`."""

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
        shape = [1] * features.ndim
        shape[self.axis] = -1
        return (features - self.mean.view(shape)) / self.deviation.view(shape)


def check_prompts(prompts: object) -> None:
    """Refuse anything but a list of prompts that are not blank."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        kind = "one string" if isinstance(prompts, str) else type(prompts).__name__
        raise TypeError(f"prompts: expected a list with one prompt per image, got {kind}; use [prompt] * len(images)")
    if not prompts:
        raise ValueError("prompts: expected one prompt per image, got an empty list; pass None to score without")
    for position, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise TypeError(f"prompts[{position}]: expected a string, got {type(prompt).__name__}")
        if not prompt.strip():
            raise ValueError(f"prompts[{position}] is empty; pass the prompt, or prompts=None for quality alone")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Facts to know before choosing a reward."""

    name: str  # for `create_reward`
    title: str
    paper: str
    license: str  # of the code here and of the weights
    scale: str  # meaning of 0 and 1, and the range of scores
    input_size: str  # preprocessing of an image, in pixels
    differentiable: bool  # whether pixel gradients exist
    gradient_path: str  # modules that carry them, and what is fixed
    needs_prompt: bool  # whether it needs prompts; else quality alone is scored without them
    weights: str  # that `create_reward(name)` loads
    megabytes: float  # of the weights, embedded or published
    judges: Literal["quality and correspondence", "quality", "correspondence", "preference"] = (
        "quality and correspondence"
    )
    accuracy: str = ""  # published, on human preferences
    sha256: Mapping[str, str] = field(default_factory=dict)  # of each embedded file
    no_match: float | None = None  # median correspondence of images to prompts that they do not show, if known

    @property
    def meaning(self) -> str:
        """How to read the scores, in one line."""
        known = (
            ""
            if self.no_match is None
            else f"; of pictures with a prompt that does not match, half get a correspondence below {self.no_match:g}"
        )
        within = "" if "images of one prompt" in self.scale else "; compare images of one prompt only"
        return f"{self.name}: {self.scale}{within}{known}"

    @property
    def embedded(self) -> bool:
        """Whether the weights are included, so that nothing is downloaded."""
        return bool(self.sha256)


def check_context(context: object, names: tuple[str, ...], batch: int) -> None:
    """Refuse a context that `prepare` cannot have returned for this model and this number of images."""
    if not isinstance(context, Mapping) or not all(isinstance(value, Tensor) for value in context.values()):
        got = type(context).__name__
        raise TypeError(f"context: expected what reward.prepare(images, prompts) returned, got {got}")
    if unknown := sorted(set(context) - set(names)):
        raise ValueError(f"context: expected some of {', '.join(names)}, got {unknown}; prepare it with this reward")
    for name, value in context.items():
        if value.ndim == 0 or len(value) != batch:
            shape = tuple(value.shape)
            raise ValueError(f"context: {name!r} has shape {shape} for {batch} images; call reward.prepare with these")


def warn_ignored_context(name: str) -> None:
    """Warn that a model without assistants was given a context."""
    warnings.warn(f"context: {name} has no assistants; the context is ignored", UserWarning, stacklevel=3)
