"""Helpers that give text, masks or features of a language model, never gradients, and one cache for all of them.

What an assistant said is held fixed while gradients flow through the rest of a model. Each loads its weights when it
is first asked something it has not answered before. Where a model is given none, it uses the offline substitutes:
`grid_regions` for a segmenter, `noun_phrases` for a reader of attributes.
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
