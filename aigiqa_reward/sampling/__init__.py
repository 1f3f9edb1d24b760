"""Sampling with diffusers pipelines: best of N, searches, steering, guidance and noise optimization.

Example:
    >>> from aigiqa_reward import BestOfN, create_reward, load_embedded_pipeline, rerank
    >>> from aigiqa_reward.sampling import BestOfEachError, NothingRankedError, best_of_each
    >>> search = BestOfN(load_embedded_pipeline(), create_reward("compact"), n=2, progress=False)
    >>> folder = best_of_each(search, ["a red apple", "a cat"], "out/", num_inference_steps=2, progress=False)
    >>> [(result.prompt, len(result.output.all_scores)) for result in folder]
    [('a red apple', 2), ('a cat', 2)]
    >>> def broken(images, prompts):
    ...     raise RuntimeError("no such reward")
    >>> search = BestOfN(load_embedded_pipeline(), broken, n=1, progress=False)
    >>> try:
    ...     best_of_each(search, ["a red apple"], "broken/", num_inference_steps=2, progress=False)
    ... except BestOfEachError as error:
    ...     print("failed:", list(error.failures))
    failed: [0]

    >>> try:
    ...     rerank(["missing.png"], "a cat", broken)
    ... except NothingRankedError as error:
    ...     print(error.output.dropped)
    {0: 'missing.png: no such file'}
"""

from aigiqa_reward.sampling.batch_run import BestOfEachError, best_of_each
from aigiqa_reward.sampling.best_of_n import BestOfN, BestOfNOutput, rerank
from aigiqa_reward.sampling.callbacks import EarlyExit, RewardLogger
from aigiqa_reward.sampling.candidates import NothingRankedError
from aigiqa_reward.sampling.guidance import RewardGuidance
from aigiqa_reward.sampling.noise_optimization import NoiseOptimizer
from aigiqa_reward.sampling.prompt_scorer import PromptScore, PromptScorer
from aigiqa_reward.sampling.search import Halving, ZeroOrder
from aigiqa_reward.sampling.steering import ParticleSteering

__all__ = [
    "BestOfEachError",
    "BestOfN",
    "BestOfNOutput",
    "EarlyExit",
    "Halving",
    "NoiseOptimizer",
    "NothingRankedError",
    "ParticleSteering",
    "PromptScore",
    "PromptScorer",
    "RewardGuidance",
    "RewardLogger",
    "ZeroOrder",
    "best_of_each",
    "rerank",
]
