"""Callbacks for a diffusers pipeline's steps: log what a reward says of the previews, or stop when it is content.

    with RewardLogger(pipe, reward, prompt, every=5) as logger:
        image = pipe(prompt, callback_on_step_end=logger).images[0]
    print([step.total for step in logger.history])

A preview is the image that the model's output stands for at a step: the latents x0, decoded. Where a pipeline samples
at another size and resizes the image in the end (Sana's `use_resolution_binning`), previews have the size sampled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from aigiqa_reward.sampling.watching import LoggedStep, SeenStep, Watch
from aigiqa_reward.selection import integer

__all__ = ["EarlyExit", "LoggedStep", "RewardLogger"]


class RewardLogger(Watch):
    """Scores the previews of a run; the images are the same, bit for bit, as without it.

    The last entry of a run is about the images themselves. Each entry costs a decoding and a call of the reward.

    Args:
        pipe: a text-to-image pipeline of Stable Diffusion 1 to 3.5, SDXL, FLUX, Qwen-Image, Z-Image or Sana.
        reward: a Reward, or any `f(images, prompts) -> (B,) tensor or RewardOutput`; it stays on its device.
        prompt: the text that the reward sees for all images, or a list of the batch's texts.
        every: score steps 0, every, 2 every, ... and the last.

    Attributes:
        history: entries since the `with` block was entered; a call of the pipeline begins again at step 0.

    Example:
        >>> from aigiqa_reward import create_reward, load_embedded_pipeline
        >>> from aigiqa_reward.sampling import RewardLogger
        >>> pipe, prompt = load_embedded_pipeline(), "a red apple on a blue background"
        >>> with RewardLogger(pipe, create_reward("compact"), prompt, every=2) as logger:
        ...     image = pipe(prompt, num_inference_steps=4, callback_on_step_end=logger).images[0]
        >>> [entry.step for entry in logger.history]
        [0, 2, 3]
    """

    def __init__(self, pipe: Any, reward: Any, prompt: str | Sequence[str], every: Any = 1) -> None:
        super().__init__(pipe, reward, prompt)
        self.every = integer("every", every, least=1)
        self.history: list[LoggedStep] = []

    def __enter__(self) -> RewardLogger:
        super().__enter__()
        self.history = []
        return self

    def after_step(self, seen: SeenStep) -> None:
        """Score the preview, if it is its turn."""
        if seen.final or seen.index % self.every == 0:
            self.history.append(LoggedStep(**seen.score(self.rate(self.preview(seen)))))


class EarlyExit(Watch):
    """Ends a run as soon as its preview is good enough, or gets no better: the preview is the image then.

    The remaining steps are skipped, with their calls of the denoiser. Each step up to there costs a decoding and a
    call of the reward. Previews lack what the skipped steps would have added: mostly fine detail.

    Args:
        pipe: as of `RewardLogger`.
        reward: as of `RewardLogger`.
        prompt: as of `RewardLogger`.
        above: end when the totals of all images of the batch are at least this.
        patience: end when the mean total of the batch has not risen for so many steps; at least 1.
        first: share of the steps, in [0, 1], that is always taken, and not scored: early previews are blurs.

    Attributes:
        exited_at: number of the last step taken in the latest run, from 0; None if the run went to its end.
        history: scores of the previews of the latest run.

    Raises:
        ValueError: neither `above` nor `patience`, or an argument out of range.

    Example:
        >>> from aigiqa_reward import create_reward, load_embedded_pipeline
        >>> from aigiqa_reward.sampling import EarlyExit
        >>> pipe, prompt = load_embedded_pipeline(), "a red apple on a blue background"
        >>> with EarlyExit(pipe, create_reward("compact"), prompt, above=-10.0, first=0.5) as early:  # anything will do
        ...     image = pipe(prompt, num_inference_steps=4, callback_on_step_end=early).images[0]
        >>> early.exited_at
        1
    """

    def __init__(
        self,
        pipe: Any,
        reward: Any,
        prompt: str | Sequence[str],
        above: float | None = None,
        patience: Any = None,
        first: float = 0.3,
    ) -> None:
        super().__init__(pipe, reward, prompt)
        if above is None and patience is None:
            raise ValueError("above, patience: expected at least one of them, got neither; pass above=0.8, say")
        if above is not None and not math.isfinite(above):
            raise ValueError(f"above: expected a finite total, got {above}; leave it out to go by patience alone")
        if not 0 <= first <= 1:
            raise ValueError(f"first: expected a share of the steps in [0, 1], got {first}; pass 0.3, say")
        self.above = above
        self.patience = None if patience is None else integer("patience", patience, least=1)
        self.first = first
        self.exited_at: int | None = None
        self.history: list[LoggedStep] = []

    def __enter__(self) -> EarlyExit:
        super().__enter__()
        self._begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if self.exited_at is not None:
            self.pipe._interrupt = False  # the pipelines do so only when they are called again
        super().__exit__(kind, *error)

    def after_step(self, seen: SeenStep) -> Tensor | None:
        """The preview's latents, where the run ends."""
        if seen.index == 0:
            self._begin()
        if seen.final or seen.index + 1 < self.first * seen.count:
            return None
        clean = self.preview(seen)
        self.history.append(LoggedStep(**seen.score(self.rate(clean))))
        if not (self._is_good() or self._is_stuck()):
            return None
        self.exited_at = seen.index
        self.pipe._interrupt = True
        return clean

    def _begin(self) -> None:
        self.exited_at, self.history = None, []

    def _is_good(self) -> bool:
        return self.above is not None and min(self.history[-1].total) >= self.above

    def _is_stuck(self) -> bool:
        """Whether the best mean lies `patience` steps back; of equal ones the earlier is the best."""
        means = [sum(step.total) / len(step.total) for step in self.history]
        if self.patience is None or math.isnan(means[-1]):
            return False
        best = max(range(len(means)), key=lambda place: -math.inf if math.isnan(means[place]) else means[place])
        return len(means) - 1 - best >= self.patience
