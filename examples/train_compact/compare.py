"""Compare held-out predictions with human scores, beside the controls, as data and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from predictions import Predictions

from aigiqa_reward.evaluation import (
    Correlations,
    Interval,
    bootstrap_intervals,
    centered_srcc,
    correlations,
    group_mean_predictor,
    prompt_auc,
    selection_gain,
    srcc,
    within,
)
from aigiqa_reward.evaluation.tables import markdown_table, number
from aigiqa_reward.utils.run_folder import without_nan

MODEL = "model"
GENERATOR = "generator's mean score"
IMAGE_ONLY = "image only"
SHUFFLED = "shuffled prompts"
HUMAN_QUALITY = "human quality score"


class Predictor(NamedTuple):
    """A predictor of one human score."""

    task: str
    name: str
    predicted: np.ndarray
    target: np.ndarray


@dataclass(frozen=True, kw_only=True)
class ReportRow:
    """One predictor of one human score; intervals resample prompts.

    Attributes:
        task: "quality" or "correspondence".
        predictor: "model" or the name of a control.
        correlations: over all images at once.
        srcc: Spearman's correlation.
        gain: selection gain over all images of each prompt.
        gain_within: selection gain over those of one generator and its variants.
        centered_srcc: SRCC after the additive effects of generator and prompt are removed from both sides. Nan
            for the generator's mean score: with that effect removed, only differences between the folds it
            was computed in are left, and their correlation with the target is an artifact (below zero).
        srcc_by_fold: SRCC within each fold.
    """

    task: str
    predictor: str
    correlations: Correlations
    srcc: Interval
    gain: Interval
    gain_within: Interval
    centered_srcc: Interval
    srcc_by_fold: tuple[float, ...]

    def cells(self) -> list[str]:
        """Row of the Markdown table."""
        agreement, spread = self.correlations, float("nan")
        if len(self.srcc_by_fold) > 1:
            spread = float(np.std(self.srcc_by_fold, ddof=1))
        return [
            self.predictor,
            bracketed(self.srcc),
            *map(number, (agreement.plcc, agreement.plcc_fitted, agreement.krcc, agreement.rmse)),
            *map(bracketed, (self.gain, self.gain_within, self.centered_srcc)),
            f"{number(float(np.mean(self.srcc_by_fold)))} ± {number(spread)}",
        ]


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """Result of `evaluate`."""

    rows: tuple[ReportRow, ...]
    right_prompt_auc: Interval | None
    srcc_over_image_only: Interval | None
    centered_srcc_over_image_only: Interval | None
    images: int
    prompts: int
    folds: int
    same_generator: str
    level: float
    repeats: int

    def row(self, task: str, predictor: str = MODEL) -> ReportRow:
        """The row of one predictor."""
        return next(row for row in self.rows if (row.task, row.predictor) == (task, predictor))

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values, None for nan."""
        return without_nan(asdict(self))

    def markdown(self) -> str:
        """The report as Markdown: a table per score, then the comparisons."""
        header = ("predictor", "SRCC", "PLCC", "PLCC fitted", "KRCC", "RMSE", "selection gain")
        header += (f"gain within {self.same_generator}", "SRCC centered by generator and prompt", "SRCC per fold")
        lines = [
            f"{self.images:,} images, {self.prompts} prompts, folds: {self.folds}. In brackets: "
            f"{self.level:.0%} bootstrap intervals over prompts ({self.repeats:,} draws)."
        ]
        for task in ("quality", "correspondence"):
            cells = [row.cells() for row in self.rows if row.task == task]
            lines += ["", f"**{task.capitalize()}**", "", *markdown_table(header, cells)]
        notes = {
            "Right prompt above a wrong one, same image (AUC)": self.right_prompt_auc,
            "Correspondence SRCC, model minus image only": self.srcc_over_image_only,
            "Correspondence SRCC centered, model minus image only": self.centered_srcc_over_image_only,
        }
        listed = [f"- {name}: {bracketed(value)}" for name, value in notes.items() if value is not None]
        return "\n".join([*lines, *([""] if listed else []), *listed]) + "\n"


def bracketed(interval: Interval) -> str:
    return "–" if math.isnan(interval.estimate) else str(interval)


