"""LAION aesthetic predictor v2 (sac+logos+ava1-l14-linearMSE): how much people like the look of an image.

Schuhmann 2022, github.com/christophschuhmann/improved-aesthetic-predictor. Five linear layers without an activation,
so one affine map, on the normalized image embedding of OpenAI's CLIP ViT-L/14. The raw score is about 1 to 10.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aigiqa_reward.encoders.clip import VIT_L
from aigiqa_reward.models.base import FullPrecision
from aigiqa_reward.models.published import CLIPReward
from aigiqa_reward.types import Images, PromptFeatures
from aigiqa_reward.utils.weights import ASSETS, read_weights

HEAD_FILE = "sac+logos+ava1-l14-linearMSE.pth"
_LAYERS = (0, 2, 4, 6, 7)
_TEXT = ("text_model.", "text_projection.", "logit_scale")


class AffineHead(FullPrecision):
    """An affine map of embeddings (B, d) to scores (B,)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(()))

    def forward(self, embeddings: Tensor) -> Tensor:
        return embeddings @ self.weight + self.bias


class LAIONAesthetic(CLIPReward):
    """LAION aesthetic v2; the total is (raw - 1) / 9. It ignores prompts."""

    name = "laion_aesthetic"
    aspect = "quality"
    needs_prompts = False
    fit = "torchvision crop"
    sizes = VIT_L
    scale, shift = 1 / 9, -1 / 9
    head_file = HEAD_FILE

    def __init__(self, tower: Any) -> None:
        super().__init__(tower)
        del self.cosine, tower.clip.text_model, tower.clip.text_projection
        self.head = AffineHead(tower.clip.config.projection_dim)

    @classmethod
    def rename(cls, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        head = {name.removeprefix("head."): t for name, t in tensors.items() if name.startswith("head.")}
        image = {name: t for name, t in tensors.items() if not name.startswith(("head.", *_TEXT))}
        folded = fold_head(head) if head else read_weights(ASSETS / "laion_aesthetic" / "head.safetensors")
        return super().rename(image) | {f"head.{name}": tensor for name, tensor in folded.items()}

    def encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return {"none": self.head.weight.new_zeros(len(texts), 0)}

    def raw_scores(self, images: Images, prompts: PromptFeatures | None) -> dict[str, Tensor]:
        return {"raw": self.head(F.normalize(self.tower.encode_image(images), dim=-1))}


def fold_head(layers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fold the published layers into one weight (d,) and bias, in float64."""
    pairs = [(layers[f"layers.{i}.weight"].double(), layers[f"layers.{i}.bias"].double()) for i in _LAYERS]
    weight, bias = reduce(lambda first, then: (then[0] @ first[0], then[0] @ first[1] + then[1]), pairs)
    return {"weight": weight[0], "bias": bias[0]}
