"""Descriptions and semantic features of images, by an image-text-to-text model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from aigiqa_reward import images as pixels
from aigiqa_reward.assistants.base import (
    AssistantConfig,
    Config,
    PretrainedAssistant,
    generate_greedily,
    pad_on_the_left,
)


class ImageTextAssistant(PretrainedAssistant[Config]):
    """Any model of transformers' AutoModelForImageTextToText with its processor."""

    wanted = "an image-text-to-text model"
    mapping = "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING"
    parts = ("AutoProcessor", "AutoModelForImageTextToText")

    @cached_property
    def _processor(self) -> Any:
        processor = super()._processor
        if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
            raise ValueError(
                f"path_or_id: {self.config.path_or_id!r} has a {type(processor).__name__}, no processor of images and "
                "text; save the model's processor into the same folder with save_pretrained"
            )
        pad_on_the_left(processor.tokenizer)
        return processor

    def _inputs(self, images: Tensor, question: str) -> Any:
        """Make the network's inputs for one question about each of the images (B, 3, H, W), on its device."""
        model = self._model
        prompt, options = self._prompt(question)
        pictures = [[image] for image in pixels.to_pil(images)]
        features = self._processor(
            text=[prompt] * len(images), images=pictures, padding=True, return_tensors="pt", **options
        )
        return features.to(model.device, dtype=model.dtype)

    def _prompt(self, question: str) -> tuple[str, dict[str, bool]]:
        """Put a question in the form the model was trained on, with options for the tokenizer."""
        processor = self._processor
        if getattr(processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": question}]
            prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            start = processor.tokenizer.bos_token
            return prompt, {"add_special_tokens": False} if start and prompt.startswith(start) else {}
        if hasattr(processor, "num_query_tokens"):  # BLIP-2 and InstructBLIP place their image tokens themselves
            return question, {}
        return f"{getattr(processor, 'image_token', '<image>')} {question}", {}


DESCRIBE = (
    "Describe this image in about 50 words: its content, its style, the angle it is seen from, and its colors. "
    "Answer with the description alone."
)
"""SC-AGIQA asks for content, style, angle and color in about 50 words (section 3.2, eq. 2); this wording is ours."""


@dataclass(frozen=True, kw_only=True)
class CaptionerConfig(AssistantConfig):
    """Which image-text-to-text model describes, and how.

    Attributes:
        question: question about each image.
        max_new_tokens: length at which an answer is cut; 50 English words take half the default.
    """

    question: str = DESCRIBE
    max_new_tokens: int = 128


class LMMCaptioner(ImageTextAssistant[CaptionerConfig]):
    """Describes images, for SC-AGIQA's comparison of prompt and description (Text-assisted Semantic Alignment).

    Any transformers image-text-to-text model; decoding is greedy, so that a description depends on its image alone.
    """

    kind = "captioner"

    def describe(self, images: Tensor) -> list[str]:
        """Describe images (B, 3, H, W) in [0, 1], which the model sees rounded to 8 bits: B texts in one line each."""
        pixels.check(images)

        def answer(rows: list[int]) -> list[str]:
            inputs = self._inputs(images[rows], self.config.question)
            texts = generate_greedily(self._model, self._processor.tokenizer, inputs, self.config.max_new_tokens)
            return [" ".join(text.split()) for text in texts]

        return self._serve(list(images), answer, str)


QUESTIONS = (
    "Evaluate the input image to determine if its quality is compromised due to a lack of meaningful semantic content.",
    "Evaluate if the image quality is compromised due to violations of coherence.",
)
"""MA-AGIQA's two prompts, word for word (section 3.2)."""


@dataclass(frozen=True, kw_only=True)
class SemanticsConfig(AssistantConfig):
    """Which image-text-to-text model reads the images; MA-AGIQA's own is mPLUG-Owl2, 4096 wide."""


class LMMSemantics(ImageTextAssistant[SemanticsConfig]):
    """Reads images with MA-AGIQA's two questions, on meaning and coherence.

    For each question the model's last hidden layer is averaged over the tokens (MA-AGIQA eq. 3). That these are the
    tokens of image and question, and not of a generated answer, is our inference from the equation.
    """

    kind = "lmm_semantics"
    recipe: ClassVar[Mapping[str, Any]] = {"questions": QUESTIONS}

    @cached_property
    def width(self) -> int:
        """Width of the features: the language model's hidden size, from its configuration; loads no weights."""
        text = getattr(self._description, "text_config", None) or self._description
        return int(text.hidden_size)

    def read(self, images: Tensor) -> Float[Tensor, "batch 2 width"]:
        """Compute the features of images (B, 3, H, W) in [0, 1], which the model sees rounded to 8 bits.

        Returns:
            (B, 2, width) float32 on the images' device: lack of meaningful content, then violations of coherence.
        """
        pixels.check(images)

        def answer(rows: list[int]) -> list[Tensor]:
            features = [self._features(self._inputs(images[rows], question)) for question in QUESTIONS]
            return list(torch.stack(features, dim=1))

        return torch.stack(self._serve(list(images), answer, Tensor)).to(images.device)

    def _features(self, inputs: Any) -> Float[Tensor, "batch width"]:
        """Average the last hidden layer over the tokens that are not padding; float32, on the CPU."""
        model = self._model  # the vocabulary's logits of every token would fill the memory:
        options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        output = model(**inputs, output_hidden_states=True, return_dict=True, use_cache=False, **options)
        layers, mask = getattr(output, "hidden_states", None), inputs["attention_mask"]
        if not layers or layers[-1].shape[:2] != mask.shape:
            raise ValueError(
                f"path_or_id: {self.config.path_or_id!r} ({type(model).__name__}) does not return the language model's "
                "hidden layer for every token; pass a decoder-only image-text-to-text model such as LLaVA or Qwen-VL"
            )
        weights = mask[:, :, None].float()
        return ((layers[-1].float() * weights).sum(dim=1) / weights.sum(dim=1)).cpu()
