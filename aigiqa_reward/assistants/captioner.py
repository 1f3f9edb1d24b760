"""Descriptions and semantic features of images, by an image-text-to-text model."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from aigiqa_reward import images as pixels
from aigiqa_reward.assistants.base import (
    AssistantConfig,
    Config,
    PretrainedAssistant,
    load_description,
    load_model,
    load_part,
)
from aigiqa_reward.utils.checks import integer

_WANTED = "an image-text-to-text model"


class ImageTextAssistant(PretrainedAssistant[Config]):
    """Any model of transformers' AutoModelForImageTextToText with its processor, each part loaded at first use."""

    @cached_property
    def _description(self) -> Any:
        return load_description(self.config, mapping="MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", wanted=_WANTED)

    @cached_property
    def _processor(self) -> Any:
        _ = self._description  # refuses a model of another kind, which may have no processor
        processor = load_part("AutoProcessor", self.config, wanted=_WANTED)
        if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
            raise ValueError(
                f"path_or_id: {self.config.path_or_id!r} has no processor of images and text (found "
                f"{type(processor).__name__}); save the model's processor into the same folder with save_pretrained"
            )
        pad_on_the_left(processor.tokenizer)  # so that generated text follows the question
        return processor

    @cached_property
    def _model(self) -> Any:
        _ = self._processor  # before the weights, which take long to read
        return load_model("AutoModelForImageTextToText", self.config, wanted=_WANTED)

    def _inputs(self, images: Tensor, question: str) -> Any:
        """Make the network's inputs for one question about each of the images (B, 3, H, W), on its device."""
        model = self._model
        prompt, options = self._prompt(question)
        features = self._processor(
            text=[prompt] * len(images),
            images=[[image] for image in pixels.to_pil(images)],
            padding=True,
            return_tensors="pt",
            **options,
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


def pad_on_the_left(tokenizer: Any) -> None:
    """Pad on the left; a tokenizer without padding token uses its end token, which is masked."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def generate_greedily(model: Any, tokenizer: Any, inputs: Any, max_new_tokens: int) -> list[str]:
    """Generate greedily, one text per row, without the prompt.

    The model's generation settings hold (end tokens, a repetition penalty), except for those of sampling.
    """
    tokens = model.generate(
        **inputs,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    prompt = inputs["input_ids"]
    if torch.equal(tokens[:, : prompt.shape[1]], prompt):  # an encoder-decoder gives the answer alone
        tokens = tokens[:, prompt.shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


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

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.question.strip():
            raise ValueError("question: expected a text, got an empty one; leave it out for the default")
        integer("max_new_tokens", self.max_new_tokens, least=1)


class LMMCaptioner(ImageTextAssistant[CaptionerConfig]):
    """Describes images, for SC-AGIQA's comparison of prompt and description (Text-assisted Semantic Alignment).

    Any transformers image-text-to-text model; decoding is greedy, so that a description depends on its image alone.

    Args:
        config: which model.
        cache: folder of descriptions; None asks the model every time.
    """

    kind = "captioner"

    def describe(self, images: Tensor) -> list[str]:
        """Describe each image, without gradients.

        Args:
            images: (B, 3, H, W) in [0, 1]; the model sees them rounded to 8 bits.

        Returns:
            B texts, white space collapsed.

        Raises:
            ValueError: the model cannot be loaded.
        """
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

    Args:
        config: which model.
        cache: folder of features; None asks the model every time.
    """

    kind = "lmm_semantics"

    @cached_property
    def width(self) -> int:
        """Width of the features: the language model's hidden size, from its configuration; loads no weights."""
        text = getattr(self._description, "text_config", None) or self._description
        return int(text.hidden_size)

    def _recipe(self) -> dict[str, Any]:
        return {"questions": QUESTIONS}

    def read(self, images: Tensor) -> Float[Tensor, "batch 2 width"]:
        """Compute the features of each image under each question, without gradients.

        Args:
            images: (B, 3, H, W) in [0, 1]; the model sees them rounded to 8 bits.

        Returns:
            (B, 2, width) float32 on the images' device: lack of meaningful content, then violations of coherence.

        Raises:
            ValueError: the model cannot be loaded, or does not return its hidden layers.
        """
        pixels.check(images)

        def answer(rows: list[int]) -> list[Tensor]:
            features = [self._features(self._inputs(images[rows], question)) for question in QUESTIONS]
            return list(torch.stack(features, dim=1))

        return torch.stack(self._serve(list(images), answer, Tensor)).to(images.device)

    def _features(self, inputs: Any) -> Float[Tensor, "batch width"]:
        """Average the last hidden layer over the tokens that are not padding; float32, on the CPU."""
        model = self._model
        options: dict[str, Any] = {}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            options["logits_to_keep"] = 1  # the vocabulary's logits of every token would fill the memory
        output = model(**inputs, output_hidden_states=True, return_dict=True, use_cache=False, **options)
        layers, mask = getattr(output, "hidden_states", None), inputs["attention_mask"]
        if not layers or layers[-1].shape[:2] != mask.shape:
            raise ValueError(
                f"path_or_id: {self.config.path_or_id!r} ({type(model).__name__}) does not return its language "
                "model's hidden layer for every token; pass a decoder-only image-text-to-text model, such as LLaVA "
                "or Qwen-VL"
            )
        weights = mask[:, :, None].float()
        return ((layers[-1].float() * weights).sum(dim=1) / weights.sum(dim=1)).cpu()
