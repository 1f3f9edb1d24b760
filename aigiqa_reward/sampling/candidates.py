"""Candidates for one prompt: scored as they come, the best few kept, and what became of each of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aigiqa_reward.rewards.ranking import Ranked, TopK, spread
from aigiqa_reward.rewards.scorer import device_of, score_batch
from aigiqa_reward.types import RewardOutput

NON_FINITE = "NaN or infinite pixels"
FLAGGED = "flagged by the pipeline's safety checker"


def reasons_to_drop(images: Tensor, flagged: Sequence[Any]) -> list[str | None]:
    """Why images (B, 3, H, W) cannot be scored, or None."""
    finite = torch.isfinite(images).flatten(1).all(dim=1).tolist()
    return [FLAGGED if flag else None if fine else NON_FINITE for flag, fine in zip(flagged, finite, strict=True)]


def why_dropped(total: float, reason: str | None = None) -> str | None:
    """Why a candidate of this total is dropped, or None; `reason` if there is one already.

    Infinity ranks nothing: it would win by an overflow, or lose to all whatever else the reward saw.
    """
    if reason is not None or math.isfinite(total):
        return reason
    return f"the reward gave {'NaN' if math.isnan(total) else total}"


POOL = 4
"""Of how many times top_k candidates the diverse ones are taken: chosen here, as wide as scores hardly fall."""

_THUMBNAIL = 16
"""Side in pixels at which images are compared for diversity: layout and colors, not texture. Chosen here."""


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What a reward says of a candidate's clean image as seen from the middle of its sampling.

    Attributes:
        step: steps that it has taken.
        steps: of the whole way.
        total: higher is better.
        quality: perceptual quality.
        correspondence: to the prompt; None if the reward gives none.
    """

    step: int
    steps: int
    total: float
    quality: float
    correspondence: float | None = None


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
        previews: by seed, what the reward said of a candidate on its way, where a search looked. A candidate without a
            score that is not among the dropped was pruned.
        denoiser_calls: rows that the denoiser was asked for, one a candidate and step; a negative prompt's own are not
            counted apart. None where the pipeline ran its own loop.
        noises: initial latents (1, ...) of the best, on the CPU, where a search changed them, in the form in which the
            pipeline takes them: `pipe(prompt, latents=..., **pipe_kwargs)` makes the image again, its seed does not.
            A sampler that draws noise on its way (ancestral, SDE, LCM) needs besides a generator of the image's seed
            that has drawn as many normal numbers as the latents have:
            `torch.randn(latents.shape, generator=generator)`.

    Example:
        >>> from PIL import Image
        >>> from aigiqa_reward import BestOfNOutput, rerank
        >>> def redness(images, prompts):
        ...     return images[:, 0].mean(dim=(1, 2))
        >>> pictures = [Image.new("RGB", (64, 64), color) for color in ("black", "red", "maroon")]
        >>> result: BestOfNOutput = rerank(pictures, "a red square", redness, top_k=2)
        >>> result.seeds, [round(score, 2) for score in result.scores], result.all_seeds, result.dropped
        ([1, 2], [1.0, 0.5], [0, 1, 2], {})
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
    previews: dict[int, tuple[Preview, ...]] = field(default_factory=dict)
    denoiser_calls: int | None = None
    noises: list[Tensor] | None = None


class NothingRankedError(RuntimeError):
    """Every candidate was dropped.

    Attributes:
        output: without images; `.dropped` says why, by seed.
    """

    def __init__(self, message: str, output: BestOfNOutput) -> None:
        super().__init__(message)
        self.output = output


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
        return score_batch(self._reward, images, prompts, self._device)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A candidate's image, and where its noise cannot be drawn from its seed alone, that noise."""

    image: Image.Image
    noise: Tensor | None = None


