"""Benchmarks with human scores, one per file, and splits that keep the images of a prompt together."""

from aigiqa_reward.datasets.agiqa1k import read_agiqa1k
from aigiqa_reward.datasets.agiqa3k import read_agiqa3k
from aigiqa_reward.datasets.aigciqa2023 import read_aigciqa2023
from aigiqa_reward.datasets.aigiqa20k import read_aigiqa20k
from aigiqa_reward.datasets.base import PreferencePairs, ScoredImages
from aigiqa_reward.datasets.genai_bench import read_genai_bench
from aigiqa_reward.datasets.hpdv2 import read_hpdv2
from aigiqa_reward.datasets.imagereward import read_imagereward
from aigiqa_reward.datasets.pairs import read_preference_pairs
from aigiqa_reward.datasets.pickapic import read_pickapic
from aigiqa_reward.datasets.sources import SOURCES, Source, read_data
from aigiqa_reward.datasets.splits import Split, group_folds, group_split, split_rows
from aigiqa_reward.datasets.table import read_table

__all__ = [
    "SOURCES",
    "PreferencePairs",
    "ScoredImages",
    "Source",
    "Split",
    "group_folds",
    "group_split",
    "read_agiqa1k",
    "read_agiqa3k",
    "read_aigciqa2023",
    "read_aigiqa20k",
    "read_data",
    "read_genai_bench",
    "read_hpdv2",
    "read_imagereward",
    "read_pickapic",
    "read_preference_pairs",
    "read_table",
    "split_rows",
]
