"""A reward in the form that policy-gradient trainers of image generators call: (images, prompts, metadata)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from aigiqa_reward.images import ImageSource, load_batch
from aigiqa_reward.rewards.bound import device_of, reward_name
from aigiqa_reward.types import RewardFunction, as_reward_output
from aigiqa_reward.utils.isolation import without_autocast


class RewardFn:
    """A reward as `f(images, prompts, metadata) -> (rewards, info)`; `Reward.as_reward_fn()` makes one.

    This is the form of ddpo-pytorch, flow_grpo and the DDPO and AlignProp trainers of earlier trl versions.

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
        self.__name__ = reward_name(reward)

    def __call__(
        self,
        images: Tensor | np.ndarray | Sequence[ImageSource],
        prompts: Sequence[str] | None = None,
        metadata: object = None,
    ) -> tuple[Tensor, dict[str, np.ndarray]]:
        """Score a batch.

        Args:
            images: (B, 3, H, W), floating point in [0, 1] or uint8; or an array (B, H, W, 3), uint8 or in [0, 1]; or a
                list of PIL images of one size.
            prompts: B strings in a list or tuple; None for quality alone.
            metadata: the trainer's data on the prompts; ignored.

        Returns:
            (B,) totals, on the device of a tensor of images, else on the CPU, with gradients if `images` require them;
            and arrays (B,): "quality", "correspondence" if there is one, and "details/NAME" for each number per image.
        """
        del metadata
        batch = load_batch(images)
        home = batch.device
        texts = list(prompts) if isinstance(prompts, tuple) else prompts
        with torch.set_grad_enabled(torch.is_grad_enabled() and batch.requires_grad), without_autocast():
            result = self.reward(batch.to(device_of(self.reward) or home), texts)  # pyright: ignore[reportArgumentType]
        output = as_reward_output(result, len(batch))
        columns = {"quality": output.quality, "correspondence": output.correspondence}
        columns |= {f"details/{name}": detail for name, detail in output.details.items()}
        return output.total.to(home), {
            name: column.detach().float().cpu().numpy()
            for name, column in columns.items()
            if column is not None and column.shape == output.total.shape
        }
