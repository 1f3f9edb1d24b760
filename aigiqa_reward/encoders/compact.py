"""The embedded towers: EfficientNet-Lite0 for images and MiniLM-L6 for text, both frozen, 29 MB together.

The image tower keeps ImageNet's classifier: the class probabilities, weighted with the sentence embeddings of the
class names, put an image into the text tower's space without any image-text training (ConSE: Norouzi et al., "Zero-shot
learning by convex combination of semantic embeddings", 2014).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from tokenizers import Tokenizer
from torch import Tensor, nn

from aigiqa_reward.encoders.text import warn_dropped, warn_if_not_latin
from aigiqa_reward.encoders.timm import TimmConfig, TimmEncoder
from aigiqa_reward.types import Images, PromptError
from aigiqa_reward.weights import ASSETS, load_strictly, read_checked, read_weights

_Tower = TypeVar("_Tower", bound=nn.Module)

TOWERS = ASSETS / "towers"
"""Folder of the towers' weights, tokenizer and model card."""

_TOKENIZER_SHA256 = "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
"""Of tokenizer.json: other numbers for the same words would give other scores without an error."""

_MEAN, _STD = 127 / 255, 128 / 255
LITE0 = TimmConfig(
    architecture="tf_efficientnet_lite0", mean=(_MEAN, _MEAN, _MEAN), std=(_STD, _STD, _STD), smooth=0.02
)
"""EfficientNet-Lite0 as TensorFlow published it: inputs are (x - 127) / 128 on 8-bit values.

Its ReLU6 corners are rounded, so that the pixel gradient predicts what a small step does. The half width was chosen
here: it changes no quality score by more than 0.002, and central differences agree with the gradient to 1e-5.
"""


LITE2 = replace(LITE0, architecture="tf_efficientnet_lite2")
"""EfficientNet-Lite2, published with the same inputs."""


@dataclass(frozen=True)
class ImageFeatures:
    """What the image tower sees.

    Attributes:
        pooled: (B, 1280) mean of the last feature map.
        semantic: (B, 384) the image in the text tower's space, unit length.
    """

    pooled: Float[Tensor, "batch width"]
    semantic: Float[Tensor, "batch semantic_width"]


@dataclass(frozen=True)
class TextFeatures:
    """What the text tower reads.

    Attributes:
        tokens: (P, L, 384) states of the words, without the start and end tokens.
        mask: (P, L) True where a token is a word's, not padding.
        pooled: (P, 384) sentence embedding, unit length.
    """

    tokens: Float[Tensor, "texts length width"]
    mask: Bool[Tensor, "texts length"]
    pooled: Float[Tensor, "texts width"]


class CompactImageTower(nn.Module):
    """EfficientNet-Lite0 with its ImageNet classifier, on images of any size of at least 32 px a side."""

    classes = 1000
    semantic_width = 384

    def __init__(self) -> None:
        super().__init__()
        self.encoder = TimmEncoder(LITE0)
        self.classifier = nn.Linear(self.encoder.width, self.classes)
        self.register_buffer("class_names", torch.zeros(self.classes, self.semantic_width))
        self.class_names: Tensor

    @property
    def width(self) -> int:
        """Width of the pooled features."""
        return self.encoder.width

    def forward(self, images: Images) -> ImageFeatures:
        """Pooled features and the place of the image among texts."""
        pooled = self.encoder.pool(self.encoder(images))
        return ImageFeatures(pooled, self.place(pooled))

    def place(self, pooled: Float[Tensor, "batch width"]) -> Float[Tensor, "batch semantic_width"]:
        """Where an image of these pooled features lies among texts; unit length."""
        logits = self.classifier(pooled.to(self.classifier.weight.dtype)).to(pooled.dtype)
        semantic = logits.softmax(dim=-1) @ self.class_names.to(pooled.dtype)
        return F.normalize(semantic, dim=-1)


class CompactTextTower(nn.Module):
    """MiniLM-L6 (Wang et al. 2020) as fine-tuned for sentence embeddings: mean over the tokens, unit length."""

    width = 384
    window = 128
    """Tokens read, of the 512 the positions allow: as the sentence encoder was trained."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30522, self.width)
        self.positions = nn.Embedding(512, self.width)
        self.norm = nn.LayerNorm(self.width, eps=1e-12)
        layer = nn.TransformerEncoderLayer(
            self.width, 12, 1536, dropout=0.0, activation="gelu", layer_norm_eps=1e-12, batch_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The uncased WordPiece tokenizer of BERT, read from the package."""
        tokenizer = Tokenizer.from_buffer(read_checked(TOWERS / "tokenizer.json", expected_sha256=_TOKENIZER_SHA256))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def encode(self, texts: Sequence[str]) -> TextFeatures:
        """Read texts; warns of what lies beyond the window and of scripts it was not trained on."""
        rows = [self._tokens(text) for text in texts]
        length = max(len(row) for row in rows)
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        mask = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows])
        device = self.words.weight.device
        return self(ids.to(device), mask.to(device))

    def _tokens(self, text: str) -> list[int]:
        warn_if_not_latin(text, tower="the compact text tower")
        encoding = self.tokenizer.encode(text)
        if len(encoding.ids) <= 2:
            raise PromptError(text)
        if len(encoding.ids) <= self.window:
            return encoding.ids
        cut = encoding.offsets[self.window - 1][0]
        warn_dropped(text, text[cut:].strip(), self.window, tower="the compact text tower")
        return encoding.ids[: self.window - 1] + encoding.ids[-1:]

    def forward(self, ids: Int[Tensor, "texts tokens"], mask: Bool[Tensor, "texts tokens"]) -> TextFeatures:
        """States of token ids (with start and end tokens) where `mask` is True."""
        places = torch.arange(ids.shape[1], device=ids.device)
        states = self.norm(self.words(ids) + self.positions(places))
        states = self.layers(states, src_key_padding_mask=~mask)
        if states.dtype in (torch.float16, torch.bfloat16):
            states = states.float()
        weights = mask[..., None].to(states.dtype)
        pooled = (states * weights).sum(dim=1) / weights.sum(dim=1)
        inner = mask.clone()
        inner[:, 0] = False
        inner[torch.arange(len(ids), device=ids.device), mask.sum(dim=1) - 1] = False
        return TextFeatures(states[:, 1:-1], inner[:, 1:-1], F.normalize(pooled, dim=-1))


def load_image_tower(*, sha256: str) -> CompactImageTower:
    """The embedded image tower, frozen, in evaluation mode."""
    return _loaded(CompactImageTower(), "image.safetensors", sha256)


def load_text_tower(*, sha256: str) -> CompactTextTower:
    """The embedded text tower, frozen, in evaluation mode."""
    return _loaded(CompactTextTower(), "text.safetensors", sha256)


def _loaded(tower: _Tower, name: str, sha256: str) -> _Tower:
    load_strictly(tower, read_weights(TOWERS / name, expected_sha256=sha256), source=name)
    return tower.requires_grad_(False).eval()
