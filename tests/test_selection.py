from __future__ import annotations

import gc
import itertools
import math
import random
import weakref

import numpy as np
import pytest
import torch

from aigiqa_reward.selection import TopK, integer, rank

NAN = float("nan")


def by_hand(scores: list[float]) -> list[int]:
    """Selection sort, straight from the words: best first, ties to the earlier, NaN last."""
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


@pytest.mark.parametrize("container", [list, tuple, np.array, torch.tensor, iter])
def test_rank_takes_any_container(container):
    assert rank(container([0.5, 2.0, NAN, 2.0, -1.0])) == [1, 3, 0, 4, 2]


def test_rank_of_nothing():
    assert rank([]) == []


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
            assert [held.index for held in top.items()] == expected
            assert [held.item for held in top.items()] == [f"item {index}" for index in expected]
            assert [held.score for held in top.items()] == [scores[index] for index in expected]


def test_ties_go_to_the_smaller_index_in_every_push_order():
    for order in itertools.permutations(range(4)):
        top = TopK(2)
        for index in order:
            top.push(1.0, index, None)
        assert [held.index for held in top.items()] == [0, 1]


def test_nan_never_enters_even_an_empty_one():
    top = TopK(3)
    assert not top.push(NAN, 0, "nothing")
    assert top.items() == []


def test_lets_go_of_displaced_items():
    class Item:
        pass

    top = TopK(2)
    references = []
    for index in range(50):
        item = Item()
        references.append(weakref.ref(item))
        top.push(float(index % 7), index, item)
        del item
    gc.collect()
    assert sum(reference() is not None for reference in references) == 2


def test_items_is_a_copy():
    top = TopK(1)
    top.push(1.0, 0, None)
    top.items().clear()
    assert len(top) == 1


@pytest.mark.parametrize("k", [True, 2.0, "3", None])
def test_k_must_be_an_integer(k):
    with pytest.raises(TypeError, match="k: expected an integer of at least 1, got"):
        TopK(k)


@pytest.mark.parametrize("k", [0, -1])
def test_k_must_be_positive(k):
    with pytest.raises(ValueError, match="k: expected an integer of at least 1, got"):
        TopK(k)


def test_integer_takes_whatever_python_counts_with():
    assert integer("n", np.int64(3), least=1) == 3
    assert integer("seed", -5) == -5
