"""Callbacks for a diffusers pipeline's steps: log a reward's scores of the previews, or stop when they are good enough.

A preview is the decoded prediction of the clean latents x0 at a step, of the size that is sampled (Sana's
`use_resolution_binning` resizes the image only in the end).
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor

from aigiqa_reward.rewards.bound import BoundReward
from aigiqa_reward.rewards.factory import as_reward
from aigiqa_reward.sampling.families import SamplingOptions, family_of
from aigiqa_reward.sampling.rollout import displayed
from aigiqa_reward.sampling.schedulers import SERVED, SEVERAL_CALLS_A_STEP, check_scheduler, predict_clean
from aigiqa_reward.types import RewardFunction, RewardOutput
from aigiqa_reward.utils.checks import check_text, integer, number

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

Entry = TypeVar("Entry", bound="LoggedStep")

_SERVED = [name for name in SERVED if name not in SEVERAL_CALLS_A_STEP]


@dataclass(frozen=True, kw_only=True)
class LoggedStep:
    """Scores of a batch's previews at one step. Higher is better; NaN where a preview has NaN or infinite pixels."""

    step: int  # from 0
    timestep: float  # the scheduler's entry for it
    total: list[float]  # (B,)
    quality: list[float] | None  # (B,) equal to `total` for a function of one number; None if the reward gives none
    correspondence: list[float] | None  # (B,) None if the reward gives none


@dataclass(frozen=True, kw_only=True)
class SeenStep:
    """One step as a callback sees it."""

    index: int  # from 0
    count: int  # number of steps in all
    timestep: float
    sample: Tensor  # (B, ...) latents before the step
    output: Tensor  # (B, ...) of the model, after guidance
    latents: Tensor  # (B, ...) after the step and after the callbacks before this one
    final: bool  # whether the latents are clean: the last step, or another callback ended the sampling
    last: bool  # whether the pipeline takes no step after it; `denoising_end` leaves some of the `count` out

    def clean(self, scheduler: Any) -> Tensor:
        """Return latents x0 (B, ...) predicted at this step, or the final ones, in at least float32."""
        if self.final:
            return self.latents.to(torch.promote_types(self.latents.dtype, torch.float32))
        return predict_clean(scheduler, self.index, self.sample, self.output)

    def scores(self, output: RewardOutput) -> dict[str, Any]:
        """Return the fields of a `LoggedStep`."""
        columns = {"total": output.total, "quality": output.quality, "correspondence": output.correspondence}
        lists = {name: None if value is None else value.detach().tolist() for name, value in columns.items()}
        return {"step": self.index, "timestep": self.timestep, **lists}


