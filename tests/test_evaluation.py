from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from aigiqa_reward.evaluation import (
    Logistic4,
    bootstrap_interval,
    bootstrap_intervals,
    centered,
    centered_srcc,
    correlations,
    fit_logistic4,
    group_mean_predictor,
    selection_gain,
    srcc,
    within,
)


@pytest.mark.parametrize("seed", range(2))
def test_correlations_agree_with_scipy_with_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=80).round(1)
    y = (x + rng.normal(size=80)).round(1)
    found = correlations(x, y)
    assert found.srcc == pytest.approx(stats.spearmanr(x, y)[0], abs=1e-12)
    assert found.plcc == pytest.approx(stats.pearsonr(x, y)[0], abs=1e-12)
    assert srcc(x.tolist(), y.tolist()) == found.srcc
    greater = np.sign(x[:, None] - x) * np.sign(y[:, None] - y)
    untied = math.sqrt(np.sum(x[:, None] != x) * np.sum(y[:, None] != y))
    assert found.krcc == pytest.approx(greater.sum() / untied, abs=1e-12)  # tau-b, from its definition


def test_fit_is_at_least_as_good_as_a_line_and_its_sign_is_in_srcc_only() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=200)
    y = 3 * x + rng.normal(size=200)
    found = correlations(100 * x + 7, y)
    line = np.polyval(np.polyfit(x, y, 1), x)
    assert found.rmse <= math.sqrt(np.mean((line - y) ** 2)) * 1.001  # in the target's units
    assert found.plcc_fitted >= found.plcc - 1e-3
    found = correlations(-x, 1 / (1 + np.exp(-x)))
    assert (found.srcc, found.krcc) == (pytest.approx(-1), pytest.approx(-1))
    assert found.plcc < -0.9
    assert found.plcc_fitted == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("constant", [0.1, 3e8])
def test_constants_have_no_correlation(constant: float) -> None:
    y = np.random.default_rng(0).normal(size=30)
    flat = np.full(30, constant)
    found = correlations(flat, y)
    assert all(math.isnan(v) for v in (found.srcc, found.plcc, found.plcc_fitted, found.krcc))
    assert found.rmse == pytest.approx(float(y.std()))
    assert math.isnan(correlations(y, flat).srcc)


