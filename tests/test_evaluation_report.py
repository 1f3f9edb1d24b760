from __future__ import annotations

import json
import math
import pickle
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from aigiqa_reward.evaluation import Predictions, correlations, evaluate

CONTROL = "generator's mean score"
GENERATORS = ("sd1.5_a", "sd1.5_b", "sd1.5_c", "good_x", "bad_y")


def make_predictions(seed: int = 0, prompts: int = 40) -> Predictions:
    """Scores with generator, prompt and image effects; the model sees them all, with noise."""
    rng = np.random.default_rng(seed)
    prompt, generator = np.divmod(np.arange(prompts * 5), 5)
    common = np.array([2.5, 2.5, 2.5, 4.0, 1.0])[generator] + 0.3 * rng.normal(size=prompts)[prompt]
    quality = common + 0.5 * rng.normal(size=prompts * 5)
    correspondence = common + 0.5 * rng.normal(size=prompts * 5)
    noise = 0.3 * rng.normal(size=(6, prompts * 5))
    return Predictions(
        names=tuple(f"{GENERATORS[g]}_{p:03d}.jpg" for p, g in zip(prompt, generator, strict=True)),
        prompts=tuple(f"prompt {p}, größer" for p in prompt),
        generators=tuple(GENERATORS[g] for g in generator),
        folds=prompt % 4,
        target_quality=quality,
        target_correspondence=correspondence,
        predicted_quality=quality + noise[0],
        predicted_correspondence=correspondence + noise[1],
        wrong_prompt_correspondence=np.stack([common - 1 + noise[2], common - 1 + noise[3]], axis=1),
        image_only_correspondence=common + noise[4],
        shuffled_prompt_correspondence=common + noise[5],
    )


def test_predictions_round_trip(tmp_path: Path) -> None:
    table = make_predictions()
    path = table.save(tmp_path / "fold.npz")
    table.save(path)  # replaces
    found = Predictions.load(str(path))
    for field in fields(Predictions):
        before, after = getattr(table, field.name), getattr(found, field.name)
        assert type(before) is type(after)
        assert np.array_equal(before, after), field.name
    assert [file.name for file in tmp_path.iterdir()] == ["fold.npz"]
    bare = replace(
        table,
        wrong_prompt_correspondence=None,
        image_only_correspondence=None,
        shuffled_prompt_correspondence=None,
    )
    assert Predictions.load(bare.save(path)).image_only_correspondence is None


class Unwritable:
    def __array__(self, *args: object, **kwargs: object) -> np.ndarray:
        raise RuntimeError("unwritable")


class UnwritableInside:
    """An object array: numpy starts the file before it refuses this field."""

    def __array__(self, *args: object, **kwargs: object) -> np.ndarray:
        return np.array([lambda: None], dtype=object)


