from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from test_evaluation import loop_gain

from aigiqa_reward.evaluation import (
    PUBLISHED,
    ProtocolReport,
    SplitScores,
    centered,
    correlations,
    fit_logistic4,
    published_markdown,
    ridge_predict,
    score_split,
)

MEASURES = [field.name for field in fields(SplitScores) if field.type == "float"]
CORRELATIONS = ("srcc", "krcc", "plcc", "plcc_fitted")
GENERATORS = ("sd1.5_a", "sd1.5_b", "sd1.5_c", "good_x", "bad_y")


def make_split(seed: int = 0, prompts: int = 12) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    prompt, generator = np.divmod(rng.permutation(prompts * 5)[: prompts * 5 - 4], 5)
    target = np.array([2.5, 2.6, 2.4, 4.0, 1.0])[generator] + rng.normal(size=len(prompt))
    return {
        "predicted": (target + rng.normal(size=len(prompt))).round(1),
        "target": target,
        "prompts": [f"prompt {p}" for p in prompt],
        "generators": [GENERATORS[g] for g in generator],
    }


def entry(seed: int, predictor: str = "model", task: str = "quality", **values: Any) -> SplitScores:
    return SplitScores(
        **{"seed": seed, "predictor": predictor, "task": task, "images": 48, **dict.fromkeys(MEASURES, 0.5), **values}
    )


def report(*scores: SplitScores) -> ProtocolReport:
    return ProtocolReport(title="Benchmark: model", protocol="groups by prompt, 80/20", scores=scores)


def dummies(*groupings: list[str]) -> np.ndarray:
    return np.hstack([np.array(labels)[:, None] == np.unique(labels) for labels in groupings]).astype(float)


def test_scores_of_a_split_agree_with_scipy_loops_and_least_squares() -> None:
    seed, split = 0, make_split()
    x, y, prompts = split["predicted"], split["target"], split["prompts"]
    wrong = np.random.default_rng(seed).integers(0, 5, size=(len(x), 3)).astype(float)
    found = score_split(seed, "model", task="quality", wrong_prompt=wrong, **split)
    assert (*found.key, found.images) == (seed, "model", "quality", len(x))
    assert found.srcc == pytest.approx(stats.spearmanr(x, y)[0])
    assert found.krcc == pytest.approx(stats.kendalltau(x, y)[0])
    assert found.plcc == pytest.approx(stats.pearsonr(x, y)[0])
    fitted = fit_logistic4(x, y)(x)
    assert found.plcc_fitted == pytest.approx(stats.pearsonr(fitted, y)[0])
    assert found.rmse == pytest.approx(math.sqrt(np.mean((fitted - y) ** 2)))
    assert found.gain == pytest.approx(loop_gain(x, y, np.array(prompts)))
    inside = [i for i in range(len(x)) if split["generators"][i].startswith("sd1.5")]
    assert found.gain_within == pytest.approx(loop_gain(x[inside], y[inside], np.array(prompts)[inside]))
    design = dummies(prompts, split["generators"])
    untied = x + 0.01 * np.random.default_rng(seed).normal(size=len(x))  # rounding would part ties of what is left
    left = [values - design @ np.linalg.lstsq(design, values, rcond=None)[0] for values in (untied, y)]
    centered_on_both = score_split(seed, "model", task="quality", **{**split, "predicted": untied}).centered_srcc
    assert centered_on_both == pytest.approx(stats.spearmanr(*left)[0])
    wins = [np.sign(x[i] - wrong[i, k]) / 2 + 0.5 for i in range(len(x)) for k in range(3)]
    assert found.right_prompt_auc == pytest.approx(sum(wins) / len(wins))


