"""Modules that several systems share, compared with plain numpy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from plain import array, attend, cosine, cross_attend, linear, relu, stir
from scipy.special import expit, softmax
from torch import Tensor, nn

from aigiqa_reward.models.base import FullPrecision, Standardize
from aigiqa_reward.models.blocks import (
    Anchor,
    CrossAttention,
    Experts,
    GatedFusion,
    LowRank,
    PromptCrossAttention,
    expected_level,
    level_probabilities,
)
from aigiqa_reward.models.cpa_iqa import smooth_maximum


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def double(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        return stir(build()).double().eval()


def test_smooth_maximum_lies_between_mean_and_maximum() -> None:
    values = rows(200, 7) / 3
    found = smooth_maximum(values, dim=1)
    plain = np.log(np.mean(np.exp(10 * array(values)), axis=1)) / 10
    assert np.allclose(found, plain, atol=1e-12)
    assert (found > values.mean(dim=1)).all()
    assert (found < values.max(dim=1).values).all()
    assert torch.allclose(found, smooth_maximum(values.T, dim=0))
    used = torch.tensor([True, False] * 3 + [True]).expand(200, -1)
    assert torch.allclose(smooth_maximum(values, 1, used), smooth_maximum(values[:, ::2], dim=1))


def test_levels_are_softmax_shares_and_span_from_0_to_their_number() -> None:
    images, levels = rows(3, 8), rows(3, 5, 8, seed=1)
    found = level_probabilities(images, levels, 7.0)
    for i in range(3):
        cosines = [cosine(array(images[i]), array(levels[i, j])) for j in range(5)]
        assert np.allclose(found[i], softmax(7 * np.array(cosines)))
    sure = torch.eye(5, dtype=torch.float64)
    assert torch.allclose(expected_level(sure), torch.tensor([0, 1.25, 2.5, 3.75, 5], dtype=torch.float64))
    assert torch.allclose(expected_level(torch.tensor([[0.5, 0.5]])), torch.tensor([1.0]))


def test_anchor_is_a_weighted_cosine() -> None:
    anchor, images, texts = Anchor().double(), rows(4, 6), rows(4, 6, seed=1)
    added, similarity = anchor(images, texts)
    plain = np.array([cosine(array(i), array(t)) for i, t in zip(images, texts, strict=True)])
    assert np.allclose(array(similarity), plain)
    assert np.allclose(array(added), 4 * array(anchor.weight) * plain)
    longer, _ = anchor(3 * images, texts / 7)
    assert torch.allclose(longer, added), "only the angle counts"


def test_low_rank_map_starts_at_zero_and_keeps_its_rank() -> None:
    features = rows(50, 20)
    fresh = LowRank(20, 16, 3).double()
    assert torch.equal(fresh(features), torch.zeros(50, 16, dtype=torch.float64))
    moved = double(lambda: LowRank(20, 16, 3))
    assert np.linalg.matrix_rank(array(moved(features) - moved(torch.zeros_like(features)))) == 3


@pytest.mark.parametrize(("shape", "axis"), [((40, 5), -1), ((8, 3, 5), -1), ((6, 2, 5, 4, 3), -3)])
def test_standardize_takes_each_channels_mean_and_deviation(shape: tuple[int, ...], axis: int) -> None:
    values = 2 + 3 * rows(*shape)
    module = Standardize(5, axis=axis).double()
    assert torch.equal(module(values), values), "the identity until it is fitted"
    module.fit(values)
    channels = np.moveaxis(array(values), axis, -1).reshape(-1, 5)
    deviation = channels.std(axis=0, ddof=1)
    plain = (channels - channels.mean(axis=0)) / (deviation + 0.1 * deviation.mean() + 1e-6)
    assert np.allclose(np.moveaxis(array(module(values)), axis, -1).reshape(-1, 5), plain)
    silent = torch.cat([values, 0 * values], dim=axis)
    module = Standardize(10, axis=axis).double()
    module.fit(silent)
    assert torch.isfinite(module(silent + 1)).all(), "a silent channel does not divide by 0"


def test_full_precision_is_never_lowered_however_deep_it_sits() -> None:
    inside: FullPrecision = Experts(8, 8)
    outside = nn.Sequential(nn.Linear(8, 8), inside, CrossAttention(8, 8), Standardize(8)).to(torch.bfloat16)
    assert outside[0].weight.dtype == torch.bfloat16
    for module in outside[1:]:
        assert {t.dtype for t in (*module.parameters(), *module.buffers())} == {torch.float32}
    assert {p.dtype for p in outside.double().parameters()} == {torch.float64}


def test_gated_fusion_is_its_equation() -> None:
    fusion = double(lambda: GatedFusion(6, 10, 8, hidden=5))
    coarse, fine = rows(4, 6), rows(4, 10, seed=1)
    found, gate = fusion(coarse, fine)
    c, f = array(coarse), array(fine)
    g = expit(linear(fusion.gate, relu(linear(fusion.hidden, np.concatenate([c, f], axis=1)))))
    assert np.allclose(array(gate), g)
    assert np.allclose(array(found), g * linear(fusion.coarse, c) + (1 - g) * linear(fusion.fine, f))


@pytest.mark.parametrize(("count", "top"), [(4, 3), (5, 5), (1, 1)])
def test_experts_answer_by_the_best_of_the_gate(count: int, top: int) -> None:
    experts = double(lambda: Experts(6, 7, experts=count, top=top))
    h = rows(20, 6)
    found, weights = experts(h)
    assert ((weights > 0).sum(dim=1) == top).all()
    assert torch.allclose(weights.sum(dim=1), torch.ones(20, dtype=torch.float64))
    for i in range(20):
        gate = linear(experts.gate[3], relu(linear(experts.gate[0], array(h[i]))))
        best = np.argsort(gate)[-top:]
        shares = np.exp(gate[best]) / np.exp(gate[best]).sum()
        assert np.allclose(array(weights[i])[best], shares)
        answers = [linear(e[3], relu(linear(e[0], array(h[i]))))[0] for e in experts.experts]
        assert np.isclose(array(found[i]), sum(s * answers[k] for s, k in zip(shares, best, strict=True)))


def test_start_at_sets_the_experts_biases() -> None:
    several, h = double(lambda: Experts(6, 7)), rows(9, 6)
    several.start_at(0.625)
    with torch.no_grad():
        for expert in several.experts:
            expert[3].weight.zero_()
    assert torch.allclose(several(h)[0], torch.full((9,), 0.625, dtype=torch.float64))


@pytest.mark.parametrize("memory", [8, 6], ids=["as wide", "narrower"])
def test_cross_attention_is_its_equation_over_the_places_kept(memory: int) -> None:
    module = double(lambda: CrossAttention(8, memory, heads=4))
    queries, places = rows(3, 2, 8), rows(3, 5, memory, seed=1)
    kept = torch.tensor([[True] * 5, [True, True, False, False, False], [False, True, False, True, True]])
    found = module(queries, places, kept)
    for i in range(3):
        plain = cross_attend(module, array(queries[i]), array(places[i, kept[i]]))
        assert np.allclose(array(found[i]), plain)


def test_prompt_attention_is_its_equation_over_the_words_kept() -> None:
    module = double(lambda: PromptCrossAttention(8, 6, rank=4, heads=2))
    image, words = rows(2, 8), rows(2, 5, 6, seed=1)
    kept = torch.tensor([[True] * 5, [True, True, False, False, False]])
    found = module(image, words, kept)
    assert abs(array(module.alpha)) > 0.01
    for i in range(2):
        read = array(words[i, kept[i]])
        query = linear(module.query, array(image[i : i + 1]))
        taken = attend(query, linear(module.key, read), linear(module.value, read), heads=2)
        plain = array(image[i]) + array(module.alpha) * linear(module.out, taken)[0]
        assert np.allclose(array(found[i]), plain)


def test_widths_and_counts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="top: expected from 1 to experts=4"):
        Experts(4, 4, experts=4, top=5)
    with pytest.raises(ValueError, match="width: expected a multiple of heads=8, got 12"):
        CrossAttention(12, 8)
    with pytest.raises(ValueError, match="rank: expected a multiple of heads=8, got 12"):
        PromptCrossAttention(16, 8, rank=12)