@pytest.mark.parametrize("broken", [Unwritable(), UnwritableInside()])
def test_a_failed_save_leaves_the_old_file(tmp_path: Path, broken: object) -> None:
    table = make_predictions()
    path = table.save(tmp_path / "fold.npz")
    before = path.read_bytes()
    object.__setattr__(table, "predicted_quality", broken)
    with pytest.raises((RuntimeError, AttributeError, pickle.PicklingError)):
        table.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["fold.npz"]


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file"):
        Predictions.load(tmp_path / "none.npz")
    with pytest.raises(ValueError, match="npz"):
        make_predictions().save(tmp_path / "fold.csv")
    path = make_predictions().save(tmp_path / "fold.npz")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged"):
        Predictions.load(path)
    np.savez(path, format=np.asarray(1), names=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="damaged"):  # an object array would have to be unpickled
        Predictions.load(path)
    np.savez(path, names=np.array(["a"]))
    with pytest.raises(ValueError, match="format 1"):
        Predictions.load(path)
    np.savez(path, format=np.asarray(1), names=np.array(["a"]), extra=np.ones(1))
    with pytest.raises(ValueError, match=r"lacks the fields .*folds.* unknown fields \['extra'\]"):
        Predictions.load(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompts", ("only one",)),
        ("folds", np.zeros(200)),
        ("target_quality", np.zeros(3)),
        ("predicted_quality", np.full(200, np.nan)),
        ("wrong_prompt_correspondence", np.zeros(200)),
        ("wrong_prompt_correspondence", np.zeros((200, 0))),
    ],
)
def test_predictions_check_their_fields(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        replace(make_predictions(), **{field: value})


def test_report_agrees_with_its_measures_and_controls() -> None:
    table = make_predictions()
    report = evaluate(table, repeats=60)
    assert (report.images, report.prompts, report.folds) == (200, 40, 4)
    row = report.row("correspondence")
    assert row.correlations == correlations(table.predicted_correspondence, table.target_correspondence)
    oracle = stats.spearmanr(table.predicted_correspondence, table.target_correspondence)[0]
    assert row.srcc.estimate == pytest.approx(oracle)
    best = possible = 0.0
    for prompt in set(table.prompts):
        rows = [
            (float(table.predicted_correspondence[i]), float(table.target_correspondence[i]))
            for i in range(200)
            if table.prompts[i] == prompt and table.generators[i].startswith("sd1.5")
        ]
        mean = sum(target for _, target in rows) / len(rows)
        best, possible = best + max(rows)[1] - mean, possible + max(target for _, target in rows) - mean
    assert row.gain_within.estimate == pytest.approx(best / possible)
    by_fold = [
        stats.spearmanr(table.predicted_correspondence[rows], table.target_correspondence[rows])[0]
        for rows in (table.folds == fold for fold in range(4))
    ]
    assert row.srcc_by_fold == pytest.approx(by_fold)
    assert (row.fold_mean, row.fold_std) == pytest.approx((np.mean(by_fold), np.std(by_fold, ddof=1)))
    for found in report.rows:
        for interval in (found.srcc, found.gain, found.gain_within, found.centered_srcc):
            if not math.isnan(interval.estimate):
                assert interval.low <= interval.high
                assert interval.low - 0.1 < interval.estimate < interval.high + 0.1
    with pytest.raises(ValueError, match="no row"):
        report.row("quality", "image only")


def test_report_tells_seeing_from_knowing_the_generator() -> None:
    report = evaluate(make_predictions(), repeats=60)
    for task in ("quality", "correspondence"):
        model, control = report.row(task), report.row(task, CONTROL)
        assert control.srcc.estimate > 0.6
        assert math.isnan(control.centered_srcc.estimate)
        assert model.centered_srcc.low > 0.6
        assert model.gain_within.low > control.gain_within.high
    image_only = report.row("correspondence", "image only")
    assert abs(image_only.centered_srcc.estimate) < 0.3
    assert report.centered_srcc_over_image_only is not None
    assert report.centered_srcc_over_image_only.low > 0
    assert report.srcc_over_image_only is not None
    assert report.srcc_over_image_only.estimate == pytest.approx(
        report.row("correspondence").srcc.estimate - image_only.srcc.estimate
    )
    assert report.right_prompt_auc is not None
    assert report.right_prompt_auc.low > 0.8


def test_generator_control_does_not_see_its_own_fold() -> None:
    table = make_predictions(prompts=8)  # two prompts a fold: what one adds to a mean is large
    predicted = []
    for i in range(len(table)):
        others = [
            float(table.target_quality[j])
            for j in range(len(table))
            if table.generators[j] == table.generators[i] and table.folds[j] != table.folds[i]
        ]
        predicted.append(sum(others) / len(others))
    row = evaluate(table, repeats=1).row("quality", CONTROL)
    assert row.srcc.estimate == pytest.approx(stats.spearmanr(predicted, table.target_quality)[0])
    assert row.correlations.plcc == pytest.approx(stats.pearsonr(predicted, table.target_quality)[0])
    single = evaluate(replace(table, folds=np.zeros(len(table), dtype=int)), repeats=1)
    assert CONTROL not in {found.predictor for found in single.rows}
    assert math.isnan(single.row("quality").fold_std)


def test_report_as_markdown_and_json() -> None:
    report = evaluate(make_predictions(), repeats=20)
    values = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert len(values["rows"]) == 7
    assert values["rows"][0]["srcc"]["estimate"] == report.row("quality").srcc.estimate
    assert values["rows"][1]["centered_srcc"]["estimate"] is None
    tables = [line for line in report.markdown().splitlines() if line.startswith("|")]
    assert len(tables) == 7 + 2 * 2
    assert len({line.count("|") for line in tables}) == 1
    assert str(report.row("quality").gain) in report.markdown()
    assert "nan" not in report.markdown()


def test_report_without_optional_controls() -> None:
    bare = replace(
        make_predictions(),
        wrong_prompt_correspondence=None,
        image_only_correspondence=None,
        shuffled_prompt_correspondence=None,
    )
    report = evaluate(bare, repeats=5)
    assert [row.predictor for row in report.rows if row.task == "correspondence"] == [
        "model",
        CONTROL,
        "human quality score",
    ]
    assert report.right_prompt_auc is None
    assert report.srcc_over_image_only is None
    assert "AUC" not in report.markdown()
    with pytest.raises(ValueError, match="no generator's name starts with 'glide'"):
        evaluate(bare, repeats=5, same_generator="glide")
