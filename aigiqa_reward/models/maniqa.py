"""MANIQA's quality head, as MA-AGIQA uses it: attention over channels, Swin blocks over places, a score and a weight.

Source: Yang et al., "MANIQA: Multi-dimension Attention Network for No-Reference Image Quality Assessment" (CVPR
Workshops 2022), in the layout that MA-AGIQA's released code has.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformerBlock

from aigiqa_reward.models.base import FullPrecision, Standardise


class TransposedAttention(FullPrecision):
    """Self-attention in which each channel is a token and the places are its features.

    Q, K, V = W_q x, W_k x, W_v x along the places; y = x + softmax(Q K' / sqrt(places)) V. Shape (B, channels, places).
    """

    def __init__(self, places: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(places, places) for _ in range(3))
        self.places = places

    def forward(self, maps: Float[Tensor, "batch channels places"]) -> Float[Tensor, "batch channels places"]:
        """The maps with what other channels add."""
        weights = (self.query(maps) @ self.key(maps).transpose(1, 2) / self.places**0.5).softmax(dim=-1)
        return maps + weights @ self.value(maps)


class ScaledSwin(FullPrecision):
    """Two Swin blocks, the second with shifted windows, behind a residual scale: y = x + scale blocks(x)."""

    def __init__(self, width: int, side: int, *, heads: int, window: int, scale: float) -> None:
        super().__init__()
        window = min(window, side)
        self.scale = scale
        self.blocks = nn.Sequential(
            *(
                SwinTransformerBlock(width, heads, [window, window], [shift, shift], mlp_ratio=2.0)
                for shift in (0, window // 2 if side > window else 0)
            )
        )

    def forward(self, maps: Float[Tensor, "batch width rows columns"]) -> Float[Tensor, "batch width rows columns"]:
        """Maps of the same shape."""
        return maps + self.scale * self.blocks(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ManiqaHead(FullPrecision):
    """From a tower's maps to MA-AGIQA's quality feature f_1 = S * W, one number a place.

    maps -> transposed attention x 2 -> 1 x 1 to width -> Swin -> transposed attention x 2 -> 1 x 1 to width / 2
    -> Swin; S = relu(MLP), W = sigmoid(MLP). With `smooth`, S = softplus(MLP): unlike the paper's it never leaves an
    image without a gradient, which relu does where every place is 0. In the paper 3072 channels of 28 x 28 places,
    width 768.

    Args:
        channels: of the maps.
        side: rows and columns of the maps.
        width: of the first stage; the second has half.
        heads: of the Swin blocks.
        window: of the Swin blocks, in places.
        scale: of the Swin blocks' contribution (0.1 in the source).
        dropout: in the score and weight branches.
        smooth: softplus in place of relu.
    """

    def __init__(
        self,
        channels: int,
        side: int,
        *,
        width: int,
        heads: int,
        window: int,
        scale: float,
        dropout: float,
        smooth: bool,
    ) -> None:
        super().__init__()
        places, half = side * side, width // 2
        self.smooth = smooth
        self.standard = Standardise(channels, axis=-3)
        self.first = nn.Sequential(TransposedAttention(places), TransposedAttention(places))
        self.reduce = nn.Conv2d(channels, width, 1)
        self.first_swin = ScaledSwin(width, side, heads=heads, window=window, scale=scale)
        self.second = nn.Sequential(TransposedAttention(places), TransposedAttention(places))
        self.halve = nn.Conv2d(width, half, 1)
        self.second_swin = ScaledSwin(half, side, heads=heads, window=window, scale=scale)
        self.score, self.weight = (
            nn.Sequential(nn.Linear(half, half), nn.ReLU(), nn.Dropout(dropout), nn.Linear(half, 1)) for _ in range(2)
        )

    def forward(
        self, maps: Float[Tensor, "batch channels rows columns"]
    ) -> tuple[Float[Tensor, "batch places"], Float[Tensor, "batch places"]]:
        """S * W and W, (B, rows * columns) each."""
        rows = maps.shape[2]
        x = self.first(self.standard(maps).flatten(2)).unflatten(2, (rows, -1))
        x = self.first_swin(self.reduce(x)).flatten(2)
        x = self.second(x).unflatten(2, (rows, -1))
        places = self.second_swin(self.halve(x)).flatten(2).transpose(1, 2)
        weight = torch.sigmoid(self.weight(places))[..., 0]
        score = F.softplus(self.score(places)) if self.smooth else F.relu(self.score(places))
        return score[..., 0] * weight, weight
