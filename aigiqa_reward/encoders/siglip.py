"""SigLIP and SigLIP 2 of one image size, as transformers builds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from tokenizers import Tokenizer
from torch import Tensor, nn

from aigiqa_reward import images as pixels
from aigiqa_reward.encoders._text import read_tokens
from aigiqa_reward.encoders.clip import pooled
from aigiqa_reward.types import Images

_HALF = (0.5, 0.5, 0.5)


class SigLIPTower(nn.Module):
    """A `transformers.SiglipModel` without its logit scale and bias. Embeddings are not normalized, at least float32.

    Prompts are lower-cased and padded on the right to the text tower's window, whose last position is their embedding.

    Args:
        config: fields of `transformers.SiglipConfig`.
        tokenizer: content of its tokenizer.json, which ends a text with one token.
    """

    def __init__(self, config: Mapping[str, Any], tokenizer: str) -> None:
        super().__init__()
        from transformers import SiglipConfig, SiglipModel

        self.config, self.tokenizer_json = dict(config), tokenizer
        self.siglip: Any = SiglipModel(SiglipConfig(**self.config))
        del self.siglip.logit_scale, self.siglip.logit_bias  # kept at full precision by the model around
        self.tokenizer = Tokenizer.from_str(tokenizer)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.window: int = self.siglip.config.text_config.max_position_embeddings
        self.image_size: int = self.siglip.config.vision_config.image_size

    def encode_image(self, images: Images) -> Float[Tensor, "batch embedding"]:
        """Embed images in [0, 1] of any size, squashed to a square."""
        square = pixels.normalize(pixels.resize(images, (self.image_size, self.image_size)), _HALF, _HALF)
        return pooled(self.siglip.get_image_features(pixel_values=square.to(self.siglip.dtype)))

    def encode_text(self, texts: Sequence[str]) -> Float[Tensor, "texts embedding"]:
        """Embed texts in any language."""
        lowered = [text.lower() for text in texts]
        ids, _ = read_tokens(
            self.tokenizer, lowered, self.window, tower="SigLIP", argument="prompts", special=1, multilingual=True
        )
        padded = F.pad(ids, (0, self.window - ids.shape[1]))
        return pooled(self.siglip.get_text_features(input_ids=padded.to(self.siglip.device)))
