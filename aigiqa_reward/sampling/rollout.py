"""Our own loop over a pipeline's parts: step by step, differentiable, with candidates that can be selected and joined.

    rollout = Rollout(pipe, num_inference_steps=20, guidance_scale=3.0)
    state = rollout.start(rollout.encode(["a red apple"]), [torch.Generator().manual_seed(0)])
    while not state.done:
        prediction = rollout.predict(state)        # .clean: the predicted latents x0
        state = rollout.advance(state, prediction.output)
    images = rollout.decode(state.latents)         # (B, 3, H, W), nominally in [0, 1]

It makes the images of `pipe(prompt, generator=..., **pipe_kwargs)`, unless a sampler draws noise between steps and the
pipeline passes it no generator (SD3, FLUX): the pipeline then uses the global random state, we the candidates'
generators. Nothing here disables gradients.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from aigiqa_reward.rewards.bound import BoundReward
from aigiqa_reward.rewards.factory import as_reward
from aigiqa_reward.sampling.families import Conditioning, Family, family_of
from aigiqa_reward.sampling.pipeline_utils import caches
from aigiqa_reward.sampling.schedulers import check_scheduler, joined_history, predict_clean, with_history_of
from aigiqa_reward.utils.checks import check_prompt, check_text, first_seed

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    from aigiqa_reward.types import RewardFunction


@dataclass(frozen=True, kw_only=True)
class State:
    """Candidates in the middle of their sampling. A step makes a new state; the old one stays valid.

    Only the generators change: two continuations of one state draw different noise in a stochastic sampler.
    """

    latents: Tensor  # (B, ...) as the scheduler sees them
    conditioning: Conditioning  # B rows
    shared: Mapping[str, Tensor]  # denoiser inputs that all candidates share
    generators: tuple[torch.Generator, ...]  # (B,) sources of the samplers' noise
    scheduler: Any  # our own copy, with these candidates' history
    step: int = 0  # steps taken

    def __len__(self) -> int:
        """Number of candidates B."""
        return len(self.latents)

    @property
    def steps(self) -> int:
        """Number of steps from noise to image; calls of the denoiser per candidate."""
        return len(self.scheduler.timesteps)

    @property
    def done(self) -> bool:
        """Whether no step is left."""
        return self.step >= self.steps

    def __getitem__(self, rows: Sequence[int]) -> State:
        """These candidates alone, with their histories; a place may come several times."""
        rows = list(rows)
        return replace(
            self,
            latents=self.latents[torch.as_tensor(rows, dtype=torch.long, device=self.latents.device)],
            conditioning=self.conditioning[rows],
            generators=tuple(self.generators[row] for row in rows),
            scheduler=with_history_of(self.scheduler, rows, self.latents),
        )

    def detach(self) -> State:
        """Detach the latents from the graph. Complete only for samplers without history."""
        return replace(self, latents=self.latents.detach())

    @staticmethod
    def cat(states: Sequence[State]) -> State:
        """Join candidates of several states of one rollout at the same step, in order."""
        if len(steps := {state.step for state in states}) > 1:
            raise ValueError(f"states: expected all at one step, got {sorted(steps)}")
        if len(states) == 1:
            return states[0]
        return replace(
            states[0],
            latents=torch.cat([state.latents for state in states]),
            conditioning=Conditioning.cat([state.conditioning for state in states]),
            generators=tuple(generator for state in states for generator in state.generators),
            scheduler=joined_history([state.scheduler for state in states], states[0].latents),
        )


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A denoiser's prediction for a state."""

    output: Tensor  # (B, ...) after guidance, the scheduler's input
    clean: Tensor  # (B, ...) the latents x0 that follow from it, in at least float32