def test_undefined_measures_are_nan() -> None:
    split = make_split()
    rows = len(split["target"])

    def undefined(**changes: Any) -> set[str]:
        scores = score_split(0, "model", task="quality", **{**split, **changes})
        return {name for name in MEASURES if math.isnan(getattr(scores, name))}

    assert undefined() == {"right_prompt_auc"}
    alike = {*CORRELATIONS, "centered_srcc", "right_prompt_auc"}
    assert undefined(predicted=np.full(rows, 0.3)) == alike
    assert undefined(target=np.full(rows, 3.0)) == {*alike, "gain", "gain_within"}
    assert undefined(same_generator="glide") == undefined(same_generator=None) == {"gain_within", "right_prompt_auc"}
    alone = {"centered_srcc", "gain", "gain_within", "right_prompt_auc"}
    assert undefined(prompts=[str(i) for i in range(rows)]) == alone
    of_generator = [len(name) + ord(name[0]) for name in split["generators"]]
    assert undefined(predicted=of_generator) == {"centered_srcc", "right_prompt_auc"}
    flat = score_split(0, "constant", task="quality", **{**split, "predicted": np.full(rows, 0.3)})
    assert (flat.gain, flat.gain_within, flat.rmse) == (0.0, 0.0, pytest.approx(split["target"].std()))


def test_centering_is_refused_where_nothing_would_be_left_or_nothing_removed() -> None:
    rng = np.random.default_rng(0)
    decided = set()
    for rows in rng.integers(5, 14, size=10):
        prompts, generators = ([str(i) for i in rng.integers(0, count, size=rows)] for count in (4, 3))
        x, y = rng.normal(size=rows), rng.normal(size=rows)
        given = {"predicted": x, "target": y, "prompts": prompts, "generators": generators}
        found = score_split(0, "model", task="quality", **given).centered_srcc
        freedom = rows - np.linalg.matrix_rank(dummies(prompts, generators))
        defined = freedom >= 4 and min(len(set(prompts)), len(set(generators))) > 1
        assert math.isnan(found) == (not defined)
        decided.add(defined)
    assert decided == {True, False}
    square = {"prompts": ["a", "a", "b", "b"], "generators": ["x", "y", "x", "y"]}
    small = score_split(0, "model", task="quality", predicted=[1, 2, 3, 5], target=[1, 2, 3, 7], **square)
    assert all(math.isnan(getattr(small, name)) for name in (*CORRELATIONS, "rmse", "centered_srcc"))
    assert small.gain == 1


def test_a_chain_of_generators_that_cannot_be_centered_is_nan() -> None:
    links = np.repeat(np.arange(300), 2)
    prompts, generators = np.tile(links, 2), np.tile(links + np.tile([0, 1], 300), 2)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 1200))
    with pytest.raises(ValueError, match="groupings: no convergence"):
        centered(x, generators, prompts)
    found = score_split(0, "model", task="quality", predicted=x, target=y, prompts=prompts, generators=generators)
    assert math.isnan(found.centered_srcc)
    assert found.srcc == correlations(x, y).srcc


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"predicted": [1.0, math.nan, 2.0]}, "predicted: .*row 1"),
        ({"target": [1.0, 2.0]}, "equal lengths .* got 3 and 2"),
        ({"generators": ["a"]}, "generators: expected 3 labels"),
        ({"wrong_prompt": np.zeros(3)}, r"wrong: expected shape \(3, K\)"),
        ({"task": "alignment"}, "task: expected one of 'quality', 'correspondence', got 'alignment'"),
        ({"predictor": "two\nlines"}, "predictor: expected one line"),
    ],
)
def test_malformed_splits_are_refused(changes: dict[str, Any], message: str) -> None:
    given = {"seed": 0, "predictor": "model", "task": "quality"}
    given |= {"predicted": [1.0, 2.0, 3.0], "target": [1.0, 2.0, 3.0]}
    given |= {"prompts": ["a", "a", "b"], "generators": ["x", "y", "x"], **changes}
    with pytest.raises(ValueError, match=message):
        score_split(given.pop("seed"), given.pop("predictor"), **given)


def test_summary_is_the_mean_spread_and_median_over_seeds() -> None:
    rng = np.random.default_rng(0)
    values = {(name, seed): float(rng.normal()) for name in MEASURES for seed in range(5)}
    predictors = (("correspondence", "ridge", 3.0), ("correspondence", "model", 1.0), ("quality", "b", 2.0))
    scores = [
        entry(seed, name, task, **{measure: scale * values[measure, seed] for measure in MEASURES})
        for seed in (4, 0, 2, 1, 3)
        for task, name, scale in predictors
    ]
    rows = report(*scores).summary()
    named = [("quality", "b"), ("correspondence", "ridge"), ("correspondence", "model")]
    assert [(row.task, row.predictor) for row in rows] == named
    for row, scale in zip(rows, (2.0, 3.0, 1.0), strict=True):
        assert row.seeds == (0, 1, 2, 3, 4)
        for name in MEASURES:
            over, seen = getattr(row, name), [scale * values[name, seed] for seed in range(5)]
            expected = [statistics.mean(seen), statistics.stdev(seen), statistics.median(seen), 5]
            assert [over.mean, over.std, over.median, over.count] == pytest.approx(expected)


