"""A reward in the form that trainers of image generators by policy gradient call: (images, prompts, metadata)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aigiqa_reward.images import ImageSource, load_batch
from aigiqa_reward.types import RewardFunction, RewardOutput, as_reward_output


class RewardFn:
    """A reward as `f(images, prompts, metadata) -> (rewards, info)`; `Reward.as_reward_fn()` makes one.

    It is the form of ddpo-pytorch, of flow_grpo, and of trl's DDPO and AlignProp trainers while it had them.

    Args:
        reward: a Reward, a CompositeReward, or any RewardFunction.

    Example:
        >>> import torch
        >>> from aigiqa_reward import create_reward
        >>> reward_fn = create_reward("compact").as_reward_fn()
        >>> images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        >>> rewards, info = reward_fn(images, ("a red fox", "a cat"), metadata=None)
        >>> rewards.shape, info["quality"].shape
        (torch.Size([2]), (2,))
    """

    def __init__(self, reward: RewardFunction) -> None:
        if not callable(reward):
            raise TypeError(f"reward: expected a Reward or a function, got {type(reward).__name__}")
        self.reward = reward
        self.__name__ = str(getattr(reward, "name", None) or getattr(reward, "__name__", type(reward).__name__))

    def __call__(
        self,
        images: Tensor | np.ndarray | Sequence[ImageSource],
        prompts: Sequence[str] | None = None,
        metadata: Any = None,
    ) -> tuple[Tensor, dict[str, np.ndarray]]:
        """Score a batch.

        Args:
            images: (B, 3, H, W), floating point in [0, 1] or uint8; or an array (B, H, W, 3), uint8 or in [0, 1]; or a
                list of PIL images of one size. They are brought to the reward's device.
            prompts: B strings in a list or tuple; None for quality alone.
            metadata: what the trainer knows of the prompts; taken and not looked at.

        Returns:
            rewards: (B,) totals, higher is better, float32 (float64 of a reward cast to it), on the images' device, on
                the CPU where they are no tensor. They carry gradients if `images` require them.
            info: arrays (B,) without gradients: "quality"; "correspondence", unless the reward gives none; and
                "details/NAME" for each detail that is one number an image, as the total of a CompositeReward's member.

        Raises:
            TypeError, ValueError: what the reward itself or `images.load_batch` refuses.
        """
        del metadata
        batch = load_batch(images)
        home = batch.device
        device = getattr(self.reward, "device", None)
        texts: Any = None if prompts is None else list(prompts) if isinstance(prompts, tuple) else prompts
        with torch.set_grad_enabled(torch.is_grad_enabled() and batch.requires_grad):
            result = self.reward(batch if device is None else batch.to(device), texts)
        output = as_reward_output(result, len(batch))
        return output.total.to(home), _info(output)


def _info(output: RewardOutput) -> dict[str, np.ndarray]:
    columns = {"quality": output.quality, "correspondence": output.correspondence}
    columns |= {f"details/{name}": detail for name, detail in output.details.items()}
    return {
        name: column.detach().float().cpu().numpy()
        for name, column in columns.items()
        if column is not None and column.shape == output.total.shape
    }
