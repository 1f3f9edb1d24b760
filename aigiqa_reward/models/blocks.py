"""Modules that several systems share: gated fusion, prompt cross-attention, score heads, level similarity."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from aigiqa_reward.models.base import FullPrecision
from aigiqa_reward.types import Images


class GatedFusion(FullPrecision):
    """Fuse a coarse and a fine embedding by a learned gate (MST-CLIPIQA).

    g = sigmoid(W_g relu(W_h [f_c; f_f])), z = g * (W_c f_c) + (1 - g) * (W_f f_f), where the gate sees the embeddings
    as they come in. Shapes: f_c (..., d_c), f_f (..., d_f), z and g (..., d).

    Args:
        coarse: width d_c of the coarse embedding.
        fine: width d_f of the fine embedding.
        width: joint width d.
        hidden: width of the gate's hidden layer (128 in the source).
    """

    def __init__(self, coarse: int, fine: int, width: int, hidden: int = 128) -> None:
        super().__init__()
        self.coarse = nn.Linear(coarse, width)
        self.fine = nn.Linear(fine, width)
        self.hidden = nn.Linear(coarse + fine, hidden)
        self.gate = nn.Linear(hidden, width)

    def forward(
        self, coarse: Float[Tensor, "*batch coarse"], fine: Float[Tensor, "*batch fine"]
    ) -> tuple[Float[Tensor, "*batch width"], Float[Tensor, "*batch width"]]:
        """The fused embedding z and the gate g."""
        gate = torch.sigmoid(self.gate(F.relu(self.hidden(torch.cat([coarse, fine], dim=-1)))))
        return gate * self.coarse(coarse) + (1 - gate) * self.fine(fine), gate


class PromptCrossAttention(FullPrecision):
    """Attend from an image embedding to the words of its prompt through a low rank (MST-CLIPIQA's prompt branch).

    z' = z + alpha * W_o attention(W_q z, W_k T, W_v T) over the words T that `mask` keeps; alpha starts at 0,
    so that an untrained branch changes nothing. The rank-r factorisation is our inference; it keeps the branch small.
    """

    def __init__(self, width: int, words: int, *, rank: int = 32, heads: int = 8) -> None:
        super().__init__()
        if rank % heads:
            raise ValueError(f"rank: expected a multiple of heads={heads}, got {rank}")
        self.heads = heads
        self.query = nn.Linear(width, rank)
        self.key = nn.Linear(words, rank)
        self.value = nn.Linear(words, rank)
        self.out = nn.Linear(rank, width)
        self.alpha = nn.Parameter(torch.zeros(()))

    def forward(
        self,
        image: Float[Tensor, "batch width"],
        words: Float[Tensor, "batch length words"],
        mask: Bool[Tensor, "batch length"],
    ) -> Float[Tensor, "batch width"]:
        """The image embedding with what its prompt adds."""
        query = self._split(self.query(image)[:, None])
        attended = F.scaled_dot_product_attention(
            query, self._split(self.key(words)), self._split(self.value(words)), attn_mask=mask[:, None, None]
        )
        return image + self.alpha * self.out(attended.transpose(1, 2).flatten(2)[:, 0])

    def _split(self, sequence: Float[Tensor, "batch length rank"]) -> Float[Tensor, "batch heads length part"]:
        return sequence.unflatten(2, (self.heads, -1)).transpose(1, 2)


class ScoreHead(FullPrecision):
    """One number from an embedding: d -> hidden -> 1 with a ReLU between."""

    def __init__(self, width: int, hidden: int = 128) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, 1)

    def forward(self, embedding: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch"]:
        """The score, unbounded."""
        return self.out(F.relu(self.hidden(embedding)))[..., 0]


def colour_histogram(images: Images, steps: int) -> Float[Tensor, "batch bins"]:
    """Shares of the colours in each image (B, 3, H, W) on a grid of `steps` levels a channel: (B, steps^3), sum 1.

    A pixel's share is spread over the levels around it by a Gaussian whose deviation is half of their distance, so
    that the histogram is smooth in the pixels; colours are averaged over a grid of 32 x 32 places first. Computed in
    at least float32.
    """
    small = F.adaptive_avg_pool2d(images if images.dtype == torch.float64 else images.float(), 32).flatten(2)
    levels = torch.linspace(0, 1, steps, device=images.device, dtype=small.dtype)
    shares = (-2 * ((small[..., None] - levels) * (steps - 1)) ** 2).softmax(dim=-1)
    red, green, blue = shares.unbind(dim=1)
    return torch.einsum("bpi,bpj,bpk->bijk", red, green, blue).flatten(1) / small.shape[2]


def level_probabilities(
    image: Float[Tensor, "batch width"], levels: Float[Tensor, "batch levels width"], scale: float
) -> Float[Tensor, "batch levels"]:
    """Softmax over scaled cosine similarities of each image to its own L level texts (TSP-MGS eq. 3)."""
    return (scale * F.cosine_similarity(image[:, None], levels, dim=-1)).softmax(dim=-1)


def expected_level(probabilities: Float[Tensor, "batch levels"]) -> Float[Tensor, " batch"]:
    """L / (L - 1) * (sum_j j p_j - 1) for levels j = 1..L: 0 at the worst level, L at the best (TSP-MGS eq. 5)."""
    count = probabilities.shape[1]
    levels = torch.arange(1, count + 1, device=probabilities.device, dtype=probabilities.dtype)
    return count / (count - 1) * ((probabilities * levels).sum(dim=1) - 1)
