"""The vocabulary that every part of the library shares: images, prompt features, rewards and their outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

Images: TypeAlias = Float[Tensor, "batch 3 height width"]
"""The one image type inside the library: RGB, nominally in [0, 1], on the device it is needed on."""

Scores: TypeAlias = Float[Tensor, " batch"]
"""One number an image; higher is better."""

Context: TypeAlias = Mapping[str, Tensor]
"""What assistants said about a batch (captions' features, masks, ...), held fixed in gradients. Row i is image i."""


class PromptError(ValueError):
    r"""A prompt in which a text tower finds no word, such as one of zero-width spaces alone.

    Args:
        prompt: the text.
        argument: the name to use in the message.

    Example:
        >>> from aigiqa_reward import create_reward

        >>> try:
        ...     create_reward("compact").encode_prompts(["a fox", "\u200b"])
        ... except PromptError as error:
        ...     print("left out:", repr(error.prompt))
        left out: '\u200b'
    """

    def __init__(self, prompt: str, argument: str = "prompts") -> None:
        super().__init__(prompt, argument)
        self.prompt = prompt
        self.argument = argument

    def __str__(self) -> str:
        return f"{self.argument}: {self.prompt!r} holds no readable word; pass one with words, or None to score without"


@dataclass(frozen=True, kw_only=True)
class PromptFeatures:
    """Prompts as one model sees them: each distinct prompt encoded once, and which row uses which.

    Attributes:
        texts: the distinct prompts, in order of first appearance, length P.
        index: (B,) integer; row i of a batch uses `texts[index[i]]`.
        tensors: named features of the distinct prompts, each of shape (P, ...). Their names belong to the model.
        model: name of the model that made them; another model refuses them.

    Example:
        >>> from aigiqa_reward import create_reward

        >>> features: PromptFeatures = create_reward("compact").encode_prompts(["a fox", "a cat", "a fox"])
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
        """Number of rows B, one an image."""
        return int(self.index.shape[0])

    def __getitem__(self, rows: slice | Tensor) -> PromptFeatures:
        """The same features for a subset of the rows."""
        return replace(self, index=self.index[rows])

    @property
    def prompts(self) -> list[str]:
        """The prompt of each row, length B."""
        return [self.texts[i] for i in self.index.tolist()]

    def expand(self, count: int) -> PromptFeatures:
        """Repeat one row `count` times: one prompt for a whole batch of images.

        Raises:
            ValueError: if there is not exactly one row.
        """
        if len(self) != 1:
            raise ValueError(
                f"expand: expected features of exactly one prompt, got {len(self)} rows; "
                "encode the prompt of this batch alone, or pass one prompt per image"
            )
        return replace(self, index=self.index.expand(count))

    def to(self, device: torch.device | str) -> PromptFeatures:
        """The same features on another device."""
        tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return replace(self, index=self.index.to(device), tensors=tensors)

    def rows(self, name: str) -> Tensor:
        """The named feature of every row, shape (B, ...)."""
        return self.tensors[name][self.index]


@dataclass(frozen=True, kw_only=True)
class RewardOutput:
    """What a reward says of a batch. Higher is better everywhere.

    Attributes:
        total: (B,) the number to maximize.
        quality: (B,) perceptual quality. On a calibrated reward 1 is the benchmark's best human score; never clamped.
        correspondence: (B,) correspondence to the prompt on the same scale, or None without prompts.
        details: named tensors of the model (gates, scores of crops, maps, ...), first dimension B.

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
    quality: Tensor
    correspondence: Tensor | None = None
    details: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """Batch size B."""
        return int(self.total.shape[0])

    def __getitem__(self, rows: slice | Tensor) -> RewardOutput:
        """The output of a subset of the rows."""
        return self._map(lambda tensor: tensor[rows])

    def __iter__(self) -> Iterator[Any]:
        """Refused: unpacking or looping over an output would silently mean something else to every reader."""
        raise TypeError("RewardOutput is not iterable: use .total, .quality, .correspondence or .details")

    def to(self, device: torch.device | str) -> RewardOutput:
        """The same output on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def detach(self) -> RewardOutput:
        """The same numbers, cut off the graph."""
        return self._map(Tensor.detach)

    def _map(self, function: Any) -> RewardOutput:
        return RewardOutput(
            total=function(self.total),
            quality=function(self.quality),
            correspondence=None if self.correspondence is None else function(self.correspondence),
            details={name: function(tensor) for name, tensor in self.details.items()},
        )

    @staticmethod
    def cat(outputs: Sequence[RewardOutput]) -> RewardOutput:
        """Join the outputs of consecutive batches of the same reward.

        Details are joined where every output has them with equal trailing shape, and left out otherwise
        (a model may give maps of the images' own sizes).
        """
        if not outputs:
            raise ValueError("cat: expected at least one RewardOutput, got none")
        joined: dict[str, Any] = {}
        for name in (f.name for f in fields(RewardOutput) if f.name != "details"):
            parts = [getattr(output, name) for output in outputs]
            joined[name] = None if any(part is None for part in parts) else torch.cat(parts)
        details = {}
        for name in outputs[0].details:
            parts = [output.details[name] for output in outputs if name in output.details]
            if len(parts) == len(outputs) and len({part.shape[1:] for part in parts}) == 1:
                details[name] = torch.cat(parts)
        return RewardOutput(**joined, details=details)


@runtime_checkable
class RewardFunction(Protocol):
    """Anything called with images (B, 3, H, W) in [0, 1] and B prompts that returns (B,) scores, higher is better.

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
    """Give a RewardFunction's result one type, and refuse one that does not hold a score for every image.

    Args:
        result: what the function returned.
        batch: number of images it was called with.
        source: how to name the function in an error.

    Raises:
        TypeError: if the result is neither a tensor nor a RewardOutput.
        ValueError: if it does not hold exactly `batch` scores.
    """
    if isinstance(result, Tensor):
        result = RewardOutput(total=result, quality=result)
    if not isinstance(result, RewardOutput):
        raise TypeError(
            f"{source} returned {type(result).__name__}; expected a tensor of shape ({batch},) or a RewardOutput"
        )
    for name in ("total", "quality", "correspondence"):
        scores = getattr(result, name)
        if scores is not None and tuple(scores.shape) != (batch,):
            raise ValueError(
                f"{source} returned {'scores' if name == 'total' else name} of shape {tuple(scores.shape)} for {batch} "
                f"images; expected ({batch},): one score an image, in the images' order"
            )
    return result


def encoded_prompts(reward: Any, prompts: Sequence[str]) -> PromptFeatures | list[str]:
    """Prompts as a reward is best given them: what its `encode_prompts` makes of them, or the texts themselves.

    Args:
        reward: a Reward or any RewardFunction. A method of that name which gives something else is its own affair.
        prompts: texts, not blank.

    Raises:
        PromptError: it cannot read one of them.

    Example:
        >>> encoded_prompts(lambda images, prompts: images.mean(dim=(1, 2, 3)), ["a fox"])
        ['a fox']
    """
    encode = getattr(reward, "encode_prompts", None)
    found = encode(list(prompts)) if callable(encode) else None
    return found if isinstance(found, PromptFeatures) else list(prompts)


def unreadable_prompts(reward: Any, prompts: Sequence[str]) -> dict[str, str]:
    r"""Why a reward cannot read some prompts, by prompt.

    Args:
        reward: a Reward or any RewardFunction; of one without `encode_prompts` nothing is known beforehand.
        prompts: texts, not blank.

    Example:
        >>> from aigiqa_reward import create_reward

        >>> list(unreadable_prompts(create_reward("compact"), ["a fox", "\u200b", "a cat"]))
        ['\u200b']
    """
    found: dict[str, str] = {}
    left = list(dict.fromkeys(prompts)) if hasattr(reward, "encode_prompts") else []
    while left:
        try:
            reward.encode_prompts(left)
            break
        except PromptError as error:
            if error.prompt not in left:
                raise
            left.remove(error.prompt)
            found[error.prompt] = str(error)
    return found
