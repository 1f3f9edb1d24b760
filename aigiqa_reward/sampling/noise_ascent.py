"""Gradient ascent on the initial noise of a rollout, as `NoiseOptimizer` runs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aigiqa_reward.images import HIGHEST, LOWEST
from aigiqa_reward.sampling.drops import NON_FINITE, why_dropped
from aigiqa_reward.sampling.rollout import Rollout, State
from aigiqa_reward.sampling.watching import BatchReward
from aigiqa_reward.types import RewardOutput

Optimizer = Literal["sgd", "adam"]

NO_GRADIENT = "NaN or infinite gradients"


def norm_log_likelihood(noise: Tensor) -> Tensor:
    """Logarithm of the chi density of the norm of standard normal noise e (Eyring et al. 2024, ReNO).

    It is (d - 1) log ||e|| - ||e||^2 / 2 + const, highest at ||e|| = sqrt(d - 1).

    Args:
        noise: of d numbers in any shape.

    Returns:
        () without the constant; differentiable.
    """
    norm = torch.linalg.vector_norm(noise)
    return (noise.numel() - 1) * norm.log() - norm.square() / 2


@dataclass(kw_only=True)
class Ascent:
    """Gradient ascent on the initial noise of one candidate. See `NoiseOptimizer` for what is not described here.

    Attributes:
        rollout: of the pipeline.
        start: one candidate at its beginning.
        reward: bound to its prompt.
        after: state of the generator that has drawn the initial noise.
        history: totals of the images so far.
        best: image (1, 3, H, W), its scores and its noise (1, ...), on the CPU; None without any.
        calls: of the denoiser so far.
    """

    rollout: Rollout
    start: State
    reward: BatchReward
    after: Tensor
    iterations: int
    optimizer: Optimizer
    learning_rate: float
    regularisation: float
    clip: float
    checkpointed: bool
    progress: bool
    history: list[float] = field(default_factory=list)
    best: tuple[Tensor, RewardOutput, Tensor] | None = None
    calls: int = 0

    @property
    def sigma(self) -> float | Tensor:
        """Standard deviation of the initial latents."""
        return getattr(self.start.scheduler, "init_noise_sigma", 1.0)

    def climb(self) -> str | None:
        """Optimise to the end; or return why it had to stop before."""
        from tqdm.auto import tqdm

        latents = self.start.latents
        kind = torch.promote_types(latents.dtype, torch.float32)
        noise = (latents / self.sigma).detach().to(kind).requires_grad_()
        optimizer = self._optimizer_of(noise)
        for iteration in tqdm(range(self.iterations + 1), desc="noise", disable=not self.progress):
            last = iteration == self.iterations
            with torch.set_grad_enabled(not last):
                image = self.image(noise)
            reason = self.judge(image.detach(), noise.detach())
            if last or reason is not None:
                return reason
            noise.grad = self.gradient(image, noise)
            length = nn.utils.clip_grad_norm_([noise], self.clip)
            if not bool(length.isfinite()):
                return NO_GRADIENT
            optimizer.step()
        return None

    def image(self, noise: Tensor) -> Tensor:
        """The image (1, 3, H, W), not clamped, of noise of unit variance."""
        generator = torch.Generator("cpu")
        generator.set_state(self.after)
        latents = noise.to(self.start.latents.dtype) * self.sigma  # in this order, as pipelines do
        state = replace(self.start, latents=latents, generators=(generator,))
        while not state.done:
            prediction = self.rollout.predict(state, checkpointed=self.checkpointed and torch.is_grad_enabled())
            state = self.rollout.advance(state, prediction.output)
            self.calls += 1
        return self.rollout.decode(state.latents)

    def judge(self, image: Tensor, noise: Tensor) -> str | None:
        """Note the total of an image as a file would have it, and the image if it is the best; or why there is none."""
        if not bool(image.isfinite().all()):
            return NON_FINITE
        output = self.reward.rate(image)
        total = float(output.total)
        if (why := why_dropped(total)) is not None:
            return why
        self.history.append(total)
        if self.best is not None and total <= float(self.best[1].total):
            return None
        if not self.rollout.family.flagged(image.clamp(0, 1))[0]:
            self.best = image.cpu(), output.to("cpu"), noise.to("cpu", self.start.latents.dtype, copy=True)
        return None

    def gradient(self, image: Tensor, noise: Tensor) -> Tensor:
        """Of the objective in the noise."""
        # A Reward refuses pixels far outside of [0, 1]; out there they show no difference.
        total = self.reward(image.clamp(LOWEST, HIGHEST), self.reward.places(1)).total.sum()
        found = torch.autograd.grad(total, noise, allow_unused=True)[0] if total.requires_grad else None
        if found is None:
            raise ValueError(
                "reward: NoiseOptimizer needs gradients of the total in the images, and this reward gives none: it "
                "runs without gradients, or leaves torch on the way; take a differentiable one (list_rewards() says "
                "which are), or sample with BestOfN or ParticleSteering, which need none"
            )
        likelihood = torch.autograd.grad(norm_log_likelihood(noise), noise)[0]
        return found + self.regularisation * likelihood

    def _optimizer_of(self, noise: Tensor) -> torch.optim.Optimizer:
        if self.optimizer == "adam":
            return torch.optim.Adam([noise], lr=self.learning_rate, maximize=True)
        return torch.optim.SGD([noise], lr=self.learning_rate, momentum=0.9, nesterov=True, maximize=True)

    def as_passed(self, noise: Tensor) -> Tensor:
        """Noise of unit variance as latents for the pipeline's call, on the CPU."""
        latents = noise.to(self.start.latents.device) * self.sigma
        return self.rollout.family.as_passed(latents, self.start.scheduler).to("cpu", noise.dtype)


@contextmanager
def without_weight_gradients(pipe: Any, reward: Any) -> Iterator[None]:
    """Let autograd keep nothing for gradients of weights."""
    modules = [module for module in (*pipe.components.values(), reward) if isinstance(module, nn.Module)]
    asked = {weight for module in modules for weight in module.parameters() if weight.requires_grad}
    try:
        for weight in asked:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in asked:
            weight.requires_grad_()
