"""Ranking and running selection against a selection sort; search plans step by step."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch

from aigiqa_reward.rewards.ranking import TopK, rank, spread
from aigiqa_reward.sampling import Halving, ZeroOrder
from aigiqa_reward.utils.checks import integer

NAN = float("nan")


def by_hand(scores: list[float]) -> list[int]:
    left = list(range(len(scores)))
    order = []
    while left:
        best = left[0]
        for index in left[1:]:
            if (math.isnan(scores[best]) and not math.isnan(scores[index])) or scores[index] > scores[best]:
                best = index
        left.remove(best)
        order.append(best)
    return order


def draw(generator: random.Random, count: int) -> list[float]:
    return [generator.choice([0.0, -0.0, 1.0, 2.5, -3.0, math.inf, -math.inf, NAN]) for _ in range(count)]


def test_rank_is_a_stable_selection_sort_with_nan_last():
    generator = random.Random(0)
    for count in range(12):
        for _ in range(20):
            scores = draw(generator, count)
            assert rank(scores) == by_hand(scores)
    for container in (tuple, np.array, torch.tensor, iter):
        assert rank(container([0.5, 2.0, NAN, 2.0, -1.0])) == [1, 3, 0, 4, 2]


@pytest.mark.parametrize("k", [1, 2, 5, 30])
def test_top_k_holds_what_ranking_everything_would_give(k):
    generator = random.Random(k)
    for _ in range(30):
        scores = draw(generator, 20)
        expected = [index for index in rank(scores) if not math.isnan(scores[index])][:k]
        for order in (range(20), reversed(range(20)), generator.sample(range(20), 20)):
            top = TopK(k)
            for index in order:
                asked = top.accepts(scores[index], index)
                assert top.push(scores[index], index, f"item {index}") is asked
                assert len(top) <= k
            top.items().clear()  # a copy
            assert [held.index for held in top.items()] == expected
            assert [held.item for held in top.items()] == [f"item {index}" for index in expected]
            assert [held.score for held in top.items()] == [scores[index] for index in expected]


def test_integers_are_pythons_and_numpys():
    for k, error in ((True, TypeError), (2.0, TypeError), ("3", TypeError), (0, ValueError)):
        with pytest.raises(error, match="k: expected an integer of at least 1, got"):
            TopK(k)
    assert integer("n", np.int64(3), least=1) == 3
    assert integer("seed", -5) == -5


def test_spread_takes_the_best_and_is_at_most_twice_as_narrow_as_possible():
    rng = random.Random(0)
    for _ in range(50):
        points = [(rng.random(), rng.random()) for _ in range(8)]
        distances = [[math.dist(a, b) for b in points] for a in points]

        def narrowest(chosen, distances=distances):
            return min(distances[a][b] for a, b in itertools.combinations(chosen, 2))

        taken = spread(distances, 3)
        assert taken[0] == 0
        assert taken == sorted(set(taken))
        assert narrowest(taken) >= max(narrowest(c) for c in itertools.combinations(range(8), 3) if 0 in c) / 2


def test_rounds_shrink_and_end_before_the_last_step():
    plan = Halving(at=(0.25, 0.5, 0.75), keep=0.5)
    assert [(r.step, r.survivors) for r in plan.rounds(16, 20)] == [(5, 8), (10, 4), (15, 2)]
    assert [(r.step, r.survivors) for r in plan.rounds(16, 20, least=6)] == [(5, 8), (10, 6)]
    assert [(r.step, r.survivors) for r in plan.rounds(16, 2)] == [(1, 4)]  # two fractions at one step: one round
    assert plan.rounds(16, 1) == [] == plan.rounds(1, 20)


def test_calls_are_those_of_a_walk_step_by_step():
    for plan in (Halving(), Halving(at=(0.25, 0.5, 0.75), keep=0.5), Halving(at=(0.9,), keep=0.1)):
        for n, steps, least in [(16, 20, 1), (7, 4, 3), (5, 1, 1)]:
            rounds = {r.step: r.survivors for r in plan.rounds(n, steps, least)}
            alive, calls = n, 0
            for step in range(steps):
                alive = rounds.get(step, alive)
                calls += alive
            assert plan.calls(n, steps, least) == calls
            assert alive >= min(n, least)


@pytest.mark.parametrize(
    ("plan", "arguments", "message"),
    [
        *((Halving, {"at": at}, "at: expected growing shares") for at in [(), (0.0,), (1.0,), (0.6, 0.3), (NAN,)]),
        *((Halving, {"keep": keep}, r"keep: expected a share in \(0, 1\)") for keep in [0.0, 1.0, NAN]),
        (ZeroOrder, {"radius": 0}, r"radius: expected a number in \(0, 1\], got 0"),
        (ZeroOrder, {"neighbors": 0}, "neighbors: expected an integer of at least 1"),
    ],
)
def test_plans_are_checked(plan, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        plan(**arguments)
