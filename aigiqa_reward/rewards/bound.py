"""Call any reward function in one way: on its device, in its precision, with prompts that are encoded once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from aigiqa_reward.images import HIGHEST, LOWEST, finite_rows
from aigiqa_reward.models.base import check_readable
from aigiqa_reward.types import PromptError, PromptFeatures, RewardFunction, RewardOutput, as_reward_output
from aigiqa_reward.utils.checks import check_reward
from aigiqa_reward.utils.isolation import check_gradients_allowed, without_autocast


class BoundReward:
    """A reward function and its encoded prompts.

    The prompts of the last call are kept encoded: a call with the same prompts, or a subset of them, encodes nothing.
    `prompts` are encoded at once, so that one that the reward cannot read raises a PromptError here.
    """

    def __init__(self, reward: RewardFunction, prompts: Sequence[str] = ()) -> None:
        self.reward = check_reward(reward)
        self._features: PromptFeatures | None = None
        if prompts:
            self.encode(prompts)

    @property
    def name(self) -> str:
        """Name of the reward, or of the function or class."""
        return reward_name(self.reward)

    @property
    def device(self) -> torch.device | None:
        """Device of the reward; None if it has none."""
        return device_of(self.reward)

    def encode(self, prompts: Sequence[str]) -> PromptFeatures | list[str]:
        """Encode prompts, or look them up among those of the last call; return the texts if the reward encodes none."""
        known = self._features
        if known is not None and set(prompts) <= set(known.texts):
            place = {text: i for i, text in enumerate(known.texts)}
            index = torch.tensor([place[prompt] for prompt in prompts], device=known.index.device)
            return replace(known, index=index)
        check_readable(prompts)
        encode = getattr(self.reward, "encode_prompts", None)
        if not callable(encode):
            return list(prompts)
        with torch.inference_mode(False), torch.no_grad(), without_autocast():  # kept for calls with gradients as well
            found = encode(list(prompts))
        self._features = found if isinstance(found, PromptFeatures) else None
        return list(prompts) if self._features is None else self._features

    def unreadable(self, prompts: Sequence[str]) -> dict[str, str]:
        """Return the reasons why the reward cannot read some of the prompts, by prompt."""
        found: dict[str, str] = {}
        left = list(dict.fromkeys(prompts))
        while left:
            try:
                self.encode(left)
                break
            except PromptError as error:
                left.remove(error.prompt)
                found[error.prompt] = str(error)
        return found

    def __call__(self, images: Tensor, prompts: str | Sequence[str] | None) -> RewardOutput:
        """Score images (B, 3, H, W), clamped to the accepted range, differentiably and without autocast."""
        images = images.to(self.device or images.device).clamp(LOWEST, HIGHEST)
        texts = [prompts] * len(images) if isinstance(prompts, str) else prompts
        reward: Any = self.reward
        images = images if images.dtype == torch.float64 else images.float()
        with without_autocast():
            result = reward(images, None if texts is None else self.encode(texts))
        return as_reward_output(result, len(images))

    def score(self, images: Tensor, prompts: str | Sequence[str] | None) -> RewardOutput:
        """Score images (B, 3, H, W) without gradients; rows with NaN or infinite pixels get NaN.

        If there are such rows, of the details only those of one number per image are returned.
        """
        with torch.inference_mode():
            kept = finite_rows(images)
            if kept.all():
                return self(images, prompts)
            rows = kept.nonzero()[:, 0]
            nothing = images.new_full((len(images),), math.nan, device=self.device, dtype=torch.float32)
            if not len(rows):
                return RewardOutput(total=nothing, quality=nothing)
            own = prompts if prompts is None or isinstance(prompts, str) else [list(prompts)[row] for row in rows]
            output = self(images[rows], own)
            output = replace(output, details={n: value for n, value in output.details.items() if value.ndim == 1})
            return output._map(lambda scores: nothing.to(scores).index_copy(0, rows.to(scores.device), scores))

    def check_differentiable(self, needed_by: str, prompt: str, device: torch.device | str = "cpu") -> None:
        """Refuse a reward without gradients by its score of a gray image, on `device` if the reward has none."""
        check_gradients_allowed(needed_by)
        place = {"device": self.device or device, "dtype": torch.float32}
        gray = torch.full((1, 3, 64, 64), 0.5, requires_grad=True, **place)
        with torch.enable_grad():
            self.require_gradient(self(gray, [prompt]).total, needed_by)

    def require_gradient(self, total: Tensor, needed_by: str) -> None:
        """Refuse scores (B,) through which no gradient reaches the images that they were computed from."""
        if not total.requires_grad:
            raise ValueError(
                f"reward: {needed_by} needs its gradient with respect to the images, and {self.name} returns scores "
                "without one; remove torch.no_grad, detach, numpy and PIL from it, or use a method for rewards without "
                "gradients (BestOfN; for fine-tuning DPO, DDPO, FlowGRPO or DiffusionNFT)"
            )


def device_of(reward: RewardFunction) -> torch.device | None:
    """Return the device of a reward: its `device`, else that of its first parameter; None if it has neither."""
    device = getattr(reward, "device", None)
    if isinstance(device, torch.device | str):
        return torch.device(device)
    if isinstance(reward, nn.Module) and (weight := next(reward.parameters(), None)) is not None:
        return weight.device
    return None


def reward_name(reward: RewardFunction) -> str:
    """Return the name of a reward, or of the function or class."""
    return str(getattr(reward, "name", None) or getattr(reward, "__qualname__", type(reward).__name__))
