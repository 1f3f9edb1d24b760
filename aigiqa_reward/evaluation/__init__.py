"""Measures of agreement with human scores, in numpy: correlations, selection gain, controls, intervals, protocol.

Malformed input (NaN, unequal lengths, no rows) raises a ValueError; a measure that is undefined on well-formed input
(the correlation of a constant, a gain with nothing to choose) is nan.

Example:
    >>> import numpy as np
    >>> from aigiqa_reward.evaluation import *
    >>> agreement: Correlations = correlations([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 6, 5])
    >>> round(agreement.srcc, 3), round(agreement.krcc, 3)
    (0.943, 0.867)
    >>> human = np.linspace(1, 5, 8)
    >>> data = {"task": "quality", "target": human, "prompts": list("ppqqrrss"), "generators": ["sd1.5"] * 8}
    >>> model: SplitScores = score_split(0, "model", predicted=human, **data)
    >>> ridge = score_split(0, "ridge", predicted=-human, **data)
    >>> report = ProtocolReport(title="mine", protocol="1 seed").with_scores([model, ridge])
    >>> row: SummaryRow = report.summary()[0]
    >>> over: OverSeeds = row.srcc
    >>> row.predictor, round(over.mean, 3), over.count
    ('model', 1.0, 1)
    >>> difference: PairedDifference = report.difference("quality", "model", "ridge")
    >>> round(difference.mean, 3), difference.wins
    (2.0, 1)
    >>> curve: Logistic4 = fit_logistic4(predicted=human, target=human)
    >>> bool(np.allclose(curve(human), human, atol=0.01))
    True
    >>> mean: Interval = bootstrap_intervals(lambda rows, _: human[rows, None].mean(axis=0), list("ppqqrrss"))[0]
    >>> mean.estimate
    3.0
    >>> best: PublishedResult = PUBLISHED[0]
    >>> best.method, best.srcc
    ('SC-AGIQA', 0.907)
"""

from aigiqa_reward.evaluation.agreement import krippendorff_alpha
from aigiqa_reward.evaluation.bootstrap import Interval, bootstrap_interval, bootstrap_intervals
from aigiqa_reward.evaluation.controls import (
    centered,
    centered_srcc,
    group_mean_predictor,
    pair_accuracy,
    prompt_auc,
    ridge_predict,
    selection_gain,
    within,
)
from aigiqa_reward.evaluation.metrics import Correlations, Logistic4, correlations, fit_logistic4, srcc
from aigiqa_reward.evaluation.protocol import (
    OverSeeds,
    PairedDifference,
    ProtocolReport,
    SplitScores,
    SummaryRow,
    score_split,
)
from aigiqa_reward.evaluation.tables import PUBLISHED, PublishedResult, published_markdown

__all__ = [
    "PUBLISHED",
    "Correlations",
    "Interval",
    "Logistic4",
    "OverSeeds",
    "PairedDifference",
    "ProtocolReport",
    "PublishedResult",
    "SplitScores",
    "SummaryRow",
    "bootstrap_interval",
    "bootstrap_intervals",
    "centered",
    "centered_srcc",
    "correlations",
    "fit_logistic4",
    "group_mean_predictor",
    "krippendorff_alpha",
    "pair_accuracy",
    "prompt_auc",
    "published_markdown",
    "ridge_predict",
    "score_split",
    "selection_gain",
    "srcc",
    "within",
]
