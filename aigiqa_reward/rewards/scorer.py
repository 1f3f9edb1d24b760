"""Score anything that holds images: files, PIL images, arrays and tensors of mixed sizes, in batches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from aigiqa_reward import images as pixels
from aigiqa_reward.images import ImageError, ImageSource, PromptSource
from aigiqa_reward.images.metadata import check_source, find_prompt
from aigiqa_reward.models.base import check_prompts
from aigiqa_reward.rewards.bound import BoundReward
from aigiqa_reward.rewards.factory import as_reward
from aigiqa_reward.types import RewardFunction, RewardOutput
from aigiqa_reward.utils.checks import integer

Inputs: TypeAlias = Sequence[ImageSource] | Tensor | np.ndarray
"""A list of PIL images, paths, arrays or tensors of any sizes; or one batch: (B, 3, H, W), or (B, H, W, 3)."""


@dataclass(frozen=True, kw_only=True)
class ScoredImage:
    """Scores of one input, a batch of one on the CPU, or the error why it or its prompt could not be read."""

    index: int
    output: RewardOutput | None
    error: str | None


class ScoringError(ValueError):
    """Some inputs, or their prompts, could not be read; the scores of the others are in `output`.

    Attributes:
        errors: reasons by index of the input.
        output: scores of all inputs, NaN where there is an error; None without any score.

    Example:
        >>> from PIL import Image
        >>> from aigiqa_reward import Scorer, create_reward
        >>> from aigiqa_reward.rewards.scorer import ScoringError
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
    """Scores inputs in batches, without gradients.

    Args:
        reward: a Reward, its name, or any function f(images, prompts) -> (B,) scores.
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

    def __init__(self, reward: RewardFunction | str, batch_size: int = 32) -> None:
        self.reward: RewardFunction = as_reward(reward)
        self.batch_size = integer("batch_size", batch_size, least=1)

    def score(
        self,
        inputs: Inputs,
        prompts: Sequence[str] | str | None = None,
        *,
        on_error: Literal["raise", "nan"] = "raise",
        prompts_from: PromptSource | None = None,
    ) -> RewardOutput:
        """Score all inputs; row i of the output, on the CPU, is inputs[i].

        Args:
            inputs: PIL images, paths, arrays or tensors of mixed sizes; or one batch, (B, 3, H, W) or (B, H, W, 3).
            prompts: one text per input, one for all, or None.
            on_error: "raise" a ScoringError after the last input, or return "nan" for inputs that cannot be read, or
                whose own prompt the reward cannot read.
            prompts_from: in place of `prompts`, where to read each path's own prompt: "embedded" in the file, "sidecar"
                beside it, or "auto" (see `aigiqa_reward.images.read_prompt`). An image without one is not scored.

        Raises:
            ScoringError: an input or its own prompt could not be read.
            PromptError: the reward cannot read the one prompt for all inputs.
        """
        if on_error not in ("raise", "nan"):
            raise ValueError(f"on_error: expected 'raise' or 'nan', got {on_error!r}")
        results = list(self.stream(inputs, prompts, prompts_from=prompts_from))
        errors = {result.index: result.error for result in results if result.error is not None}
        template = next((result.output for result in results if result.output is not None), None)
        output = None
        if template is not None:
            failed = template._map(lambda tensor: torch.full_like(tensor.float(), torch.nan))
            output = RewardOutput.cat([failed if r.output is None else r.output for r in results])
        if errors and on_error == "raise":
            raise ScoringError(errors, output)
        unknown = torch.full((len(results),), torch.nan, dtype=torch.float32, device="cpu")
        return output or RewardOutput(total=unknown, quality=unknown.clone())

    def stream(
        self,
        inputs: Inputs,
        prompts: Sequence[str] | str | None = None,
        *,
        prompts_from: PromptSource | None = None,
    ) -> Iterator[ScoredImage]:
        """Score batch by batch, and yield each result in the order of the inputs as soon as it is known.

        Arguments are checked at once. Inputs that cannot be read, or whose own prompt cannot, have an `error`.
        """
        sources = check_images(inputs, "inputs")
        texts = [prompts] * len(sources) if isinstance(prompts, str) else prompts
        if texts is not None:
            check_prompts(texts)
            if len(texts) != len(sources):
                raise ValueError(f"prompts: expected one per input, got {len(texts)} prompts for {len(sources)} inputs")
        faults: dict[int, str] = {}
        if prompts_from is not None:
            if texts is not None:
                raise ValueError("prompts, prompts_from: expected one of them, got both")
            texts, faults = _prompts_of(sources, prompts_from)
        bound = BoundReward(self.reward, [prompts] if isinstance(prompts, str) else ())
        return self._stream(sources, texts, bound, faults)

    def _stream(
        self, sources: list[ImageSource], texts: Sequence[str] | None, reward: BoundReward, faults: Mapping[int, str]
    ) -> Iterator[ScoredImage]:
        for start in range(0, len(sources), self.batch_size):
            window = range(start, min(start + self.batch_size, len(sources)))
            errors = {index: faults[index] for index in window if index in faults}
            usable = [index for index in window if index not in faults]
            unreadable = reward.unreadable([texts[index] for index in usable]) if texts else {}
            errors |= {index: unreadable[texts[index]] for index in usable if texts and texts[index] in unreadable}
            by_shape: dict[torch.Size, dict[int, Tensor]] = {}
            for index in usable:
                try:
                    image = pixels.load(sources[index])
                except (ValueError, TypeError) as error:
                    errors[index] = str(error)
                else:
                    if index not in errors:
                        by_shape.setdefault(image.shape, {})[index] = image
            results: dict[int, RewardOutput] = {}
            for batch in by_shape.values():
                output = reward.score(torch.stack(list(batch.values())), texts and [texts[index] for index in batch])
                results |= {index: output[row : row + 1].to("cpu") for row, index in enumerate(batch)}
            yield from (ScoredImage(index=i, output=results.get(i), error=errors.get(i)) for i in window)


def _prompts_of(sources: Sequence[ImageSource], place: PromptSource) -> tuple[list[str], dict[int, str]]:
    """Read the prompt of each file; return texts, "" where there is none, and the reasons by index."""
    check_source("prompts_from", place)
    texts, faults = [""] * len(sources), dict[int, str]()
    for index, source in enumerate(sources):
        if not isinstance(source, str | os.PathLike):
            kind = type(source).__name__
            raise TypeError(f"prompts_from: expected paths as inputs, got {kind} at inputs[{index}]; pass prompts")
        try:
            texts[index] = find_prompt(source, place).text
        except ImageError as error:
            faults[index] = str(error)
    return texts, faults


def check_images(images: Inputs, argument: str) -> list[ImageSource]:
    """Return the images of a list or batch; refuse a single one, and none."""
    if isinstance(images, str | bytes) or not isinstance(images, Sequence | Tensor | np.ndarray):
        raise TypeError(
            f"{argument}: expected a list of images (PIL, paths, arrays, tensors) or one batch, got "
            f"{type(images).__name__}; wrap a single image in a list"
        )
    if isinstance(images, Tensor | np.ndarray) and images.ndim != 4:
        shape = tuple(images.shape)
        raise ValueError(f"{argument}: expected a batch of 4 dimensions, got shape {shape}; wrap one image in a list")
    if len(images) == 0:
        raise ValueError(f"{argument}: expected at least one image, got none")
    return list(images)
