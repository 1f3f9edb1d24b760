"""What an image shows, in words, by a language model that sees."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from aigiqa_reward import images as pixels
from aigiqa_reward.assistants._entries import TEXT
from aigiqa_reward.assistants._image_text import ImageTextModel
from aigiqa_reward.assistants._pretrained import AssistantConfig, PretrainedAssistant, check_at_least
from aigiqa_reward.assistants.cache import AssistantCache

DESCRIBE = (
    "Describe this image in about 50 words: its content, its style, the angle it is seen from, and its colours. "
    "Answer with the description alone."
)
"""SC-AGIQA asks for content, style, angle and colour in about 50 words (section 3.2, eq. 2); this wording is ours."""


@dataclass(frozen=True, kw_only=True)
class CaptionerConfig(AssistantConfig):
    """Which image-text-to-text model describes, and how.

    Attributes:
        question: what it is asked about each image.
        max_new_tokens: length at which an answer is cut. Chosen here: twice what 50 English words take.

    Example:
        >>> from aigiqa_reward.assistants import CaptionerConfig
        >>> CaptionerConfig(path_or_id="llava-hf/llava-1.5-7b-hf", device="cuda:0", batch_size=4).max_new_tokens
        128
    """

    question: str = DESCRIBE
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.question.strip():
            raise ValueError("question: expected a text, got an empty one; leave it out for the default")
        check_at_least("max_new_tokens", self.max_new_tokens, 1)


class LMMCaptioner(PretrainedAssistant[CaptionerConfig]):
    """Describes images, for SC-AGIQA's comparison of prompt and description (Text-assisted Semantic Alignment).

    Any transformers image-text-to-text model; decoding is greedy, so that a description depends on its image alone.

    Args:
        config: which model.
        cache: where descriptions are kept; None asks the model every time.

    Example:
        >>> from aigiqa_reward.assistants import Assistants, CaptionerConfig, LMMCaptioner
        >>> captioner = LMMCaptioner(CaptionerConfig(path_or_id="llava-hf/llava-1.5-7b-hf"))  # loads nothing yet
        >>> Assistants(captioner=captioner).captioner is captioner
        True
    """

    kind = "captioner"

    def __init__(self, config: CaptionerConfig, *, cache: AssistantCache | None = None) -> None:
        super().__init__(config, cache=cache)

    @cached_property
    def _lmm(self) -> ImageTextModel:
        return ImageTextModel(self.config)

    def describe(self, images: Tensor) -> list[str]:
        """One description an image, without gradients.

        Args:
            images: (B, 3, H, W) in [0, 1]; the model sees them rounded to 8 bits.

        Returns:
            B texts, white space collapsed.

        Raises:
            TypeError: `images` is not a floating-point tensor.
            ValueError: images of a wrong shape or range; or the model cannot be loaded.
        """
        pixels.check(images)

        def answer(rows: list[int]) -> list[str]:
            inputs = self._lmm.inputs(images[rows], self.config.question)
            return [" ".join(text.split()) for text in self._lmm.generate(inputs, self.config.max_new_tokens)]

        return self._serve(list(images), answer, TEXT)
