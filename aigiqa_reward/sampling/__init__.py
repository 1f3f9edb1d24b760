"""Everything that touches a diffusers pipeline; diffusers is imported by whoever makes the pipeline."""

from aigiqa_reward.sampling.best_of_n import BestOfN, BestOfNOutput, rerank

__all__ = ["BestOfN", "BestOfNOutput", "rerank"]
