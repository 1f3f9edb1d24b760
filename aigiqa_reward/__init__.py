"""Differentiable rewards for AI-generated images: quality and correspondence to the prompt, scored separately.

Importing this package loads none of torch, diffusers, transformers, peft, accelerate and trl: every name below is
imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from aigiqa_reward.rewards.composite import CompositeReward
    from aigiqa_reward.rewards.factory import create_reward, get_reward_spec, list_rewards
    from aigiqa_reward.rewards.metric import RewardMetric
    from aigiqa_reward.rewards.reward import Reward
    from aigiqa_reward.rewards.scorer import Scorer
    from aigiqa_reward.rewards.smooth import SharpnessAwareReward, SmoothedReward
    from aigiqa_reward.sampling.best_of_n import BestOfN, BestOfNOutput, rerank
    from aigiqa_reward.toy.pipeline import load_embedded_pipeline
    from aigiqa_reward.types import RewardFunction, RewardOutput

__all__ = [
    "BestOfN",
    "BestOfNOutput",
    "CompositeReward",
    "Reward",
    "RewardFunction",
    "RewardMetric",
    "RewardOutput",
    "Scorer",
    "SharpnessAwareReward",
    "SmoothedReward",
    "create_reward",
    "get_reward_spec",
    "list_rewards",
    "load_embedded_pipeline",
    "rerank",
]
_MODULES = {
    "rewards.composite": "CompositeReward",
    "rewards.factory": "create_reward get_reward_spec list_rewards",
    "rewards.metric": "RewardMetric",
    "rewards.reward": "Reward",
    "rewards.scorer": "Scorer",
    "rewards.smooth": "SharpnessAwareReward SmoothedReward",
    "sampling.best_of_n": "BestOfN BestOfNOutput rerank",
    "toy.pipeline": "load_embedded_pipeline",
    "types": "RewardFunction RewardOutput",
}


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names.split():
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