class Tally:
    """Takes in scored candidates; keeps everybody's scores, and the pictures of the best.

    Args:
        top_k: how many images the output shall hold.
        diverse: hold the best 4 top_k, and show those `top_k` of them that lie far apart.
    """

    def __init__(self, top_k: int, *, diverse: bool = False) -> None:
        self._top_k, self._diverse = top_k, diverse
        self._winners = TopK(top_k * POOL if diverse else top_k)
        self._scores: dict[int, _Scores] = {}
        self._dropped: dict[int, str] = {}
        self._previews: dict[int, list[Preview]] = {}
        self.calls: int | None = None

    def add(
        self,
        seeds: Sequence[int],
        reasons: Sequence[str | None],
        output: RewardOutput | None,
        picture: Callable[[int], Picture],
    ) -> None:
        """Take in candidates.

        Args:
            seeds: (B,) their seeds, of which no other candidate has one. Of two equal scores the smaller seed wins.
            reasons: (B,) why a candidate is dropped, or None.
            output: scores of those that are not dropped, in their order; None if there are none.
            picture: gives the picture of row i; called for those only that are among the best so far.
        """
        for row, (seed, reason, scores) in enumerate(zip(seeds, reasons, scores_of(output, reasons), strict=True)):
            why = why_dropped(scores.total, reason)
            if why is not None:
                self.leave(seed, why)
                continue
            self._scores[seed] = scores
            if self._winners.accepts(scores.total, seed):
                self._winners.push(scores.total, seed, picture(row))

    def total(self, seed: int) -> float:
        """Total of a candidate that was taken in; NaN if it was dropped or did not reach its end."""
        return self._scores[seed].total

    def preview(self, seed: int, preview: Preview) -> None:
        """Note what the reward said of a candidate on its way."""
        self._previews.setdefault(seed, []).append(preview)

    def leave(self, seed: int, reason: str | None = None) -> None:
        """Take in a candidate that does not reach its end: pruned, or for a reason dropped."""
        self._scores[seed] = _Scores()
        if reason is not None:
            self._dropped[seed] = reason

    def output(self) -> BestOfNOutput:
        """What is known so far."""
        seeds = sorted(self._scores)
        best = self._best()
        found = [self._scores[winner.index] for winner in best]
        every = [self._scores[seed] for seed in seeds]
        known = any(scores.correspondence is not None for scores in every)
        noises = [winner.item.noise for winner in best]
        return BestOfNOutput(
            images=[winner.item.image for winner in best],
            scores=[winner.score for winner in best],
            seeds=[winner.index for winner in best],
            quality=[scores.quality for scores in found],
            correspondence=[_number(scores.correspondence) for scores in found] if known else None,
            all_scores=[scores.total for scores in every],
            all_seeds=seeds,
            all_quality=[scores.quality for scores in every],
            all_correspondence=[_number(scores.correspondence) for scores in every] if known else None,
            dropped=dict(self._dropped),
            previews={seed: tuple(self._previews[seed]) for seed in sorted(self._previews)},
            denoiser_calls=self.calls,
            noises=None if any(noise is None for noise in noises) or not noises else noises,
        )

    def _best(self) -> list[Ranked]:
        held = self._winners.items()
        if not self._diverse or len(held) <= self._top_k:
            return held
        small = np.stack([np.asarray(h.item.image.resize((_THUMBNAIL,) * 2), np.float32).ravel() for h in held])
        distances = np.linalg.norm(small[:, None] - small[None], axis=-1)
        return [held[place] for place in spread(distances.tolist(), self._top_k)]


@dataclass(frozen=True, kw_only=True)
class _Scores:
    total: float = math.nan
    quality: float = math.nan
    correspondence: float | None = None


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def scores_of(output: RewardOutput | None, reasons: Sequence[str | None]) -> list[_Scores]:
    """Scores of (B,) candidates, of which `output` holds those without a reason to be dropped; NaN for the others."""
    if output is None:
        return [_Scores()] * len(reasons)
    aspects = ("total", "quality", "correspondence")
    columns = [getattr(output, aspect) for aspect in aspects]
    present = {a: c.to("cpu", torch.float64).tolist() for a, c in zip(aspects, columns, strict=True) if c is not None}
    rows = iter(range(len(output)))
    empty = _Scores(correspondence=math.nan if "correspondence" in present else None)
    filled = [next(rows) if reason is None else None for reason in reasons]
    return [empty if r is None else _Scores(**{a: values[r] for a, values in present.items()}) for r in filled]


def judge(
    images: Tensor, flagged: Sequence[Any], reward: PromptedReward
) -> tuple[list[str | None], RewardOutput | None]:
    """Why images (B, 3, H, W) are dropped, or None; and the scores of the others, in their order."""
    reasons = reasons_to_drop(images, flagged)
    kept = [row for row, reason in enumerate(reasons) if reason is None]
    return reasons, reward(images if len(kept) == len(images) else images[kept]) if kept else None


def conclude(output: BestOfNOutput, top_k: int, *, name: str, stacklevel: int) -> None:
    """Say, in one warning, which candidates were dropped.

    Args:
        output: the final one.
        top_k: how many images were wanted.
        name: what a seed is to the reader: "seed" or "image".
        stacklevel: as for `warnings.warn`, counted from this function.

    Raises:
        NothingRankedError: if no candidate is left.
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
        raise NothingRankedError(f"none of the {count} candidates could be ranked ({why})", output)
    fewer = f", so only {left} of top_k={top_k} are returned" if left < top_k else ""
    message = f"{len(output.dropped)} of {count} candidates were dropped{fewer} ({why})"
    warnings.warn(message, stacklevel=stacklevel)
