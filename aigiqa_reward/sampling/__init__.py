"""Everything that touches a diffusers pipeline; diffusers is imported by whoever makes the pipeline."""

from aigiqa_reward.sampling.best_of_n import BestOfN, BestOfNOutput, rerank
from aigiqa_reward.sampling.callbacks import EarlyExit, RewardLogger
from aigiqa_reward.sampling.guidance import RewardGuidance
from aigiqa_reward.sampling.many_prompts import BestOfEachError, best_of_each
from aigiqa_reward.sampling.noise_optimization import NoiseOptimizer
from aigiqa_reward.sampling.prompt_scorer import PromptScore, PromptScorer
from aigiqa_reward.sampling.steering import ParticleSteering

__all__ = [
    "BestOfEachError",
    "BestOfN",
    "BestOfNOutput",
    "EarlyExit",
    "NoiseOptimizer",
    "ParticleSteering",
    "PromptScore",
    "PromptScorer",
    "RewardGuidance",
    "RewardLogger",
    "best_of_each",
    "rerank",
]
