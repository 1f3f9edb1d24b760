"""Rewards whose gradients follow small changes of pixels less: sharpness-aware gradients, and smoothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aigiqa_reward.images import HIGHEST, LOWEST
from aigiqa_reward.rewards.bound import device_of, reward_name
from aigiqa_reward.rewards.factory import as_reward
from aigiqa_reward.types import PromptFeatures, RewardFunction, RewardOutput, as_reward_output, at_least_float32
from aigiqa_reward.utils.checks import first_seed, integer, number
from aigiqa_reward.utils.isolation import without_autocast

IMAGE_RADIUS = 0.4 / 255
"""Default radius of `SharpnessAwareReward`."""


class _Wrapper(nn.Module):
    """A reward around another one, whose prompts and device it has."""

    reward: RewardFunction

    def __init__(self, reward: RewardFunction | str) -> None:
        super().__init__()
        self.reward = as_reward(reward)

    @property
    def device(self) -> torch.device | None:
        """Device of the reward; None if it has none."""
        return device_of(self.reward)

    @without_autocast()
    def encode_prompts(self, prompts: Sequence[str]) -> PromptFeatures | list[str]:
        """Encode B prompts as the reward does; return the texts if it encodes none."""
        reward: Any = self.reward
        return reward.encode_prompts(list(prompts)) if hasattr(reward, "encode_prompts") else list(prompts)

    def _score(self, images: Tensor, prompts: Sequence[str] | PromptFeatures | None) -> RewardOutput:
        reward: Any = self.reward
        return as_reward_output(reward(images, prompts), len(images), source=reward_name(reward))


class SharpnessAwareReward(_Wrapper):
    """A reward with its gradient taken at the worst image within a small ball; the scores are those of the image.

    With g the gradient of the total at an image x, the gradient is that at x' = x - radius g / rms(g): one step of
    gradient descent on the reward, to the sphere of images whose root mean square difference from x is `radius`
    (Kim and Sim 2026, "Reward Sharpness-Aware Fine-Tuning for Diffusion Models"). Where the reward rises sharply, by
    changes of pixels that nobody sees, the gradients at x and at x' differ; a broad rise is left as it is.

    Each call with gradients costs one more forward and backward pass of the reward; a call without gradients costs
    nothing. `DRaFT` and `ReFL` (`sharpness_aware`), `RewardGuidance` and `NoiseOptimizer` (`image_radius`) use it.

    Args:
        reward: a Reward, or any function f(images, prompts) that is differentiable with respect to the images.
        radius: radius of the ball, as the RMS over the pixels of an image, at least 0; 0 gives the plain gradient.

    Example:
        >>> import torch
        >>> from aigiqa_reward import SharpnessAwareReward, create_reward
        >>> plain = create_reward("compact")
        >>> reward = SharpnessAwareReward(plain, radius=2 / 255)
        >>> images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        >>> out = reward(images, ["a fox", "a cat"])
        >>> bool((out.total == plain(images, ["a fox", "a cat"]).total).all())
        True
        >>> out.total.sum().backward()
        >>> images.grad.shape
        torch.Size([2, 3, 64, 64])
    """

    def __init__(self, reward: RewardFunction | str, *, radius: float = IMAGE_RADIUS) -> None:
        super().__init__(reward)
        self.radius = check_radius("radius", radius, "0.4 / 255")

    @property
    def name(self) -> str:
        """Name of the reward with the radius."""
        return f"{reward_name(self.reward)} (sharpness-aware, radius {self.radius:.4g})"

    @without_autocast()
    def forward(self, images: Tensor, prompts: Sequence[str] | PromptFeatures | None = None) -> RewardOutput:
        """Score a batch (B, 3, H, W) as the reward does; `details` carry no gradients if `images` require them."""
        images = at_least_float32(images)
        if not (self.radius and torch.is_grad_enabled() and images.requires_grad):
            return self._score(images, prompts)
        here = images.detach().requires_grad_()
        plain = self._score(here, prompts)
        gradient = None
        if plain.total.requires_grad:
            gradient = torch.autograd.grad(plain.total.sum(), here, allow_unused=True)[0]
        if gradient is None:  # who needs the gradient reports that there is none
            return plain
        worst = self._score(_Straight.apply(self._worst(images.detach(), gradient), images), prompts)
        plain, values = plain.detach(), _Straight.apply
        return RewardOutput(
            total=values(plain.total, worst.total),
            quality=None if worst.quality is None else values(plain.quality, worst.quality),
            correspondence=None if worst.correspondence is None else values(plain.correspondence, worst.correspondence),
            details=plain.details,
        )

    def _worst(self, images: Tensor, gradient: Tensor) -> Tensor:
        """Return x' of images (B, 3, H, W); an image whose gradient is zero or not finite stays as it is."""
        largest = gradient.abs().flatten(1).amax(dim=1).view(-1, 1, 1, 1)
        moved = largest.isfinite() & (largest > 0)
        unit = gradient / torch.where(moved, largest, 1)  # so that squares neither vanish nor overflow
        rms = unit.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
        return _within(images - torch.where(moved, self.radius * unit / rms, 0), images)