class Watch(ABC, Generic[Entry]):
    """A context manager to pass as `callback_on_step_end`, alone or within diffusers' MultiPipelineCallbacks.

    `prompt` is one text for all images, or P texts for B = P k images, each for k in a row, as pipelines make
    `num_images_per_prompt=k`. The other arguments are those of `RewardLogger`.
    """

    tensor_inputs: ClassVar[list[str]] = ["latents"]

    def __init__(self, pipe: DiffusionPipeline, reward: RewardFunction | str, prompt: str | Sequence[str]) -> None:
        self._name, reward = type(self).__name__, as_reward(reward, pipe)
        self._adapter = type(family_of(pipe, need=self._name))
        self.pipe: Any = pipe
        texts = (list(prompt) if isinstance(prompt, list | tuple) else [prompt]) or [""]
        remedy = "pass the prompt of the images, or a list of one prompt per image"
        self.texts = [check_text(text, "prompt", remedy) for text in texts]
        self.reward = BoundReward(reward, self.texts)
        self.history: list[Entry] = []
        self._taps: list[_Tap] = []
        self._called: Mapping[str, Any] | None = None
        self._size: tuple[int, int] | None = None
        self._steps = self._calls = 0

    @abstractmethod
    def after_step(self, seen: SeenStep) -> Tensor | None:
        """Look at a step; return the latents (B, ...) to continue with, or None to leave them."""

    def __enter__(self) -> Self:
        if self._taps:
            raise ValueError(f"{self._name}: is entered already; make another one for a second with block")
        if "callback_on_step_end" not in inspect.signature(type(self.pipe).__call__).parameters:
            raise ValueError(
                f"pipe: {self._name} is called after each step, and {type(self.pipe).__name__} has no "
                "callback_on_step_end; use BestOfN or ParticleSteering, which run its parts themselves"
            )
        check_scheduler(self.pipe.scheduler, need=self._name, served=_SERVED, flow=self._adapter.flow)
        self.history, self._called, self._steps, self._calls = [], None, 0, 0
        wanted = (self.pipe.scheduler, "step", self._on_step), (self.pipe, "prepare_latents", self._on_prepare)
        for target, name, listener in wanted:
            tap = vars(target).get(name)
            if not isinstance(tap, _Tap):
                tap = _Tap(target, name)
                setattr(target, name, tap)
            tap.listeners[id(self)] = listener
            self._taps.append(tap)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        for tap in self._taps:
            del tap.listeners[id(self)]
            tap.remove_idle()
        self._taps, self._called = [], None
        if self._steps and not self._calls and kind is None:
            message = "was entered, but the pipeline never called it; pass it: pipe(prompt, callback_on_step_end=...)"
            warnings.warn(f"{self._name} {message}", stacklevel=2)

    def __call__(
        self, pipeline: DiffusionPipeline, step_index: int, timestep: float, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Handle a step, as diffusers calls it."""
        called, self._called, self._calls = self._called, None, self._calls + 1
        if pipeline is not self.pipe or called is None:
            raise ValueError(
                f"callback_on_step_end: {self._name} works only within its with block, for the pipeline and the "
                "scheduler that it was entered with; make one for that pipeline, and set pipe.scheduler before"
            )
        count = len(self.pipe.scheduler.timesteps)
        seen = SeenStep(
            index=step_index,
            count=count,
            timestep=float(timestep),
            sample=called["sample"],
            output=called["model_output"],
            latents=callback_kwargs.get("latents", called["result"]),
            final=step_index + 1 == count or bool(getattr(pipeline, "_interrupt", False)),
            last=step_index + 1 == getattr(pipeline, "num_timesteps", count),
        )
        latents = self.after_step(seen)
        return callback_kwargs if latents is None else {**callback_kwargs, "latents": latents}

    def places(self, count: int) -> list[int]:
        """Return which of the P prompts each of `count` images was made for."""
        given = len(self.texts)
        if count % given:
            raise ValueError(
                f"prompt: expected one text, or as many as the batch has prompts, got {given} for {count} images; pass "
                "the same list as to the pipeline"
            )
        return [place for place in range(given) for _ in range(count // given)]

    def prompts(self, images: Tensor) -> list[str]:
        """Return the prompt of each of the images (B, 3, H, W)."""
        return [self.texts[place] for place in self.places(len(images))]

    def decode(self, clean: Tensor) -> Tensor:
        """Decode latents x0 to images (B, 3, H, W), nominally in [0, 1], not clamped; differentiable."""
        assert self._size is not None  # every pipeline of a family prepares its latents
        return self._adapter(self.pipe, SamplingOptions(height=self._size[0], width=self._size[1])).decode(clean)

    def preview(self, seen: SeenStep) -> tuple[Tensor, LoggedStep]:
        """Return latents x0 (B, ...) predicted at a step, and the scores of their images, clamped as files are."""
        with torch.no_grad():
            clean = seen.clean(self.pipe.scheduler).to(seen.latents.dtype)
            images = displayed(self.decode(clean))
        return clean, LoggedStep(**seen.scores(self.reward.score(images, self.prompts(images))))

    def _on_step(self, arguments: Mapping[str, Any], result: Any) -> None:
        self._steps += 1
        self._called = {**arguments, "result": result[0]}

    def _on_prepare(self, arguments: Mapping[str, Any], result: Any) -> None:
        self._size = int(arguments["height"]), int(arguments["width"])


class _Tap:
    """A wrapper around a method that passes arguments and result to its listeners, who may leave in any order."""

    def __init__(self, target: Any, name: str) -> None:
        self.target, self.name = target, name
        self.before = vars(target).get(name)
        self.__wrapped__ = getattr(target, name)  # pipelines look at the signature of a scheduler's step
        self.listeners: dict[int, Callable[[Mapping[str, Any], Any], None]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.__wrapped__(*args, **kwargs)
        arguments = inspect.signature(self.__wrapped__).bind(*args, **kwargs).arguments
        for listener in self.listeners.values():
            listener(arguments, result)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.__wrapped__, memo)  # a copy of the object has no listeners

    def remove_idle(self) -> None:
        """Restore the object, unless somebody still listens, or has put another wrapper on top since."""
        while isinstance(tap := vars(self.target).get(self.name), _Tap) and not tap.listeners:
            if tap.before is None:
                delattr(self.target, self.name)
            else:
                setattr(self.target, self.name, tap.before)


class RewardLogger(Watch[LoggedStep]):
    """Scores the previews of a run; the images are the same, bit for bit, as without it.

    The last entry of a run is the score of the images themselves (with `denoising_end`, of the last step's preview).
    Each entry costs a decoding and a call of the reward.

    Args:
        pipe: a pipeline of Stable Diffusion 1 to 3.5, SDXL, FLUX, Qwen-Image, Z-Image or Sana.
        reward: a Reward, or any `f(images, prompts) -> (B,) tensor or RewardOutput`; it stays on its device.
        prompt: text that the reward sees for all images, or a list of the batch's texts.
        every: score steps 0, every, 2 every, ... and the last.

    `history` has the entries since the `with` block was entered; each call of the pipeline starts at step 0.

    Example:
        >>> from aigiqa_reward import create_reward, load_embedded_pipeline
        >>> from aigiqa_reward.sampling import RewardLogger
        >>> pipe, prompt = load_embedded_pipeline(), "a red apple on a blue background"
        >>> with RewardLogger(pipe, create_reward("compact"), prompt, every=2) as logger:
        ...     image = pipe(prompt, num_inference_steps=4, callback_on_step_end=logger).images[0]
        >>> [entry.step for entry in logger.history]
        [0, 2, 3]
    """

    def __init__(
        self, pipe: DiffusionPipeline, reward: RewardFunction | str, prompt: str | Sequence[str], every: int = 1
    ) -> None:
        super().__init__(pipe, reward, prompt)
        self.every = integer("every", every, least=1)

    def after_step(self, seen: SeenStep) -> None:
        """Score the preview, at the steps that are due."""
        if seen.final or seen.last or seen.index % self.every == 0:
            self.history.append(self.preview(seen)[1])


class EarlyExit(Watch[LoggedStep]):
    """Ends a run as soon as its preview is good enough, or no longer improves, and returns the preview as the image.

    Each step before costs a decoding and a call of the reward. Previews lack mostly fine detail.

    Args:
        pipe: see `RewardLogger`.
        reward: see `RewardLogger`.
        prompt: see `RewardLogger`.
        above: end when the totals of all images of the batch are at least this.
        patience: end when the mean total of the batch has not risen for so many steps; at least 1.
        first: share of the steps, in [0, 1], that is always taken, and not scored: early previews are blurs.

    Of the latest run, `history` has the previews' scores, and `exited_at` the number of the last step taken, from 0; it
    is None if the run was not ended early.

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
        pipe: DiffusionPipeline,
        reward: RewardFunction | str,
        prompt: str | Sequence[str],
        above: float | None = None,
        patience: int | None = None,
        first: float = 0.3,
    ) -> None:
        super().__init__(pipe, reward, prompt)
        if above is None and patience is None:
            raise ValueError("above, patience: expected at least one of them, got neither; pass above=0.8, say")
        self.above = None if above is None else number("above", above, "that is finite", math.isfinite)
        self.patience = None if patience is None else integer("patience", patience, least=1)
        self.first = number("first", first, "in [0, 1], a share of the steps; try 0.3", lambda v: 0 <= v <= 1)
        self.exited_at: int | None = None

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if self.exited_at is not None:
            self.pipe._interrupt = False  # the pipelines do so only when they are called again
        super().__exit__(kind, *error)

    def after_step(self, seen: SeenStep) -> Tensor | None:
        """Return the preview's latents where the run ends."""
        if seen.index == 0:
            self.exited_at, self.history = None, []
        if seen.final or seen.index + 1 < self.first * seen.count:
            return None
        clean, entry = self.preview(seen)
        self.history.append(entry)
        is_good = self.above is not None and all(total >= self.above for total in entry.total)
        if not (is_good or self._is_stuck()):
            return None
        self.exited_at, self.pipe._interrupt = seen.index, True
        return clean

    def _is_stuck(self) -> bool:
        """Whether the best mean is `patience` steps old; of equal ones the earlier is the best."""
        means = [sum(step.total) / len(step.total) for step in self.history]
        ranked = [-math.inf if math.isnan(mean) else mean for mean in means]
        age = len(ranked) - 1 - ranked.index(max(ranked))
        return self.patience is not None and not math.isnan(means[-1]) and age >= self.patience
