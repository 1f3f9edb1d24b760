"""Compare a model with human scores, beside what simpler predictors reach."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aigiqa_reward.evaluation.bootstrap import Interval, bootstrap_intervals
from aigiqa_reward.evaluation.controls import centered_srcc, group_mean_predictor, prompt_auc, selection_gain, within
from aigiqa_reward.evaluation.metrics import correlations, srcc
from aigiqa_reward.evaluation.predictions import Predictions
from aigiqa_reward.evaluation.report import (
    GENERATOR,
    HUMAN_QUALITY,
    IMAGE_ONLY,
    MODEL,
    SHUFFLED,
    EvaluationReport,
    ReportRow,
)


def evaluate(
    table: Predictions,
    *,
    repeats: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    same_generator: str = "sd1.5",
) -> EvaluationReport:
    """Compare a model's held-out predictions with human scores, beside the controls.

    The controls: the generator's mean score over the other folds (left out where there is a single fold); for
    correspondence also an image-only model and the model under shuffled prompts where the table has them, and
    the human quality score itself.

    Args:
        table: the predictions.
        repeats: bootstrap draws; 1,000 take about 20 s on 2,400 images.
        level: coverage of the intervals.
        seed: of the draws.
        same_generator: names that start with it are variants of one generator, compared within each prompt.

    Raises:
        ValueError: no generator of that name, a generator that only one fold has, or fewer than 5 images.
    """
    prompts = np.unique(np.array(table.prompts), return_inverse=True)[1]
    generators = np.unique(np.array(table.generators), return_inverse=True)[1]
    variants = within(table.generators, same_generator)
    predictors = _predictors(table)

    def measures(rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
        values = np.array(
            [
                _measure(predicted[rows], target[rows], ids, generators[rows], variants[rows])
                for _, _, predicted, target in predictors
            ]
        )
        values[[name == GENERATOR for _, name, _, _ in predictors], 3] = np.nan
        auc, over = np.nan, np.full(2, np.nan)
        if table.wrong_prompt_correspondence is not None:
            auc = prompt_auc(table.predicted_correspondence[rows], table.wrong_prompt_correspondence[rows])
        if table.image_only_correspondence is not None:
            place = {(task, name): i for i, (task, name, _, _) in enumerate(predictors)}
            model, control = place["correspondence", MODEL], place["correspondence", IMAGE_ONLY]
            over = (values[model] - values[control])[[0, 3]]
        return np.concatenate([values.ravel(), [auc], over])

    intervals = bootstrap_intervals(measures, prompts, repeats=repeats, level=level, seed=seed)
    has_image_only = table.image_only_correspondence is not None
    return EvaluationReport(
        rows=_rows(predictors, intervals, table.folds),
        right_prompt_auc=None if table.wrong_prompt_correspondence is None else intervals[-3],
        srcc_over_image_only=intervals[-2] if has_image_only else None,
        centered_srcc_over_image_only=intervals[-1] if has_image_only else None,
        images=len(table),
        prompts=len(set(table.prompts)),
        folds=len(np.unique(table.folds)),
        same_generator=same_generator,
        level=level,
        repeats=repeats,
    )


_Predictor = tuple[str, str, np.ndarray, np.ndarray]  # task, name, predicted, target


def _predictors(table: Predictions) -> list[_Predictor]:
    quality, correspondence = table.target_quality, table.target_correspondence
    rows: list[tuple[str, str, np.ndarray | None, np.ndarray]] = [
        ("quality", MODEL, table.predicted_quality, quality),
        ("quality", GENERATOR, _generator_means(quality, table), quality),
        ("correspondence", MODEL, table.predicted_correspondence, correspondence),
        ("correspondence", GENERATOR, _generator_means(correspondence, table), correspondence),
        ("correspondence", IMAGE_ONLY, table.image_only_correspondence, correspondence),
        ("correspondence", SHUFFLED, table.shuffled_prompt_correspondence, correspondence),
        ("correspondence", HUMAN_QUALITY, quality, correspondence),
    ]
    return [(task, name, predicted, target) for task, name, predicted, target in rows if predicted is not None]


def _generator_means(target: np.ndarray, table: Predictions) -> np.ndarray | None:
    """Each image's generator's mean score over the other folds; None where there are none."""
    folds = np.unique(table.folds)
    if len(folds) == 1:
        return None
    generators = np.array(table.generators)
    predicted = np.empty(len(table), dtype=np.float64)
    for fold in folds:
        held_out = table.folds == fold
        predicted[held_out] = group_mean_predictor(target[~held_out], generators[~held_out], generators[held_out])
    return predicted


def _measure(
    predicted: np.ndarray,
    target: np.ndarray,
    prompts: np.ndarray,
    generators: np.ndarray,
    variants: np.ndarray,
) -> list[float]:
    """The four bootstrapped columns of one predictor."""
    inside = float("nan")
    if variants.any():
        inside = selection_gain(predicted[variants], target[variants], prompts[variants])
    return [
        srcc(predicted, target),
        selection_gain(predicted, target, prompts),
        inside,
        centered_srcc(predicted, target, generators, prompts),
    ]


def _rows(predictors: Sequence[_Predictor], intervals: Sequence[Interval], folds: np.ndarray) -> tuple[ReportRow, ...]:
    rows = []
    for place, (task, name, predicted, target) in enumerate(predictors):
        overall, gain, inside, beyond = intervals[4 * place : 4 * place + 4]
        by_fold = [srcc(predicted[folds == fold], target[folds == fold]) for fold in np.unique(folds)]
        rows.append(
            ReportRow(
                task=task,
                predictor=name,
                correlations=correlations(predicted, target),
                srcc=overall,
                gain=gain,
                gain_within=inside,
                centered_srcc=beyond,
                srcc_by_fold=tuple(by_fold),
            )
        )
    return tuple(rows)
