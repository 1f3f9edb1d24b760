"""Modules that several systems share, compared with plain numpy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from plain import array, cross_attend, linear, relu, stir
from torch import Tensor, nn

from aigiqa_reward.models.base import FullPrecision, Standardize
from aigiqa_reward.models.blocks import CrossAttention, Experts
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


@pytest.mark.parametrize("memory", [8, 6], ids=["as wide", "narrower"])
def test_cross_attention_is_its_equation_over_the_places_kept(memory: int) -> None:
    module = double(lambda: CrossAttention(8, memory, heads=4))
    queries, places = rows(3, 2, 8), rows(3, 5, memory, seed=1)
    kept = torch.tensor([[True] * 5, [True, True, False, False, False], [False, True, False, True, True]])
    found = module(queries, places, kept)
    for i in range(3):
        plain = cross_attend(module, array(queries[i]), array(places[i, kept[i]]))
        assert np.allclose(array(found[i]), plain)
