from __future__ import annotations

import csv
import io
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
    """A test part: every prompt by every generator, less a few images, predictions with ties."""
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


# --------------------------------------------------------------------------------------------- one split


def loop_gain(predicted: np.ndarray, target: np.ndarray, groups: list[str]) -> float:
    picked = possible = 0.0
    for group in set(groups):
        rows = [i for i in range(len(groups)) if groups[i] == group]
        top = max(predicted[i] for i in rows)
        tied = [target[i] for i in rows if predicted[i] == top]
        mean = sum(target[i] for i in rows) / len(rows)
        picked, possible = picked + sum(tied) / len(tied) - mean, possible + max(target[i] for i in rows) - mean
    return picked / possible


def dummies(*groupings: list[str]) -> np.ndarray:
    return np.hstack([np.array(labels)[:, None] == np.unique(labels) for labels in groupings]).astype(float)


@pytest.mark.parametrize("seed", range(4))
def test_scores_of_a_split_agree_with_scipy_loops_and_least_squares(seed: int) -> None:
    split = make_split(seed)
    x, y, prompts = split["predicted"], split["target"], split["prompts"]
    wrong = np.random.default_rng(seed).integers(0, 5, size=(len(x), 3)).astype(float)
    found = score_split(seed, "model", task="quality", wrong_prompt=wrong, **split)
    assert (found.seed, found.predictor, found.task, found.images) == (seed, "model", "quality", len(x))
    assert found.srcc == pytest.approx(stats.spearmanr(x, y)[0])
    assert found.krcc == pytest.approx(stats.kendalltau(x, y)[0])
    assert found.plcc == pytest.approx(stats.pearsonr(x, y)[0])
    fitted = fit_logistic4(x, y)(x)
    assert found.plcc_fitted == pytest.approx(stats.pearsonr(fitted, y)[0])
    assert found.rmse == pytest.approx(math.sqrt(np.mean((fitted - y) ** 2)))
    assert found.gain == pytest.approx(loop_gain(x, y, prompts))
    inside = [i for i in range(len(x)) if split["generators"][i].startswith("sd1.5")]
    assert found.gain_within == pytest.approx(loop_gain(x[inside], y[inside], [prompts[i] for i in inside]))
    design = dummies(prompts, split["generators"])
    untied = x + 0.01 * np.random.default_rng(seed).normal(size=len(x))  # rounding would part ties of what is left
    left = [values - design @ np.linalg.lstsq(design, values, rcond=None)[0] for values in (untied, y)]
    centered_on_both = score_split(seed, "model", task="quality", **{**split, "predicted": untied}).centered_srcc
    assert centered_on_both == pytest.approx(stats.spearmanr(*left)[0])
    wins = [np.sign(x[i] - wrong[i, k]) / 2 + 0.5 for i in range(len(x)) for k in range(3)]
    assert found.right_prompt_auc == pytest.approx(sum(wins) / len(wins))


def test_what_a_split_cannot_tell_is_nan() -> None:
    split = make_split()
    rows = len(split["target"])
    found = score_split(0, "model", task="quality", **split)
    assert math.isnan(found.right_prompt_auc)
    assert not any(math.isnan(getattr(found, name)) for name in MEASURES[:-1])
    flat = score_split(0, "constant", task="quality", **{**split, "predicted": np.full(rows, 0.3)})
    assert all(math.isnan(getattr(flat, name)) for name in (*CORRELATIONS, "centered_srcc"))
    assert (flat.gain, flat.gain_within, flat.rmse) == (0.0, 0.0, pytest.approx(split["target"].std()))
    even = score_split(0, "model", task="quality", **{**split, "target": np.full(rows, 3.0)})
    assert all(math.isnan(getattr(even, name)) for name in (*CORRELATIONS, "centered_srcc", "gain", "gain_within"))
    for other in ("glide", None):
        without = score_split(0, "model", task="quality", **split, same_generator=other)
        assert math.isnan(without.gain_within)
        assert without.gain == found.gain
    alone = score_split(0, "model", task="quality", **{**split, "prompts": [str(i) for i in range(rows)]})
    assert all(math.isnan(value) for value in (alone.centered_srcc, alone.gain, alone.gain_within))
    assert alone.srcc == found.srcc
    of_generator = [len(name) + ord(name[0]) for name in split["generators"]]
    known = score_split(0, "generator", task="quality", **{**split, "predicted": of_generator})
    assert math.isnan(known.centered_srcc)
    assert known.srcc == pytest.approx(stats.spearmanr(of_generator, split["target"])[0])


