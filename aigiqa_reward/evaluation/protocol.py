"""Results of a model that is trained and tested on several random splits of one benchmark.

Test parts of different seeds overlap, so predictions are never pooled: reported are mean and spread over seeds.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from aigiqa_reward.evaluation.controls import NotConverged, centered_srcc, prompt_auc, selection_gain
from aigiqa_reward.evaluation.metrics import MIN_ROWS, Correlations, Labels, Numbers, correlations, group_codes, pair
from aigiqa_reward.evaluation.tables import TASKS, markdown_table, number
from aigiqa_reward.utils.io import csv_text, read_json
from aigiqa_reward.utils.run_folder import without_nan, write_json

MODEL = "model"
GENERATOR = "generator's mean score"
"""Predictors that every protocol has: the model, and the control that knows only which generator made the image."""

FORMAT = 1
"""Version of the file, increased when a field changes its meaning."""

MEASURES = ("srcc", "krcc", "plcc", "plcc_fitted", "rmse", "centered_srcc", "gain", "gain_within", "right_prompt_auc")
"""The measures of `SplitScores`, in its order."""

_SHOWN = ("krcc", "plcc", "plcc_fitted", "centered_srcc", "gain", "gain_within", "right_prompt_auc")
_COLUMNS = ("SRCC", "SRCC median", "KRCC", "PLCC raw", "PLCC fitted", "centered SRCC", "gain", "gain within", "AUC")
_LEGEND = (
    "Mean ± standard deviation over seeds; in brackets, in how many seeds a measure is defined where that is not all. "
    "PLCC fitted: after the 4-parameter logistic. Centered SRCC: by generator and prompt. Gain: selection gain over "
    "the images of each prompt; within: over those of one generator. AUC: an image's right prompt above a wrong one."
)


@dataclass(frozen=True, kw_only=True)
class SplitScores:
    """Agreement of one predictor with one human score on the test part of one split; nan where undefined.

    Attributes:
        seed: seed of the split.
        predictor: "model" or the name of a control, in one line.
        task: "quality" or "correspondence", the human score predicted.
        srcc: Spearman's rank correlation.
        krcc: Kendall's tau-b.
        plcc: Pearson's correlation of the raw predictions.
        plcc_fitted: Pearson's correlation after the 4-parameter logistic, fitted on the test part for reporting only.
        rmse: root mean squared error after the logistic, in the target's units.
        centered_srcc: SRCC after the additive effects of generator and prompt are removed from both sides.
        gain: selection gain over the images of each prompt.
        gain_within: selection gain over those of one generator and its variants.
        right_prompt_auc: probability that an image's right prompt scores above a wrong one.
        images: number of test images.
    """

    seed: int
    predictor: str
    task: str
    srcc: float
    krcc: float
    plcc: float
    plcc_fitted: float
    rmse: float
    centered_srcc: float
    gain: float
    gain_within: float
    right_prompt_auc: float
    images: int

    def __post_init__(self) -> None:
        if not self.predictor.isprintable():
            raise ValueError(f"predictor: expected one line of text to print in tables, got {self.predictor!r}")
        if self.task not in TASKS:
            raise ValueError(f"task: expected one of {', '.join(map(repr, TASKS))}, got {self.task!r}")

    @property
    def key(self) -> tuple[int, str, str]:
        """Seed, predictor and task, which occur together once in a protocol."""
        return self.seed, self.predictor, self.task


def score_split(
    seed: int,
    predictor: str,
    *,
    task: str,
    predicted: Numbers,
    target: Numbers,
    prompts: Labels,
    generators: Labels,
    same_generator: str | None = "sd1.5",
    wrong_prompt: np.ndarray | None = None,
) -> SplitScores:
    """Measure predictions on the test part of one split.

    Undefined measures are nan: correlations of constant predictions or of fewer than 5 images; the centered SRCC
    with a single generator or prompt, with fewer than 4 degrees of freedom left, or for predictions that the two
    effects explain entirely; a gain with nothing to choose among or without images of `same_generator`.

    Args:
        seed: seed of the split.
        predictor: "model" or the name of a control.
        task: "quality" or "correspondence".
        predicted: (N,) predictions on any scale, higher is better.
        target: (N,) human scores.
        prompts: (N,) prompt of each image.
        generators: (N,) generator, and variant, that made each image.
        same_generator: prefix of the names that are variants of one generator; None for no such.
        wrong_prompt: (N, K) predictions for the same images with K other prompts, or None.
    """
    x, y = pair(predicted, target)
    prompt_codes, _ = group_codes(prompts, len(x), "prompts")
    generator_codes, _ = group_codes(generators, len(x), "generators")
    agreement = Correlations(srcc=np.nan, plcc=np.nan, plcc_fitted=np.nan, krcc=np.nan, rmse=np.nan)
    inside = np.array([same_generator is not None and str(name).startswith(same_generator) for name in generators])
    return SplitScores(
        seed=seed,
        predictor=predictor,
        task=task,
        **asdict(correlations(x, y) if len(x) >= MIN_ROWS else agreement),
        centered_srcc=_centered_srcc(x, y, generator_codes, prompt_codes),
        gain=selection_gain(x, y, prompt_codes),
        gain_within=selection_gain(x[inside], y[inside], prompt_codes[inside]) if inside.any() else np.nan,
        right_prompt_auc=np.nan if wrong_prompt is None else prompt_auc(x, wrong_prompt),
        images=len(x),
    )


def _centered_srcc(x: np.ndarray, y: np.ndarray, generators: np.ndarray, prompts: np.ndarray) -> float:
    first, second = int(generators.max()) + 1, int(prompts.max()) + 1
    # The rank of the two groupings' additive effects: a mean per group, less one per connected part.
    links = coo_array((np.ones(len(x)), (generators, first + prompts)), shape=(first + second, first + second))
    effects = first + second - int(connected_components(links, directed=False)[0])
    if min(first, second) < 2 or len(x) - effects < MIN_ROWS - 1:
        return np.nan
    try:
        return centered_srcc(x, y, generators, prompts)
    except NotConverged:  # hardly any prompt has images of two generators
        return np.nan


@dataclass(frozen=True, kw_only=True)
class OverSeeds:
    """Mean, standard deviation (ddof 1) and median of one measure over the `count` seeds in which it is defined.

    Nan where there are none; the standard deviation of a single seed is nan as well.
    """

    mean: float
    std: float
    median: float
    count: int

    def __str__(self) -> str:
        return number(self.mean) if self.count < 2 else f"{number(self.mean)} ± {number(self.std)}"

    @classmethod
    def of(cls, values: Iterable[float]) -> OverSeeds:
        """Summarize the values that are not nan."""
        known = np.array([value for value in values if not np.isnan(value)])
        if not len(known):
            return cls(mean=np.nan, std=np.nan, median=np.nan, count=0)
        std = float(known.std(ddof=1)) if len(known) > 1 else np.nan
        return cls(mean=float(known.mean()), std=std, median=float(np.median(known)), count=len(known))


@dataclass(frozen=True, kw_only=True)
class SummaryRow:
    """One predictor of one human score over its seeds (ascending); task, predictor and measures as in `SplitScores`."""

    task: str
    predictor: str
    seeds: tuple[int, ...]
    srcc: OverSeeds
    krcc: OverSeeds
    plcc: OverSeeds
    plcc_fitted: OverSeeds
    rmse: OverSeeds
    centered_srcc: OverSeeds
    gain: OverSeeds
    gain_within: OverSeeds
    right_prompt_auc: OverSeeds

    def cells(self) -> list[str]:
        """Return the row of the Markdown table."""
        over = [getattr(self, name) for name in ("srcc", *_SHOWN)]
        partly = [f" ({one.count} of {len(self.seeds)})" if 0 < one.count < len(self.seeds) else "" for one in over]
        first, *others = [f"{one}{count}" for one, count in zip(over, partly, strict=True)]
        return [self.predictor, first, number(self.srcc.median), *others]


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """SRCC of one predictor minus another's, seed by seed on the same test parts.

    Splits share most of their images, so the spread describes these splits; it is no standard error.

    Attributes:
        mean: mean over the seeds in which both are defined; nan if there is none.
        std: standard deviation (ddof 1); nan for fewer than two seeds.
        seeds: number of seeds compared.
        wins: number of seeds in which the first predictor is strictly higher.
    """

    mean: float
    std: float
    seeds: int
    wins: int

    def __str__(self) -> str:
        if self.seeds == 0:
            return "–"
        spread = f" ± {self.std:.3f}" if self.seeds > 1 else ""
        return f"{self.mean:+.3f}{spread}, higher in {self.wins} of {self.seeds} seeds"


@dataclass(frozen=True, kw_only=True)
class ProtocolReport:
    """The scores of all seeds, predictors and tasks of one protocol; grows seed by seed, so that a run can resume.

    Attributes:
        title: the benchmark, or the benchmark and the model, in one line.
        protocol: kind of split, such as "groups by prompt, 80/20, 10 seeds".
        scores: one entry per seed, predictor and task.
    """

    title: str
    protocol: str
    scores: tuple[SplitScores, ...] = ()

    def __post_init__(self) -> None:
        keys = [entry.key for entry in self.scores]
        if repeated := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"scores: expected each seed, predictor and task once, got {repeated[0]} again")

    def done(self, seed: int, predictor: str, task: str) -> bool:
        """Return whether the report has the scores of this seed, predictor and task."""
        return any(entry.key == (seed, predictor, task) for entry in self.scores)

    def with_scores(self, more: Iterable[SplitScores]) -> ProtocolReport:
        """Return a new report that holds more scores."""
        return replace(self, scores=(*self.scores, *more))

    def summary(self) -> tuple[SummaryRow, ...]:
        """Return one row per task and predictor: quality first, predictors in the order of their first appearance."""
        rows = []
        for task, predictor in dict.fromkeys(
            (task, e.predictor) for task in TASKS for e in self.scores if e.task == task
        ):
            entries = self._by_seed(task, predictor)
            measures = {name: OverSeeds.of(getattr(e, name) for e in entries.values()) for name in MEASURES}
            rows.append(SummaryRow(task=task, predictor=predictor, seeds=tuple(entries), **measures))
        return tuple(rows)

    def difference(self, task: str, a: str, b: str) -> PairedDifference:
        """Compute SRCC of predictor `a` minus that of `b`, over the seeds that both were scored on."""
        first, second = self._by_seed(task, a), self._by_seed(task, b)
        both = [first[seed].srcc - second[seed].srcc for seed in first if seed in second]
        over = OverSeeds.of(both)
        return PairedDifference(mean=over.mean, std=over.std, seeds=over.count, wins=sum(value > 0 for value in both))

    def markdown(self) -> str:
        """Return the summary as Markdown: the protocol, then a table per task."""
        seeds, images = {entry.seed for entry in self.scores}, sorted({entry.images for entry in self.scores})
        counted = "No seed has been scored."
        if seeds:
            range_of = " to ".join(f"{count:,}" for count in dict.fromkeys((images[0], images[-1])))
            counted = f"Scored: {len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'}, {range_of} test images each."
        lines = [f"### {self.title}", "", f"{self.protocol.rstrip('.')}. {counted}"]
        rows = self.summary()
        for task in TASKS:
            of_task = [row for row in rows if row.task == task]
            if of_task:
                table = markdown_table(("predictor", *_COLUMNS), [row.cells() for row in of_task])
                lines += ["", f"**{task.capitalize()}**", "", *table]
            partial = [row for row in of_task if len(row.seeds) < len(seeds)]
            lines += [""] if partial else []
            for row in partial:
                listed = ", ".join(map(str, row.seeds))
                lines.append(f"- {row.predictor}: {len(row.seeds)} of {len(seeds)} seeds ({listed})")
        return "\n".join([*lines, *(["", _LEGEND] if rows else [])]) + "\n"

    def csv(self) -> str:
        """Return one line per seed, predictor and task below a header; full precision, empty where undefined."""
        names = [field.name for field in fields(SplitScores)]
        return csv_text([names, *([entry[name] for name in names] for entry in self.as_dict()["scores"])])

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values, None for nan."""
        scores = [without_nan(asdict(entry)) for entry in self.scores]
        return {"format": FORMAT, "title": self.title, "protocol": self.protocol, "scores": scores}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one .json file atomically, and return its path."""
        target = Path(path)
        if target.suffix != ".json":
            raise ValueError(f"path: expected a name that ends in .json, got {str(target)!r}")
        write_json(target, self.as_dict())
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ProtocolReport:
        """Read a file that `save` wrote."""
        try:
            values = read_json(path)
            if values["format"] != FORMAT:
                raise ValueError(f"expected format {FORMAT}, got {values['format']}; save it again")
            found: list[dict[str, Any]] = [
                {k: np.nan if v is None else v for k, v in entry.items()} for entry in values["scores"]
            ]
            scores = tuple(SplitScores(**entry) for entry in found)
            return cls(title=values["title"], protocol=values["protocol"], scores=scores)
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"path: {str(path)!r} is not a file of ProtocolReport.save ({error})") from error

    def _by_seed(self, task: str, predictor: str) -> dict[int, SplitScores]:
        """Return the scores of one predictor by seed, ascending."""
        entries = [entry for entry in self.scores if (entry.task, entry.predictor) == (task, predictor)]
        if not entries:
            there = sorted({(entry.task, entry.predictor) for entry in self.scores})
            raise ValueError(f"task, predictor: no scores of {(task, predictor)}; there are {there}")
        return {entry.seed: entry for entry in sorted(entries, key=lambda entry: entry.seed)}
