"""What one predictor reaches on the test part of one random split."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from aigiqa_reward.evaluation._numbers import Labels, Numbers, group_codes, pair
from aigiqa_reward.evaluation._text import plain
from aigiqa_reward.evaluation.controls import NotConverged, centred_srcc, prompt_auc, selection_gain
from aigiqa_reward.evaluation.correlation import MIN_ROWS, Correlations, correlations

TASKS = ("quality", "correspondence")
"""The two human scores, in the order of every table."""

MEASURES = (
    "srcc",
    "krcc",
    "plcc",
    "plcc_fitted",
    "rmse",
    "centred_srcc",
    "gain",
    "gain_within",
    "right_prompt_auc",
)
"""The measures of `SplitScores`, in its order."""


def check_line(argument: str, text: str) -> None:
    """Refuse what cannot stand in one line of a table or heading."""
    if not isinstance(text, str) or not text.strip() or not text.isprintable():
        raise ValueError(f"{argument}: expected one line of text to print in tables, got {text!r}")


@dataclass(frozen=True, kw_only=True)
class SplitScores:
    """Agreement of one predictor with one human score on the test part of one split; nan where undefined.

    Attributes:
        seed: of the split.
        predictor: "model" or the name of a control, in one line.
        task: "quality" or "correspondence", the human score predicted.
        srcc: Spearman's rank correlation.
        krcc: Kendall's tau-b.
        plcc: Pearson's correlation of the raw predictions.
        plcc_fitted: after the 4-parameter logistic, fitted on the test part for reporting only.
        rmse: root mean squared error after the logistic, in the target's units.
        centred_srcc: SRCC after the additive effects of generator and prompt are removed from both sides.
        gain: selection gain over the images of each prompt.
        gain_within: selection gain over those of one generator and its variants.
        right_prompt_auc: probability that an image's right prompt scores above a wrong one.
        images: number of test images.

    Raises:
        ValueError: a predictor that is not one line of text, an unknown task, a seed or number of images that is no
            integer, no images, or an infinite measure.

    Example:
        >>> from aigiqa_reward.evaluation import SplitScores, score_split
        >>> human, prompts, generators = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], list("ppqqrr"), ["sd1.5"] * 6
        >>> scores: SplitScores = score_split(
        ...     0, "model", task="quality", predicted=human, target=human, prompts=prompts, generators=generators
        ... )
        >>> scores.key, round(scores.srcc, 3), scores.gain, scores.images
        ((0, 'model', 'quality'), 1.0, 1.0, 6)
    """

    seed: int
    predictor: str
    task: str
    srcc: float
    krcc: float
    plcc: float
    plcc_fitted: float
    rmse: float
    centred_srcc: float
    gain: float
    gain_within: float
    right_prompt_auc: float
    images: int

    def __post_init__(self) -> None:
        check_line("predictor", self.predictor)
        if self.task not in TASKS:
            raise ValueError(f"task: expected one of {', '.join(map(repr, TASKS))}, got {self.task!r}")
        for name in ("seed", "images"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise ValueError(f"{name}: expected an integer, got {value!r}")
            object.__setattr__(self, name, int(value))
        if self.images < 1:
            raise ValueError(f"images: expected at least one test image, got {self.images}")
        for name in MEASURES:
            value = float(getattr(self, name))
            if math.isinf(value):
                raise ValueError(f"{name}: expected a finite number, or nan where it is undefined, got {value}")
            object.__setattr__(self, name, value)

    @property
    def key(self) -> tuple[int, str, str]:
        """Seed, predictor and task, which occur together once in a protocol."""
        return self.seed, self.predictor, self.task

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it, None for nan."""
        return plain(asdict(self))


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

    What the test part cannot tell is nan: correlations of constant predictions or of fewer than 5 images; the
    centred SRCC with a single generator or prompt, with fewer than 4 degrees of freedom left (5 images have as
    many after their mean), or for predictions that the two effects explain entirely; a gain with nothing to
    choose among; the gain within a generator that the test part lacks.

    Args:
        seed: of the split.
        predictor: "model" or the name of a control.
        task: "quality" or "correspondence".
        predicted: (N,) predictions on any scale, higher is better.
        target: (N,) human scores.
        prompts: (N,) the prompt of each image.
        generators: (N,) the generator, and variant, that made it.
        same_generator: names that start with it are variants of one generator; None where there is no such.
        wrong_prompt: (N, K) predictions for the same images with K other prompts, or None.

    Raises:
        ValueError: NaN or infinite values, unequal lengths, no rows, or an unknown task.

    Example:
        >>> from aigiqa_reward.evaluation import score_split
        >>> human, prompts, generators = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], list("ppqqrr"), ["sd1.5"] * 6
        >>> told = {"target": human, "prompts": prompts, "generators": generators}
        >>> score_split(0, "best", task="quality", predicted=[0, 1, 0, 1, 0, 1], **told).gain
        1.0
    """
    x, y = pair(predicted, target)
    prompt_codes, _ = group_codes(prompts, len(x), "prompts")
    generator_codes, _ = group_codes(generators, len(x), "generators")
    agreement = _correlations(x, y)
    inside = float("nan")
    if same_generator is not None:
        variants = np.array([str(name).startswith(same_generator) for name in generators], dtype=bool)
        if variants.any():
            inside = selection_gain(x[variants], y[variants], prompt_codes[variants])
    return SplitScores(
        seed=seed,
        predictor=predictor,
        task=task,
        **asdict(agreement),
        centred_srcc=_centred_srcc(x, y, generator_codes, prompt_codes),
        gain=selection_gain(x, y, prompt_codes),
        gain_within=inside,
        right_prompt_auc=float("nan") if wrong_prompt is None else prompt_auc(x, wrong_prompt),
        images=len(x),
    )


def _correlations(x: np.ndarray, y: np.ndarray) -> Correlations:
    if len(x) < MIN_ROWS:
        return Correlations(srcc=np.nan, plcc=np.nan, plcc_fitted=np.nan, krcc=np.nan, rmse=np.nan)
    return correlations(x, y)


def _centred_srcc(x: np.ndarray, y: np.ndarray, generators: np.ndarray, prompts: np.ndarray) -> float:
    counts = int(generators.max()) + 1, int(prompts.max()) + 1
    if min(counts) < 2 or len(x) - _effects(generators, prompts, counts) < MIN_ROWS - 1:
        return float("nan")
    try:
        return centred_srcc(x, y, generators, prompts)
    except NotConverged:  # hardly any prompt has images of two generators
        return float("nan")


def _effects(first: np.ndarray, second: np.ndarray, counts: tuple[int, int]) -> int:
    """Rank of two groupings' additive effects: a mean for each group, less one for each part they fall into."""
    links = coo_array((np.ones(len(first)), (first, counts[0] + second)), shape=(sum(counts), sum(counts)))
    parts, _ = connected_components(links, directed=False)
    return sum(counts) - int(parts)