@pytest.mark.parametrize(
    ("predicted", "target", "message"),
    [
        ([1, 2, 3, 4, math.nan], [1, 2, 3, 4, 5], "predicted: .*row 4"),
        ([1, 2, 3, 4, 5], [1, math.inf, 3, 4, 5], "target: .*row 1"),
        ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5], "equal lengths of at least 5, got 6 and 5"),
        ([1, 2, 3, 4], [1, 2, 3, 4], "equal lengths of at least 5, got 4 and 4"),
    ],
)
def test_malformed_input_is_refused(predicted: list[float], target: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        correlations(predicted, target)
    with pytest.raises(ValueError, match=message):
        fit_logistic4(predicted, target)


TRUE = [Logistic4(b1=4.5, b2=0.3, b3=0.4, b4=0.12), Logistic4(b1=0.2, b2=0.9, b3=-3.0, b4=2.0)]


@pytest.mark.parametrize("true", TRUE)
def test_logistic_recovers_the_curve_that_made_the_data(true: Logistic4) -> None:
    x = true.b3 + 5 * true.b4 * np.random.default_rng(0).uniform(-1, 1, size=300)
    y = true.b2 + (true.b1 - true.b2) / (1 + np.exp(-(x - true.b3) / abs(true.b4)))
    assert true(x) == pytest.approx(y)
    found = fit_logistic4(x, y)
    for name in ("b1", "b2", "b3", "b4"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=1e-4, abs=1e-4), name


def loop_gain(predicted: np.ndarray, target: np.ndarray, groups: np.ndarray) -> float:
    picked = possible = 0.0
    for group in set(groups.tolist()):
        rows = [i for i in range(len(groups)) if groups[i] == group]
        top = max(predicted[i] for i in rows)
        tied = [target[i] for i in rows if predicted[i] == top]
        mean = sum(target[i] for i in rows) / len(rows)
        picked += sum(tied) / len(tied) - mean
        possible += max(target[i] for i in rows) - mean
    return picked / possible


def test_selection_gain_at_its_ends_and_without_a_choice() -> None:
    rng = np.random.default_rng(0)
    target, groups = rng.normal(size=101) + 0.1, rng.integers(0, 12, size=101)
    assert selection_gain(np.full(101, 0.3), target, groups) == 0.0
    assert selection_gain(-target, target, groups) < 0
    offset = rng.normal(size=12)[groups]  # what is common to a group changes no choice
    assert selection_gain(target + offset, target, groups) == pytest.approx(1)
    assert math.isnan(selection_gain(target, target, np.arange(101)))
    assert math.isnan(selection_gain(target, np.full(101, 3.0), groups))
    with pytest.raises(ValueError, match="groups: expected 101 labels"):
        selection_gain(target, target, [0, 1])


def test_within_finds_the_variants_and_unknown_generators_are_refused() -> None:
    names = ["sd1.5_normal", "xl2.2_normal", "sd1.5_lowstep"]
    assert within(names, "sd1.5").tolist() == [True, False, True]
    with pytest.raises(ValueError, match=r"'glide'.*sd1\.5_lowstep"):
        within(names, "glide")
    with pytest.raises(ValueError, match=r"no training row of \['c'\]"):
        group_mean_predictor([1, 2], ["a", "b"], ["a", "c"])


def unbalanced_design(seed: int, rows: int = 300) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    first = rng.choice(8, size=rows, p=rng.dirichlet(np.ones(8)))
    second = (rng.integers(0, 30, size=rows) + first * rng.integers(0, 2, size=rows)) % 30
    return first, second, rng.normal(size=8)[first] + 5 * rng.normal(size=30)[second] + 100


@pytest.mark.parametrize("seed", range(3))
def test_centering_removes_additive_effects_exactly(seed: int) -> None:
    first, second, effects = unbalanced_design(seed)
    noise = np.random.default_rng(seed + 100).normal(size=len(effects))
    assert np.count_nonzero(centered(effects, first, second)) == 0
    both = centered(noise + effects, first, second)
    assert both == pytest.approx(centered(noise, first, second), abs=1e-8)
    dummies = np.hstack([first[:, None] == np.arange(8), second[:, None] == np.arange(30)]).astype(float)
    oracle = noise - dummies @ np.linalg.lstsq(dummies, noise, rcond=None)[0]
    assert both == pytest.approx(oracle, abs=1e-8)


def test_centered_srcc_sees_only_what_the_effects_do_not_explain() -> None:
    first, second, effects = unbalanced_design(0)
    rng = np.random.default_rng(1)
    signal = rng.normal(size=len(effects))
    assert centered_srcc(signal - 7 * effects, signal + effects, first, second) == pytest.approx(1)
    assert math.isnan(centered_srcc(effects, signal + effects, first, second))
    assert abs(centered_srcc(effects + rng.normal(size=300), effects + signal, first, second)) < 0.2
    with pytest.raises(ValueError, match="groupings: expected 300 labels"):
        centered(signal, first[:5])


@pytest.mark.parametrize("seed", range(2))
def test_centered_srcc_does_not_break_ties_by_rounding(seed: int) -> None:
    rows, columns = np.repeat(np.arange(5), 7), np.tile(np.arange(7), 5)
    predicted, target = np.random.default_rng(seed).integers(0, 4, size=(2, 5, 7))

    def exact(whole: np.ndarray) -> np.ndarray:
        return 35 * whole - 5 * whole.sum(axis=1, keepdims=True) - 7 * whole.sum(axis=0) + whole.sum()

    assert len(np.unique(exact(target))) < 35
    expected = stats.spearmanr(exact(predicted).ravel(), exact(target).ravel()).statistic
    found = centered_srcc(predicted.ravel() / 10, target.ravel() / 10, rows, columns)
    assert found == pytest.approx(expected, abs=1e-12)


def test_bootstrap_interval_covers_a_known_mean() -> None:
    rng = np.random.default_rng(0)
    groups, covered, trials = np.repeat(np.arange(50), 4), 0, 100
    for trial in range(trials):
        values = 2.0 + rng.normal(size=50)[groups] + 0.5 * rng.normal(size=200)  # alike within a group
        found = bootstrap_interval(lambda rows, _, v=values: float(v[rows].mean()), groups, repeats=100, seed=trial)
        covered += found.low <= 2.0 <= found.high
    assert 0.86 <= covered / trials <= 0.99  # resampling rows instead of groups would cover about 0.65


def test_a_group_drawn_twice_is_two_groups_with_all_its_rows() -> None:
    groups = np.random.default_rng(0).permutation(np.repeat(np.arange(20), np.arange(1, 21)))
    sizes = np.bincount(groups)
    repeated = []

    def statistic(rows: np.ndarray, ids: np.ndarray) -> float:
        assert len(set(ids.tolist())) == 20
        for copy in range(20):
            drawn = groups[rows[ids == copy]]
            assert len(set(drawn.tolist())) == 1
            assert len(set(rows[ids == copy].tolist())) == len(drawn) == sizes[drawn[0]]
        repeated.append(len(set(groups[rows].tolist())) < 20)
        return 0.0

    bootstrap_interval(statistic, groups, repeats=20)
    assert len(repeated) == 21 and not repeated[0] and any(repeated)  # the estimate has every group once


def test_bootstrap_is_seeded_and_paired() -> None:
    rng = np.random.default_rng(0)
    y, groups = rng.normal(size=100), np.repeat(np.arange(20), 5)
    a, b = y + rng.normal(size=100), y + rng.normal(size=100)

    def both(rows: np.ndarray, _: np.ndarray) -> np.ndarray:
        first, second = srcc(a[rows], y[rows]), srcc(b[rows], y[rows])
        return np.array([first, second, first - second, np.nan])

    one, two, difference, undefined = bootstrap_intervals(both, groups, repeats=50, level=0.9, seed=3)
    alone = bootstrap_interval(lambda rows, _: srcc(a[rows], y[rows]), groups, repeats=50, level=0.9, seed=3)
    assert one == alone
    assert one != bootstrap_interval(lambda rows, _: srcc(a[rows], y[rows]), groups, repeats=50, level=0.9, seed=4)
    assert difference.estimate == pytest.approx(one.estimate - two.estimate)
    assert math.isnan(undefined.low)
    wider = bootstrap_intervals(both, groups, repeats=50, level=0.99, seed=3)[0]
    assert wider.low < one.low < one.estimate < one.high < wider.high
    with pytest.raises(ValueError, match="repeats, level"):
        bootstrap_intervals(both, groups, level=1.0)
