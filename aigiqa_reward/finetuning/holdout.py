"""The reward that is not trained on, for lack of another: an embedded system with a head of its own, without text."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aigiqa_reward.reward import Reward
from aigiqa_reward.scorer import device_of
from aigiqa_reward.types import PromptFeatures, RewardOutput
from aigiqa_reward.zoo import create_reward

CANDIDATES = ("compact", "mst_clipiqa", "tsp_mgs", "sc_agiqa", "cpa_iqa", "ma_agiqa")
"""Embedded systems that may be held out, the first that the trained reward does not use is. Chosen here: the two that
agree best with people and cost least stand first, then by cost."""


_HOLDERS = ("__self__", "__func__", "func", "args", "keywords")
"""What a bound method and a `functools.partial` keep."""


class QualityAlone:
    """A reward's quality as the total; its correspondence is told beside and counts for nothing.

    Quality of an embedded system does not depend on the prompt, so no text branch has a say.

    Args:
        reward: an embedded system.
    """

    def __init__(self, reward: Reward) -> None:
        self.reward = reward

    @property
    def name(self) -> str:
        """The system's name in the zoo."""
        return self.reward.name

    @property
    def device(self) -> torch.device:
        """Where images must be."""
        return self.reward.device

    def encode_prompts(self, prompts: Sequence[str]) -> PromptFeatures:
        """As the reward does, for its correspondence."""
        return self.reward.encode_prompts(prompts)

    def __call__(self, images: Tensor, prompts: Sequence[str] | PromptFeatures | None = None) -> RewardOutput:
        """Scores (B,) of images (B, 3, H, W) in [0, 1]; `total` is the quality."""
        output = self.reward(images, prompts)
        return RewardOutput(total=output.quality, quality=output.quality, correspondence=output.correspondence)


def default_holdout(reward: Any, device: torch.device | None = None) -> QualityAlone:
    """A second embedded system, offline, to judge what is trained on `reward`.

    It is `compact`; `mst_clipiqa` where that is the trained one; for a composite of both the next one.

    What it can see: an image that only the trained head likes. Every system has a head of its own, fitted apart.
    What it cannot see: correspondence, since all embedded systems read prompts with one text tower, whose faults they
    share; pictures that have become good and no longer show the prompt keep their held-out reward. Its correspondence
    stands beside in the figures, and no decision uses it. Nor does it see what deceives the image tower
    (EfficientNet-Lite0) that they share as well, `compact` beside a second one. A reward of your own, by people's
    preferences or on other towers, sees more.

    Args:
        reward: the trained reward. Every Reward within a module (a CompositeReward, a wrapper of your own) is found,
            and what a function or an object of yours refers to.
        device: where to put the second system, where the trained reward does not say on which it is.

    Returns:
        The second system, on the trained reward's device.

    Raises:
        ValueError: the trained reward uses every embedded system.
    """
    used = {part.name for part in _rewards_in(reward)}
    left = [name for name in CANDIDATES if name not in used]
    if not left:
        raise ValueError(
            "holdout: the trained reward uses every embedded system, so that none is left to be held out; pass a "
            "reward or a function f(images, prompts) of your own as holdout"
        )
    return QualityAlone(create_reward(left[0], device=device_of(reward) or device))


def _rewards_in(found: Any, depth: int = 3) -> Iterator[Reward]:
    """Rewards that are part of a module, or that a function or another object refers to."""
    if isinstance(found, nn.Module):
        yield from (part for part in found.modules() if isinstance(part, Reward))
    elif depth and not (inspect.ismodule(found) or inspect.isclass(found)):
        for other in _referred_to(found):
            yield from _rewards_in(other, depth - 1)


def _referred_to(found: Any) -> list[Any]:
    if isinstance(found, list | tuple | set):
        return list(found)
    if isinstance(found, dict):
        return list(found.values())
    others = [*getattr(found, "__dict__", {}).values(), *(getattr(found, name, None) for name in _HOLDERS)]
    if inspect.isfunction(found):
        seen = inspect.getclosurevars(found)
        others += [*seen.nonlocals.values(), *seen.globals.values()]
    return others
