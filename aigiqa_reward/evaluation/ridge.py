"""Ridge regression on frozen features: the control that tells what a model adds to the features it stands on."""

from __future__ import annotations

import numpy as np

from aigiqa_reward.evaluation._numbers import Labels, Numbers, group_codes, numbers

PENALTIES = tuple(float(penalty) for penalty in np.logspace(-1, 5, 13))
"""Tried by default, two a decade: chosen here, from nearly none to nearly the mean for standardised features."""

FOLDS = 5


def ridge_predict(
    features_train: np.ndarray,
    target_train: Numbers,
    features_test: np.ndarray,
    *,
    groups_train: Labels,
    penalties: Numbers = PENALTIES,
) -> np.ndarray:
    """Fit a ridge regression whose penalty is chosen inside the training rows, and predict.

    Minimises the sum over rows of (y - b - w.z)^2, plus penalty * |w|^2, where z are the features less their mean
    over their standard deviation in the rows fitted on; a feature that is constant there does not count. The
    penalty has the least mean squared error over 5 folds of whole groups (as many as there are groups, if fewer),
    each predicted from the others with their own mean and deviation; of equal ones, the largest.

    Deterministic. In closed form, from one eigendecomposition a fold of the smaller of the two Gram matrices.

    Args:
        features_train: (N, D) finite numbers.
        target_train: (N,) human scores.
        features_test: (M, D).
        groups_train: (N,) the group of each training row, such as its prompt; at least two groups.
        penalties: positive numbers to choose from, in any order.

    Returns:
        (M,) float64 predictions in the target's units.

    Raises:
        ValueError: wrong shapes, NaN or infinite values, a single group, or a penalty that is not positive.

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
    if len(x) != len(y):
        raise ValueError(f"features_train, target_train: expected equal lengths, got {len(x)} and {len(y)}")
    if x.shape[1] != t.shape[1]:
        raise ValueError(f"features_test: expected {x.shape[1]} columns as in features_train, got {t.shape[1]}")
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
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if len(bad):
        raise ValueError(
            f"{argument}: expected finite numbers, got NaN or infinite ones in {len(bad)} rows, "
            f"the first {bad[0]}; drop or repair those rows"
        )
    return array


def _deal(codes: np.ndarray, folds: int) -> np.ndarray:
    """The fold of each row (N,): groups go from the largest to the smallest, each to the fold with the fewest rows."""
    sizes = np.bincount(codes)
    fold_of_group = np.empty(len(sizes), dtype=np.int64)
    filled = np.zeros(folds, dtype=np.int64)
    for group in np.argsort(-sizes, kind="stable"):
        fold = int(np.argmin(filled))
        fold_of_group[group] = fold
        filled[fold] += sizes[group]
    return fold_of_group[codes]


def _predictions(x: np.ndarray, y: np.ndarray, t: np.ndarray, penalties: np.ndarray) -> np.ndarray:
    """Predictions for rows t (M, D) by a fit on rows x (N, D) with each of L penalties: (M, L)."""
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
