"""Candidates for one prompt: their scores, why some are dropped, and the images of the best."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aigiqa_reward.images import finite_rows, to_pil
from aigiqa_reward.rewards.bound import BoundReward
from aigiqa_reward.rewards.ranking import Ranked, TopK, spread
from aigiqa_reward.types import RewardOutput

NON_FINITE = "NaN or infinite pixels"
FLAGGED = "flagged by the pipeline's safety checker"
POOL = 4  # the diverse candidates are selected from this many times top_k; scores fall little within these
_COPY = 256  # px, longest side of the copies that `Keep` calls thumbnails
_THUMBNAIL = 16  # side in px at which images are compared for diversity: layout and colors, not texture

Keep = Literal["best", "thumbnails", "all"]
"""Whether to keep images besides the best: none, small copies, or all as they are."""


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Scores of a candidate's clean image as predicted after `step` of `steps`; higher is better."""

    step: int
    steps: int
    total: float
    quality: float | None = None
    correspondence: float | None = None


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Scores of one candidate; NaN and None where it was dropped, for the reason in `dropped`, or pruned."""

    total: float = math.nan
    quality: float | None = None
    correspondence: float | None = None
    dropped: str | None = None

    def preview(self, step: int, steps: int) -> Preview:
        """Return these scores as those of the image that was predicted after `step` of `steps`."""
        scores = {"total": self.total, "quality": self.quality, "correspondence": self.correspondence}
        return Preview(step=step, steps=steps, **scores)


def why_dropped(total: float) -> str | None:
    """Return why a candidate cannot be ranked by this total, such as an overflow; None if it can."""
    return None if math.isfinite(total) else f"the reward gave {'NaN' if math.isnan(total) else total}"


def judged(output: RewardOutput) -> list[Judged]:
    """Return the scores of each row; rows with a total that is not finite are dropped."""
    aspects = {"total": output.total, "quality": output.quality, "correspondence": output.correspondence}
    columns = {name: scores.to("cpu", torch.float64).tolist() for name, scores in aspects.items() if scores is not None}
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [Judged(dropped=why) if (why := why_dropped(row["total"])) else Judged(**row) for row in rows]


def judge(images: Tensor, flagged: Sequence[bool], reward: BoundReward, prompts: str | Sequence[str]) -> list[Judged]:
    """Score images (B, 3, H, W) without gradients; those that are not finite or were flagged never reach the reward."""
    finite = finite_rows(images).tolist()
    reasons = [FLAGGED if flag else None if fine else NON_FINITE for flag, fine in zip(flagged, finite, strict=True)]
    kept = [row for row, reason in enumerate(reasons) if reason is None]
    found = [Judged(dropped=reason) for reason in reasons]
    if kept:
        texts = prompts if isinstance(prompts, str) else [prompts[row] for row in kept]
        output = reward.score(images if len(kept) == len(images) else images[kept], texts)
        for row, scores in zip(kept, judged(output), strict=True):
            found[row] = scores
    return found


@dataclass(frozen=True, kw_only=True)
class BestOfNOutput:
    """The best candidates for one prompt, and the scores of all of them. Higher is better.

    `rerank` numbers its inputs 0, 1, ... and returns these numbers as seeds. A candidate without a score that is not in
    `dropped` was pruned.

    Attributes:
        images: the best, at most top_k, RGB, best first; ties go to the earlier candidate.
        scores: their totals, best first.
        seeds: their seeds, best first; each makes its image again (see `BestOfN`), and is None where none does: after
            a search among noises, noise optimization and particle steering.
        winners: their numbers in `all_seeds`, best first: as `seeds`, but never None.
        quality: their perceptual quality, best first; equal to `scores` if the reward is a function of one number, None
            if the reward gives none.
        correspondence: their correspondence to the prompt, best first; None if the reward gives none.
        all_scores: totals of all candidates in candidate order; NaN for those that were dropped.
        all_seeds: numbers of all candidates in candidate order: the seeds of their noise.
        all_quality: quality of all candidates in candidate order; NaN for those that were dropped; None likewise.
        all_correspondence: likewise; None if the reward gives none.
        dropped: reasons why candidates could not be ranked, by seed.
        previews: scores of a candidate on its way, by seed, where a search looked at them.
        others: copies of candidates that are not among the best, by number, as `BestOfN(keep=)` wants them.
        denoiser_calls: denoiser calls, one per candidate and step (a negative prompt adds none); None where the
            pipeline ran its own loop.
        noises: initial latents (1, ...) of the best, on the CPU, in the pipeline's format, where a search changed them:
            `pipe(prompt, latents=..., **pipe_kwargs)` makes the image again. A sampler that draws
            noise on its way (ancestral, SDE, LCM) also needs a generator with the image's seed that has drawn as many
            normal numbers as the latents have: `torch.randn(latents.shape, generator=generator)`.

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
    seeds: list[int | None]
    winners: list[int]
    quality: list[float] | None
    correspondence: list[float] | None
    all_scores: list[float]
    all_seeds: list[int]
    all_quality: list[float] | None
    all_correspondence: list[float] | None
    dropped: dict[int, str]
    previews: dict[int, tuple[Preview, ...]] = field(default_factory=dict)
    others: dict[int, Image.Image] = field(default_factory=dict)
    denoiser_calls: int | None = None
    noises: list[Tensor] | None = None

    def rows(self) -> Iterator[tuple[int, float, float | None, float | None]]:
        """Iterate over number, total, quality and correspondence of the best, best first."""
        return _rows(self.winners, self.scores, self.quality, self.correspondence)

    def all_rows(self) -> Iterator[tuple[int, float, float | None, float | None]]:
        """Iterate over number, total, quality and correspondence of all candidates in candidate order."""
        return _rows(self.all_seeds, self.all_scores, self.all_quality, self.all_correspondence)