def test_a_measure_that_some_seeds_lack_is_summed_up_over_the_others() -> None:
    lacking = entry(0, srcc=0.5), entry(1, srcc=math.nan), entry(2, srcc=0.7), entry(0, "flat", srcc=math.nan)
    some, none = report(*lacking).summary()
    expected = [0.6, 0.6, statistics.stdev([0.5, 0.7]), 2]
    assert [some.srcc.mean, some.srcc.median, some.srcc.std, some.srcc.count] == pytest.approx(expected)
    assert (some.krcc.count, none.srcc.count) == (3, 0)
    assert all(math.isnan(value) for value in (none.srcc.mean, none.srcc.std, none.srcc.median))
    single = report(entry(0, srcc=0.5)).summary()[0].srcc
    assert (single.mean, single.median, single.count) == (0.5, 0.5, 1) and math.isnan(single.std)


def test_difference_pairs_seeds() -> None:
    model = {0: 0.80, 1: 0.70, 2: 0.75, 3: math.nan, 4: 0.9}
    ridge = {2: 0.75, 1: 0.60, 0: 0.82, 3: 0.1, 5: 0.2}
    found = report(
        *(entry(seed, srcc=value) for seed, value in model.items()),
        *(entry(seed, "ridge", srcc=value) for seed, value in ridge.items()),
    ).difference("quality", "model", "ridge")
    pairs = [0.80 - 0.82, 0.70 - 0.60, 0.75 - 0.75]
    assert found.mean == pytest.approx(statistics.mean(pairs))
    assert found.std == pytest.approx(statistics.stdev(pairs))
    assert (found.seeds, found.wins) == (3, 1)
    assert str(found) == f"{statistics.mean(pairs):+.3f} ± {statistics.stdev(pairs):.3f}, higher in 1 of 3 seeds"
    apart = report(entry(0), entry(1, "ridge"))
    assert math.isnan(apart.difference("quality", "model", "ridge").mean)
    assert str(apart.difference("quality", "model", "ridge")) == "–"
    assert str(apart.difference("quality", "model", "model")) == "+0.000, higher in 0 of 1 seeds"
    with pytest.raises(ValueError, match=r"no scores of \('quality', 'gate'\); there are .*'ridge'"):
        apart.difference("quality", "model", "gate")


