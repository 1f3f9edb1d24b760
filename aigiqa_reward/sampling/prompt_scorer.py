"""Score prompts by the images that a pipeline makes of them, for optimizers of prompts."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from aigiqa_reward.rewards.bound import BoundReward
from aigiqa_reward.rewards.factory import as_reward
from aigiqa_reward.sampling.best_of_n import BestOfN
from aigiqa_reward.sampling.candidates import FLAGGED, NothingRankedError, judge
from aigiqa_reward.sampling.pipeline_utils import Sampler, check_pipe_kwargs, in_chunks
from aigiqa_reward.types import RewardFunction
from aigiqa_reward.utils.checks import check_prompt, check_text, integer

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

_OWNED = {
    "prompt": "pass the prompts to score()",
    "generator": "each image has its own, made from its seed: pass seed= to score()",
    "latents": "each image draws its own from its seed: pass seed= to score()",
    "num_images_per_prompt": "set images_per_prompt= of PromptScorer",
    "output_type": "images go to the reward as tensors",
    "return_dict": "leave it out",
}
"""Arguments of a pipeline that PromptScorer sets itself, and what to do instead."""


@dataclass(frozen=True, kw_only=True)
class PromptScore:
    """Scores of the images that a pipeline makes of one prompt; NaN if none could be scored. Higher is better.

    Attributes:
        total: number to maximize.
        quality: perceptual quality; None if the reward gives none.
        correspondence: correspondence to the text that the prompt is judged by; None if there is none.
        dropped: reason why no image could be scored; None if one could.
        cached: whether nothing was sampled for it, because it was known or asked for twice.

    Example:
        >>> from aigiqa_reward.sampling import PromptScore
        >>> PromptScore(total=0.6, quality=0.5, correspondence=0.7).flagged
        False
    """

    total: float
    quality: float | None = None
    correspondence: float | None = None
    dropped: str | None = None
    cached: bool = False

    @property
    def flagged(self) -> bool:
        """Whether the pipeline's safety checker flagged the images."""
        return self.dropped == FLAGGED


class _Image(NamedTuple):
    """One image to make and score; the key of the cache."""

    prompt: str
    judged_by: str
    seed: int


