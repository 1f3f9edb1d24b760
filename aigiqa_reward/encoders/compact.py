"""The embedded towers as one contrastive encoder: images, places of an image, texts and words in one space.

The space is the text tower's, minus what all images and all texts share. An image enters it by its ImageNet classes
(`CompactImageTower`) and by a linear map of low rank that was trained contrastively on the embedded world:

    e(x) = c(x) / |c(x)| - c0 + W_o W_i (x - m) / s,    c(x) = softmax(classifier(x)) N,    t = text - t0,

with the pooled features x, the class names' embeddings N and means c0, t0. The same map at each place of the feature
map gives the place's embedding. A word's embedding is its state over the norm of its text's mean state, minus t0.
No prompt and no human score of any benchmark was used; but the pixels of all AGIQA-3K images were, for the means and
to keep the learned map small on images unlike the world's: the towers have seen the test images of its splits.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from aigiqa_reward.encoders._text import read_tokens
from aigiqa_reward.encoders.timm import TimmConfig, TimmEncoder
from aigiqa_reward.types import Images
from aigiqa_reward.utils.isolation import building
from aigiqa_reward.utils.weights import ASSETS, load_strictly, read_checked, read_weights

_Tower = TypeVar("_Tower", bound=nn.Module)

TOWERS = ASSETS / "towers"
"""Folder of the towers' weights, tokenizer and model card."""

_TOKENIZER_SHA256 = "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"

_MEAN, _STD = 127 / 255, 128 / 255
LITE0 = TimmConfig(
    architecture="tf_efficientnet_lite0", mean=(_MEAN, _MEAN, _MEAN), std=(_STD, _STD, _STD), blocks=(2, 3, 4)
)
"""EfficientNet-Lite0 as TensorFlow published it: inputs are (x - 127) / 128 on 8-bit values.

The blocks are the stages with strides 8, 16 and 32.
"""

QUALITY_TOWER = replace(LITE0, blocks=(), folded=True)
"""EfficientNet-Lite0 of the compact reward's quality."""

MATCH_TOWER = replace(LITE0, architecture="tf_efficientnet_lite2", blocks=(3, 4), folded=True)
"""EfficientNet-Lite2 of the compact reward's match; its blocks are the stages with strides 16 and 32."""


class ImageFeatures(NamedTuple):
    """Output of the image tower: (B, 1280) pooled features, and (B, 384) unit vectors in the text tower's space."""

    pooled: Tensor
    semantic: Tensor


class TextFeatures(NamedTuple):
    """Output of the text tower: words (P, L, 384), their mask (P, L), and (P, 384) sentence embeddings, unit length."""

    tokens: Tensor
    mask: Tensor
    pooled: Tensor


class CompactImageTower(nn.Module):
    """An EfficientNet-Lite with its ImageNet classifier, on images of any size of at least 32 px a side."""

    classes = 1000
    semantic_width = 384

    def __init__(self, config: TimmConfig = LITE0) -> None:
        super().__init__()
        self.encoder = TimmEncoder(config)
        self.classifier = nn.Linear(self.encoder.width, self.classes)
        self.register_buffer("class_names", torch.zeros(self.classes, self.semantic_width))
        self.class_names: Tensor

    def forward(self, images: Images) -> ImageFeatures:
        pooled = self.encoder.pool(self.encoder(images))
        return ImageFeatures(pooled, self.place(pooled))

    def place(self, pooled: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch semantic_width"]:
        """Compute the place among texts of pooled features: the class names' mean by probability, unit length."""
        logits = self.classifier(pooled.to(self.classifier.weight.dtype)).to(pooled.dtype)
        return F.normalize(logits.softmax(dim=-1) @ self.class_names.to(pooled.dtype), dim=-1)


class CompactTextTower(nn.Module):
    """MiniLM-L6 (Wang et al. 2020) as fine-tuned for sentence embeddings: mean over the tokens, unit length."""

    width = 384
    window = 128  # of 512 positions: as the sentence encoder was trained

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
        tokenizer = Tokenizer.from_buffer(read_checked(TOWERS / "tokenizer.json", expected_sha256=_TOKENIZER_SHA256))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def encode(self, texts: Sequence[str]) -> TextFeatures:
        """Encode texts, with a warning of words beyond the window and of scripts it was not trained on."""
        ids, mask = read_tokens(self.tokenizer, texts, self.window, tower="the compact text tower", argument="prompts")
        device = self.words.weight.device
        return self(ids.to(device), mask.to(device))

    def word_numbers(self, texts: Sequence[str]) -> Int[Tensor, "texts words"]:
        """Return of which word, by spaces and from 0, each token that `encode` returns is a part; -1 at padding."""
        rows = []
        for text in texts:
            starts = [match.start() for match in re.finditer(r"\S+", text)]
            offsets = self.tokenizer.encode(text).offsets[1 : self.window - 1]
            rows.append(torch.tensor([bisect_right(starts, start) - 1 for start, end in offsets if end > start]))
        return pad_sequence(rows, batch_first=True, padding_value=-1)

    def forward(self, ids: Int[Tensor, "texts tokens"], mask: Bool[Tensor, "texts tokens"]) -> TextFeatures:
        states = self.norm(self.words(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device)))
        states = self.layers(states, src_key_padding_mask=~mask)
        if states.dtype in (torch.float16, torch.bfloat16):
            states = states.float()
        weights = mask[..., None].to(states.dtype)
        pooled = (states * weights).sum(dim=1) / weights.sum(dim=1)
        inner = mask.clone()
        inner[:, 0] = False
        inner[torch.arange(len(ids), device=ids.device), mask.sum(dim=1) - 1] = False
        return TextFeatures(states[:, 1:-1], inner[:, 1:-1], F.normalize(pooled, dim=-1))


