"""Selection gain, and the controls beside a model: generator means, centering, ridge regression on its features."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aigiqa_reward.evaluation.bootstrap import Interval, bootstrap_interval
from aigiqa_reward.evaluation.metrics import ROUNDING, Labels, Numbers, check_finite, group_codes, numbers, pair, srcc

MAX_SWEEPS = 10_000
"""Rounds of centering before giving up; a nearly balanced design needs about ten."""

PENALTIES = tuple(float(penalty) for penalty in np.logspace(-1, 5, 13))
"""Ridge penalties that are tried, from nearly none to nearly the mean for standardized features."""

FOLDS = 5


class NotConverged(ValueError):
    """Error of centering by groupings that hardly overlap."""


def selection_gain(predicted: Numbers, target: Numbers, groups: Labels) -> float:
    """Compute the share of the best possible improvement that picking each group's best-predicted row brings.

    mean over groups of (target of the picked row - mean target of the group), over
    mean over groups of (best target - mean target): 1 for a perfect choice, 0 on average for a random one.
    Tied predictions count with the mean target of the tied rows, so a constant predictor has exactly 0.

    Args:
        predicted: (N,) predictions, higher is better.
        target: (N,) human scores; the gain is nan if no group has two different ones.
        groups: (N,) group within which rows compete, such as the prompt.

    Example:
        >>> from aigiqa_reward.evaluation import selection_gain
        >>> human, prompts = [1.0, 2.0, 3.0, 4.0], ["a", "a", "b", "b"]
        >>> selection_gain([0, 1, 0, 1], human, prompts), selection_gain([0, 1, 1, 0], human, prompts)
        (1.0, 0.0)
    """
    x, y = pair(predicted, target)
    codes, count = group_codes(groups, len(x), "groups")
    highest, best = np.full(count, -np.inf), np.full(count, -np.inf)
    np.maximum.at(highest, codes, x)
    np.maximum.at(best, codes, y)
    tied = (x == highest[codes]).astype(np.float64)
    mean = np.bincount(codes, weights=y, minlength=count) / np.bincount(codes, minlength=count)
    picked = np.bincount(codes, weights=y * tied, minlength=count) / np.bincount(codes, weights=tied)
    possible = float(np.mean(best - mean))
    return float(np.mean(picked - mean)) / possible if possible > ROUNDING * float(np.ptp(y)) else np.nan


def pair_accuracy(better: Numbers, worse: Numbers, groups: Labels, *, repeats: int = 1000, seed: int = 0) -> Interval:
    """Compute the share of pairs in which people's choice scores higher; a tie counts half.

    Args:
        better: (N,) scores of the preferred image of each pair.
        worse: (N,) scores of the other.
        groups: (N,) group of each pair, such as its prompt; the interval is over groups.
        repeats: number of bootstrap draws.
        seed: random seed of the draws.

    Example:
        >>> from aigiqa_reward.evaluation import pair_accuracy
        >>> pair_accuracy([0.9, 0.4, 0.3, 0.5], [0.1, 0.2, 0.3, 0.7], ["a", "b", "c", "d"]).estimate
        0.625
    """
    x, y = pair(better, worse)
    won = (x > y) + 0.5 * (x == y)
    return bootstrap_interval(lambda rows, _: float(won[rows].mean()), groups, repeats=repeats, seed=seed)


def within(generators: Sequence[str] | np.ndarray, prefix: str) -> np.ndarray:
    """Find the rows of a generator and its variants: (N,) bool, True where the name starts with `prefix`.

    With it, the selection gain over the variants of one generator, which are alike in quality on average::

        rows = within(generators, "sd1.5")
        gain = selection_gain(predicted[rows], target[rows], prompts[rows])

    Example:
        >>> from aigiqa_reward.evaluation import within
        >>> within(["sd1.5_normal", "sd1.5_lowstep", "DALLE2_normal"], "sd1.5")
        array([ True,  True, False])
    """
    mask = np.array([name.startswith(prefix) for name in generators], dtype=bool)
    if not mask.any():
        raise ValueError(f"prefix: no generator's name starts with {prefix!r}; there are {sorted(set(generators))}")
    return mask


def prompt_auc(right: Numbers, wrong: np.ndarray) -> float:
    """Compute how often an image's right prompt scores above a wrong one for the same image; ties count half.

    Args:
        right: (N,) correspondence of each image to its own prompt.
        wrong: (N, K) correspondence of the same image to K other prompts.

    Example:
        >>> import numpy as np
        >>> from aigiqa_reward.evaluation import prompt_auc
        >>> prompt_auc([0.9, 0.4], np.array([[0.1, 0.2], [0.3, 0.5]]))
        0.75
    """
    x, others = numbers(right, "right"), np.asarray(wrong, dtype=np.float64)
    if others.ndim != 2 or others.shape[0] != len(x) or others.shape[1] == 0:
        raise ValueError(f"wrong: expected shape ({len(x)}, K) with K of at least 1, got {others.shape}")
    others = check_finite(others, "wrong")
    return float(np.mean((x[:, None] > others) + 0.5 * (x[:, None] == others)))


def group_mean_predictor(train_target: Numbers, train_groups: Labels, groups: Labels) -> np.ndarray:
    """Predict each row by the mean training target of its group.

    With generators as groups this is the generator-identity control: a model that beats it has seen more than
    which generator made the image.

    Args:
        train_target: (M,) human scores.
        train_groups: (M,) their groups.
        groups: (N,) groups of the rows to predict, all of which occur in training.

    Example:
        >>> from aigiqa_reward.evaluation import group_mean_predictor
        >>> group_mean_predictor([1.0, 3.0, 4.0], ["sd", "sd", "dalle"], ["dalle", "sd"])
        array([4., 2.])
    """
    y = numbers(train_target, "train_target")
    codes, count = group_codes(train_groups, len(y), "train_groups")
    means = np.bincount(codes, weights=y) / np.bincount(codes, minlength=count)
    known, wanted = np.unique(np.asarray(train_groups)), np.asarray(groups)
    unknown = sorted(set(wanted.tolist()) - set(known.tolist()))
    if unknown:
        raise ValueError(f"groups: no training row of {unknown}; training has {known.tolist()}")
    return means[np.searchsorted(known, wanted)]


def centered(values: Numbers, *groupings: Labels) -> np.ndarray:
    """Remove the additive effects of several groupings, such as generator and prompt, from values (N,).

    Group means are subtracted in turn until none is left. On unbalanced data too this ends at the residuals
    of the least-squares fit of all effects together. Values that the effects explain entirely become exact 0.
    Raises NotConverged, a ValueError, where the groupings hardly overlap.

    Example:
        >>> from aigiqa_reward.evaluation import centered
        >>> centered([1.0, 2.0, 11.0, 14.0], ["a", "a", "b", "b"], ["x", "y", "x", "y"])
        array([ 0.5, -0.5, -0.5,  0.5])
    """
    x = numbers(values, "values")
    coded = [group_codes(labels, len(x), "groupings") for labels in groupings]
    sized = [(codes, np.bincount(codes, minlength=count)) for codes, count in coded]
    scale = float(np.abs(x - x.mean()).max())
    residual = x - x.mean()
    for _ in range(MAX_SWEEPS):
        moved = 0.0
        for codes, sizes in sized:
            means = np.bincount(codes, weights=residual, minlength=len(sizes)) / sizes
            residual = residual - means[codes]
            moved = max(moved, float(np.abs(means).max()))
        if moved <= 1e-3 * ROUNDING * scale:
            return residual if np.abs(residual).max() > ROUNDING * scale else np.zeros_like(residual)
    raise NotConverged(
        f"groupings: no convergence after {MAX_SWEEPS} rounds: they hardly overlap; center by fewer of them"
    )


def centered_srcc(predicted: Numbers, target: Numbers, *groupings: Labels) -> float:
    """Compute SRCC after the additive effects of `groupings` are removed from predictions and targets.

    Nan for a predictor that those effects explain entirely. Raises as `centered` does.

    Example:
        >>> import numpy as np
        >>> from aigiqa_reward.evaluation import centered_srcc
        >>> generators, prompts = np.repeat(["sd", "dalle", "xl"], 4), np.tile(["a", "b", "c", "d"], 3)
        >>> human = np.random.default_rng(0).normal(size=12)
        >>> round(centered_srcc(human + 10 * (generators == "xl"), human, generators, prompts), 3)
        1.0
    """
    return srcc(_levels(predicted, groupings), _levels(target, groupings))


def _levels(values: Numbers, groupings: tuple[Labels, ...]) -> np.ndarray:
    """Return the rank of each row's centered value among the distinct ones; differences by rounding don't count."""
    residual, x = centered(values, *groupings), numbers(values, "values")
    order = residual.argsort(kind="stable")
    apart = np.diff(residual[order], prepend=residual[order[:1]]) > ROUNDING * np.abs(x - x.mean()).max()
    levels = np.empty(len(x))
    levels[order] = np.cumsum(apart)
    return levels


def ridge_predict(
    features_train: np.ndarray,
    target_train: Numbers,
    features_test: np.ndarray,
    *,
    groups_train: Labels,
    penalties: Numbers = PENALTIES,
) -> np.ndarray:
    """Fit a ridge regression whose penalty is chosen inside the training rows, and predict.

    Minimizes the sum over rows of (y - b - w.z)^2, plus penalty * |w|^2, where z are the features standardized on the
    rows fitted on, without those that are constant there. The penalty has the least mean squared error over 5 folds
    of whole groups (as many as there are groups, if fewer); of equal ones, the largest. In closed form, by one
    eigendecomposition per fold of the smaller of the two Gram matrices.

    Args:
        features_train: (N, D) finite numbers.
        target_train: (N,) human scores.
        features_test: (M, D) finite numbers.
        groups_train: (N,) group of each training row, such as its prompt; at least two groups.
        penalties: positive numbers to choose from, in any order.

    Example:
        >>> import numpy as np
        >>> from aigiqa_reward.evaluation import ridge_predict
        >>> features = np.random.default_rng(0).normal(size=(60, 5))
        >>> human = features @ [1.0, 0.5, 0.0, 0.0, -1.0]
        >>> predicted = ridge_predict(features[:40], human[:40], features[40:], groups_train=np.arange(40) // 4)
        >>> predicted.shape, bool(np.corrcoef(predicted, human[40:])[0, 1] > 0.99)
        ((20,), True)
    """
    y = numbers(target_train, "target_train")
    x, t = _matrix(features_train, "features_train"), _matrix(features_test, "features_test")
    if len(x) != len(y) or x.shape[1] != t.shape[1]:
        shapes = f"{x.shape}, {y.shape} and {t.shape}"
        raise ValueError(f"features_train, target_train, features_test: expected (N, D), (N,) and (M, D), got {shapes}")
    codes, count = group_codes(groups_train, len(y), "groups_train")
    if count < 2:
        raise ValueError("groups_train: expected at least two groups to choose the penalty by, got one")
    ordered = np.sort(numbers(penalties, "penalties"))[::-1]
    if ordered[-1] <= 0:
        raise ValueError(f"penalties: expected positive numbers, got {ordered[-1]}")
    folds = _deal(codes, min(FOLDS, count))
    squared = np.zeros(len(ordered))
    for fold in range(int(folds.max()) + 1):
        held_out = folds == fold
        errors = _predictions(x[~held_out], y[~held_out], x[held_out], ordered) - y[held_out, None]
        squared += (errors**2).sum(axis=0)
    best = int(np.argmin(squared))
    return _predictions(x, y, t, ordered[best : best + 1])[:, 0]


def _matrix(values: np.ndarray, argument: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(f"{argument}: expected shape (rows, features) with a feature or more, got {array.shape}")
    return check_finite(array, argument)


def _deal(codes: np.ndarray, folds: int) -> np.ndarray:
    """Return the fold of each row (N,), dealing groups from the largest, each to the fold with the fewest rows."""
    sizes = np.bincount(codes)
    fold_of_group, filled = np.empty(len(sizes), dtype=np.int64), np.zeros(folds, dtype=np.int64)
    for group in np.argsort(-sizes, kind="stable"):
        fold_of_group[group] = fold = int(np.argmin(filled))
        filled[fold] += sizes[group]
    return fold_of_group[codes]


def _predictions(x: np.ndarray, y: np.ndarray, t: np.ndarray, penalties: np.ndarray) -> np.ndarray:
    """Predict rows t (M, D) by a fit on rows x (N, D) with each of L penalties: (M, L)."""
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    varies = deviation > 1e-12 * np.abs(x).max(axis=0)  # what rounding leaves of a constant is far below
    scale = np.where(varies, deviation, np.inf)
    z, residual = (x - mean) / scale, y - y.mean()
    dual = len(x) < x.shape[1]
    values, vectors = np.linalg.eigh(z @ z.T if dual else z.T @ z)
    projected = vectors.T @ (residual if dual else z.T @ residual)
    solved = vectors @ (projected[:, None] / (np.maximum(values, 0.0)[:, None] + penalties))
    weights = z.T @ solved if dual else solved
    return y.mean() + (t - mean) / scale @ weights
