"""The images that preference pairs are made of: one of each noise, or several of one noise that differ on purpose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from aigiqa_reward.finetuning.tools import total_of_grey
from aigiqa_reward.sampling.best_of_n import BestOfN
from aigiqa_reward.sampling.checks import number
from aigiqa_reward.sampling.guidance import RewardGuidance
from aigiqa_reward.sampling.many_prompts import BestOfEachError, ResultsFolder, best_of_each
from aigiqa_reward.sampling.run_settings import reward_name
from aigiqa_reward.selection import integer

_CALLBACK = "callback_on_step_end"


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """What the images of one noise differ in; by default there is one image of each, and noises are paired.

    Attributes:
        guidance_scales: none, or at least two different scales of guidance.
        reward_guidance: 0, or the scale of a `sampling.RewardGuidance`, with which each noise is sampled once more.

    Raises:
        ValueError: both, one scale alone or twice, or a number out of range.
    """

    guidance_scales: Sequence[float] = ()
    reward_guidance: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.guidance_scales, Sequence) or isinstance(self.guidance_scales, str):
            raise TypeError(f"guidance_scales: expected several numbers, as (1.0, 4.0), got {self.guidance_scales!r}")
        scales = tuple(number("guidance_scales", s, "in each place", math.isfinite) for s in self.guidance_scales)
        if len(scales) == 1 or len(set(scales)) < len(scales):
            raise ValueError(
                f"guidance_scales: expected none, or at least two different scales, got {list(self.guidance_scales)}"
            )
        expected = "of at least 0, a scale of RewardGuidance"
        number("reward_guidance", self.reward_guidance, expected, lambda value: 0 <= value < math.inf)
        if scales and self.reward_guidance:
            raise ValueError("guidance_scales, reward_guidance: images of one noise differ in one of them; pass one")
        object.__setattr__(self, "guidance_scales", scales)

    def __bool__(self) -> bool:
        return bool(self.guidance_scales or self.reward_guidance)

    def check_count(self, pairs_per_prompt: int, n: int, named: str) -> int:
        """The number of pairs of a prompt, of which `n` noises have one each, or two noises have one."""
        most, share = (n, named) if self else (n // 2, f"{named} / 2")
        if integer("pairs_per_prompt", pairs_per_prompt, least=1) > most:
            raise ValueError(
                f"pairs_per_prompt: expected at most {share} = {most}, got {pairs_per_prompt}; raise {named}"
            )
        return pairs_per_prompt


class GuidedBestOfN(BestOfN):
    """A BestOfN whose images climb its reward while they are sampled.

    Args:
        search: what it does otherwise.
        scale: of `sampling.RewardGuidance`.
        prompt: one of those to come, to try the reward with.

    Raises:
        TypeError, ValueError: a pipeline that RewardGuidance cannot guide, or a reward without gradients.
    """

    def __init__(self, search: BestOfN, scale: float, prompt: str) -> None:
        super().__init__(search.pipe, search.reward, n=search.n, top_k=search.top_k, batch_size=search.batch_size)
        self.progress, self.scale = search.progress, scale
        with RewardGuidance(self.pipe, self.reward, prompt, scale=scale):
            pass  # what is wrong with the pipeline is said here
        if not total_of_grey(self.reward, prompt, self.pipe.device).requires_grad:
            raise ValueError(
                f"reward_guidance: climbs the reward by its gradient in the images, and {reward_name(self.reward)} "
                "gives none; leave it out, or pass guidance_scales"
            )

    def _sample(self, call: Any, seeds: Sequence[int]) -> tuple[Tensor, list[Any]]:
        with RewardGuidance(self.pipe, self.reward, call.prompt, scale=self.scale) as guidance:
            return super()._sample(replace(call, pipe_kwargs={**call.pipe_kwargs, _CALLBACK: guidance}), seeds)


def sampled(
    search: BestOfN, prompts: Sequence[str], folder: Path, contrast: Contrast, progress: Any, more: dict[str, Any]
) -> tuple[list[ResultsFolder], BestOfEachError | None]:
    """All candidates of all prompts, and the first failure.

    Args:
        search: ranks all of a prompt's candidates.
        prompts: texts.
        folder: holds the results; where there is a contrast, in a folder of each kind of images.
        contrast: what the kinds differ in.
        progress: as of `best_of_each`, over all kinds.
        more: further arguments of `best_of_each`.
    """
    failed, results = None, []
    for place, (name, of_kind, own) in enumerate(kinds := _kinds(search, prompts, contrast, more)):
        show = _part_of(progress, place, len(kinds))
        try:
            results.append(best_of_each(of_kind, prompts, folder / name, progress=show, **{**more, **own}))
        except BestOfEachError as error:
            results.append(error.results)
            failed = failed or error
    return results, failed


def _kinds(
    search: BestOfN, prompts: Sequence[str], contrast: Contrast, more: dict[str, Any]
) -> list[tuple[str, BestOfN, dict[str, Any]]]:
    """Of images of one noise: a folder's name, what samples them, and arguments of its own."""
    if scale := contrast.reward_guidance:
        if _CALLBACK in more:
            raise ValueError(f"{_CALLBACK}: reward_guidance is one itself; leave out one of the two")
        noted = {"settings": {**(more.get("settings") or {}), "reward_guidance": scale}}
        guided = GuidedBestOfN(search, scale, prompts[0])
        return [("unguided", search, {}), (f"reward-guidance-{scale:g}", guided, noted)]
    if contrast.guidance_scales:
        return [(f"guidance-{scale:g}", search, {"guidance_scale": scale}) for scale in contrast.guidance_scales]
    return [("", search, {})]


def _part_of(progress: Any, place: int, parts: int) -> Any:
    """A caller's bar over several runs: of run `place` what is done of all of them."""
    if not callable(progress) or parts < 2:
        return progress
    return lambda done, total: progress(place * total + done, parts * total)