@building()
def load_image_tower(*, sha256: str) -> CompactImageTower:
    """Load the embedded image tower, frozen, in evaluation mode."""
    return _loaded(CompactImageTower(), "image.safetensors", sha256)


@building()
def load_text_tower(*, sha256: str) -> CompactTextTower:
    """Load the embedded text tower, frozen, in evaluation mode."""
    return _loaded(CompactTextTower(), "text.safetensors", sha256)


def _loaded(tower: _Tower, name: str, sha256: str) -> _Tower:
    load_strictly(tower, read_weights(TOWERS / name, expected_sha256=sha256), source=name)
    return tower.requires_grad_(False).eval()


class Alignment(nn.Module):
    """The trained map into the joint space, of features (..., features) whose place among texts is (..., width)."""

    rank = 64  # the world's things and colors differ in 63 + 7 directions

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.place_in = nn.Linear(features, self.rank, bias=False)
        self.place_out = nn.Linear(self.rank, width, bias=False)
        nn.init.zeros_(self.place_out.weight)
        self.log_scale = nn.Parameter(torch.tensor(20.0).log())
        self.feature_mean = nn.Buffer(torch.zeros(features))
        self.feature_std = nn.Buffer(torch.ones(features))
        self.semantic_mean = nn.Buffer(torch.zeros(width))
        self.text_mean = nn.Buffer(torch.zeros(width))

    def forward(self, features: Tensor, semantic: Tensor) -> Tensor:
        dtype = features.dtype
        centered = (features - self.feature_mean.to(dtype)) / self.feature_std.to(dtype)
        learned = F.linear(F.linear(centered, self.place_in.weight.to(dtype)), self.place_out.weight.to(dtype))
        return semantic - self.semantic_mean.to(dtype) + learned


class CompactEncoder(nn.Module):
    """EfficientNet-Lite0 and MiniLM-L6 as a contrastive encoder, 29 MB, offline; for images in [0, 1] from 32 px.

    Its places are 32 x 32 px each; embeddings in the joint space are not normalized. `look`, `read` and `ground` are an
    image-grounded text encoder, in place of BLIP's.
    """

    image_size = 224
    any_size = True
    mean = (_MEAN, _MEAN, _MEAN)
    level_side = image_size // 32

    def __init__(self) -> None:
        super().__init__()
        self.image = CompactImageTower()
        self.text = CompactTextTower()
        self.feature_width, self.width = self.image.encoder.width, self.text.width
        self.level_channels, self.grounded_width = self.image.encoder.level_channels, 2 * self.width
        self.alignment = Alignment(self.feature_width, self.width)

    def describe(self) -> dict[str, Any]:
        return {"compact": "EfficientNet-Lite0 and MiniLM-L6"}

    @property
    def logit_scale(self) -> float:
        return float(self.alignment.log_scale.detach().float().exp())

    def feature_map(self, images: Images) -> Float[Tensor, "batch features rows columns"]:
        return self.image.encoder(images)

    def features(self, images: Images) -> Float[Tensor, "batch features"]:
        return self.image.encoder.pool(self.feature_map(images))

    def project(self, features: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch embedding"]:
        return self.alignment(features, self.image.place(features))

    def encode_image(self, images: Images) -> Float[Tensor, "batch embedding"]:
        return self.project(self.features(images))

    def encode_map(self, images: Images) -> Float[Tensor, "batch embedding rows columns"]:
        return self.project(self.feature_map(images).movedim(1, -1)).movedim(-1, 1)

    def levels(self, images: Images) -> Float[Tensor, "batch channels rows columns"]:
        return self.image.encoder.levels(images)

    def observe(self, images: Images) -> tuple[Tensor, Tensor]:
        """Compute `feature_map` and `levels` in one pass."""
        return self.image.encoder.observe(images)

    def encode_text(self, texts: Sequence[str]) -> Float[Tensor, "texts embedding"]:
        pooled = self.text.encode(texts).pooled
        return pooled - self.alignment.text_mean.to(pooled.dtype)

    def encode_words(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embed words (P, L, d), whose mean is about the text's embedding; with a mask (P, L), False at padding."""
        read = self.text.encode(texts)
        kept = read.mask[..., None].to(read.tokens.dtype)
        mean = (read.tokens * kept).sum(dim=1) / kept.sum(dim=1)
        scaled = read.tokens / mean.norm(dim=-1)[:, None, None]
        return scaled - self.alignment.text_mean.to(scaled.dtype), read.mask

    def look(self, images: Images) -> Float[Tensor, "batch places embedding"]:
        return self.encode_map(images).flatten(2).transpose(1, 2)

    def read(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return dict(zip(("text", "mask"), self.encode_words(texts), strict=True))

    def ground(self, seen: Tensor, text: Tensor, mask: Tensor) -> Float[Tensor, "batch length grounded"]:
        """Compare each word with the places nearest to it, without further weights (ours, not the paper's).

        o_k = sum_p softmax_p(s cos(T_k, M_p)) M_p, and the states are [o_k; sqrt(d) T_k * o_k].
        """
        similarity = F.normalize(text, dim=-1) @ F.normalize(seen, dim=-1).transpose(1, 2)
        attended = (self.logit_scale * similarity).softmax(dim=-1) @ seen
        agreed = text * attended * self.width**0.5
        return torch.cat([attended, agreed], dim=-1) * mask[..., None]
