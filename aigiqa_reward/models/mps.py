"""MPS: CLIP ViT-H/14 and a cross-attention from the image to those words of the prompt that a condition concerns.

Zhang et al. 2024, "Learning Multi-dimensional Human Preference for Text-to-Image Generation". The published weights are
those of the overall preference. The raw score is exp(logit_scale) cos(prompt, attended image).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aigiqa_reward.encoders.clip import CLIPTower
from aigiqa_reward.models.published import CLIPReward
from aigiqa_reward.types import Images, PromptFeatures, at_least_float32
from aigiqa_reward.utils.io import read_json

CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)
"""The condition of the overall preference."""

_SIZES = {"dim": 1024, "layer_num": 4, "dim_head": 64, "heads": 16, "ff_mult": 4}
_END = 49407  # pads too, and pads are attended to
_KEPT = 0.01  # share of the row's greatest likeness to the condition above which a word is attended to


class MPS(CLIPReward):
    """MPS, overall; the total is raw / 26."""

    name = "mps"
    scale = 1 / 26

    def __init__(self, tower: CLIPTower, sizes: Mapping[str, int], condition: str) -> None:
        super().__init__(tower)
        self.cross_sizes, self.condition = dict(sizes), condition
        width, head, heads, factor = (sizes[key] for key in ("dim", "dim_head", "heads", "ff_mult"))
        self.layers = nn.ModuleList(_Layer(width, head, heads, factor) for _ in range(sizes["layer_num"]))

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> Self:
        return cls(CLIPTower(description["config"]), description["cross_model"], description["condition"])

    def describe(self) -> dict[str, Any]:
        return {"config": self.tower.config, "cross_model": self.cross_sizes, "condition": self.condition}

    @classmethod
    def read_description(cls, folder: Path | None) -> dict[str, Any]:
        file = None if folder is None else folder / "config.json"
        found = read_json(file) if file is not None and file.is_file() else {}
        cross = found.get("cross_model", _SIZES)
        own = {"cross_model": {key: cross[key] for key in _SIZES}, "condition": found.get("condition", CONDITION)}
        return super().read_description(folder) | own

    @classmethod
    def rename(cls, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = {name.removeprefix("mps."): tensor for name, tensor in tensors.items()}
        clip = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
        cross = {
            name.removeprefix("cross_model.").replace(".0.fn.", ".cross.", 1).replace(".1.fn.", ".own.", 1): tensor
            for name, tensor in tensors.items()
            if not name.startswith("model.") and not name.endswith("fn.norm.bias")  # a constant 0
        }
        return super().rename(clip) | cross

    def encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        clip = self.tower.clip
        ids = self.tower.tokenize([*texts, self.condition], padding=_END)
        states = clip.text_model(input_ids=ids)
        words, ends = clip.text_projection(states.last_hidden_state), clip.text_projection(states.pooler_output)
        likeness = (words[:-1] @ words[-1].T).amax(dim=2)
        kept = likeness / likeness.amax(dim=1, keepdim=True) > _KEPT
        return {"text": ends[:-1], "words": words[:-1], "kept": kept}

    def raw_scores(self, images: Images, prompts: PromptFeatures | None) -> dict[str, Tensor]:
        assert prompts is not None
        clip, words, kept = self.tower.clip, prompts.rows("words"), prompts.rows("kept")
        patches = clip.visual_projection(clip.vision_model(pixel_values=self.tower.square(images)).last_hidden_state)
        for layer in self.layers:
            patches = layer(patches, words, kept)
        cosine = self.cosine(at_least_float32(prompts.rows("text")), at_least_float32(patches[:, 0]))
        return {"raw": self.cosine.logit_scale.exp() * cosine}


class _Norm(nn.Module):
    """Layer norm without a bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, states: Tensor) -> Tensor:
        return F.layer_norm(states, states.shape[-1:], self.weight)


class _Rotary(nn.Module):
    """Rotary positions (L, width) of a head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 10000.0 ** -(torch.arange(0, width, 2) / width))
        self.inv_freq: Tensor

    def forward(self, states: Tensor) -> Tensor:
        places = torch.arange(states.shape[-2], device=states.device, dtype=self.inv_freq.dtype)
        angles = torch.outer(places, self.inv_freq).repeat(1, 2)
        first, second = states.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        return states * angles.cos().to(states.dtype) + turned * angles.sin().to(states.dtype)


def _swiglu(states: Tensor) -> Tensor:
    states, gate = states.chunk(2, dim=-1)
    return F.silu(gate) * states


def _attend(queries: Tensor, keys: Tensor, values: Tensor, heads: int, kept: Tensor | None = None) -> Tensor:
    """Attend with several heads of queries (B, L, heads * d) to one head of keys and values (B, K, d)."""
    mask = None if kept is None else kept[:, None, None, :]
    keys, values = (tensor[:, None].expand(-1, heads, -1, -1) for tensor in (keys, values))
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask).transpose(1, 2).flatten(2)


class _Cross(nn.Module):
    """Cross-attention to the words, and a feed-forward layer beside it."""

    def __init__(self, width: int, head: int, heads: int, factor: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = _Norm(width)
        self.to_q = nn.Linear(width, heads * head, bias=False)
        self.to_kv = nn.Linear(width, 2 * head, bias=False)
        self.to_out = nn.Linear(heads * head, width, bias=False)
        self.ff = nn.ModuleDict(
            {"0": nn.Linear(width, 2 * factor * width, bias=False), "2": nn.Linear(factor * width, width, bias=False)}
        )

    def forward(self, states: Tensor, words: Tensor, kept: Tensor) -> Tensor:
        states = self.norm(states)
        keys, values = self.to_kv(words).chunk(2, dim=-1)
        queries = self.to_q(states).unflatten(2, (self.heads, -1)).transpose(1, 2)
        attended = _attend(queries, keys, values, self.heads, kept)
        return self.to_out(attended) + self.ff["2"](_swiglu(self.ff["0"](states)))


class _Own(nn.Module):
    """Self-attention and a feed-forward layer beside it, in one projection."""

    def __init__(self, width: int, head: int, heads: int, factor: int) -> None:
        super().__init__()
        self.heads, self.parts = heads, (heads * head, head, head, 2 * factor * width)
        self.norm = _Norm(width)
        self.rotary_emb = _Rotary(head)
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.parts), bias=False)
        self.attn_out = nn.Linear(heads * head, width, bias=False)
        self.ff_out = nn.ModuleDict({"1": nn.Linear(factor * width, width, bias=False)})

    def forward(self, states: Tensor) -> Tensor:
        queries, keys, values, forward = self.fused_attn_ff_proj(self.norm(states)).split(self.parts, dim=-1)
        queries = self.rotary_emb(queries.unflatten(2, (self.heads, -1)).transpose(1, 2))
        attended = _attend(queries, self.rotary_emb(keys), values, self.heads)
        return self.attn_out(attended) + self.ff_out["1"](_swiglu(forward))


class _Layer(nn.Module):
    """A layer of the cross model, with both residuals."""

    def __init__(self, width: int, head: int, heads: int, factor: int) -> None:
        super().__init__()
        self.cross, self.own = _Cross(width, head, heads, factor), _Own(width, head, heads, factor)

    def forward(self, states: Tensor, words: Tensor, kept: Tensor) -> Tensor:
        states = states + self.cross(states, words, kept)
        return states + self.own(states)
