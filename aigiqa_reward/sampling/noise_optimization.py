"""Noise optimisation: the initial noise of a one- to four-step model climbs up a reward's gradient.

Eyring et al. 2024, "ReNO: Enhancing One-step Text-to-Image Models through Reward-based Noise Optimization".
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aigiqa_reward import images as pixels
from aigiqa_reward.sampling.candidates import BestOfNOutput, Picture, Tally, conclude
from aigiqa_reward.sampling.checks import check_prompt, check_reward, check_text, first_seed, number
from aigiqa_reward.sampling.drops import FLAGGED
from aigiqa_reward.sampling.families import family_of
from aigiqa_reward.sampling.noise_ascent import Ascent, Optimizer, norm_log_likelihood, without_weight_gradients
from aigiqa_reward.sampling.rollout import Rollout, State
from aigiqa_reward.sampling.watching import BatchReward
from aigiqa_reward.selection import integer

__all__ = ["NoiseOptimizer", "NoiseOptimizerOutput", "norm_log_likelihood"]

LEARNING_RATES: dict[Optimizer, float] = {"sgd": 5.0, "adam": 0.02}
"""For sgd ReNO's; for adam chosen here: as its steps do not shrink with the gradient, 20 of them move noise of standard
deviation 1 by at most 0.4 a number."""


@dataclass(frozen=True, kw_only=True)
class NoiseOptimizerOutput(BestOfNOutput):
    """The best image on the way, as the only candidate; `noises` holds its initial latents.

    Attributes:
        history: total of the image before each step of the optimiser, and after the last one; history[0] is the image
            of the seed.
    """

    history: list[float]

    @property
    def noise(self) -> Tensor:
        """Initial latents (1, ...) of the best image, on the CPU, of the pipeline's own type, as its call takes them.

        `pipe(prompt, latents=output.noise, **pipe_kwargs)` makes the image again. They are of about unit variance:
        Stable Diffusion, SDXL and PixArt multiply what they are given by their scheduler's `init_noise_sigma`. FLUX
        and Qwen-Image take them packed, (1, tokens, channels); FLUX.2 as (1, channels, height, width) of its tokens;
        all others as (1, channels, height, width). A sampler that draws noise on its way goes on where the initial
        noise ended: give such a pipeline a generator of the seed that has drawn `noise.shape` numbers before.
        """
        assert self.noises is not None, "an output without an image is an error"
        return self.noises[0]


class NoiseOptimizer:
    """Optimises the initial noise of one image through the whole rollout: all steps, decoder and reward.

    In each iteration the noise e takes a step of gradient ascent on

        total(decode(rollout(e))) + regularisation * ((d - 1) log ||e|| - ||e||^2 / 2)

    and of all images on the way the one of the highest total is returned. For models that make an image in one to four
    steps (SD-Turbo, SDXL-Turbo, latent consistency models, FLUX schnell). An iteration costs about three calls of the
    model, four when checkpointed. No parameter gets a `.grad`. In float16 gradients may vanish or overflow: load the
    pipeline in bfloat16 or float32; the noise itself is kept in float32.

    Args:
        pipe: a text-to-image pipeline of a family that `sampling.families` lists. It is left as it was.
        reward: a Reward, or any `f(images, prompts) -> (B,) tensor or RewardOutput` with gradients in the images.
        iterations: at least 1.
        learning_rate: above 0; by default `LEARNING_RATES` of the optimiser.
        regularisation: at least 0; the default is ReNO's.
        clip: longest gradient of the whole, above 0; `math.inf` for no clipping. The default is ReNO's.
        optimizer: "sgd", with Nesterov momentum 0.9 as in ReNO, or "adam".
        checkpointed: keep no activations of the denoiser, compute them again on the way back.
        longest: more steps than this are refused.
        reward_prompt: the text that the reward sees; by default the pipeline's prompt.
        progress: show a progress bar over the iterations.

    Raises:
        TypeError: an argument of a wrong type, or a pipeline without an adapter.
        ValueError: an argument out of range.

    Example:
        >>> from aigiqa_reward import create_reward, load_embedded_pipeline
        >>> from aigiqa_reward.sampling import NoiseOptimizer
        >>> optimise = NoiseOptimizer(load_embedded_pipeline(), create_reward("compact"), iterations=2, progress=False)
        >>> result = optimise("a red apple on a blue background", seed=0, num_inference_steps=1)
        >>> len(result.history), result.scores[0] == max(result.history), result.noise.shape
        (3, True, torch.Size([1, 4, 16, 16]))
    """

    def __init__(
        self,
        pipe: Any,
        reward: Any,
        iterations: Any = 20,
        learning_rate: float | None = None,
        regularisation: float = 0.01,
        clip: float = 0.1,
        optimizer: Optimizer = "sgd",
        checkpointed: bool = True,
        longest: Any = 4,
        reward_prompt: Any = None,
        progress: bool = True,
    ) -> None:
        family_of(pipe, need="NoiseOptimizer")
        self.pipe: Any = pipe
        self.reward = check_reward(reward)
        self.iterations = integer("iterations", iterations, least=1)
        if optimizer not in LEARNING_RATES:
            raise ValueError(f"optimizer: expected one of {', '.join(LEARNING_RATES)}, got {optimizer!r}")
        self.optimizer: Optimizer = optimizer
        rate = LEARNING_RATES[optimizer] if learning_rate is None else learning_rate
        self.learning_rate = number(
            "learning_rate", rate, f"above 0; try {LEARNING_RATES[optimizer]}", lambda v: 0 < v < math.inf
        )
        self.regularisation = number(
            "regularisation", regularisation, "of at least 0; try 0.01", lambda v: 0 <= v < math.inf
        )
        self.clip = number("clip", clip, "above 0; try 0.1, or math.inf for no clipping", lambda v: v > 0)
        self.checkpointed = checkpointed
        self.longest = integer("longest", longest, least=1)
        if reward_prompt is not None:
            check_text(reward_prompt, "reward_prompt", "leave it out to use the pipeline's prompt")
        self.reward_prompt = reward_prompt
        self.progress = progress

    def __call__(self, prompt: Any, seed: Any = 0, **pipe_kwargs: Any) -> NoiseOptimizerOutput:
        """Optimise the noise of one prompt.

        Args:
            prompt: one text.
            seed: of the noise to start from.
            **pipe_kwargs: arguments of the pipeline's call (steps, guidance, size, negative prompt, ...).

        Warns:
            UserWarning: if an image, its total or a gradient is not finite: the best so far is returned.

        Raises:
            TypeError: a list of prompts, or another argument of a wrong type.
            ValueError: an argument that cannot be served, more steps than `longest`, a reward without gradients.
            NothingRankedError: if there is no image: not finite from the start, or all flagged by the safety checker.
        """
        seed = first_seed(seed, 1, "the noise")
        text = check_text(check_prompt(prompt), "prompt", "pass what the image shall show")
        if torch.is_inference_mode_enabled():
            raise ValueError("NoiseOptimizer: torch.inference_mode() forbids gradients; call it outside of that block")
        rollout = Rollout(self.pipe, need="NoiseOptimizer", **pipe_kwargs)
        generator = torch.Generator("cpu").manual_seed(seed)
        try:
            start = rollout.start(rollout.encode([text]), [generator])
            self._check_steps(start.steps)
            reward = BatchReward(self.reward, text if self.reward_prompt is None else self.reward_prompt)
            ascent = self._ascent(rollout, start, reward, generator.get_state())
            with torch.enable_grad(), without_weight_gradients(self.pipe, self.reward):
                stopped = ascent.climb()
        finally:
            if hasattr(self.pipe, "maybe_free_model_hooks"):
                self.pipe.maybe_free_model_hooks()  # offloads, as the pipeline does at the end of a call
        output = _output(ascent, seed, stopped)
        conclude(output, 1, name="seed", stacklevel=3)
        if stopped is not None:
            warnings.warn(
                f"NoiseOptimizer stopped after {len(ascent.history)} images because of {stopped}; the best so far is "
                "returned. Half precision overflows easily: load the pipeline in bfloat16 or float32, or lower "
                "learning_rate=",
                stacklevel=2,
            )
        return output

    def _check_steps(self, steps: int) -> None:
        if steps > self.longest:
            raise ValueError(
                f"num_inference_steps: expected at most longest={self.longest} calls of the denoiser, got {steps}; the "
                "gradient passes through each of them, costs time and memory for each and fades or explodes on a long "
                "way. Use a model of one to four steps with num_inference_steps=1 to 4, raise longest=, or take "
                "BestOfN or ParticleSteering, which need no gradients"
            )

    def _ascent(self, rollout: Rollout, start: State, reward: BatchReward, after: Tensor) -> Ascent:
        return Ascent(
            rollout=rollout,
            start=start,
            reward=reward,
            after=after,
            iterations=self.iterations,
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            regularisation=self.regularisation,
            clip=self.clip,
            checkpointed=self.checkpointed,
            progress=self.progress,
        )


def _output(ascent: Ascent, seed: int, stopped: str | None) -> NoiseOptimizerOutput:
    tally = Tally(1)
    tally.calls = ascent.calls
    if ascent.best is None:
        tally.leave(seed, stopped or FLAGGED)
    else:
        image, scores, noise = ascent.best
        picture = Picture(image=pixels.to_pil(ascent.rollout.family.marked(image))[0], noise=ascent.as_passed(noise))
        tally.add([seed], [None], scores, lambda _: picture)
    return NoiseOptimizerOutput(**vars(tally.output()), history=ascent.history)
