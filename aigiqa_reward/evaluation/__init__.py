"""Measures of agreement with human scores, in numpy: correlations, selection gain, controls, intervals.

Two rules hold everywhere. Malformed input (NaN, unequal lengths, no rows) raises a ValueError; a measure that
is undefined on well-formed input (the correlation of a constant, a gain with nothing to choose) is nan.

Example:
    >>> import numpy as np

    >>> human = np.linspace(1, 5, 8)
    >>> table = Predictions(
    ...     names=tuple("abcdefgh"),
    ...     prompts=tuple("ppqqrrss"),
    ...     generators=("sd", "xl") * 4,
    ...     folds=np.array([0, 0, 0, 0, 1, 1, 1, 1]),
    ...     target_quality=human,
    ...     target_correspondence=human,
    ...     predicted_quality=human,
    ...     predicted_correspondence=human,
    ... )
    >>> found: EvaluationReport = evaluate(table, repeats=10, same_generator="sd")
    >>> round(found.row("quality").srcc.estimate, 3)
    1.0

    >>> told = {"task": "quality", "target": human, "prompts": table.prompts, "generators": ["sd1.5"] * 8}
    >>> model = score_split(0, "model", predicted=human, **told)
    >>> ridge = score_split(0, "ridge", predicted=-human, **told)
    >>> report = ProtocolReport(title="mine", protocol="1 seed").with_scores([model, ridge])
    >>> row: SummaryRow = report.summary()[0]
    >>> srcc: OverSeeds = row.srcc
    >>> row.predictor, round(srcc.mean, 3), srcc.count
    ('model', 1.0, 1)
    >>> difference: PairedDifference = report.difference("quality", "model", "ridge")
    >>> round(difference.mean, 3), difference.wins
    (2.0, 1)
"""

from aigiqa_reward.evaluation.bootstrap import Interval, bootstrap_interval, bootstrap_intervals
from aigiqa_reward.evaluation.compare import evaluate
from aigiqa_reward.evaluation.controls import (
    centered,
    centered_srcc,
    group_mean_predictor,
    prompt_auc,
    ridge_predict,
    selection_gain,
    within,
)
from aigiqa_reward.evaluation.metrics import Correlations, Logistic4, correlations, fit_logistic4, srcc
from aigiqa_reward.evaluation.predictions import Predictions
from aigiqa_reward.evaluation.protocol import (
    OverSeeds,
    PairedDifference,
    ProtocolReport,
    SplitScores,
    SummaryRow,
    score_split,
)
from aigiqa_reward.evaluation.report import EvaluationReport, ReportRow
from aigiqa_reward.evaluation.tables import PUBLISHED, PublishedResult, published_markdown

__all__ = [
    "PUBLISHED",
    "Correlations",
    "EvaluationReport",
    "Interval",
    "Logistic4",
    "OverSeeds",
    "PairedDifference",
    "Predictions",
    "ProtocolReport",
    "PublishedResult",
    "ReportRow",
    "SplitScores",
    "SummaryRow",
    "bootstrap_interval",
    "bootstrap_intervals",
    "centered",
    "centered_srcc",
    "correlations",
    "evaluate",
    "fit_logistic4",
    "group_mean_predictor",
    "prompt_auc",
    "published_markdown",
    "ridge_predict",
    "score_split",
    "selection_gain",
    "srcc",
    "within",
]
