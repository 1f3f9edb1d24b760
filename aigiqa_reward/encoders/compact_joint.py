"""The embedded towers as one contrastive encoder: images, places of an image, texts and words in one space.

The space is the text tower's, less what all images and all texts share. An image comes into it by its ImageNet classes
(see `encoders.compact`) and by a linear map of low rank that was trained contrastively on the embedded world:

    e(x) = c(x) / |c(x)| - c0 + W_o W_i (x - m) / s,    c(x) = softmax(classifier(x)) N,    t = text - t0,

with the pooled features x, the class names' embeddings N and means c0, t0. The same map at each place of the feature
map gives the place's embedding, and each word's state, scaled by the length of its text's mean state, the word's.
No prompt and no human score of any benchmark was used; the pixels of all AGIQA-3K images at hand were, for the means
and to keep the learned map small on images unlike the world's: on its splits the towers have seen the test images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from aigiqa_reward.encoders.compact import CompactImageTower, CompactTextTower
from aigiqa_reward.types import Images

RANK = 64
"""Of the trained map: chosen here, no less than the 63 + 7 directions of the world's things and colours by much."""


class Alignment(nn.Module):
    """The trained part: how features and texts come into the joint space."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.place_in = nn.Linear(features, RANK, bias=False)
        self.place_out = nn.Linear(RANK, width, bias=False)
        nn.init.zeros_(self.place_out.weight)
        self.log_scale = nn.Parameter(torch.tensor(20.0).log())
        for name, length in (
            ("feature_mean", features),
            ("feature_std", features),
            ("semantic_mean", width),
            ("text_mean", width),
        ):
            self.register_buffer(name, torch.zeros(length))
        self.feature_std: Tensor
        self.feature_mean: Tensor
        self.semantic_mean: Tensor
        self.text_mean: Tensor
        nn.init.ones_(self.feature_std)

    def forward(
        self, features: Float[Tensor, "*batch features"], semantic: Float[Tensor, "*batch embedding"]
    ) -> Float[Tensor, "*batch embedding"]:
        """The joint embedding of features whose class names say `semantic`; not normalised."""
        dtype = features.dtype
        centred = (features - self.feature_mean.to(dtype)) / self.feature_std.to(dtype)
        learned = F.linear(F.linear(centred, self.place_in.weight.to(dtype)), self.place_out.weight.to(dtype))
        return semantic - self.semantic_mean.to(dtype) + learned


class CompactEncoder(nn.Module):
    """EfficientNet-Lite0 and MiniLM-L6 as a contrastive encoder, 29 MB, offline; for images of any size from 32 px."""

    image_size = 224
    any_size = True
    mean = (127 / 255, 127 / 255, 127 / 255)
    level_blocks = (2, 3, 4)
    """Stages whose maps `levels` joins: strides 8, 16 and 32."""

    def __init__(self) -> None:
        super().__init__()
        self.image = CompactImageTower()
        self.text = CompactTextTower()
        self.alignment = Alignment(self.image.width, self.text.width)

    def describe(self) -> dict[str, Any]:
        """The towers are always the embedded ones' architectures."""
        return {"compact": "EfficientNet-Lite0 and MiniLM-L6"}

    @property
    def width(self) -> int:
        """Width d of the joint space."""
        return self.text.width

    @property
    def feature_width(self) -> int:
        """Width of the features before the joint space."""
        return self.image.width

    @property
    def level_channels(self) -> int:
        """Channels of `levels`."""
        return self.image.encoder.level_channels(self.level_blocks)

    @property
    def level_side(self) -> int:
        """Rows and columns of `levels` on images of `image_size`."""
        return self.image_size // 32

    @property
    def logit_scale(self) -> float:
        """The trained inverse temperature of the similarities."""
        return float(self.alignment.log_scale.detach().float().exp())

    def feature_map(self, images: Images) -> Float[Tensor, "batch features rows columns"]:
        """Features of each place, one for 32 x 32 px, of images in [0, 1]."""
        return self.image.encoder(images)

    def features(self, images: Images) -> Float[Tensor, "batch features"]:
        """Pooled features of images in [0, 1]."""
        return self.image.encoder.pool(self.feature_map(images))

    def project(self, features: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch embedding"]:
        """Features to joint embeddings; not normalised."""
        logits = self.image.classifier(features.to(self.image.classifier.weight.dtype)).to(features.dtype)
        semantic = logits.softmax(dim=-1) @ self.image.class_names.to(features.dtype)
        return self.alignment(features, F.normalize(semantic, dim=-1))

    def encode_image(self, images: Images) -> Float[Tensor, "batch embedding"]:
        """Images to joint embeddings; not normalised."""
        return self.project(self.features(images))

    def encode_map(self, images: Images) -> Float[Tensor, "batch embedding rows columns"]:
        """The joint embedding of each place, one for 32 x 32 px."""
        return self.project(self.feature_map(images).movedim(1, -1)).movedim(-1, 1)

    def levels(self, images: Images) -> Float[Tensor, "batch channels rows columns"]:
        """Maps of three depths on the grid of the coarsest, one place for 32 x 32 px."""
        return self.image.encoder.levels(images, self.level_blocks)

    def observe(
        self, images: Images
    ) -> tuple[Float[Tensor, "batch features rows columns"], Float[Tensor, "batch channels level_rows level_columns"]]:
        """`feature_map` and `levels` of the same images, in one pass."""
        return self.image.encoder.observe(images, self.level_blocks)

    def encode_text(self, texts: Sequence[str]) -> Float[Tensor, "texts embedding"]:
        """Texts to joint embeddings; not normalised."""
        pooled = self.text.encode(texts).pooled
        return pooled - self.alignment.text_mean.to(pooled.dtype)

    def encode_words(
        self, texts: Sequence[str]
    ) -> tuple[Float[Tensor, "texts length embedding"], Bool[Tensor, "texts length"]]:
        """Each word's joint embedding, and which places hold words; their mean is about the text's embedding."""
        read = self.text.encode(texts)
        kept = read.mask[..., None].to(read.tokens.dtype)
        mean = (read.tokens * kept).sum(dim=1) / kept.sum(dim=1)
        scaled = read.tokens / mean.norm(dim=-1)[:, None, None]
        return scaled - self.alignment.text_mean.to(scaled.dtype), read.mask

    # What SC-AGIQA asks of BLIP: a text read in sight of an image.

    @property
    def grounded_width(self) -> int:
        """Width of `ground`'s states."""
        return 2 * self.width

    def look(self, images: Images) -> Float[Tensor, "batch places embedding"]:
        """What `ground` needs of an image: the joint embedding of each place."""
        return self.encode_map(images).flatten(2).transpose(1, 2)

    def read(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """What `ground` needs of texts: `text` (P, L, d), their words, and `mask` (P, L)."""
        words, mask = self.encode_words(texts)
        return {"text": words, "mask": mask}

    def ground(
        self,
        seen: Float[Tensor, "batch places embedding"],
        text: Float[Tensor, "batch length embedding"],
        mask: Bool[Tensor, "batch length"],
    ) -> Float[Tensor, "batch length grounded"]:
        """What the image shows at the places nearest to each word, and how the two agree.

        o_k = sum_p softmax_p(s cos(T_k, M_p)) M_p, and the states are [o_k; sqrt(d) T_k * o_k]. Without weights of its
        own; it stands for BLIP's image-grounded text encoder (ours, not the paper's).
        """
        similarity = F.normalize(text, dim=-1) @ F.normalize(seen, dim=-1).transpose(1, 2)
        attended = (self.logit_scale * similarity).softmax(dim=-1) @ seen
        agreed = text * attended * self.width**0.5
        return torch.cat([attended, agreed], dim=-1) * mask[..., None]