class SmoothedReward(_Wrapper):
    """The mean of a reward over small random changes of an image: Gaussian noise, and shifts by whole pixels.

    It estimates the expectation of the reward in a neighborhood of the image by `n` draws, differentiably: what exists
    only in one arrangement of pixels averages out of scores and gradients. The draws depend on `seed` and the size of
    the images only: every image of every call gets the same ones, so that a score depends neither on the batch nor on
    the place in it. A larger `n` is closer to the expectation, and costs n forward and backward passes of the reward.

    Args:
        reward: a Reward, or any function f(images, prompts) that returns (B,) scores.
        noise: std of the noise per pixel, at least 0.
        shift: maximum shift in px, in each direction; borders are repeated. 0 shifts nothing.
        n: number of draws.
        seed: seed of the draws.

    Example:
        >>> import torch
        >>> from aigiqa_reward import SmoothedReward, create_reward
        >>> reward = SmoothedReward(create_reward("compact"), n=4, seed=1)
        >>> images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        >>> both = reward(images, ["a fox", "a cat"]).total
        >>> bool(torch.allclose(both[1:], reward(images[1:], ["a cat"]).total, atol=1e-5))
        True
    """

    def __init__(
        self, reward: RewardFunction | str, *, noise: float = 6 / 255, shift: int = 3, n: int = 2, seed: int = 0
    ) -> None:
        super().__init__(reward)
        self.noise = number("noise", noise, "of at least 0; try 6 / 255", lambda value: 0 <= value < math.inf)
        self.shift, self.n = integer("shift", shift, least=0), integer("n", n, least=1)
        self.seed = first_seed(seed, 1, "the draws")

    @property
    def name(self) -> str:
        """Name of the reward with the settings."""
        settings = f"noise {self.noise:.4g}, shift {self.shift}, n {self.n}, seed {self.seed}"
        return f"{reward_name(self.reward)} (smoothed, {settings})"

    @without_autocast()
    def forward(self, images: Tensor, prompts: Sequence[str] | PromptFeatures | None = None) -> RewardOutput:
        """Score a batch (B, 3, H, W): means over the draws, without `details`."""
        images = at_least_float32(images)
        if not (self.noise or self.shift):
            return self._score(images, prompts)
        outputs = [self._score(changed(images), prompts) for changed in self._draws(images.shape[-2:])]
        quality, correspondence = [o.quality for o in outputs], [o.correspondence for o in outputs]
        return RewardOutput(
            total=torch.stack([output.total for output in outputs]).mean(dim=0),
            quality=_mean(quality),
            correspondence=_mean(correspondence),
        )

    def _draws(self, size: Sequence[int]) -> Iterator[Callable[[Tensor], Tensor]]:
        """Yield one change of images (B, 3, H, W) per draw, drawn on the CPU in float32, equal on all devices."""
        generator = torch.Generator("cpu").manual_seed(self.seed)
        for _ in range(self.n):
            y, x = torch.randint(2 * self.shift + 1, (2,), generator=generator, device="cpu").tolist()
            noise = torch.randn((3, *size), generator=generator, dtype=torch.float32, device="cpu") * self.noise
            yield lambda images, y=y, x=x, noise=noise: self._changed(images, y, x, noise)

    def _changed(self, images: Tensor, y: int, x: int, noise: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if self.shift:
            images = F.pad(images, [self.shift] * 4, mode="replicate")[..., y : y + height, x : x + width]
        if not self.noise:
            return images
        return _Straight.apply(_within(images.detach() + noise.to(images), images.detach()), images)


def check_radius(argument: str, value: float, example: str) -> float:
    """Return the radius of a ball, at least 0."""
    return number(argument, value, f"of at least 0; try {example}", lambda radius: 0 <= radius < math.inf)


def sharpness_aware(reward: RewardFunction | str, image_radius: float) -> RewardFunction | str:
    """Wrap a reward in `SharpnessAwareReward`, if the radius is above 0."""
    radius = check_radius("image_radius", image_radius, "0.4 / 255")
    return SharpnessAwareReward(reward, radius=radius) if radius else reward


class _Straight(torch.autograd.Function):
    """The first tensor in the forward pass; in the backward pass its gradient goes to the second one."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, path: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, gradient


def _within(moved: Tensor, images: Tensor) -> Tensor:
    """Clamp moved images to the values that rewards accept, as far as the images themselves have such values."""
    return moved.clamp(images.clamp(max=LOWEST), images.clamp(min=HIGHEST))


def _mean(values: Sequence[Tensor | None]) -> Tensor | None:
    """Return the mean over the draws; None if the reward gives none."""
    found = [value for value in values if value is not None]
    return torch.stack(found).mean(dim=0) if len(found) == len(values) else None