def test_centering_is_refused_where_nothing_would_be_left_or_nothing_removed() -> None:
    rng = np.random.default_rng(0)
    decided = set()
    for rows in rng.integers(5, 14, size=24):
        prompts, generators = ([str(i) for i in rng.integers(0, count, size=rows)] for count in (4, 3))
        x, y = rng.normal(size=rows), rng.normal(size=rows)
        found = score_split(
            0, "model", task="quality", predicted=x, target=y, prompts=prompts, generators=generators
        ).centered_srcc
        freedom = rows - np.linalg.matrix_rank(dummies(prompts, generators))
        defined = freedom >= 4 and min(len(set(prompts)), len(set(generators))) > 1
        assert math.isnan(found) == (not defined)
        decided.add(defined)
    assert decided == {True, False}
    square = {"prompts": ["a", "a", "b", "b"], "generators": ["x", "y", "x", "y"]}
    small = score_split(0, "model", task="quality", predicted=[1, 2, 3, 5], target=[1, 2, 3, 7], **square)
    assert all(math.isnan(getattr(small, name)) for name in (*CORRELATIONS, "rmse", "centered_srcc"))
    assert small.gain == 1
    one = score_split(0, "model", task="quality", predicted=[1], target=[1], prompts=["a"], generators=["x"])
    assert one.images == 1


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
        ({"target": [1.0, 2.0]}, "equal lengths, got 3 and 2"),
        ({"prompts": ["a"]}, "prompts: expected 3 labels"),
        ({"generators": ["a"]}, "generators: expected 3 labels"),
        ({"wrong_prompt": np.zeros(3)}, r"wrong: expected shape \(3, K\)"),
        ({"task": "alignment"}, "task: expected one of 'quality', 'correspondence', got 'alignment'"),
        ({"predictor": "two\nlines"}, "predictor: expected one line"),
        ({"seed": 1.5}, "seed: expected an integer, got 1.5"),
    ],
)
def test_malformed_splits_are_refused(changes: dict[str, Any], message: str) -> None:
    given = {
        "seed": 0,
        "predictor": "model",
        "task": "quality",
        "predicted": [1.0, 2.0, 3.0],
        "target": [1.0, 2.0, 3.0],
        "prompts": ["a", "a", "b"],
        "generators": ["x", "y", "x"],
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        score_split(given.pop("seed"), given.pop("predictor"), **given)


def test_scores_are_finite_or_nan_and_of_some_images() -> None:
    with pytest.raises(ValueError, match="gain: expected a finite number"):
        entry(0, gain=math.inf)
    with pytest.raises(ValueError, match="images: expected at least one"):
        entry(0, images=0)
    given = entry(np.int64(3), srcc=np.float32(0.25))  # pyright: ignore[reportArgumentType]
    assert json.loads(json.dumps(given.as_dict()))["seed"] == 3


# --------------------------------------------------------------------------------------------- all seeds


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
    assert [(row.task, row.predictor) for row in rows] == [
        ("quality", "b"),
        ("correspondence", "ridge"),
        ("correspondence", "model"),
    ]
    for row, scale in zip(rows, (2.0, 3.0, 1.0), strict=True):
        assert row.seeds == (0, 1, 2, 3, 4)
        for name in MEASURES:
            over, seen = getattr(row, name), [scale * values[name, seed] for seed in range(5)]
            assert over.count == 5
            assert over.mean == pytest.approx(statistics.mean(seen))
            assert over.std == pytest.approx(statistics.stdev(seen))
            assert over.median == pytest.approx(statistics.median(seen))


def test_a_measure_that_some_seeds_lack_is_summed_up_over_the_others() -> None:
    rows = report(
        entry(0, srcc=0.5), entry(1, srcc=math.nan), entry(2, srcc=0.7), entry(0, "flat", srcc=math.nan)
    ).summary()
    assert (rows[0].srcc.mean, rows[0].srcc.median, rows[0].srcc.count) == (pytest.approx(0.6), pytest.approx(0.6), 2)
    assert rows[0].srcc.std == pytest.approx(statistics.stdev([0.5, 0.7]))
    assert rows[0].krcc.count == 3
    assert rows[1].srcc.count == 0
    assert all(math.isnan(value) for value in (rows[1].srcc.mean, rows[1].srcc.std, rows[1].srcc.median))
    single = report(entry(0, srcc=0.5)).summary()[0].srcc
    assert (single.mean, single.median, single.count) == (0.5, 0.5, 1)
    assert math.isnan(single.std)


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


def test_a_report_grows_and_an_interrupted_run_resumes(tmp_path: Path) -> None:
    path = tmp_path / "protocol.json"
    empty = report()
    assert empty.summary() == ()
    empty.save(path)
    scored = []
    for _ in range(2):  # the second run finds all seeds done
        for seed in range(4):
            found = ProtocolReport.load(path)
            if not found.done(seed, "model", "quality"):
                scored.append(seed)
                found.with_scores([entry(seed), entry(seed, task="correspondence")]).save(path)
    assert scored == [0, 1, 2, 3]
    found = ProtocolReport.load(path)
    assert len(found.scores) == 8
    assert not found.done(0, "ridge", "quality")
    assert empty.scores == ()
    assert [file.name for file in tmp_path.iterdir()] == ["protocol.json"]
    with pytest.raises(ValueError, match=r"scores: .*\(2, 'model', 'quality'\) again"):
        found.with_scores([entry(2)])


def test_reports_round_trip_with_every_digit(tmp_path: Path) -> None:
    split = make_split()
    before = report(
        score_split(7, "gate -> mean, größer", task="correspondence", **split),
        score_split(7, "constant", task="quality", **{**split, "predicted": np.zeros(len(split["target"]))}),
    )
    path = before.save(tmp_path / "new" / "protocol.json")
    after = ProtocolReport.load(str(path))
    assert (after.title, after.protocol) == (before.title, before.protocol)
    for one, two in zip(before.scores, after.scores, strict=True):
        for field in fields(SplitScores):
            old, new = getattr(one, field.name), getattr(two, field.name)
            assert type(old) is type(new)
            assert old == new or (math.isnan(old) and math.isnan(new)), field.name
    assert json.loads(path.read_text(encoding="utf-8")) == before.as_dict()
    assert "NaN" not in path.read_text()


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "protocol.json"
    with pytest.raises(ValueError, match="no file"):
        ProtocolReport.load(path)
    with pytest.raises(ValueError, match=r"ends in \.json"):
        report().save(tmp_path / "protocol.csv")
    good = report(entry(0)).as_dict()
    for content, message in (
        ("{", "not a file of ProtocolReport.save"),
        ("[]", "not a file of ProtocolReport.save"),
        ("{}", "not a file of ProtocolReport.save"),
        (json.dumps({**good, "format": 2}), "format 1 .* got 2"),
        (json.dumps({**good, "extra": 1}), "extra"),
        (json.dumps({**good, "scores": [{"seed": 1}]}), "does not hold a protocol report"),
        (json.dumps({**good, "scores": [{**good["scores"][0], "srcc": "high"}]}), "does not hold a protocol report"),
        (json.dumps({**good, "scores": good["scores"] * 2}), "again"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            ProtocolReport.load(path)
    with pytest.raises(ValueError, match="title: expected one line"):
        ProtocolReport(title="", protocol="")
    with pytest.raises(ValueError, match="protocol: expected a text, got None"):
        ProtocolReport(title="t", protocol=None)  # pyright: ignore[reportArgumentType]


def test_csv_is_tidy_and_exact() -> None:
    scores = [score_split(seed, 'ridge, "same" features', task="quality", **make_split(seed)) for seed in range(3)]
    rows = list(csv.DictReader(io.StringIO(report(*scores).csv())))
    assert len(rows) == 3
    for row, wanted in zip(rows, scores, strict=True):
        assert list(row) == [field.name for field in fields(SplitScores)]
        assert (int(row["seed"]), row["predictor"], row["task"]) == wanted.key
        assert int(row["images"]) == wanted.images
        assert row["right_prompt_auc"] == ""
        assert all(float(row[name]) == getattr(wanted, name) for name in MEASURES[:-1])


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


def test_every_measure_stands_in_its_column() -> None:
    places = {name: place / 10 for place, name in enumerate(MEASURES)}
    line = report(entry(0, **places)).markdown().splitlines()[8]
    shown = [cell.strip() for cell in line.split("|")[2:-1]]
    wanted = ["srcc", "srcc", "krcc", "plcc", "plcc_fitted", "centered_srcc", "gain", "gain_within", "right_prompt_auc"]
    assert shown == [f"{places[name]:.3f}" for name in wanted]


# --------------------------------------------------------------------------------------------- published


def test_published_figures_stand_apart_and_say_so() -> None:
    keys = [(row.benchmark, row.task, row.method) for row in PUBLISHED]
    assert len(set(keys)) == len(keys)
    for benchmark in ("AGIQA-3K", "AGIQA-1K", "AIGCIQA2023", "AIGIQA-20K"):
        text = published_markdown(benchmark)
        assert text.startswith(f"### {benchmark}: as published, with other splits\n")
        rows = [row for row in PUBLISHED if row.benchmark == benchmark]
        assert len([line for line in text.splitlines() if line.startswith("|")]) == len(rows) + 2 * len(
            {row.task for row in rows}
        )
        for row in rows:
            assert f"| {row.method} | {row.protocol} | {row.srcc:.4f} | {row.plcc:.4f} |" in text
            assert 0 < row.srcc < row.plcc < 1  # so in every one of the papers' tables
    assert ("correspondence", "CLIP") in {(row.task, row.method) for row in PUBLISHED}
    with pytest.raises(ValueError, match=r"'agiqa3k'; did you mean 'AGIQA-3K'\? There is: .*AIGCIQA2023"):
        published_markdown("agiqa3k")


# --------------------------------------------------------------------------------------------- ridge


def augmented(x: np.ndarray, y: np.ndarray, t: np.ndarray, penalty: float) -> np.ndarray:
    """Ridge as ordinary least squares with one more row a feature and a free intercept."""
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    keep = deviation > 0
    z, s = ((rows - mean)[:, keep] / deviation[keep] for rows in (x, t))
    design = np.hstack([z, np.ones((len(z), 1))])
    penalty_rows = math.sqrt(penalty) * np.eye(z.shape[1], z.shape[1] + 1)
    solved = np.linalg.lstsq(np.vstack([design, penalty_rows]), np.concatenate([y, np.zeros(z.shape[1])]), rcond=None)[
        0
    ]
    return s @ solved[:-1] + solved[-1]


def by_hand(x: np.ndarray, y: np.ndarray, t: np.ndarray, groups: list[str], penalties: list[float]) -> np.ndarray:
    """The same choice of the penalty, by loops."""
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


@pytest.mark.parametrize(("rows", "width"), [(60, 8), (40, 90), (30, 30), (41, 1)])
@pytest.mark.parametrize("noise", [0.1, 3.0, 30.0])
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
    assert ridge_predict(x * units + 7, 100 * y - 3, t * units + 7, groups_train=groups) == pytest.approx(
        100 * found - 3, rel=1e-6
    )
    constant = np.hstack([x, np.full((50, 1), 0.1)]), np.hstack([t, rng.normal(size=(9, 1))])
    assert ridge_predict(constant[0], y, constant[1], groups_train=groups) == pytest.approx(found, rel=1e-9)
    assert ridge_predict(np.ones((50, 3)), y, np.zeros((2, 3)), groups_train=groups) == pytest.approx(y.mean())
    assert ridge_predict(x, np.full(50, 2.5), t, groups_train=groups) == pytest.approx(2.5)
    assert ridge_predict(x, y, t[:0], groups_train=groups).shape == (0,)


def test_ridge_learns_a_line_and_shrinks_noise() -> None:
    rng = np.random.default_rng(0)
    x, t, groups = rng.normal(size=(300, 10)), rng.normal(size=(100, 10)), np.arange(300) // 6
    weights = rng.normal(size=10)
    assert ridge_predict(x, x @ weights, t, groups_train=groups) == pytest.approx(t @ weights, abs=0.02)
    noise = rng.normal(size=300)
    assert ridge_predict(x, noise, t, groups_train=groups).std() < 0.1
    assert stats.spearmanr(ridge_predict(x, x @ weights + noise, t, groups_train=groups), t @ weights)[0] > 0.95


def test_ridge_chooses_by_groups_not_by_rows() -> None:
    """Features that only tell the group apart predict other rows of it, and no other group."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(20), 10)
    x = np.eye(20)[groups] + 1e-3 * rng.normal(size=(200, 20))
    y = rng.normal(size=20)[groups]
    by_group = ridge_predict(x, y, x, groups_train=groups)
    by_row = ridge_predict(x, y, x, groups_train=np.arange(200))
    assert by_group.std() < 0.3 * y.std() < 0.9 * by_row.std()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features_train": np.zeros(6)}, r"features_train: expected shape .* got \(6,\)"),
        ({"features_train": np.zeros((5, 2))}, "equal lengths, got 5 and 6"),
        ({"features_train": np.full((6, 2), np.nan)}, "features_train: expected finite numbers"),
        ({"features_test": np.zeros((3, 4))}, "features_test: expected 2 columns .* got 4"),
        ({"features_test": np.full((3, 2), np.inf)}, "features_test: expected finite numbers, .* the first 0"),
        ({"target_train": [1, 2, 3, 4, 5, np.nan]}, "target_train: .*row 5"),
        ({"groups_train": [0, 1]}, "groups_train: expected 6 labels"),
        ({"groups_train": [0] * 6}, "groups_train: expected at least two groups"),
        ({"penalties": [1.0, 0.0]}, "penalties: expected positive numbers, got 0.0"),
        ({"penalties": []}, "penalties: expected a sequence of at least one number"),
    ],
)
def test_ridge_refuses_malformed_input(changes: dict[str, Any], message: str) -> None:
    given = {
        "features_train": np.arange(12.0).reshape(6, 2),
        "target_train": [1, 2, 3, 4, 5, 6],
        "features_test": np.zeros((3, 2)),
        "groups_train": [0, 0, 1, 1, 2, 2],
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        ridge_predict(**given)


def test_measuring_loads_no_torch() -> None:
    code = "import sys, aigiqa_reward.evaluation; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
