"""Types that every part of the library shares: images, prompt features, rewards and their outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Images: TypeAlias = Float[Tensor, "batch 3 height width"]
"""Images inside the library: RGB, nominally in [0, 1]."""

Scores: TypeAlias = Float[Tensor, " batch"]
"""One number per image; higher is better."""

Context: TypeAlias = Mapping[str, Tensor]
"""Outputs of assistants for a batch (features of captions, masks, ...), constants for gradients; row i is image i."""


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or as it is if it is more precise."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class PromptError(ValueError):
    r"""A prompt that a text encoder cannot read: with half of a character, or without a word in it.

    Example:
        >>> from aigiqa_reward import create_reward
        >>> from aigiqa_reward.types import PromptError
        >>> try:
        ...     create_reward("compact").encode_prompts(["a fox", "\u200b"])
        ... except PromptError as error:
        ...     print("left out:", repr(error.prompt))
        left out: '\u200b'
    """

    def __init__(
        self,
        prompt: str,
        argument: str = "prompts",
        fault: str = "holds no readable word; pass one with words, or None to score without",
    ) -> None:
        super().__init__(prompt, argument, fault)
        self.prompt, self.argument, self.fault = prompt, argument, fault

    def __str__(self) -> str:
        return f"{self.argument}: {self.prompt!r} {self.fault}"


@dataclass(frozen=True, kw_only=True)
class PromptFeatures:
    """Prompts encoded by one model: each distinct prompt once, and which row uses which.

    Attributes:
        texts: (P,) distinct prompts, in order of first appearance.
        index: (B,) integers; row i of a batch uses `texts[index[i]]`.
        tensors: features of the distinct prompts by the model's names, each (P, ...).
        model: name of the model that made them; another model refuses them.

    Example:
        >>> from aigiqa_reward import create_reward
        >>> features = create_reward("compact").encode_prompts(["a fox", "a cat", "a fox"])
        >>> len(features), features.texts, features.prompts
        (3, ('a fox', 'a cat'), ['a fox', 'a cat', 'a fox'])
        >>> len(features[:1].expand(8))
        8
    """

    texts: tuple[str, ...]
    index: Tensor
    tensors: Mapping[str, Tensor]
    model: str

    def __len__(self) -> int:
        """Number of rows B, one per image."""
        return int(self.index.shape[0])

    def __getitem__(self, rows: slice | Tensor) -> PromptFeatures:
        """Return the features of a subset of the rows."""
        return replace(self, index=self.index[rows])

    @property
    def prompts(self) -> list[str]:
        """The prompt of each row, length B."""
        return [self.texts[i] for i in self.index.tolist()]

    def expand(self, count: int) -> PromptFeatures:
        """Repeat the only row `count` times: one prompt for a whole batch of images."""
        if len(self) != 1:
            raise ValueError(f"expand: expected features of exactly one prompt, got {len(self)} rows; encode one alone")
        return replace(self, index=self.index.expand(count))

    def to(self, device: torch.device | str) -> PromptFeatures:
        """Return the features on another device."""
        tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return replace(self, index=self.index.to(device), tensors=tensors)

    def rows(self, name: str) -> Tensor:
        """Return the named feature of every row, (B, ...)."""
        return self.tensors[name][self.index]


@dataclass(frozen=True, kw_only=True)
class RewardOutput:
    """Scores of a batch. Higher is better everywhere.

    Attributes:
        total: (B,) number to maximize.
        quality: (B,) perceptual quality. For a calibrated reward 1 is the benchmark's best human score; never clamped.
            None for a reward that does not judge it alone, such as CLIPScore and PickScore.
        correspondence: (B,) correspondence to the prompt on the same scale; None without prompts, and for a reward that
            does not judge it alone.
        details: tensors of the model by name (gates, scores of crops, maps, ...), first dimension B.

    Example:
        >>> import torch
        >>> from aigiqa_reward import RewardOutput, create_reward
        >>> out: RewardOutput = create_reward("compact")(torch.rand(2, 3, 64, 64), ["a fox", "a cat"])
        >>> out.total.shape, out.quality.shape, out.correspondence.shape
        (torch.Size([2]), torch.Size([2]), torch.Size([2]))
        >>> bool(torch.allclose(out.total, (out.quality + out.correspondence) / 2))
        True
        >>> len(out[:1]), len(RewardOutput.cat([out, out]))
        (1, 4)
    """

    total: Tensor
    quality: Tensor | None = None
    correspondence: Tensor | None = None
    details: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """Batch size B."""
        return int(self.total.shape[0])

    def __getitem__(self, rows: slice | Tensor) -> RewardOutput:
        """Return the output of a subset of the rows."""
        return self._map(lambda tensor: tensor[rows])

    def __iter__(self) -> Iterator[Any]:
        """Refuse to be unpacked or looped over, which could mean aspects or rows."""
        raise TypeError("RewardOutput is not iterable: use .total, .quality, .correspondence or .details")

    def to(self, device: torch.device | str) -> RewardOutput:
        """Return the output on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def detach(self) -> RewardOutput:
        """Return the output without its graph."""
        return self._map(Tensor.detach)

    def _map(self, function: Callable[[Tensor], Tensor]) -> RewardOutput:
        return RewardOutput(
            total=function(self.total),
            quality=None if self.quality is None else function(self.quality),
            correspondence=None if self.correspondence is None else function(self.correspondence),
            details={name: function(tensor) for name, tensor in self.details.items()},
        )

    @staticmethod
    def cat(outputs: Sequence[RewardOutput]) -> RewardOutput:
        """Join the outputs of consecutive batches of one reward.

        Aspects and details that are missing in one of them, and details of different sizes (maps of the images' own
        sizes), are left out; rows of different lengths, such as scores of words, are filled up with NaN.
        """
        aspects = [[o.quality for o in outputs], [o.correspondence for o in outputs]]
        quality, correspondence = (
            None if any(part is None for part in parts) else torch.cat([part for part in parts if part is not None])
            for parts in aspects
        )
        details = {}
        for name in outputs[0].details:
            parts = [output.details[name] for output in outputs if name in output.details]
            if len(parts) == len(outputs) and all(part.ndim == 2 and part.is_floating_point() for part in parts):
                longest = max(part.shape[1] for part in parts)
                parts = [F.pad(part, (0, longest - part.shape[1]), value=torch.nan) for part in parts]
            if len(parts) == len(outputs) and len({part.shape[1:] for part in parts}) == 1:
                details[name] = torch.cat(parts)
        return RewardOutput(
            total=torch.cat([output.total for output in outputs]),
            quality=quality,
            correspondence=correspondence,
            details=details,
        )


