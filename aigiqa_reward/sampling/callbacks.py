"""Callbacks for a diffusers pipeline's steps: log what a reward says of the previews, or stop when it is content.

    with RewardLogger(pipe, reward, prompt, every=5) as logger:
        image = pipe(prompt, callback_on_step_end=logger).images[0]
    print([step.total for step in logger.history])

A preview is the image that the model's output stands for at a step: the latents x0, decoded. Where a pipeline samples
at another size and resizes the image in the end (Sana's `use_resolution_binning`), previews have the size sampled.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from aigiqa_reward.rewards.bound import device_of
from aigiqa_reward.sampling.families import SamplingOptions, family_of
from aigiqa_reward.sampling.schedulers import SERVED, SEVERAL_CALLS_A_STEP, check_scheduler, predict_clean
from aigiqa_reward.types import RewardOutput, as_reward_output
from aigiqa_reward.utils.checks import check_reward, check_text, integer

_SERVED = [name for name in SERVED if name not in SEVERAL_CALLS_A_STEP]


@dataclass(frozen=True, kw_only=True)
class LoggedStep:
    """Scores of a batch's previews at one step. Higher is better; NaN where a preview has NaN or infinite pixels.

    Attributes:
        step: number of the step, from 0.
        timestep: the scheduler's entry for it.
        total: (B,) one an image.
        quality: (B,) equal to `total` if the reward gives one number only.
        correspondence: (B,) None if the reward gives none.
    """

    step: int
    timestep: float
    total: list[float]
    quality: list[float]
    correspondence: list[float] | None


@dataclass(frozen=True, kw_only=True)
class SeenStep:
    """One step as a callback finds it.

    Attributes:
        index: number of the step, from 0.
        count: number of steps in all.
        timestep: the scheduler's entry for it.
        sample: (B, ...) latents before the step.
        output: (B, ...) of the model, after guidance.
        latents: (B, ...) after the step and after the callbacks before this one.
        final: whether the latents are what will be decoded: the last step, or another callback ended the sampling.
    """

    index: int
    count: int
    timestep: float
    sample: Tensor
    output: Tensor
    latents: Tensor
    final: bool

    def clean(self, scheduler: Any) -> Tensor:
        """Latents x0 (B, ...) as seen from this step, in at least float32; those to be decoded, once they are there."""
        if self.final:
            return self.latents.to(torch.promote_types(self.latents.dtype, torch.float32))
        return predict_clean(scheduler, self.index, self.sample, self.output)

    def score(self, output: RewardOutput, **more: Any) -> dict[str, Any]:
        """The fields of a `LoggedStep`."""
        scores = {name: getattr(output, name) for name in ("total", "quality", "correspondence")}
        lists = {name: None if value is None else value.detach().tolist() for name, value in scores.items()}
        return {"step": self.index, "timestep": self.timestep, **lists, **more}


class BatchReward:
    """A reward bound to the prompts of a batch, which are encoded once. Leaves gradients to the caller.

    Args:
        reward: a Reward, or any RewardFunction. Images are brought to its device, if it says which that is.
        prompt: one text for all images, or P texts for B = P k images, each for k in a row, which is the order in which
            pipelines make `num_images_per_prompt=k`.
    """

    def __init__(self, reward: Any, prompt: str | Sequence[str]) -> None:
        self._reward = check_reward(reward)
        texts = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
        remedy = "pass the text that the images shall be judged by, or a list of one text an image"
        self.texts = [check_text(text, "prompt", remedy) for text in texts or [""]]
        self._device = device_of(reward)
        self._features: Any = None
        if callable(getattr(reward, "encode_prompts", None)):
            with torch.no_grad():
                self._features = reward.encode_prompts(self.texts)

    def places(self, count: int) -> Tensor:
        """(count,) which of the texts each of `count` images belongs to."""
        each, over = divmod(count, len(self.texts))
        if over:
            raise ValueError(
                f"prompt: expected one text, or as many as the batch has prompts, got {len(self.texts)} for {count} "
                "images; pass the same list as to the pipeline"
            )
        return torch.arange(len(self.texts)).repeat_interleave(each)

    def __call__(self, images: Tensor, places: Tensor) -> RewardOutput:
        """Score images (B, 3, H, W) in [0, 1], image i by the text at `places[i]`."""
        if self._device is not None:
            images = images.to(self._device)
        if self._features is None:
            prompts: Any = [self.texts[place] for place in places.tolist()]
        else:
            prompts = self._features[places.to(self._features.index.device)]
        return as_reward_output(self._reward(images, prompts), len(images))

    def rate(self, images: Tensor) -> RewardOutput:
        """Scores (B,) of previews, clamped to [0, 1] as an image file is; without gradients, NaN where not finite."""
        with torch.no_grad():
            rows = images.isfinite().flatten(1).all(dim=1).nonzero()[:, 0]
            places = self.places(len(images))[rows.cpu()]
            nothing = torch.full((len(images),), math.nan)
            if not len(rows):
                return RewardOutput(total=nothing, quality=nothing)
            output = self(images[rows].clamp(0, 1), places).to(images.device)

        def spread(values: Tensor) -> Tensor:
            return nothing.to(values).index_copy(0, rows, values)

        correspondence = None if output.correspondence is None else spread(output.correspondence)
        return RewardOutput(total=spread(output.total), quality=spread(output.quality), correspondence=correspondence)


class Watch(ABC):
    """A context manager to pass as `callback_on_step_end`, alone or within diffusers' MultiPipelineCallbacks.

    Args:
        pipe: a text-to-image pipeline of a family that `sampling.families` lists, which has step callbacks.
        reward: a Reward, or any RewardFunction.
        prompt: as of `BatchReward`.

    Raises:
        TypeError: a pipeline without an adapter, a reward that cannot be called, a prompt that is no text.
        ValueError: a blank prompt; on entering, a pipeline without step callbacks, or a scheduler that calls the
            denoiser several times a step.
    """

    tensor_inputs: ClassVar[list[str]] = ["latents"]

    def __init__(self, pipe: Any, reward: Any, prompt: str | Sequence[str]) -> None:
        self._name = type(self).__name__
        self._adapter = type(family_of(pipe, need=self._name))
        self.pipe = pipe
        self.reward = BatchReward(reward, prompt)
        self._taps: list[_Tap] = []
        self._called: Mapping[str, Any] | None = None
        self._size: tuple[int, int] | None = None
        self._steps = self._calls = 0

    @abstractmethod
    def after_step(self, seen: SeenStep) -> Tensor | None:
        """Look at a step; latents (B, ...) to go on with, or None for those that there are."""

    def __enter__(self) -> Self:
        if self._taps:
            raise ValueError(f"{self._name}: is entered already; make another one for a second with block")
        pipe = self.pipe
        if "callback_on_step_end" not in inspect.signature(type(pipe).__call__).parameters:
            raise ValueError(
                f"pipe: {self._name} is called after each step, and {type(pipe).__name__} has no callback_on_step_end; "
                "use BestOfN or ParticleSteering, which run its parts themselves"
            )
        check_scheduler(pipe.scheduler, need=self._name, served=_SERVED, flow=self._adapter.flow)
        self._called, self._steps, self._calls = None, 0, 0
        self._taps = [_tap(pipe.scheduler, "step"), _tap(pipe, "prepare_latents")]
        for tap, listener in zip(self._taps, (self._on_step, self._on_prepare), strict=True):
            tap.listeners[id(self)] = listener
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        for tap in self._taps:
            del tap.listeners[id(self)]
            tap.remove_idle()
        self._taps, self._called = [], None
        if self._steps and not self._calls and kind is None:
            warnings.warn(
                f"{self._name} was entered, but the pipeline never called it; pass it: "
                "pipe(prompt, callback_on_step_end=...)",
                stacklevel=2,
            )

    def __call__(
        self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """What diffusers calls after a step.

        Raises:
            ValueError: outside a `with` block, or by another pipeline than its own.
        """
        called, self._called, self._calls = self._called, None, self._calls + 1
        if not self._taps:
            raise ValueError(
                f"callback_on_step_end: {self._name} sees the steps only within its with block: "
                f"with {self._name}(pipe, ...) as watch: pipe(prompt, callback_on_step_end=watch)"
            )
        if pipeline is not self.pipe or called is None:
            raise ValueError(
                f"callback_on_step_end: {self._name} listens to the pipeline and the scheduler that it was entered "
                "with, and another one runs; make one for that pipeline, and set pipe.scheduler before the with block"
            )
        count = len(pipeline.scheduler.timesteps)
        seen = SeenStep(
            index=step_index,
            count=count,
            timestep=float(timestep),
            sample=called["sample"],
            output=called["model_output"],
            latents=callback_kwargs.get("latents", called["result"]),
            final=step_index + 1 == count or bool(getattr(pipeline, "_interrupt", False)),
        )
        latents = self.after_step(seen)
        return callback_kwargs if latents is None else {**callback_kwargs, "latents": latents}

    def decode(self, clean: Tensor) -> Tensor:
        """Images (B, 3, H, W) of latents x0, nominally in [0, 1], not clamped; differentiable."""
        assert self._size is not None  # every pipeline of a family prepares its latents
        height, width = self._size
        return self._adapter(self.pipe, SamplingOptions(height=height, width=width)).decode(clean)

    def preview(self, seen: SeenStep) -> Tensor:
        """Latents x0 (B, ...) as seen from a step, of the type of its latents; without gradients."""
        with torch.no_grad():
            return seen.clean(self.pipe.scheduler).to(seen.latents.dtype)

    def rate(self, clean: Tensor) -> RewardOutput:
        """Scores (B,) of the images of latents x0, without gradients."""
        with torch.no_grad():
            return self.reward.rate(self.decode(clean))

    def _on_step(self, arguments: Mapping[str, Any], result: Any) -> None:
        self._steps += 1
        self._called = {**arguments, "result": result[0]}

    def _on_prepare(self, arguments: Mapping[str, Any], result: Any) -> None:
        self._size = int(arguments["height"]), int(arguments["width"])


# --------------------------------------------------------------------------------------------- listening

_ABSENT = object()


class _Tap:
    """Stands in front of a method of one object: calls it, and tells its listeners the arguments and the result.

    One tap serves all listeners, so that they may leave in any order.
    """

    def __init__(self, target: Any, name: str) -> None:
        self.target, self.name = target, name
        self.before = vars(target).get(name, _ABSENT)
        self.__wrapped__ = getattr(target, name)  # pipelines look at the signature of a scheduler's step
        self.listeners: dict[int, Callable[[Mapping[str, Any], Any], None]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.__wrapped__(*args, **kwargs)
        arguments = inspect.signature(self.__wrapped__).bind(*args, **kwargs).arguments
        for listener in self.listeners.values():
            listener(arguments, result)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.__wrapped__, memo)  # nobody listens to a copy of the object

    def remove_idle(self) -> None:
        """Leave the object as it was, unless somebody still listens, or has put another wrapper on top since."""
        while isinstance(tap := vars(self.target).get(self.name), _Tap) and not tap.listeners:
            if tap.before is _ABSENT:
                delattr(self.target, self.name)
            else:
                setattr(self.target, self.name, tap.before)


def _tap(target: Any, name: str) -> _Tap:
    """The tap in front of a method, put there if there is none."""
    tap = vars(target).get(name)
    if not isinstance(tap, _Tap):
        tap = _Tap(target, name)
        setattr(target, name, tap)
    return tap


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
