"""Train the match: which of many captions an image has, in the space of EfficientNet-Lite2 and MiniLM's last layer.

    python examples/train_compact/match.py --agiqa3k DIR --biq2021 DIR --flickr8k DIR --visor DIR --runs DIR

What the frozen image tower sees and the text states before the last layer are computed once, in about half an hour on
one core. A step compares all images of a batch with all of its captions (InfoNCE), and each image with its caption made
wrong; it trains the probability that a caption is right, and which of its words are wrong.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from data import Sources, read_options
from loop import fit
from pairs import MatchSettings, Pairs
from texts import LAYER
from torch import Tensor, nn
from towers import published_tower

from aigiqa_reward.encoders.compact import MATCH_TOWER, CompactImageTower, CompactTextTower, TextFeatures
from aigiqa_reward.models.compact import CompactConfig, Matcher
from aigiqa_reward.utils.weights import write_weights

NEVER = -1e4
"""Logit of a caption that does not count."""

SCALES = {"scales": [2.7, 1.0, 1.0], "attention_scale": 2.0, "support_scale": 2.0}
"""Logarithms of the matcher's scales at the start; they are trained as logarithms."""


class Exponential(nn.Module):
    """Parametrization of a positive number by its logarithm."""

    def forward(self, logarithm: Tensor) -> Tensor:
        return logarithm.exp()

    def right_inverse(self, number: Tensor) -> Tensor:
        return number.log()


class Texts(NamedTuple):
    """What the matcher reads of P texts, and which of their tokens (P, L) are neither first, last nor padding."""

    read: dict[str, Tensor]
    inner: Tensor

    def rows(self, rows: slice) -> Texts:
        return Texts({name: x[rows] for name, x in self.read.items()}, self.inner[rows])

    def float(self) -> Texts:
        return Texts({name: x.float() for name, x in self.read.items()}, self.inner)


class MatchTraining(nn.Module):
    """The matcher with dropout, MiniLM's last layer, and the scale and bias of the probability of a match."""

    def __init__(self, text: CompactTextTower, image: CompactImageTower, settings: MatchSettings) -> None:
        super().__init__()
        self.layer = copy.deepcopy(text.layers.layers[LAYER]).requires_grad_(True)
        places = image.encoder.level_channels
        pooled = 2 * (image.encoder.width + places) + image.semantic_width
        self.matcher = Matcher(CompactConfig(), pooled, places, text.width)
        self.matcher.text_mean.copy_(image.class_names.mean(dim=0))
        self.matcher.bias.requires_grad_(False).zero_()  # `bias` here takes part in the probability alone
        for name, logarithm in SCALES.items():
            nn.utils.parametrize.register_parametrization(self.matcher, name, Exponential())
            setattr(self.matcher, name, torch.tensor(logarithm).exp())
        self.scale, self.bias = nn.Parameter(torch.zeros(())), nn.Parameter(torch.tensor(-4.0))  # scale: logarithm
        self.offset = nn.Parameter(torch.tensor(-1.0))  # of every token's support
        weak = (self.matcher.places[0], self.matcher.places[2], self.matcher.sentence[2], self.matcher.words[2])
        for linear in (self.matcher.pooled[0], self.matcher.pooled[2]):
            linear.register_forward_pre_hook(partial(_drop, share=settings.dropout))
        for linear in weak:
            linear.register_forward_pre_hook(partial(_drop, share=settings.weak_dropout))

    def read(self, states: Tensor, mask: Tensor) -> Texts:
        """Read texts from their states (P, L, 384) before the last layer."""
        states = self.layer(states, src_key_padding_mask=~mask)
        kept = mask[..., None].float()
        inner = mask.clone()
        inner[:, 0] = False
        inner[torch.arange(len(mask)), mask.sum(dim=1) - 1] = False
        pooled = F.normalize((states * kept).sum(dim=1) / kept.sum(dim=1), dim=-1)
        read = self.matcher.read(TextFeatures(states, inner, pooled))
        return Texts(read | {"offset": read["offset"] + self.offset}, inner)

    def compare_all(self, seen: dict[str, Tensor], texts: Texts) -> Tensor:
        """Compare B images with P texts, (B, P), as the matcher compares pairs."""
        matcher, read = self.matcher, texts.read
        likeness = read["words"].flatten(0, 1) @ seen["places"].flatten(0, 1).T
        likeness = likeness.unflatten(1, seen["places"].shape[:2])  # (P L, B, 64)
        sharp = (matcher.attention_scale * likeness).logsumexp(dim=-1).float() - np.log(likeness.shape[2])
        nearest = (sharp / matcher.attention_scale).unflatten(0, read["words"].shape[:2])  # (P, L, B)
        support = matcher.support_scale * nearest + read["offset"][..., None]
        weight = read["weight"] / read["weight"].sum(dim=1, keepdim=True)
        words = (weight[..., None] * support).sum(dim=1).T
        whole, place, by_word = matcher.scales
        return whole * seen["image"] @ read["sentence"].T + place * seen["semantic"] @ read["text"].T + by_word * words

    def logit(self, match: Tensor) -> Tensor:
        """Return the logit of the probability that the caption is right."""
        return self.scale.exp() * match + self.bias

    @torch.no_grad()
    def product(self) -> dict[str, Tensor]:
        """Return the weights under the names that the compact reward has for them."""
        matcher, scale = self.matcher, self.scale.exp()
        state = {name: x.clone() for name, x in matcher.state_dict().items() if "parametrizations" not in name}
        state |= {name: getattr(matcher, name) for name in SCALES}
        state |= {"scales": scale * state["scales"], "bias": self.bias}
        state["weights.bias"][1] += self.offset
        layer = {f"text.layers.layers.{LAYER}.{name}": x for name, x in self.layer.state_dict().items()}
        return layer | {f"matcher.{name}": x for name, x in state.items()}