def test_a_report_grows_and_round_trips_with_every_digit(tmp_path: Path) -> None:
    path, split = tmp_path / "new" / "protocol.json", make_split()
    report().save(path)
    for seed in range(3):
        found = ProtocolReport.load(path)
        assert not found.done(seed, "größer -> mean", "quality")
        flat = score_split(seed, "flat", task="quality", **{**split, "predicted": np.zeros(len(split["target"]))})
        more = [score_split(seed, "größer -> mean", task=task, **split) for task in ("quality", "correspondence")]
        found = found.with_scores([*more, flat])
        found.save(path)
    after = ProtocolReport.load(str(path))
    assert after.done(2, "flat", "quality") and not after.done(0, "flat", "correspondence")
    assert [file.name for file in path.parent.iterdir()] == ["protocol.json"]
    assert str(after.scores) == str(found.scores) and len(after.scores) == 9  # NaN equals NaN as a text
    assert json.loads(path.read_text(encoding="utf-8")) == found.as_dict()
    assert "NaN" not in path.read_text()
    with pytest.raises(ValueError, match=r"scores: .*\(2, 'flat', 'quality'\) again"):
        found.with_scores([entry(2, "flat")])


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "protocol.json"
    with pytest.raises(ValueError, match=r"not a file of .*No such file"):
        ProtocolReport.load(path)
    with pytest.raises(ValueError, match=r"ends in \.json"):
        report().save(tmp_path / "protocol.csv")
    good = report(entry(0)).as_dict()
    for content, message in (
        ("{", "not a file of ProtocolReport.save"),
        ("[]", "not a file of ProtocolReport.save"),
        (json.dumps({**good, "format": 2}), "format 1, got 2"),
        (json.dumps({**good, "scores": [{"seed": 1}]}), "not a file of ProtocolReport.save"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            ProtocolReport.load(path)


def test_markdown_has_a_table_a_task_and_says_what_is_missing() -> None:
    rng = np.random.default_rng(0)
    values = rng.uniform(0.2, 0.9, size=3)
    text = report(
        *(entry(seed, srcc=values[seed], images=40 + seed) for seed in range(3)),
        *(entry(seed, "a|b", srcc=(0.1, math.nan)[seed]) for seed in range(2)),
        *(entry(seed, "flat", **dict.fromkeys(MEASURES, math.nan)) for seed in range(3)),
        entry(0, task="correspondence"),
    ).markdown()
    lines = text.splitlines()
    assert lines[0] == "### Benchmark: model"
    assert lines[2] == "groups by prompt, 80/20. Scored: 3 seeds, 40 to 48 test images each."
    tables = [line.replace(r"\|", "") for line in lines if line.startswith("|")]
    assert len(tables) == 2 * 2 + 3 + 1
    assert {line.count("|") for line in tables} == {11}
    header = [cell.strip() for cell in tables[0].split("|")[1:-1]]
    model = dict(zip(header, [cell.strip() for cell in tables[2].split("|")[1:-1]], strict=True))
    assert model["SRCC"] == f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
    assert model["SRCC median"] == f"{statistics.median(values):.3f}"
    assert header[3:] == ["KRCC", "PLCC raw", "PLCC fitted", "centered SRCC", "gain", "gain within", "AUC"]
    assert "| 0.100 (1 of 2) | 0.100 | 0.500 ± 0.000 |" in text
    assert "| flat | – | – |" in text
    assert "- a|b: 2 of 3 seeds (0, 1)" in lines
    assert "nan" not in text
    assert report().markdown().endswith("No seed has been scored.\n")
    places = {name: place / 10 for place, name in enumerate(MEASURES)}
    line = report(entry(0, **places)).markdown().splitlines()[8]
    wanted = ["srcc", "srcc", "krcc", "plcc", "plcc_fitted", "centered_srcc", "gain", "gain_within", "right_prompt_auc"]
    assert [cell.strip() for cell in line.split("|")[2:-1]] == [f"{places[name]:.3f}" for name in wanted]


def test_published_figures_stand_apart_and_say_so() -> None:
    keys = [(row.benchmark, row.task, row.method) for row in PUBLISHED]
    assert len(set(keys)) == len(keys)
    for benchmark in ("AGIQA-3K", "AGIQA-1K", "AIGCIQA2023", "AIGIQA-20K"):
        text = published_markdown(benchmark)
        assert text.startswith(f"### {benchmark}: as published, with other splits\n")
        rows = [row for row in PUBLISHED if row.benchmark == benchmark]
        assert text.count("\n|") == len(rows) + 2 * len({row.task for row in rows})
        for row in rows:
            assert f"| {row.method} | {row.protocol} | {row.srcc:.4f} | {row.plcc:.4f} |" in text
            assert 0 < row.srcc < row.plcc < 1  # so in every one of the papers' tables
    with pytest.raises(ValueError, match=r"'agiqa3k'; did you mean 'AGIQA-3K'\? There is: .*AIGCIQA2023"):
        published_markdown("agiqa3k")


def augmented(x: np.ndarray, y: np.ndarray, t: np.ndarray, penalty: float) -> np.ndarray:
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    keep = deviation > 0
    z, s = ((rows - mean)[:, keep] / deviation[keep] for rows in (x, t))
    design = np.hstack([z, np.ones((len(z), 1))])
    penalty_rows = math.sqrt(penalty) * np.eye(z.shape[1], z.shape[1] + 1)
    wanted = np.concatenate([y, np.zeros(z.shape[1])])
    solved = np.linalg.lstsq(np.vstack([design, penalty_rows]), wanted, rcond=None)[0]
    return s @ solved[:-1] + solved[-1]


def by_hand(x: np.ndarray, y: np.ndarray, t: np.ndarray, groups: list[str], penalties: list[float]) -> np.ndarray:
    names = sorted(set(groups))
    count = min(5, len(names))
    filled, fold_of = [0] * count, {}
    for name in sorted(names, key=lambda name: (-groups.count(name), name)):
        fold_of[name] = filled.index(min(filled))
        filled[fold_of[name]] += groups.count(name)
    errors = {}
    for penalty in penalties:
        errors[penalty] = 0.0
        for fold in range(count):
            held = np.array([fold_of[group] == fold for group in groups])
            errors[penalty] += float(np.sum((augmented(x[~held], y[~held], x[held], penalty) - y[held]) ** 2))
    return augmented(x, y, t, min(errors, key=lambda penalty: errors[penalty]))


@pytest.mark.parametrize(("rows", "width", "noise"), [(60, 8, 0.1), (40, 90, 3.0), (30, 30, 30.0)])
def test_ridge_agrees_with_augmented_least_squares(rows: int, width: int, noise: float) -> None:
    rng = np.random.default_rng(rows + width)
    x = rng.normal(size=(rows, width)) * rng.uniform(0.1, 10, size=width) + rng.normal(size=width)
    t = rng.normal(size=(17, width))
    y = x @ rng.normal(size=width) / width + noise * rng.normal(size=rows)
    groups = [f"prompt {group}" for group in rng.integers(0, 9, size=rows)]
    penalties = [0.1, 1.0, 10.0, 100.0, 1000.0]
    found = ridge_predict(x, y, t, groups_train=groups, penalties=penalties)
    assert found == pytest.approx(by_hand(x, y, t, groups, penalties), rel=1e-6, abs=1e-8)
    again = rng.permutation(rows)
    shuffled = ridge_predict(x[again], y[again], t, groups_train=np.array(groups)[again], penalties=penalties[::-1])
    assert shuffled == pytest.approx(found, rel=1e-8)


def test_ridge_ignores_units_and_constant_features() -> None:
    rng = np.random.default_rng(0)
    x, t, groups = rng.normal(size=(50, 4)), rng.normal(size=(9, 4)), np.arange(50) // 5
    y = x @ [1.0, -2.0, 0.5, 0.0] + 0.1 * rng.normal(size=50)
    found = ridge_predict(x, y, t, groups_train=groups)
    units = np.array([1e-3, 1.0, 50.0, 1e4])
    scaled = ridge_predict(x * units + 7, 100 * y - 3, t * units + 7, groups_train=groups)
    assert scaled == pytest.approx(100 * found - 3, rel=1e-6)
    constant = np.hstack([x, np.full((50, 1), 0.1)]), np.hstack([t, rng.normal(size=(9, 1))])
    assert ridge_predict(constant[0], y, constant[1], groups_train=groups) == pytest.approx(found, rel=1e-9)
    assert ridge_predict(np.ones((50, 3)), y, np.zeros((2, 3)), groups_train=groups) == pytest.approx(y.mean())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features_train": np.zeros(6)}, r"features_train: expected shape .* got \(6,\)"),
        ({"features_train": np.zeros((5, 2))}, r"expected \(N, D\), \(N,\) and \(M, D\), got \(5, 2\), \(6,\)"),
        ({"features_test": np.full((3, 2), np.inf)}, "features_test: expected finite numbers, .* the first row 0"),
        ({"groups_train": [0, 1]}, "groups_train: expected 6 labels"),
        ({"groups_train": [0] * 6}, "groups_train: expected at least two groups"),
        ({"penalties": [1.0, 0.0]}, "penalties: expected positive numbers, got 0.0"),
    ],
)
def test_ridge_refuses_malformed_input(changes: dict[str, Any], message: str) -> None:
    given = {"features_train": np.arange(12.0).reshape(6, 2), "target_train": [1, 2, 3, 4, 5, 6]}
    given |= {"features_test": np.zeros((3, 2)), "groups_train": [0, 0, 1, 1, 2, 2], **changes}
    with pytest.raises(ValueError, match=message):
        ridge_predict(**given)


@pytest.mark.slow
def test_measuring_loads_no_torch() -> None:
    code = "import sys, aigiqa_reward.evaluation; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
