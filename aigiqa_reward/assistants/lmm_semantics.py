"""What a language model that sees thinks of an image's meaning, as features."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from aigiqa_reward import images as pixels
from aigiqa_reward.assistants._entries import TENSOR
from aigiqa_reward.assistants._image_text import ImageTextModel
from aigiqa_reward.assistants._pretrained import AssistantConfig, PretrainedAssistant
from aigiqa_reward.assistants.cache import AssistantCache

QUESTIONS = (
    "Evaluate the input image to determine if its quality is compromised due to a lack of meaningful semantic content.",
    "Evaluate if the image quality is compromised due to violations of coherence.",
)
"""MA-AGIQA's two prompts, word for word (section 3.2)."""


@dataclass(frozen=True, kw_only=True)
class SemanticsConfig(AssistantConfig):
    """Which image-text-to-text model reads the images; MA-AGIQA's own is mPLUG-Owl2, 4096 wide.

    Example:
        >>> import torch
        >>> from aigiqa_reward.assistants import SemanticsConfig
        >>> SemanticsConfig(path_or_id="llava-hf/llava-1.5-7b-hf", dtype=torch.bfloat16).dtype
        torch.bfloat16
    """


class LMMSemantics(PretrainedAssistant[SemanticsConfig]):
    """Reads images with MA-AGIQA's two questions: is there meaning, and does it cohere.

    Of each question the model's last hidden layer is averaged over the tokens (MA-AGIQA eq. 3). That these are the
    tokens of image and question, and not of a generated answer, is our inference from the equation.

    Args:
        config: which model.
        cache: where features are kept; None asks the model every time.

    Example:
        >>> from aigiqa_reward.assistants import Assistants, LMMSemantics, SemanticsConfig
        >>> reader = LMMSemantics(SemanticsConfig(path_or_id="llava-hf/llava-1.5-7b-hf"))  # loads nothing yet
        >>> Assistants(semantics=reader).semantics is reader
        True
    """

    kind = "lmm_semantics"

    def __init__(self, config: SemanticsConfig, *, cache: AssistantCache | None = None) -> None:
        super().__init__(config, cache=cache)

    @cached_property
    def _lmm(self) -> ImageTextModel:
        return ImageTextModel(self.config)

    @cached_property
    def width(self) -> int:
        """Width of the features: the language model's hidden size, from its configuration; loads no weights."""
        return self._lmm.width

    def _recipe(self) -> dict[str, Any]:
        return {"questions": QUESTIONS}

    def read(self, images: Tensor) -> Float[Tensor, "batch 2 width"]:
        """The features of each image under each question, without gradients.

        Args:
            images: (B, 3, H, W) in [0, 1]; the model sees them rounded to 8 bits.

        Returns:
            (B, 2, width) float32 on the images' device: lack of meaningful content, then violations of coherence.

        Raises:
            TypeError: `images` is not a floating-point tensor.
            ValueError: images of a wrong shape or range; or the model cannot be loaded, or shows no hidden layers.
        """
        pixels.check(images)

        def answer(rows: list[int]) -> list[Tensor]:
            features = [self._features(self._lmm.inputs(images[rows], question)) for question in QUESTIONS]
            return list(torch.stack(features, dim=1))

        return torch.stack(self._serve(list(images), answer, TENSOR)).to(images.device)

    def _features(self, inputs: Any) -> Float[Tensor, "batch width"]:
        """Mean of the last hidden layer over the tokens that are not padding; float32, on the CPU."""
        model = self._lmm.model
        options: dict[str, Any] = {}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            options["logits_to_keep"] = 1  # the vocabulary's logits of every token would fill the memory for nothing
        output = model(**inputs, output_hidden_states=True, return_dict=True, use_cache=False, **options)
        layers, mask = getattr(output, "hidden_states", None), inputs["attention_mask"]
        if not layers or layers[-1].shape[:2] != mask.shape:
            raise ValueError(
                f"path_or_id: {self.config.path_or_id!r} ({type(model).__name__}) does not show its language model's "
                "hidden layer for every token; pass a decoder-only image-text-to-text model, such as a LLaVA or a "
                "Qwen-VL"
            )
        weights = mask[:, :, None].float()
        return ((layers[-1].float() * weights).sum(dim=1) / weights.sum(dim=1)).cpu()
