"""Assistants that give text, masks or features of a language model, without gradients, and their cache.

Their outputs are held fixed while gradients flow through the rest of a model. Weights are loaded at the first question
that is not in the cache. Without assistants, a model uses the offline substitutes `grid_regions` and `noun_phrases`.
"""

from aigiqa_reward.assistants.attributes import AttributesConfig, LLMAttributes, noun_phrases
from aigiqa_reward.assistants.base import Assistants, AttributeReader, Captioner, Segmenter, SemanticsReader
from aigiqa_reward.assistants.cache import AssistantCache
from aigiqa_reward.assistants.captioner import CaptionerConfig, LMMCaptioner, LMMSemantics, SemanticsConfig
from aigiqa_reward.assistants.segmenter import SAMSegmenter, SegmenterConfig, grid_regions

__all__ = [
    "AssistantCache",
    "Assistants",
    "AttributeReader",
    "AttributesConfig",
    "Captioner",
    "CaptionerConfig",
    "LLMAttributes",
    "LMMCaptioner",
    "LMMSemantics",
    "SAMSegmenter",
    "Segmenter",
    "SegmenterConfig",
    "SemanticsConfig",
    "SemanticsReader",
    "grid_regions",
    "noun_phrases",
]