class PromptScorer:
    """Scores prompts by the images that a pipeline makes of them.

    Image i of a prompt has the seed `s = seed + i` and is that of `pipe(prompt,
    generator=torch.Generator("cpu").manual_seed(s), **pipe_kwargs)`: bit for bit with batch_size=1 in float32 on the
    CPU, within 2/255 otherwise. `BestOfN` says which pipelines need `torch.manual_seed(s)` before, and which images are
    sampled one by one. All prompts of a call share their seeds, so that they differ by more than noise. Scores are
    cached by prompt, judging text and seed.

    Args:
        pipe: diffusers pipeline that makes images from a list of prompts (with batch_size=1: from one). Or a BestOfN,
            which scores by its own reward; a prompt then counts as much as its best candidate, and the seeds of image i
            are those of its n candidates, from `seed + i * n` on.
        reward: a Reward, its name, or any `f(images, prompts) -> (B,) tensor or RewardOutput`; None with a BestOfN.
        images_per_prompt: images whose scores are averaged; more separate prompts from luck better.
        batch_size: images sampled at a time, of different prompts too; a BestOfN has its own.
        cache_size: images whose scores are cached, the last used; 0 caches none.
        **pipe_kwargs: arguments of the pipeline's call (steps, guidance, size, negative prompt, ...), the same for all
            prompts.

    Example:
        >>> from aigiqa_reward import create_reward, load_embedded_pipeline
        >>> from aigiqa_reward.sampling import PromptScore, PromptScorer
        >>> scorer = PromptScorer(load_embedded_pipeline(), create_reward("compact"), num_inference_steps=2)
        >>> one, other = scorer.score(["a red apple", "a cat"], seed=3)
        >>> isinstance(one, PromptScore), one.dropped, one.cached
        (True, None, False)
        >>> scorer.score(["a cat"], seed=3)[0].cached
        True
    """

    def __init__(
        self,
        pipe: DiffusionPipeline | BestOfN | Callable[..., Any],
        reward: RewardFunction | str | None = None,
        *,
        images_per_prompt: int = 1,
        batch_size: int = 4,
        cache_size: int = 10_000,
        **pipe_kwargs: Any,
    ) -> None:
        search = self._search = pipe if isinstance(pipe, BestOfN) else None
        if search and reward is not None:
            raise ValueError("reward: a BestOfN judges by its own reward; leave this one out")
        if not callable(pipe):
            raise TypeError(f"pipe: expected a diffusers pipeline or a BestOfN, got {type(pipe).__name__}")
        self.pipe: Any = search.pipe if search else pipe
        self.reward: Any = search.reward if search else as_reward(reward, pipe)
        self.images_per_prompt = integer("images_per_prompt", images_per_prompt, least=1)
        self.batch_size = integer("batch_size", batch_size, least=1)
        self.cache_size = integer("cache_size", cache_size, least=0)
        check_pipe_kwargs(pipe_kwargs, "PromptScorer", _OWNED)
        self.pipe_kwargs = pipe_kwargs
        self._known: dict[_Image, PromptScore] = {}

    @property
    def seeds_per_prompt(self) -> int:
        """Consecutive seeds that a prompt uses, from `seed` on: those of its images, or of all their candidates."""
        return self.images_per_prompt * (1 if self._search is None else self._search.n)

    def score(
        self, prompts: Sequence[str], judged_by: Sequence[str] | None = None, *, seed: int = 0
    ) -> list[PromptScore]:
        """Make the images of all prompts that are not cached, and score them.

        Args:
            prompts: (N,) prompts of the pipeline.
            judged_by: (N,) prompts of the reward; by default the same.
            seed: seed of every prompt's first image.

        Returns:
            N scores in the prompts' order, each the mean over its images that could be scored.
        """
        prompts = _texts(prompts, "prompts")
        judged_by = prompts if judged_by is None else _texts(judged_by, "judged_by")
        if len(judged_by) != len(prompts):
            raise ValueError(f"judged_by: expected one text per prompt, got {len(judged_by)} for {len(prompts)}")
        first = integer("seed", seed, least=0)
        step = self.seeds_per_prompt // self.images_per_prompt
        seeds = range(first, first + self.seeds_per_prompt, step)
        rows = [[_Image(p, text, s) for s in seeds] for p, text in zip(prompts, judged_by, strict=True)]
        images = list(dict.fromkeys(image for row in rows for image in row))
        found = {image: self._known[image] for image in images if image in self._known}
        new = dict(self._judge([image for image in images if image not in found]))
        found |= new
        kept = {image: score for image, score in self._known.items() if image not in found} | found
        self._known = dict(list(kept.items())[max(0, len(kept) - self.cache_size) :])  # those used last
        unseen, scores = set(new), []
        for row in rows:
            scores.append(replace(_mean([found[image] for image in row]), cached=unseen.isdisjoint(row)))
            unseen.difference_update(row)
        return scores

    def unreadable(self, judged_by: Sequence[str]) -> dict[str, str]:
        """Return the reasons why the reward cannot read some of its prompts, by prompt."""
        return BoundReward(self.reward).unreadable(judged_by)

    def clear(self) -> None:
        """Empty the cache, after the pipeline or the reward was changed."""
        self._known.clear()

    def _judge(self, images: Sequence[_Image]) -> Iterator[tuple[_Image, PromptScore]]:
        if self._search is not None:
            yield from ((image, self._best(self._search, image)) for image in images)
            return
        sampler = Sampler(self.pipe, self.pipe_kwargs)

        def sample_and_score(chunk: Sequence[_Image]) -> list[PromptScore]:
            pictures, flagged = sampler([image.prompt for image in chunk], [image.seed for image in chunk])
            candidates = judge(pictures, flagged, BoundReward(self.reward), [image.judged_by for image in chunk])
            return [PromptScore(**vars(candidate)) for candidate in candidates]

        size = self.batch_size if sampler.together else 1
        for chunk, scores in in_chunks(images, size, sample_and_score, self.pipe):
            yield from zip(chunk, scores, strict=True)

    def _best(self, search: BestOfN, image: _Image) -> PromptScore:
        search = copy.copy(search)  # the user's own keeps its reward_prompt
        search.reward_prompt = image.judged_by
        try:
            *_, output = search.stream(image.prompt, image.seed, **self.pipe_kwargs)
        except NothingRankedError as error:
            reason = next(iter(error.output.dropped.values()))
            return PromptScore(total=math.nan, dropped=reason)
        _, total, quality, correspondence = next(output.rows())
        return PromptScore(total=total, quality=quality, correspondence=correspondence)


def _mean(scores: Sequence[PromptScore]) -> PromptScore:
    judged = [score for score in scores if score.dropped is None]
    if not judged:
        return scores[0]

    def mean(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return fmean(known) if known else None

    return PromptScore(
        total=fmean(score.total for score in judged),
        quality=mean(score.quality for score in judged),
        correspondence=mean(score.correspondence for score in judged),
    )


def _texts(given: Sequence[str], argument: str) -> list[str]:
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f"{argument}: expected a list of texts, got {type(given).__name__}; put a single one in a list")
    for place, text in enumerate(given):
        check_text(text, f"{argument}[{place}]", "leave blank ones out")
        check_prompt(text, f"{argument}[{place}]")
    return list(given)
