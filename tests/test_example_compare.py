from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scipy import stats

from aigiqa_reward.evaluation import correlations

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_compact"
CONTROL = "generator's mean score"
GENERATORS = ("sd1.5_a", "sd1.5_b", "sd1.5_c", "good_x", "bad_y")


@pytest.fixture(scope="module")
def example() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLE))
        return importlib.import_module("compare")


def make_predictions(example: ModuleType, prompts: int = 40) -> Any:
    rng = np.random.default_rng(0)
    prompt, generator = np.divmod(np.arange(prompts * 5), 5)
    common = np.array([2.5, 2.5, 2.5, 4.0, 1.0])[generator] + 0.3 * rng.normal(size=prompts)[prompt]
    quality, correspondence = common + 0.5 * rng.normal(size=(2, prompts * 5))
    noise = 0.3 * rng.normal(size=(6, prompts * 5))
    return example.Predictions(
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


def test_the_report_shows_what_a_model_sees_beyond_the_generator(example: ModuleType) -> None:
    table = make_predictions(example)
    report = example.evaluate(table, repeats=30)
    row = report.row("correspondence")
    assert row.correlations == correlations(table.predicted_correspondence, table.target_correspondence)
    by_fold = [
        stats.spearmanr(table.predicted_correspondence[rows], table.target_correspondence[rows])[0]
        for rows in (table.folds == fold for fold in range(4))
    ]
    assert row.srcc_by_fold == pytest.approx(by_fold)
    for task in ("quality", "correspondence"):
        model, control = report.row(task), report.row(task, CONTROL)
        assert control.srcc.estimate > 0.6
        assert math.isnan(control.centered_srcc.estimate)
        assert model.centered_srcc.low > 0.6
        assert model.gain_within.low > control.gain_within.high
    image_only = report.row("correspondence", "image only")
    assert report.centered_srcc_over_image_only.low > 0
    assert report.srcc_over_image_only.estimate == pytest.approx(row.srcc.estimate - image_only.srcc.estimate)
    assert report.right_prompt_auc.low > 0.8
    values = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert values["rows"][1]["centered_srcc"]["estimate"] is None
    assert report.markdown().count("\n|") == 7 + 2 * 2