def evaluate(
    table: Predictions, *, repeats: int = 1000, level: float = 0.95, seed: int = 0, same_generator: str = "sd1.5"
) -> EvaluationReport:
    """Compare a model's held-out predictions with human scores, beside the controls.

    The controls: the generator's mean score over the other folds (left out where there is a single fold); for
    correspondence also an image-only model and the model under shuffled prompts where the table has them, and
    the human quality score itself. 1,000 draws take about 20 s on 2,400 images.
    """
    prompts = np.unique(np.array(table.prompts), return_inverse=True)[1]
    generators = np.unique(np.array(table.generators), return_inverse=True)[1]
    variants = within(table.generators, same_generator)
    found = predictors(table)
    place = {(predictor.task, predictor.name): number for number, predictor in enumerate(found)}
    model, control = place["correspondence", MODEL], place.get(("correspondence", IMAGE_ONLY))

    def measures(rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
        values = np.array(
            [measure(p.predicted[rows], p.target[rows], ids, generators[rows], variants[rows]) for p in found]
        )
        values[[p.name == GENERATOR for p in found], 3] = np.nan
        auc = np.nan
        if table.wrong_prompt_correspondence is not None:
            auc = prompt_auc(table.predicted_correspondence[rows], table.wrong_prompt_correspondence[rows])
        over = np.full(2, np.nan) if control is None else (values[model] - values[control])[[0, 3]]
        return np.concatenate([values.ravel(), [auc], over])

    intervals = bootstrap_intervals(measures, prompts, repeats=repeats, level=level, seed=seed)
    return EvaluationReport(
        rows=tuple(row(p, intervals[4 * n : 4 * n + 4], table.folds) for n, p in enumerate(found)),
        right_prompt_auc=None if table.wrong_prompt_correspondence is None else intervals[-3],
        srcc_over_image_only=None if control is None else intervals[-2],
        centered_srcc_over_image_only=None if control is None else intervals[-1],
        images=len(table),
        prompts=len(set(table.prompts)),
        folds=len(np.unique(table.folds)),
        same_generator=same_generator,
        level=level,
        repeats=repeats,
    )


def predictors(table: Predictions) -> list[Predictor]:
    quality, correspondence = table.target_quality, table.target_correspondence
    rows = [
        ("quality", MODEL, table.predicted_quality, quality),
        ("quality", GENERATOR, generator_means(quality, table), quality),
        ("correspondence", MODEL, table.predicted_correspondence, correspondence),
        ("correspondence", GENERATOR, generator_means(correspondence, table), correspondence),
        ("correspondence", IMAGE_ONLY, table.image_only_correspondence, correspondence),
        ("correspondence", SHUFFLED, table.shuffled_prompt_correspondence, correspondence),
        ("correspondence", HUMAN_QUALITY, quality, correspondence),
    ]
    return [Predictor(task, name, values, target) for task, name, values, target in rows if values is not None]


def generator_means(target: np.ndarray, table: Predictions) -> np.ndarray | None:
    """Each image's generator's mean score over the other folds; None where there are none."""
    folds, generators = np.unique(table.folds), np.array(table.generators)
    if len(folds) == 1:
        return None
    predicted = np.empty(len(table), dtype=np.float64)
    for fold in folds:
        held_out = table.folds == fold
        predicted[held_out] = group_mean_predictor(target[~held_out], generators[~held_out], generators[held_out])
    return predicted


def measure(
    predicted: np.ndarray, target: np.ndarray, prompts: np.ndarray, generators: np.ndarray, variants: np.ndarray
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


def row(predictor: Predictor, intervals: Sequence[Interval], folds: np.ndarray) -> ReportRow:
    overall, gain, inside, beyond = intervals
    predicted, target = predictor.predicted, predictor.target
    return ReportRow(
        task=predictor.task,
        predictor=predictor.name,
        correlations=correlations(predicted, target),
        srcc=overall,
        gain=gain,
        gain_within=inside,
        centered_srcc=beyond,
        srcc_by_fold=tuple(srcc(predicted[folds == fold], target[folds == fold]) for fold in np.unique(folds)),
    )
