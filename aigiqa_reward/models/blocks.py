"""Modules that several systems share: gated fusion, cross-attention, experts, score heads, level similarity."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from aigiqa_reward.models.base import FullPrecision


class GatedFusion(FullPrecision):
    """Fusion of a coarse and a fine embedding by a learned gate: z and g (..., width) (MST-CLIPIQA).

    g = sigmoid(W_g relu(W_h [f_c; f_f])), z = g * (W_c f_c) + (1 - g) * (W_f f_f).
    """

    def __init__(self, coarse: int, fine: int, width: int, hidden: int = 128) -> None:
        super().__init__()
        self.coarse = nn.Linear(coarse, width)
        self.fine = nn.Linear(fine, width)
        self.hidden = nn.Linear(coarse + fine, hidden)
        self.gate = nn.Linear(hidden, width)

    def forward(self, coarse: Tensor, fine: Tensor) -> tuple[Tensor, Tensor]:
        gate = torch.sigmoid(self.gate(F.relu(self.hidden(torch.cat([coarse, fine], dim=-1)))))
        return gate * self.coarse(coarse) + (1 - gate) * self.fine(fine), gate


class PromptCrossAttention(FullPrecision):
    """Low-rank attention from an image embedding to the words of its prompt (MST-CLIPIQA's prompt branch).

    z' = z + alpha * W_o attention(W_q z, W_k T, W_v T) over the words T (B, L, words) that the mask (B, L) keeps; alpha
    starts at 0, so that an untrained branch changes nothing. The low rank is our inference; it keeps the branch small.
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

    def forward(self, image: Tensor, words: Tensor, mask: Tensor) -> Float[Tensor, "batch width"]:
        sequences = (self.query(image)[:, None], self.key(words), self.value(words))
        query, key, value = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in sequences)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
        return image + self.alpha * self.out(attended.transpose(1, 2).flatten(2)[:, 0])


class CrossAttention(FullPrecision):
    """Multi-head attention, and a projection, of (B, Q, width) to the places of (B, L, memory) that a mask keeps."""

    def __init__(self, width: int, memory: int, *, heads: int = 8) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width: expected a multiple of heads={heads}, got {width}")
        self.attention = nn.MultiheadAttention(width, heads, kdim=memory, vdim=memory, batch_first=True)

    def forward(self, queries: Tensor, memory: Tensor, mask: Tensor) -> Float[Tensor, "batch queries width"]:
        return self.attention(queries, memory, memory, key_padding_mask=~mask, need_weights=False)[0]


class Experts(FullPrecision):
    """A mixture of experts, of which a gate takes the best few per row (MoER in SC-AGIQA, eq. 10).

    y = sum over the top k of p_e f_e(h), p = softmax(gate(h)) renormalized over the k taken (the renormalization is
    our inference). Each expert, and the gate, is width -> hidden -> out with a ReLU between. Returns y (B,) and each
    expert's weight (B, experts), 0 for those not taken.
    """

    def __init__(self, width: int, hidden: int, *, experts: int = 4, top: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        if not 1 <= top <= experts:
            raise ValueError(f"top: expected from 1 to experts={experts}, got {top}")

        def layers(out: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, out))

        self.top = top
        self.gate = layers(experts)
        self.experts = nn.ModuleList(layers(1) for _ in range(experts))

    def start_at(self, mean: float) -> None:
        for name, parameter in self.experts.named_parameters():
            if name.endswith("3.bias"):  # of the last layer
                nn.init.constant_(parameter, mean)

    def forward(self, h: Float[Tensor, "batch width"]) -> tuple[Tensor, Tensor]:
        logits = self.gate(h)
        taken = torch.zeros_like(logits, dtype=torch.bool).scatter(1, logits.topk(self.top, dim=1).indices, True)
        weights = logits.masked_fill(~taken, -torch.inf).softmax(dim=1)
        answers = torch.cat([expert(h) for expert in self.experts], dim=1)
        return (weights * answers).sum(dim=1), weights


class LowRank(FullPrecision):
    """A linear map of low rank that starts at zero: an adapter of a frozen tower."""

    def __init__(self, width: int, out: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank)
        self.up = nn.Linear(rank, out, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, features: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch out"]:
        return self.up(self.down(features))


class Anchor(FullPrecision):
    """A term of the correspondence score, weight * s cos(e, t), and the cosine, for embeddings (B, d); s is fixed.

    Ours: on towers not aligned by a CLIP, cross-attention alone does not learn the match from a few hundred prompts.
    """

    SCALE = 4.0
    """s: the std of a cosine on the compact towers is about a quarter, so that s cos has order 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.03))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        similarity = F.cosine_similarity(image, text.to(image.dtype), dim=1)
        return self.weight * self.SCALE * similarity, similarity


class ScoreHead(FullPrecision):
    """One number (...) from embeddings (..., d): d -> hidden -> 1 with a ReLU between, unbounded."""

    def __init__(self, width: int, hidden: int = 128) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, 1)

    def forward(self, embedding: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch"]:
        return self.out(F.relu(self.hidden(embedding)))[..., 0]


def level_probabilities(
    image: Float[Tensor, "batch width"], levels: Float[Tensor, "batch levels width"], scale: float
) -> Float[Tensor, "batch levels"]:
    """Compute the softmax over scaled cosine similarities of each image to its own level texts (TSP-MGS eq. 3)."""
    return (scale * F.cosine_similarity(image[:, None], levels, dim=-1)).softmax(dim=-1)


def expected_level(probabilities: Float[Tensor, "batch levels"]) -> Float[Tensor, " batch"]:
    """Compute L / (L - 1) * (sum_j j p_j - 1), j = 1..L: 0 at the worst level, L at the best (TSP-MGS eq. 5)."""
    count = probabilities.shape[1]
    levels = torch.arange(1, count + 1, device=probabilities.device, dtype=probabilities.dtype)
    return count / (count - 1) * ((probabilities * levels).sum(dim=1) - 1)


def masked_mean(values: Float[Tensor, "batch length *rest"], mask: Bool[Tensor, "batch length"]) -> Tensor:
    """Average over the entries of dimension 1 that `mask` keeps; 0 where it keeps none."""
    kept = mask.view(*mask.shape, *[1] * (values.ndim - 2)).to(values.dtype)
    return (values * kept).sum(dim=1) / kept.sum(dim=1).clamp_min(1)
