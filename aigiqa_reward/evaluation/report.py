"""The report of a model against human scores, as data and as Markdown."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from aigiqa_reward.evaluation.bootstrap import Interval
from aigiqa_reward.evaluation.metrics import Correlations
from aigiqa_reward.evaluation.tables import markdown_table, number, plain

MODEL = "model"
GENERATOR = "generator's mean score"
IMAGE_ONLY = "image only"
SHUFFLED = "shuffled prompts"
HUMAN_QUALITY = "human quality score"


@dataclass(frozen=True, kw_only=True)
class ReportRow:
    """One predictor of one human score.

    Attributes:
        task: "quality" or "correspondence", the score predicted.
        predictor: "model" or the name of a control.
        correlations: over all images at once.
        srcc: with its interval.
        gain: selection gain over all images of each prompt.
        gain_within: selection gain over those of one generator and its variants.
        centered_srcc: SRCC after the additive effects of generator and prompt are removed from both sides. Nan
            for the generator's mean score: with that effect removed, only differences between the folds it
            was computed in are left, and their correlation with the target is an artifact (below zero).
        srcc_by_fold: SRCC of each fold alone, in the order of the fold numbers.

    Example:
        >>> from dataclasses import fields
        >>> from aigiqa_reward.evaluation import ReportRow
        >>> [field.name for field in fields(ReportRow)][:4]  # what EvaluationReport.rows holds
        ['task', 'predictor', 'correlations', 'srcc']
    """

    task: str
    predictor: str
    correlations: Correlations
    srcc: Interval
    gain: Interval
    gain_within: Interval
    centered_srcc: Interval
    srcc_by_fold: tuple[float, ...]

    @property
    def fold_mean(self) -> float:
        """Mean SRCC over the folds."""
        return float(np.mean(self.srcc_by_fold))

    @property
    def fold_std(self) -> float:
        """Standard deviation of SRCC over the folds (ddof 1); nan for a single fold."""
        return float(np.std(self.srcc_by_fold, ddof=1)) if len(self.srcc_by_fold) > 1 else float("nan")


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """What `evaluate` found. Intervals resample prompts.

    Attributes:
        rows: one a predictor: quality first, the model first.
        right_prompt_auc: probability that an image's right prompt scores above a wrong one, or None.
        srcc_over_image_only: correspondence SRCC of the model minus the image-only control's, or None.
        centered_srcc_over_image_only: the same of the centered SRCC, or None.
        images: number of images.
        prompts: number of distinct prompts.
        folds: number of folds.
        same_generator: the generator whose variants `gain_within` compares.
        level: coverage of the intervals.
        repeats: bootstrap draws.
    """

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
        """The row of one predictor.

        Raises:
            ValueError: there is none.
        """
        for row in self.rows:
            if (row.task, row.predictor) == (task, predictor):
                return row
        raise ValueError(
            f"task, predictor: no row {(task, predictor)}; there are {[(row.task, row.predictor) for row in self.rows]}"
        )

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON holds it: nested dictionaries and lists of numbers and names, None for nan."""
        return plain(asdict(self))

    def markdown(self) -> str:
        """The report as Markdown: a table a score, then the comparisons."""
        lines = [
            f"{self.images:,} images, {self.prompts} prompts, folds: {self.folds}. In brackets: "
            f"{self.level:.0%} bootstrap intervals over prompts ({self.repeats:,} draws)."
        ]
        for task in ("quality", "correspondence"):
            lines += ["", f"**{task.capitalize()}**", "", *self._table(task)]
        notes = {
            "Right prompt above a wrong one, same image (AUC)": self.right_prompt_auc,
            "Correspondence SRCC, model minus image only": self.srcc_over_image_only,
            "Correspondence SRCC centered, model minus image only": self.centered_srcc_over_image_only,
        }
        listed = [f"- {name}: {_bracketed(value)}" for name, value in notes.items() if value is not None]
        return "\n".join([*lines, *([""] if listed else []), *listed]) + "\n"

    def _table(self, task: str) -> list[str]:
        header = [
            "predictor",
            "SRCC",
            "PLCC",
            "PLCC fitted",
            "KRCC",
            "RMSE",
            "selection gain",
            f"gain within {self.same_generator}",
            "SRCC centered by generator and prompt",
            "SRCC per fold",
        ]
        rows = []
        for row in self.rows:
            if row.task == task:
                agreement = row.correlations
                rows.append(
                    [
                        row.predictor,
                        _bracketed(row.srcc),
                        *map(number, (agreement.plcc, agreement.plcc_fitted, agreement.krcc, agreement.rmse)),
                        *map(_bracketed, (row.gain, row.gain_within, row.centered_srcc)),
                        f"{number(row.fold_mean)} ± {number(row.fold_std)}",
                    ]
                )
        return markdown_table(header, rows)


def _bracketed(interval: Interval) -> str:
    return "–" if math.isnan(interval.estimate) else str(interval)
