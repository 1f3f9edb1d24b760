"""What a model may ask of its assistants, whoever plays the part."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol

from torch import Tensor


class Captioner(Protocol):
    """Says in words what images show.

    Example:
        >>> import torch
        >>> from aigiqa_reward.assistants import Captioner
        >>> class Fixed:
        ...     def describe(self, images: torch.Tensor) -> list[str]:
        ...         return ["a photo"] * len(images)
        >>> captioner: Captioner = Fixed()
        >>> captioner.describe(torch.rand(2, 3, 64, 64))
        ['a photo', 'a photo']
    """

    def describe(self, images: Tensor, /) -> list[str]:
        """One text an image of (B, 3, H, W) in [0, 1]."""
        ...


class SemanticsReader(Protocol):
    """Reads images' meaning and coherence as features of a language model.

    Example:
        >>> import torch
        >>> from aigiqa_reward.assistants import SemanticsReader
        >>> class Means:
        ...     width = 3
        ...     def read(self, images: torch.Tensor) -> torch.Tensor:
        ...         return images.mean(dim=(2, 3)).unsqueeze(1).expand(-1, 2, -1)
        >>> reader: SemanticsReader = Means()
        >>> reader.read(torch.rand(4, 3, 64, 64)).shape
        torch.Size([4, 2, 3])
    """

    @property
    def width(self) -> int:
        """Width of the features."""
        ...

    def read(self, images: Tensor, /) -> Tensor:
        """(B, 2, width) float32 features of images (B, 3, H, W) in [0, 1]."""
        ...


class Segmenter(Protocol):
    """Finds the regions of images.

    Example:
        >>> import torch
        >>> from aigiqa_reward.assistants import Segmenter, grid_regions
        >>> class Grid:
        ...     def segment(self, images: torch.Tensor) -> torch.Tensor:
        ...         return grid_regions().expand(len(images), -1, -1, -1)
        >>> segmenter: Segmenter = Grid()
        >>> segmenter.segment(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 16, 64, 64])
    """

    def segment(self, images: Tensor, /) -> Tensor:
        """(B, R, 64, 64) soft masks in [0, 1] of images (B, 3, H, W) in [0, 1]; unused places are zero."""
        ...


class AttributeReader(Protocol):
    """Takes prompts apart into visual attributes.

    Example:
        >>> from aigiqa_reward.assistants import AttributeReader
        >>> class Commas:
        ...     def decompose(self, texts: list[str]) -> list[list[str]]:
        ...         return [text.split(", ") for text in texts]
        >>> reader: AttributeReader = Commas()
        >>> reader.decompose(["a red fox, snow"])
        [['a red fox', 'snow']]
    """

    def decompose(self, texts: list[str], /) -> list[list[str]]:
        """At least one short phrase a text, in its order."""
        ...


_METHODS = {"captioner": "describe", "semantics": "read", "segmenter": "segment", "attributes": "decompose"}


@dataclass(frozen=True, kw_only=True)
class Assistants:
    """The helpers a model is given; for each that is None it uses its offline substitute, and says so in `details`.

    Attributes:
        captioner: describes images (SC-AGIQA).
        semantics: reads images' meaning as features (MA-AGIQA).
        segmenter: finds regions (CPA-IQA).
        attributes: takes prompts apart (CPA-IQA).

    Raises:
        TypeError: an assistant without the method of its role, or a class instead of an assistant.

    Example:
        >>> from aigiqa_reward.assistants import Assistants, CaptionerConfig, LMMCaptioner
        >>> captioner = LMMCaptioner(CaptionerConfig(path_or_id="llava-hf/llava-1.5-7b-hf"))
        >>> Assistants(captioner=captioner).segmenter is None  # the offline substitute stands in
        True
        >>> Assistants(captioner=LMMCaptioner)
        Traceback (most recent call last):
            ...
        TypeError: captioner: expected an assistant with a method describe(), or None, got the ...
    """

    captioner: Captioner | None = None
    semantics: SemanticsReader | None = None
    segmenter: Segmenter | None = None
    attributes: AttributeReader | None = None

    def __post_init__(self) -> None:
        for role in (f.name for f in fields(self)):
            assistant, method = getattr(self, role), _METHODS[role]
            if isinstance(assistant, type) or (
                assistant is not None and not callable(getattr(assistant, method, None))
            ):
                given = f"the class {assistant.__name__}" if isinstance(assistant, type) else type(assistant).__name__
                raise TypeError(
                    f"{role}: expected an assistant with a method {method}(), or None, got {given}; "
                    "aigiqa_reward.assistants holds one for every role"
                )