@runtime_checkable
class RewardFunction(Protocol):
    """A function of images (B, 3, H, W) in [0, 1] and B prompts that returns (B,) scores, higher is better.

    Example:
        >>> import torch
        >>> from aigiqa_reward import RewardFunction, Scorer
        >>> def brightness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        ...     return images.mean(dim=(1, 2, 3))
        >>> reward: RewardFunction = brightness
        >>> Scorer(reward).score([torch.zeros(3, 64, 64), torch.ones(3, 64, 64)], "a white square").total
        tensor([0., 1.])
    """

    def __call__(self, images: Tensor, prompts: list[str], /) -> Tensor | RewardOutput:
        """Score a batch."""
        ...


def as_reward_output(result: Tensor | RewardOutput, batch: int, *, source: str = "the reward") -> RewardOutput:
    """Convert what a RewardFunction returned for `batch` images to a RewardOutput, and check its shapes."""
    if isinstance(result, Tensor):
        result = RewardOutput(total=result, quality=result)
    if not isinstance(result, RewardOutput):
        kind = type(result).__name__
        raise TypeError(f"{source} returned {kind}; expected a tensor of shape ({batch},) or a RewardOutput")
    for name in ("total", "quality", "correspondence"):
        scores = getattr(result, name)
        if scores is not None and tuple(scores.shape) != (batch,):
            raise ValueError(
                f"{source} returned {'scores' if name == 'total' else name} of shape {tuple(scores.shape)} for {batch} "
                f"images; expected ({batch},): one score per image, in the images' order"
            )
    return result
