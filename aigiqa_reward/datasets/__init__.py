"""Benchmarks with human scores, one a file, and splits that keep a prompt's images together."""

from aigiqa_reward.datasets.agiqa3k import read_agiqa3k
from aigiqa_reward.datasets.base import ScoredImages
from aigiqa_reward.datasets.splits import group_folds, group_split

__all__ = ["ScoredImages", "group_folds", "group_split", "read_agiqa3k"]
