"""The prompts of each step."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch

from aigiqa_reward.finetuning.batch import Batch, Schedule, generator_of, seed_of

PROMPTS = [f"prompt {number}" for number in range(7)]


def schedule(**settings: Any) -> Schedule:
    return Schedule(**{"prompts": PROMPTS, "part_size": 2, "parts": 3, **settings})


def rows_of(batches: list[Batch]) -> dict[int, str]:
    return {row: prompt for batch in batches for row, prompt in zip(batch.rows, batch.prompts, strict=True)}


def test_every_prompt_comes_once_an_epoch() -> None:
    plan = schedule()
    shown = [prompt for step in range(7) for _, prompt in sorted(rows_of(plan.batches(step)).items())]
    epochs = [shown[start : start + 7] for start in range(0, 42, 7)]
    assert [Counter(epoch) for epoch in epochs] == [Counter(PROMPTS)] * 6
    assert len({tuple(epoch) for epoch in epochs}) == 6, "each in its own order"
    assert all([PROMPTS[place] for place in b.places] == list(b.prompts) for b in plan.batches(5))
    assert shown != [p for s in range(7) for _, p in sorted(rows_of(schedule(seed=1).batches(s)).items())]


def test_the_split_decides_nothing(step: int = 3) -> None:
    expected = rows_of(schedule(part_size=24, parts=1).batches(step))
    assert sorted(expected) == list(range(24))
    for part_size, parts in itertools.product((1, 2, 3, 4, 6), (1, 2, 4)):
        processes = 24 // (part_size * parts)
        plan = schedule(part_size=part_size, parts=parts, processes=processes)
        if plan.size != 24:
            continue
        shares = [plan.batches(step, process) for process in range(processes)]
        assert all(len(share) == parts and {len(batch) for batch in share} == {part_size} for share in shares)
        rows = [row for share in shares for batch in share for row in batch.rows]
        assert sorted(rows) == list(range(24))
        assert {row: prompt for share in shares for row, prompt in rows_of(share).items()} == expected
        assert {(b.size, b.step, b.round) for share in shares for b in share} == {(24, step, step)}


def test_rows_of_a_prompt_lie_side_by_side() -> None:
    plan = schedule(rows_per_prompt=3)
    shown = [prompt for step in range(7) for _, prompt in sorted(rows_of(plan.batches(step)).items())]
    groups = [shown[start : start + 3] for start in range(0, len(shown), 3)]
    assert all(len(set(group)) == 1 for group in groups)
    assert [Counter(g[0] for g in groups[start : start + 7]) for start in (0, 7)] == [Counter(PROMPTS)] * 2
    with pytest.raises(
        ValueError, match=r"2 rows x 3 accumulation steps x 2 processes = 12.* multiple of the 5 images per prompt"
    ):
        schedule(rows_per_prompt=5, processes=2)


def test_a_round_keeps_its_rows_and_draws() -> None:
    plan = schedule(round_of=lambda step: step // 3)
    every = [plan.batches(step) for step in range(7)]
    assert [batches[0].round for batches in every] == [0, 0, 0, 1, 1, 1, 2]
    assert [batches[0].step for batches in every] == list(range(7))
    assert rows_of(every[0]) == rows_of(every[2]) != rows_of(every[3])
    single = schedule()
    assert [rows_of(every[place]) for place in (0, 3, 6)] == [rows_of(single.batches(step)) for step in (0, 1, 2)]
    noise = [[torch.randn(2, generator=g).tolist() for g in batches[0].generators("noise")] for batches in every]
    assert noise[0] == noise[1] == noise[2] != noise[3]
    drawn = [batches[0].numbers("late step").random() for batches in every]
    assert len(set(drawn)) == 7, "what is drawn for a step is another in each"
    assert drawn[4] == every[4][2].numbers("late step").random(), "and one in all its parts"


def test_every_place_has_randomness_of_its_own() -> None:
    places = itertools.product((0, 1), ("noise", "order"), range(20), range(20))
    seeds = {seed_of(seed, purpose, *place) for seed, purpose, *place in places}
    assert len(seeds) == 2 * 2 * 20 * 20
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(1, "noise", 2, 3) != seed_of(1, "noise", 23) != seed_of(12, "noise", 3)
    first, second = (torch.randn(3, generator=generator_of(0, "x", 1)) for _ in range(2))
    assert torch.equal(first, second)
