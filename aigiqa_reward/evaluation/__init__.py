"""Measures of agreement with human scores, in numpy: correlations, selection gain, controls, intervals.

Two rules hold everywhere. Malformed input (NaN, unequal lengths, no rows) raises a ValueError; a measure that
is undefined on well-formed input (the correlation of a constant, a gain with nothing to choose) is nan.
"""

from aigiqa_reward.evaluation.bootstrap import Interval, bootstrap_interval, bootstrap_intervals
from aigiqa_reward.evaluation.compare import evaluate
from aigiqa_reward.evaluation.controls import (
    centred,
    centred_srcc,
    group_mean_predictor,
    prompt_auc,
    selection_gain,
    within,
)
from aigiqa_reward.evaluation.correlation import Correlations, Logistic4, correlations, fit_logistic4, srcc
from aigiqa_reward.evaluation.predictions import Predictions
from aigiqa_reward.evaluation.protocol import OverSeeds, PairedDifference, ProtocolReport, SummaryRow
from aigiqa_reward.evaluation.published import PUBLISHED, PublishedResult, published_markdown
from aigiqa_reward.evaluation.report import EvaluationReport, ReportRow
from aigiqa_reward.evaluation.ridge import ridge_predict
from aigiqa_reward.evaluation.split_scores import SplitScores, score_split

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
    "centred",
    "centred_srcc",
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