def _drop(linear: nn.Module, inputs: tuple[Tensor], *, share: float) -> Tensor:
    return F.dropout(inputs[0], share, linear.training)


def mean(losses: Tensor, weights: Tensor) -> Tensor:
    return (losses * weights).sum() / weights.sum()


def loss_of(model: MatchTraining, rng: np.random.Generator, *, pairs: Pairs) -> Tensor:
    """Compute the loss of one step."""
    settings, batch = pairs.settings, pairs(rng)
    count, has = len(batch.weights), batch.has_wrong  # has: numbers of the images with a wrong caption
    able = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # elsewhere bfloat16 would take twenty times as long
    model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=able):
        seen, texts = model.matcher.look(**batch.seen), model.read(batch.states, batch.mask)
        everything = model.compare_all(seen, texts.rows(slice(count))).float()  # (images, captions)
    seen, texts = {name: x.float() for name, x in seen.items()}, texts.float()
    right, wrong = texts.rows(slice(count)), texts.rows(slice(count, None))
    match, support = model.matcher(seen, right.read)
    wrong_match, wrong_support = model.matcher({name: x[has] for name, x in seen.items()}, wrong.read)

    same = batch.texts[:, None] == batch.texts
    rows = torch.arange(count)
    others = everything.masked_fill(same & ~torch.eye(count, dtype=torch.bool), NEVER)
    own_wrong = torch.full((count,), NEVER).index_put((has,), wrong_match)
    of_image = F.cross_entropy(torch.cat([others, own_wrong[:, None]], dim=1), rows, reduction="none")
    of_text = F.cross_entropy(others.T, rows, reduction="none")
    loss = mean(of_image + of_text, batch.weights)
    loss = loss + settings.hard * mean(F.softplus(wrong_match - match[has]), batch.weights[has])

    shifted = (rows + int(rng.integers(1, count))) % count
    strangers = model.logit(everything[rows, shifted])[~same[rows, shifted]]
    probability = F.binary_cross_entropy_with_logits(model.logit(match), batch.weights) + F.softplus(strangers).mean()
    probability = probability + settings.wrong * F.softplus(model.logit(wrong_match)).mean()
    loss = loss + settings.probability * probability
    bad, inner = batch.bad & wrong.inner, wrong.inner
    words = mean(F.softplus(wrong_support), bad) + mean(F.softplus(-wrong_support), inner & ~bad) / 2
    words = words + mean(F.softplus(-support), right.inner * batch.weights[:, None]) / 2
    share = bad / bad.sum(dim=1, keepdim=True).clamp_min(1)
    lowest = F.cross_entropy((-wrong_support).masked_fill(~inner, NEVER), share)
    return loss + settings.words * words + settings.lowest * lowest


def train(sources: Sources, runs: Path, settings: MatchSettings, position: int = 1) -> None:
    """Train, or resume, and write `match.safetensors`."""
    torch.set_num_threads(1)
    pairs = Pairs(sources, settings, runs)
    torch.manual_seed(settings.seed)  # here, as computing the features draws numbers too
    model = fit(
        MatchTraining(pairs.tower, published_tower(MATCH_TOWER), settings),
        partial(loss_of, pairs=pairs),
        settings=settings,
        checkpoint=runs / "match.pt",
        sources=sources.describe(),
        start=pairs.standardize,
        slower={"layer.": settings.layer_rate},
        position=position,
    )
    write_weights(runs / "match.safetensors", model.product())


if __name__ == "__main__":
    train(*read_options(__doc__), MatchSettings())
