"""The stop rule on sequences whose truth is known."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats
from validated import made_up

from aigiqa_reward.finetuning.early_stopping import Monitor, paired
from aigiqa_reward.utils.run_folder import to_json

P, S = 8, 4


class Sequence:
    def __init__(self, seed: int, prompts: int = P) -> None:
        self.random = np.random.default_rng(seed)
        self.base = self.random.normal(0, 1, (prompts, 1)) + self.random.normal(0, 0.5, (prompts, S))

    def noisy(self, mean: float) -> np.ndarray:
        by_prompt = self.random.normal(0, 0.1, (len(self.base), 1))
        return self.base + mean + by_prompt + self.random.normal(0, 0.1, self.base.shape)

    def result(self, step: int, holdout: float, reward: float, **more: Any):
        return made_up(step, self.noisy(holdout), self.noisy(reward), **more)


def run(seed: int, holdouts: list[float], rewards: list[float], monitor: Monitor | None = None) -> Monitor:
    monitor, sequence = monitor or Monitor(), Sequence(seed)
    for place, (holdout, reward) in enumerate(zip(holdouts, rewards, strict=True)):
        if monitor.add(10 * place, sequence.result(10 * place, holdout, reward)):
            break
    return monitor


def resumed(monitor: Monitor) -> Monitor:
    other = Monitor()
    other.load(json.loads(to_json(monitor.state())))
    return other


RISING = [0.3 * i for i in range(10)]
HACKED = [0.0, 0.3, 0.6, 0.9, 0.2, -0.4, -1.0, -1.6, -2.2, -2.8]


def test_hacking_is_stopped_after_the_patience_and_the_best_is_kept() -> None:
    for seed in range(10):
        monitor = run(seed, HACKED, RISING)
        assert monitor.last_step == 50
        assert monitor.best_step == 30
        assert monitor.stop is not None
        assert monitor.stop.startswith("step 50: the held-out reward has fallen")
        assert "(step 30)" in monitor.stop


def test_what_is_no_hacking_does_not_stop() -> None:
    up_and_down = [0.0, 0.5, -1.0, 0.6, -1.0, 0.7, -1.0, 0.8, -1.0, 0.9]
    assert run(0, up_and_down, RISING).stop is None
    assert run(0, HACKED, [-value for value in RISING]).stop is None, "both fall"
    for seed in range(10):
        monitor = run(seed, RISING, RISING)
        assert (monitor.stop, monitor.best_step) == (None, 90)
    assert run(0, HACKED, RISING, Monitor(patience=4)).last_step == 70


@pytest.mark.parametrize("rewards", [[0.0] * 10, RISING], ids=["nothing changes", "the reward rises"])
def test_noise_alone_seldom_stops(rewards: list[float]) -> None:
    stopped = sum(run(seed, [0.0] * 10, rewards).stop is not None for seed in range(80))
    assert stopped <= 4


def test_ties_go_to_the_earlier() -> None:
    monitor = Monitor()
    for step in (0, 10, 20):
        monitor.add(step, made_up(step, [[1.0, 2.0]], [[float(step)] * 2]))
    assert monitor.best_step == 0
    assert monitor.best_holdout == 1.5


@pytest.mark.parametrize(
    ("first", "later", "reason"),
    [
        ({}, {"diversity": 0.09}, "differ 45%"),
        ({}, {"saturation": 0.13}, "13% of the pixel values"),
        ({}, {"diversity": 0.11, "saturation": 0.10}, None),
        # Three times 40 % is more than all there is; the bound is then 80 %, two thirds of the rest.
        ({"saturation": 0.4}, {"saturation": 0.79}, None),
        ({"saturation": 0.4}, {"saturation": 0.81}, "81% of the pixel values"),
    ],
)
def test_collapse_and_saturation_are_relative_to_the_first(first: Any, later: Any, reason: str | None) -> None:
    monitor, sequence = Monitor(), Sequence(0)
    assert monitor.add(0, sequence.result(0, 0, 0, **first)) is None
    assert monitor.add(10, sequence.result(10, 0.5, 0.5, **later)) is None
    stop = monitor.add(20, sequence.result(20, 1.0, 1.0, **later))
    assert stop is None if reason is None else reason in (stop or "")


def test_images_that_are_not_finite() -> None:
    monitor, random = Monitor(), np.random.default_rng(0)
    scores = random.normal(size=(P, S))
    monitor.add(0, made_up(0, scores, scores))
    few = scores + 1
    few[0, :2] = np.nan
    assert monitor.add(10, made_up(10, few, few, bad=2)) is None
    assert monitor.best_step == 0
    many = np.full((P, S), np.nan)
    reason = monitor.add(20, made_up(20, many, many, diversity=np.nan, saturation=np.nan, bad=P * S))
    assert reason == "step 20: 32 of 32 validation images are not finite"
    assert monitor.best_step == 0


def test_the_paired_difference_is_scipys_over_the_prompts_means() -> None:
    random = np.random.default_rng(0)
    now, before = random.normal(size=(2, P, S))
    mean, error, units = paired(now, before)
    expected = stats.ttest_rel(now.mean(axis=1), before.mean(axis=1))
    assert units == P
    assert mean / error == pytest.approx(expected.statistic)
    one = stats.ttest_rel(now[0], before[0])
    mean, error, units = paired(now[:1], before[:1])
    assert (mean / error, units) == (pytest.approx(one.statistic), S)
    gaps = now.copy()
    gaps[3], gaps[4, 0] = np.nan, np.nan
    mean, _, units = paired(gaps, before)
    rows = [0, 1, 2, 5, 6, 7]
    differences = [*(now[rows] - before[rows]).mean(axis=1), (now[4, 1:] - before[4, 1:]).mean()]
    assert (mean, units) == (pytest.approx(np.mean(differences)), P - 1)


def test_a_single_image_never_proves_a_fall() -> None:
    monitor = Monitor()
    for place in range(6):
        assert monitor.add(place, made_up(place, [[-float(place)]], [[float(place)]])) is None


@pytest.mark.parametrize("interrupted", [1, 3, 5])
def test_a_resumed_monitor_decides_the_same(interrupted: int) -> None:
    sequence = Sequence(3)
    results = [sequence.result(10 * i, HACKED[i], RISING[i]) for i in range(8)]
    whole, part = Monitor(), Monitor()
    for result in results:
        whole.add(result.step, result)
    for result in results[:interrupted]:
        part.add(result.step, result)
    part = resumed(part)
    for result in results[interrupted:]:
        part.add(result.step, result)
    assert whole.stop is not None
    assert part.state() == whole.state()


def test_nothing_finite_from_the_start_has_no_best() -> None:
    monitor = Monitor()
    nothing = made_up(0, [[np.nan]], [[np.nan]], diversity=np.nan, saturation=np.nan, bad=1)
    assert monitor.add(0, nothing) is not None
    assert monitor.best_step is None
    assert math.isnan(monitor.best_holdout)
    again = resumed(monitor)
    assert to_json(again.state()) == to_json(monitor.state())
    assert again.stop == monitor.stop
