"""SigLIP 2: how well an image fits its prompt, in many languages.

Tschannen et al. 2025, "SigLIP 2: Multilingual Vision-Language Encoders with Improved Semantic Understanding,
Localization, and Dense Features". The raw score is the logit exp(logit_scale) cos(image, prompt) + logit_bias, whose
sigmoid is the probability that both belong together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from aigiqa_reward import images as pixels
from aigiqa_reward.encoders._text import read_tokens
from aigiqa_reward.models.base import FullPrecision
from aigiqa_reward.models.published import Cosine, PublishedModel, read_tokenizer
from aigiqa_reward.types import Images, PromptFeatures
from aigiqa_reward.utils.io import read_json

_TOWER = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
_SO400M = {"vision_config": {**_TOWER, "image_size": 384, "patch_size": 14}}
_SO400M["text_config"] = {**_TOWER, "vocab_size": 256000, "projection_size": 1152, "max_position_embeddings": 64}
_HALF = (0.5, 0.5, 0.5)


class _Bias(FullPrecision):
    def __init__(self) -> None:
        super().__init__()
        self.logit_bias = nn.Parameter(torch.zeros(()))


class SigLIP2(PublishedModel):
    """A SigLIP or SigLIP 2 of one image size; the total is the logit.

    Prompts are lower-cased and padded on the right to the text tower's window, whose last position is their embedding.
    """

    name = "siglip2"
    aspect = "correspondence"

    def __init__(self, config: Mapping[str, Any], tokenizer: str) -> None:
        super().__init__()
        from transformers import SiglipConfig, SiglipModel

        self.config, self.tokenizer_json = dict(config), tokenizer
        self.tower = SiglipModel(SiglipConfig(**self.config))
        del self.tower.logit_scale, self.tower.logit_bias
        self.cosine, self.bias = Cosine(), _Bias()
        self.tokenizer = Tokenizer.from_str(tokenizer)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.window: int = self.tower.config.text_config.max_position_embeddings
        self.side: int = self.tower.config.vision_config.image_size

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> Self:
        return cls(description["config"], description["tokenizer"])

    def describe(self) -> dict[str, Any]:
        return {"config": self.config, "tokenizer": self.tokenizer_json}

    @classmethod
    def read_description(cls, folder: Path | None) -> dict[str, Any]:
        if folder is None:
            return {"config": _SO400M, "tokenizer": ""}
        found = read_json(folder / "config.json")
        return {"config": {key: found[key] for key in _SO400M}, "tokenizer": read_tokenizer(folder)}

    @classmethod
    def rename(cls, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        unused = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
        scalars = {"logit_scale": "cosine.logit_scale", "logit_bias": "bias.logit_bias"}
        return {
            scalars.get(name, f"tower.{name}"): tensor.reshape(()) if name in scalars else tensor
            for name, tensor in tensors.items()
            if name not in unused
        }

    def encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        lowered = [text.lower() for text in texts]
        ids, _ = read_tokens(
            self.tokenizer, lowered, self.window, tower="SigLIP 2", argument="prompts", special=1, multilingual=True
        )
        padded = torch.nn.functional.pad(ids, (0, self.window - ids.shape[1]))
        found: Any = self.tower.get_text_features(input_ids=padded.to(self.cosine.logit_scale.device))
        return {"text": getattr(found, "pooler_output", found)}

    def raw_scores(self, images: Images, prompts: PromptFeatures | None) -> dict[str, Tensor]:
        assert prompts is not None
        square = pixels.normalize(pixels.resize(images, (self.side, self.side)), _HALF, _HALF)
        found: Any = self.tower.get_image_features(pixel_values=square.to(self.tower.dtype))
        image, text = (
            tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            for tensor in (getattr(found, "pooler_output", found), prompts.rows("text"))
        )
        return {"raw": self.cosine.logit_scale.exp() * self.cosine(image, text) + self.bias.logit_bias}
