"""Candidates for one prompt: scored as they come, the best few kept, and what became of each of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from aigiqa_reward.scorer import device_of
from aigiqa_reward.selection import TopK
from aigiqa_reward.types import RewardOutput, as_reward_output

NON_FINITE = "NaN or infinite pixels"
FLAGGED = "flagged by the pipeline's safety checker"
NO_SCORE = "the reward gave NaN"


@dataclass(frozen=True, kw_only=True)
class BestOfNOutput:
    """The best candidates for one prompt, and the scores of all of them. Higher is better.

    `rerank` numbers its inputs 0, 1, ... and gives these numbers as seeds.

    Attributes:
        images: the at most top_k best, RGB, best first; ties go to the earlier candidate.
        scores: their totals, best first.
        seeds: their seeds, best first; each makes its image again (see `BestOfN`).
        quality: their perceptual quality, best first; equal to `scores` if the reward gives one number only.
        correspondence: their correspondence to the prompt, best first; None if the reward gives none.
        all_scores: totals of all candidates in candidate order; NaN for those that were dropped.
        all_seeds: seeds of all candidates in candidate order.
        all_quality: quality of all candidates in candidate order; NaN for those that were dropped.
        all_correspondence: likewise; None if the reward gives none.
        dropped: why candidates could not be ranked, by seed.
    """

    images: list[Image.Image]
    scores: list[float]
    seeds: list[int]
    quality: list[float]
    correspondence: list[float] | None
    all_scores: list[float]
    all_seeds: list[int]
    all_quality: list[float]
    all_correspondence: list[float] | None
    dropped: dict[int, str]


class PromptedReward:
    """A reward bound to one prompt, which is encoded once.

    Args:
        reward: a Reward, or any RewardFunction. Images are brought to its device, if it says which that is.
        text: the prompt that it sees, not blank.
    """

    def __init__(self, reward: Any, text: str) -> None:
        self._reward = reward
        self._text = text
        self._device = device_of(reward)
        self._features: Any = None
        if callable(getattr(reward, "encode_prompts", None)):
            with torch.no_grad():
                self._features = reward.encode_prompts([text])

    def __call__(self, images: Tensor) -> RewardOutput:
        """Score images (B, 3, H, W) in [0, 1], without gradients."""
        count = images.shape[0]
        prompts = [self._text] * count if self._features is None else self._features.expand(count)
        with torch.inference_mode():
            result = self._reward(images if self._device is None else images.to(self._device), prompts)
        return as_reward_output(result, count)


class Tally:
    """Takes in scored candidates; keeps everybody's scores, and the images of the `top_k` best."""

    def __init__(self, top_k: int) -> None:
        self._winners = TopK(top_k)
        self._seeds: list[int] = []
        self._total: list[float] = []
        self._quality: list[float] = []
        self._correspondence: list[float] = []
        self._has_correspondence = False
        self._dropped: dict[int, str] = {}

    def add(
        self,
        seeds: Sequence[int],
        reasons: Sequence[str | None],
        output: RewardOutput | None,
        picture: Callable[[int], Image.Image],
    ) -> None:
        """Take in the next candidates.

        Args:
            seeds: (B,) their seeds.
            reasons: (B,) why a candidate is dropped, or None.
            output: scores of those that are not dropped, in their order; None if there are none.
            picture: gives the image of row i; called for those only that are among the best so far.
        """
        kept = [row for row, reason in enumerate(reasons) if reason is None]
        total, quality, correspondence = (
            _spread(None if output is None else getattr(output, aspect), kept, len(seeds))
            for aspect in ("total", "quality", "correspondence")
        )
        first = len(self._seeds)
        self._seeds += seeds
        self._total += total
        self._quality += quality
        self._correspondence += correspondence
        self._has_correspondence |= output is not None and output.correspondence is not None
        for row, (seed, reason, score) in enumerate(zip(seeds, reasons, total, strict=True)):
            if math.isnan(score):
                self._dropped[seed] = reason or NO_SCORE
            elif self._winners.accepts(score, first + row):
                self._winners.push(score, first + row, picture(row))

    def output(self) -> BestOfNOutput:
        """What is known so far."""
        best = self._winners.items()
        places = [winner.index for winner in best]
        known = self._has_correspondence
        return BestOfNOutput(
            images=[winner.item for winner in best],
            scores=[winner.score for winner in best],
            seeds=[self._seeds[place] for place in places],
            quality=[self._quality[place] for place in places],
            correspondence=[self._correspondence[place] for place in places] if known else None,
            all_scores=list(self._total),
            all_seeds=list(self._seeds),
            all_quality=list(self._quality),
            all_correspondence=list(self._correspondence) if known else None,
            dropped=dict(self._dropped),
        )


def _spread(values: Tensor | None, kept: list[int], count: int) -> list[float]:
    """The values at the places `kept` of `count`, NaN elsewhere."""
    spread = torch.full((count,), math.nan, dtype=torch.float64)
    if values is not None:
        spread[kept] = values.to("cpu", torch.float64)
    return spread.tolist()


def conclude(output: BestOfNOutput, top_k: int, *, name: str, stacklevel: int) -> None:
    """Say, in one warning, which candidates were dropped.

    Args:
        output: the final one.
        top_k: how many images were wanted.
        name: what a seed is to the reader: "seed" or "image".
        stacklevel: as for `warnings.warn`, counted from this function.

    Raises:
        RuntimeError: if no candidate is left.
    """
    if not output.dropped:
        return
    by_reason: dict[str, list[int]] = {}
    for seed, reason in output.dropped.items():
        by_reason.setdefault(reason, []).append(seed)
    why = "; ".join(f"{name} {', '.join(map(str, seeds))}: {reason}" for reason, seeds in by_reason.items())
    if NON_FINITE in by_reason:
        why += ". A half-precision VAE overflows easily: decode in float32 or bfloat16"
    count, left = len(output.all_seeds), len(output.images)
    if left == 0:
        raise RuntimeError(f"none of the {count} candidates could be ranked ({why})")
    fewer = f", so only {left} of top_k={top_k} are returned" if left < top_k else ""
    message = f"{len(output.dropped)} of {count} candidates were dropped{fewer} ({why})"
    warnings.warn(message, stacklevel=stacklevel)


# --------------------------------------------------------------------------------------------- checks


def check_reward(reward: Any) -> Any:
    """Return a reward that can be called.

    Raises:
        TypeError: if it cannot.
    """
    if not callable(reward):
        raise TypeError(
            f"reward: expected a Reward or a function f(images, prompts), got {type(reward).__name__}; "
            "make one with create_reward('compact')"
        )
    return reward


def check_prompt(prompt: Any) -> Any:
    """Return one prompt, or None.

    Raises:
        TypeError: a list of prompts, or not a text.
    """
    if isinstance(prompt, list | tuple):
        raise TypeError(f"prompt: expected one prompt per call, got {len(prompt)}: loop over them")
    if prompt is not None and not isinstance(prompt, str):
        raise TypeError(f"prompt: expected a text, got {type(prompt).__name__}; pass a str")
    return prompt


def check_text(text: Any, argument: str, remedy: str) -> str:
    """Return a text that a reward can judge by.

    Raises:
        TypeError: not a text.
        ValueError: None, or blank.
    """
    if text is None or (isinstance(text, str) and not text.strip()):
        raise ValueError(f"{argument}: expected a text for the reward to see, got {text!r}; {remedy}")
    if not isinstance(text, str):
        raise TypeError(f"{argument}: expected a text, got {type(text).__name__}; pass a str")
    return text
