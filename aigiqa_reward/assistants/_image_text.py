"""Image-text-to-text models of transformers: loading one, and putting a question to it about images."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from aigiqa_reward import images as pixels
from aigiqa_reward.assistants._pretrained import AssistantConfig, load_description, load_model, load_part

_WANTED = "an image-text-to-text model"


class ImageTextModel:
    """A model that reads an image and a question, each of its parts loaded at first use.

    Any model that transformers' AutoModelForImageTextToText loads, with the processor that was saved beside it.
    """

    def __init__(self, config: AssistantConfig) -> None:
        self.config = config

    @cached_property
    def _description(self) -> Any:
        """The model's configuration, of the wanted kind."""
        return load_description(self.config, mapping="MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", wanted=_WANTED)

    @property
    def width(self) -> int:
        """Width of the language model's hidden layers, from the configuration; loads no weights."""
        text = getattr(self._description, "text_config", None) or self._description
        return int(text.hidden_size)

    @cached_property
    def processor(self) -> Any:
        """What makes the network's inputs; pads on the left, so that generated text follows the question."""
        _ = self._description  # refuses a model of another kind, which may have no processor
        processor = load_part("AutoProcessor", self.config, wanted=_WANTED)
        if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
            raise ValueError(
                f"path_or_id: {self.config.path_or_id!r} brings no processor of images and text (found "
                f"{type(processor).__name__}); save the model's processor into the same folder with save_pretrained"
            )
        pad_on_the_left(processor.tokenizer)
        return processor

    @cached_property
    def model(self) -> Any:
        """The network, frozen."""
        _ = self.processor  # before the weights, which take long to read
        return load_model("AutoModelForImageTextToText", self.config, wanted=_WANTED)

    def inputs(self, images: Tensor, question: str) -> Any:
        """The network's inputs for one question about each of the images (B, 3, H, W), on its device."""
        model = self.model
        prompt, options = self._prompt(question)
        features = self.processor(
            text=[prompt] * len(images),
            images=[[image] for image in pixels.to_pil(images)],
            padding=True,
            return_tensors="pt",
            **options,
        )
        return features.to(model.device, dtype=model.dtype)

    def _prompt(self, question: str) -> tuple[str, dict[str, bool]]:
        """A question in the form the model was trained on, and how it is to be tokenised."""
        processor = self.processor
        if getattr(processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": question}]
            prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            start = processor.tokenizer.bos_token
            return prompt, {"add_special_tokens": False} if start and prompt.startswith(start) else {}
        if hasattr(processor, "num_query_tokens"):  # BLIP-2 and InstructBLIP place their image tokens themselves
            return question, {}
        return f"{getattr(processor, 'image_token', '<image>')} {question}", {}

    def generate(self, inputs: Any, max_new_tokens: int) -> list[str]:
        """Greedy continuations, one a row, without the prompt."""
        return generate_greedily(self.model, self.processor.tokenizer, inputs, max_new_tokens)


def pad_on_the_left(tokenizer: Any) -> None:
    """Let rows of unequal length end together; a tokenizer without padding uses its end token, which is masked."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def generate_greedily(model: Any, tokenizer: Any, inputs: Any, max_new_tokens: int) -> list[str]:
    """Text that a model finds likeliest word by word, one a row, without the prompt.

    The model's own generation settings hold (end tokens, a repetition penalty), except that nothing is drawn.
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
