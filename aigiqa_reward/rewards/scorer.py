"""Score anything that holds images: files, PIL, arrays, tensors, mixed sizes, one after another in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aigiqa_reward import images as pixels
from aigiqa_reward.images import ImageSource
from aigiqa_reward.models.base import check_prompts
from aigiqa_reward.types import (
    PromptError,
    PromptFeatures,
    RewardFunction,
    RewardOutput,
    as_reward_output,
    encoded_prompts,
    unreadable_prompts,
)

_Encoded = PromptFeatures | list[str]
"""Prompts as the reward takes them."""


@dataclass(frozen=True, kw_only=True)
class ScoredImage:
    """One input's result.

    Attributes:
        index: its place in the inputs.
        output: its scores, a batch of one on the CPU; None if it, or its own prompt, could not be read.
        error: why not; None if it could.

    Example:
        >>> from PIL import Image
        >>> from aigiqa_reward import Scorer, create_reward

        >>> inputs = [Image.new("RGB", (64, 64), "red"), "missing.png"]
        >>> results: list[ScoredImage] = list(Scorer(create_reward("compact")).stream(inputs))
        >>> for result in results:
        ...     print(result.index, result.output is not None, result.error)
        0 True None
        1 False missing.png: no such file
    """

    index: int
    output: RewardOutput | None
    error: str | None


class ScoringError(ValueError):
    """Some inputs, or their prompts, could not be read. Nothing that was scored is lost.

    Attributes:
        errors: reason by index of the input.
        output: scores of all inputs, NaN where there is an error; None if there is no score at all.

    Example:
        >>> from PIL import Image
        >>> from aigiqa_reward import Scorer, create_reward

        >>> inputs = [Image.new("RGB", (64, 64), "red"), "missing.png"]
        >>> try:
        ...     Scorer(create_reward("compact")).score(inputs)
        ... except ScoringError as error:
        ...     print(error.errors, error.output.total.isnan())
        {1: 'missing.png: no such file'} tensor([False,  True])
    """

    def __init__(self, errors: dict[int, str], output: RewardOutput | None) -> None:
        first, reason = next(iter(errors.items()))
        kept = "" if output is None else "; the other scores are in this error's .output, or use on_error='nan'"
        super().__init__(f"inputs: {len(errors)} could not be read, the first is inputs[{first}]: {reason}{kept}")
        self.errors = errors
        self.output = output


class Scorer:
    """Scores inputs with a reward in batches, without gradients, through the same `Reward.forward`.

    Args:
        reward: a Reward, or any function (images, prompts) -> scores.
        batch_size: images held and scored at a time.

    Example:
        >>> import numpy as np
        >>> from PIL import Image
        >>> from aigiqa_reward import Scorer, create_reward
        >>> Image.new("RGB", (64, 48), "red").save("red.png")
        >>> inputs = ["red.png", Image.new("RGB", (80, 64), "blue"), np.zeros((64, 64, 3), dtype=np.uint8)]
        >>> scores = Scorer(create_reward("compact"), batch_size=2).score(inputs, "a red square")
        >>> scores.total.shape, scores.correspondence.shape
        (torch.Size([3]), torch.Size([3]))
    """

    def __init__(self, reward: RewardFunction, batch_size: int = 32) -> None:
        if not callable(reward):
            raise TypeError(f"reward: expected a Reward or a function, got {type(reward).__name__}")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size: expected an integer of at least 1, got {batch_size!r}")
        self.reward = reward
        self.batch_size = batch_size

    def score(
        self,
        inputs: Sequence[ImageSource] | Tensor | np.ndarray,
        prompts: Sequence[str] | str | None = None,
        *,
        on_error: str = "raise",
    ) -> RewardOutput:
        """Score all inputs.

        Args:
            inputs: PIL images, paths, arrays or tensors, of any sizes mixed; or one batch: a tensor (B, 3, H, W) or an
                array or tensor (B, H, W, 3).
            prompts: one string an input, one string for all, or None.
            on_error: "raise" a ScoringError at the end, or give "nan" for inputs that cannot be read, and for those
                whose own prompt the reward cannot read.

        Returns:
            Scores on the CPU, row i for inputs[i].

        Raises:
            ScoringError: an input could not be read, or its own prompt; it carries every other score.
            PromptError: one string for all that the reward cannot read.
            TypeError, ValueError: the arguments do not fit together.
        """
        if on_error not in ("raise", "nan"):
            raise ValueError(f"on_error: expected 'raise' or 'nan', got {on_error!r}")
        results = list(self.stream(inputs, prompts))
        errors = {result.index: result.error for result in results if result.error is not None}
        template = next((result.output for result in results if result.output is not None), None)
        output = None
        if template is not None:
            failed = template._map(lambda tensor: torch.full_like(tensor.float(), float("nan")))
            output = RewardOutput.cat([failed if r.output is None else r.output for r in results])
        elif on_error == "nan":
            unknown = torch.full((len(results),), float("nan"))
            output = RewardOutput(total=unknown, quality=unknown.clone())
        if errors and on_error == "raise":
            raise ScoringError(errors, output)
        assert output is not None
        return output

    def stream(
        self, inputs: Sequence[ImageSource] | Tensor | np.ndarray, prompts: Sequence[str] | str | None = None
    ) -> Iterator[ScoredImage]:
        """Score inputs one batch after another, yielding each result in the inputs' order as soon as it is known.

        The arguments are checked before this returns; unreadable inputs, and inputs whose own prompt the reward cannot
        read, are results with an `error`.
        """
        sources = _sources(inputs)
        texts = _texts(prompts, len(sources))
        shared = self._encode([prompts], None) if isinstance(prompts, str) else None
        return self._stream(sources, texts, shared)

    def _stream(
        self, sources: Sequence[ImageSource], texts: list[str] | None, features: _Encoded | None
    ) -> Iterator[ScoredImage]:
        for start in range(0, len(sources), self.batch_size):
            window = range(start, min(start + self.batch_size, len(sources)))
            loaded, errors = _load(sources, window)
            prompts: Any = None
            if texts is not None:
                prompts = [texts[index] for index in window]
                features, unread = self._encode_readable(prompts, features)
                errors = {index: unread[texts[index]] for index in window if texts[index] in unread} | errors
                loaded = {index: image for index, image in loaded.items() if index not in errors}
                prompts = features
            yield from self._window(window, loaded, errors, prompts)

    def _encode_readable(self, prompts: list[str], previous: _Encoded | None) -> tuple[_Encoded | None, dict[str, str]]:
        """Features of these prompts, and why some cannot be read: their rows hold those of another one."""
        try:
            return self._encode(prompts, previous), {}
        except PromptError:
            unread = unreadable_prompts(self.reward, prompts)
            read = [prompt for prompt in prompts if prompt not in unread]
            if not read:
                return None, unread
            return self._encode([read[0] if prompt in unread else prompt for prompt in prompts], previous), unread

    def _encode(self, prompts: list[str], previous: _Encoded | None) -> _Encoded:
        """Features of these prompts, taken from the window before where it had them all; texts, if there are none."""
        if not isinstance(previous, PromptFeatures) or not set(prompts) <= set(previous.texts):
            return encoded_prompts(self.reward, prompts)
        place = {text: i for i, text in enumerate(previous.texts)}
        index = torch.tensor([place[prompt] for prompt in prompts], device=previous.index.device)
        return replace(previous, index=index)

    def _window(
        self, window: range, loaded: dict[int, Tensor], errors: dict[int, str], prompts: Any
    ) -> Iterator[ScoredImage]:
        by_shape: dict[torch.Size, list[int]] = {}
        for index, image in loaded.items():
            by_shape.setdefault(image.shape, []).append(index)
        results: dict[int, RewardOutput] = {}
        for members in by_shape.values():
            rows = [index - window.start for index in members]
            output = self._score_batch(torch.stack([loaded[index] for index in members]), _take(prompts, rows))
            results |= {index: output[i : i + 1] for i, index in enumerate(members)}
        for index in window:
            yield ScoredImage(index=index, output=results.get(index), error=errors.get(index))

    def _score_batch(self, batch: Tensor, prompts: Any) -> RewardOutput:
        return score_batch(self.reward, batch, prompts, device_of(self.reward)).to("cpu")


def score_batch(reward: RewardFunction, images: Tensor, prompts: Any, device: torch.device | None) -> RewardOutput:
    """Score images (B, 3, H, W) without gradients.

    Args:
        reward: a Reward or any RewardFunction.
        images: in [0, 1].
        prompts: B strings, or their features, or None.
        device: where to bring the images first, as `device_of(reward)` says.
    """
    with torch.inference_mode():
        result = reward(images if device is None else images.to(device), prompts)
    return as_reward_output(result, len(images))


def device_of(reward: Any) -> torch.device | None:
    """Where a reward wants its images: its own `device`, else that of its first parameter; None if it has neither."""
    device = getattr(reward, "device", None)
    if isinstance(device, torch.device | str):
        return torch.device(device)
    if isinstance(reward, nn.Module) and (weight := next(reward.parameters(), None)) is not None:
        return weight.device
    return None


def _take(prompts: Any, rows: list[int]) -> Any:
    if prompts is None:
        return None
    if isinstance(prompts, PromptFeatures):
        return prompts[torch.tensor(rows, device=prompts.index.device)]
    return [prompts[row] for row in rows]


def _sources(inputs: Any) -> Sequence[ImageSource]:
    if isinstance(inputs, str | bytes) or not isinstance(inputs, Sequence | Tensor | np.ndarray):
        raise TypeError(
            "inputs: expected a list of images (PIL, paths, arrays, tensors) or one batch, got "
            f"{type(inputs).__name__}; wrap a single image in a list"
        )
    if isinstance(inputs, Tensor | np.ndarray) and inputs.ndim != 4:
        raise ValueError(
            f"inputs: expected a batch (B, 3, H, W) or (B, H, W, 3), got shape {tuple(inputs.shape)}; "
            "wrap a single image in a list"
        )
    if len(inputs) == 0:
        raise ValueError("inputs: expected at least one image, got none")
    return list(inputs)


def _texts(prompts: Any, count: int) -> list[str] | None:
    if prompts is None:
        return None
    texts = [prompts] * count if isinstance(prompts, str) else prompts
    check_prompts(texts)
    if len(texts) != count:
        raise ValueError(f"prompts: expected one per input, got {len(texts)} prompts for {count} inputs")
    return list(texts)


def _load(sources: Sequence[ImageSource], window: range) -> tuple[dict[int, Tensor], dict[int, str]]:
    loaded, errors = {}, {}
    for index in window:
        try:
            loaded[index] = pixels.load(sources[index])
        except (ValueError, TypeError) as error:
            errors[index] = str(error)
    return loaded, errors