class Rollout:
    """Samples with the parts of a pipeline, for one set of arguments of its call.

    Args:
        pipe: a text-to-image pipeline of a family in `sampling.families`. It is not changed.
        need: name of the caller, for errors.
        **pipe_kwargs: as in `pipe(prompt, **pipe_kwargs)`.
    """

    def __init__(self, pipe: DiffusionPipeline, *, need: str = "this", **pipe_kwargs: Any) -> None:
        self.family: Family = family_of(pipe, pipe_kwargs, need=need)
        check_scheduler(pipe.scheduler, need=need, flow=self.family.flow)
        for part in caches(pipe):
            raise ValueError(
                f"pipe: its {part} has a cache that keeps results from one call to the next, and {need} calls it for "
                f"other candidates in between; call pipe.{part}.disable_cache(), or, if a function of diffusers.hooks "
                "added the cache, load the pipeline without it"
            )
        self.pipe: Any = pipe

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode B prompts to conditioning of B rows, without gradients."""
        with torch.no_grad():
            return self.family.encode(prompts)

    def start(
        self, conditioning: Conditioning, generators: Sequence[torch.Generator], latents: Tensor | None = None
    ) -> State:
        """Draw the initial noise of B candidates, each from its generator, as the pipeline would.

        Initial `latents` (B, ...) are used instead where given; the generators draw theirs all the same.
        """
        with torch.no_grad():
            drawn, shared = self.family.start(generators, conditioning)
        scheduler = copy.deepcopy(self.pipe.scheduler)
        vars(scheduler).pop("step", None)  # a callback's wrapper around the pipeline's scheduler is not for ours
        self.family.set_timesteps(scheduler, drawn)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        latents = self.family.as_started(drawn, scheduler) if latents is None else latents
        sources = tuple(generators)
        return State(latents=latents, conditioning=conditioning, shared=shared, generators=sources, scheduler=scheduler)

    def predict(self, state: State, *, checkpointed: bool = False) -> Prediction:
        """Run the denoiser once (on two rows per candidate with classifier-free guidance).

        With `checkpointed` the backward pass computes the denoiser's activations again instead of keeping them.
        """
        scheduler, time, latents = state.scheduler, state.scheduler.timesteps[state.step], state.latents
        if hasattr(scheduler, "scale_model_input"):
            latents = scheduler.scale_model_input(latents, time)
        arguments, predict = (latents, time, state.conditioning, state.shared), self.family.predict
        output: Any = checkpoint(predict, *arguments, use_reentrant=False) if checkpointed else predict(*arguments)
        return Prediction(output=output, clean=predict_clean(scheduler, state.step, state.latents, output))

    def advance(self, state: State, output: Tensor) -> State:
        """Take the scheduler's step with a model output."""
        scheduler = with_history_of(state.scheduler, range(len(state)), state.latents)
        offered: dict[str, Any] = {"generator": list(state.generators), "eta": self.family.options.eta}
        taken = offered.keys() & inspect.signature(scheduler.step).parameters
        arguments = {name: offered[name] for name in taken}
        latents = scheduler.step(
            output, scheduler.timesteps[state.step], state.latents, **arguments, return_dict=False
        )[0]
        return replace(state, latents=latents, scheduler=scheduler, step=state.step + 1)

    def run(self, state: State, until: int | None = None) -> State:
        """Continue to step `until`, by default to the end."""
        until = state.steps if until is None else min(until, state.steps)
        while state.step < until:
            state = self.advance(state, self.predict(state).output)
        return state

    def show(self, latents: Tensor, *, final: bool = False) -> Tensor:
        """Decode to images (B, 3, H, W) in [0, 1] as the pipeline does: clamped, without gradients; NaN stays.

        With `final` they get the pipeline's watermark, where it has one.
        """
        with torch.no_grad():
            images = self.family.decode(latents)
            return displayed(self.family.marked(images) if final else images)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode to images (B, 3, H, W), nominally in [0, 1], not clamped; differentiable."""
        return self.family.decode(latents)


def displayed(images: Tensor) -> Tensor:
    """Clamp images to [0, 1] as an image file does; NaN and infinity stay."""
    return torch.where(images.isfinite(), images.clamp(0, 1), images)


@dataclass(frozen=True, kw_only=True)
class Call:
    """Parts of one call of a `PromptSampler`."""

    rollout: Rollout
    reward: BoundReward
    prompt: str
    text: str  # the prompt that the reward sees
    seed: int


class PromptSampler:
    """Base of methods that sample one prompt by our own loop, with a reward; arguments as in `ParticleSteering`."""

    def __init__(
        self, pipe: DiffusionPipeline, reward: RewardFunction | str, reward_prompt: str | None, progress: bool
    ) -> None:
        self._name = type(self).__name__
        self.reward: RewardFunction = as_reward(reward, pipe)
        self._flow = family_of(pipe, need=self._name).flow
        self.pipe: Any = pipe
        if reward_prompt is not None:
            check_text(reward_prompt, "reward_prompt", "leave it out to use the pipeline's prompt")
        self.reward_prompt, self.progress = reward_prompt, progress

    def _check_scheduler(self, served: Sequence[str]) -> None:
        check_scheduler(self.pipe.scheduler, need=self._name, flow=self._flow, served=served)

    @contextmanager
    def _call(self, prompt: str, first: int, seeds: int, of: str, pipe_kwargs: dict[str, Any]) -> Iterator[Call]:
        """Check the arguments of a call, and offload the pipeline's models at its end, as the pipeline does."""
        seed = first_seed(first, seeds, of)
        prompt = check_text(check_prompt(prompt), "prompt", "pass a description of the image")
        text = prompt if self.reward_prompt is None else self.reward_prompt
        rollout = Rollout(self.pipe, need=self._name, **pipe_kwargs)
        try:
            yield Call(rollout=rollout, reward=BoundReward(self.reward, [text]), prompt=prompt, text=text, seed=seed)
        finally:
            if hasattr(self.pipe, "maybe_free_model_hooks"):
                self.pipe.maybe_free_model_hooks()
