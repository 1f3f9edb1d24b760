"""Differentiable rewards for AI-generated images: perceptual quality and correspondence to the prompt, scored separately.

Importing this package loads none of diffusers, transformers, peft, accelerate and trl: every name below is imported
when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from aigiqa_reward.rewards.composite import CompositeReward
    from aigiqa_reward.rewards.factory import create_reward
    from aigiqa_reward.rewards.reward import Reward
    from aigiqa_reward.rewards.scorer import Scorer
    from aigiqa_reward.rewards.specs import list_rewards
    from aigiqa_reward.sampling.best_of_n import BestOfN, BestOfNOutput, rerank
    from aigiqa_reward.toy.pipeline import load_embedded_pipeline
    from aigiqa_reward.types import RewardFunction, RewardOutput

_EXPORTS = {
    "BestOfN": "aigiqa_reward.sampling.best_of_n",
    "BestOfNOutput": "aigiqa_reward.sampling.best_of_n",
    "CompositeReward": "aigiqa_reward.rewards.composite",
    "Reward": "aigiqa_reward.rewards.reward",
    "RewardFunction": "aigiqa_reward.types",
    "RewardOutput": "aigiqa_reward.types",
    "Scorer": "aigiqa_reward.rewards.scorer",
    "create_reward": "aigiqa_reward.rewards.factory",
    "list_rewards": "aigiqa_reward.rewards.factory",
    "load_embedded_pipeline": "aigiqa_reward.toy.pipeline",
    "rerank": "aigiqa_reward.sampling.best_of_n",
}

__all__ = [
    "BestOfN",
    "BestOfNOutput",
    "CompositeReward",
    "Reward",
    "RewardFunction",
    "RewardOutput",
    "Scorer",
    "create_reward",
    "list_rewards",
    "load_embedded_pipeline",
    "rerank",
]


def __getattr__(name: str) -> object:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'aigiqa_reward' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
