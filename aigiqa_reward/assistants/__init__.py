"""Assistants that give text, masks or features of a language model, without gradients, and their cache.

Their outputs are held fixed while gradients flow through the rest of a model. Weights are loaded at the first question
that is not in the cache. Without assistants, a model uses the offline substitutes `grid_regions` and `noun_phrases`.

Example:
    >>> from aigiqa_reward.assistants import *
    >>> cache = AssistantCache("answers/", max_bytes=10**9)  # makes its folder with the first answer
    >>> captioner = LMMCaptioner(CaptionerConfig(path_or_id="llava-hf/llava-1.5-7b-hf", batch_size=4), cache=cache)
    >>> semantics = LMMSemantics(SemanticsConfig(path_or_id="llava-hf/llava-1.5-7b-hf"))  # loads nothing yet
    >>> segmenter = SAMSegmenter(SegmenterConfig(path_or_id="facebook/sam-vit-base", points_per_side=16))
    >>> attributes = LLMAttributes(AttributesConfig(path_or_id="Qwen/Qwen2.5-0.5B-Instruct", limit=4))
    >>> Assistants(captioner=captioner, segmenter=segmenter).semantics is None
    True

Any object with the method of a role is an assistant as well:

    >>> import torch
    >>> class Own:
    ...     width = 3
    ...     def describe(self, images: torch.Tensor) -> list[str]:
    ...         return ["a photo"] * len(images)
    ...     def read(self, images: torch.Tensor) -> torch.Tensor:
    ...         return images.mean(dim=(2, 3)).unsqueeze(1).expand(-1, 2, -1)
    ...     def segment(self, images: torch.Tensor) -> torch.Tensor:
    ...         return torch.ones(len(images), 1, 64, 64)
    ...     def decompose(self, texts: list[str]) -> list[list[str]]:
    ...         return [text.split(", ") for text in texts]
    >>> roles: tuple[Captioner, SemanticsReader, Segmenter, AttributeReader] = (Own(),) * 4
    >>> Assistants(attributes=roles[3]).attributes.decompose(["a red fox, snow"])
    [['a red fox', 'snow']]
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