def _rows(
    seeds: list[int], totals: list[float], *aspects: list[float] | None
) -> Iterator[tuple[int, float, float | None, float | None]]:
    quality, correspondence = (aspect or [None] * len(seeds) for aspect in aspects)
    return zip(seeds, totals, quality, correspondence, strict=True)


class NothingRankedError(RuntimeError):
    """Every candidate was dropped; `output.dropped` has the reasons, by seed."""

    def __init__(self, message: str, output: BestOfNOutput) -> None:
        super().__init__(message)
        self.output = output


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A candidate's image, whether its seed makes it again, and its initial noise where a search changes noises."""

    image: Image.Image
    noise: Tensor | None = None
    seeded: bool = True

    @staticmethod
    def of(images: Tensor, row: int, noise: Tensor | None = None, *, seeded: bool = True) -> Picture:
        """Take one image of a batch (B, 3, H, W) and, of (B, ...) noises, its own."""
        own = None if noise is None else noise[row : row + 1].clone()
        return Picture(image=to_pil(images[row : row + 1].cpu())[0], noise=own, seeded=seeded)


class Tally:
    """Scores of all candidates so far, and the pictures of the best `top_k`, or of those that look least alike."""

    def __init__(self, top_k: int, *, diverse: bool = False, keep: Keep = "best") -> None:
        self._top_k, self._diverse, self._keep = top_k, diverse, keep
        self._copies: dict[int, Image.Image] = {}
        self._winners = TopK(top_k * POOL if diverse else top_k)
        self._judged: dict[int, Judged] = {}
        self._previews: dict[int, list[Preview]] = {}
        self.calls: int | None = None

    def add(self, seeds: Sequence[int], candidates: Sequence[Judged], picture: Callable[[int], Picture]) -> None:
        """Add candidates (B,) that reached their end; `picture(row)` is called only for the best so far."""
        for row, (seed, candidate) in enumerate(zip(seeds, candidates, strict=True)):
            self._judged[seed] = candidate
            wins = candidate.dropped is None and self._winners.accepts(candidate.total, seed)
            if not wins and (self._keep == "best" or candidate.dropped is not None):
                continue
            found = picture(row)
            if wins:
                self._winners.push(candidate.total, seed, found)
            if self._keep != "best":
                self._copies[seed] = found.image
            if self._keep == "thumbnails":
                self._copies[seed] = found.image.copy()
                self._copies[seed].thumbnail((_COPY, _COPY))

    def total(self, seed: int) -> float:
        """Return the total of a candidate; NaN if it was dropped or pruned."""
        return self._judged[seed].total

    def preview(self, seed: int, preview: Preview) -> None:
        """Add the scores of a candidate's predicted image."""
        self._previews.setdefault(seed, []).append(preview)

    def leave(self, seed: int, reason: str | None = None) -> None:
        """Add a candidate that does not reach its end: pruned, or dropped for a reason."""
        self._judged[seed] = Judged(dropped=reason)

    def output(self) -> BestOfNOutput:
        """Return the output for the candidates so far."""
        seeds, best = sorted(self._judged), self._best()
        found, every = [self._judged[winner.index] for winner in best], [self._judged[seed] for seed in seeds]
        noises = [winner.item.noise for winner in best]

        def column(aspect: str, candidates: list[Judged]) -> list[float] | None:
            if all(getattr(candidate, aspect) is None for candidate in every):
                return None
            values = [getattr(candidate, aspect) for candidate in candidates]
            return [math.nan if value is None else value for value in values]

        return BestOfNOutput(
            images=[winner.item.image for winner in best],
            scores=[winner.score for winner in best],
            seeds=[winner.index if winner.item.seeded else None for winner in best],
            winners=[winner.index for winner in best],
            quality=column("quality", found),
            correspondence=column("correspondence", found),
            all_scores=[candidate.total for candidate in every],
            all_seeds=seeds,
            all_quality=column("quality", every),
            all_correspondence=column("correspondence", every),
            dropped={seed: c.dropped for seed, c in self._judged.items() if c.dropped is not None},
            previews={seed: tuple(self._previews[seed]) for seed in sorted(self._previews)},
            others={seed: self._copies[seed] for seed in sorted(self._copies.keys() - {w.index for w in best})},
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


def conclude(output: BestOfNOutput, top_k: int, *, name: str, stacklevel: int) -> None:
    """Warn once of all candidates that were dropped, by `name` and seed; a NothingRankedError if none is left."""
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
    warnings.warn(f"{len(output.dropped)} of {count} candidates were dropped{fewer} ({why})", stacklevel=stacklevel)
