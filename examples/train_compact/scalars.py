"""Fit the compact reward's last scalars to people's scores of images whose prompts no training saw."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch
from predictions import Predictions
from scipy.optimize import minimize
from scipy.special import expit, log_expit
from torch import Tensor
from tqdm import tqdm

from aigiqa_reward import images as pixels
from aigiqa_reward.datasets import ScoredImages, group_folds
from aigiqa_reward.evaluation import srcc
from aigiqa_reward.models.base import Seen
from aigiqa_reward.models.compact import Compact
from aigiqa_reward.types import PromptFeatures

KNOWN = 0.995
"""Share of these images within the limit of the distance."""

TRIALS = 4000
"""Trials of the search for the weights of correspondence: half at random, half near the best so far."""

LOWEST, HIGHEST = (0.2, 0.0, -1.0, 0.03), (2.5, 1.0, 2.5, 1.2)
"""Bounds of the random trials: weights of quality and match, constant, gamma."""

RIGHT, WRONG, ABOVE, LIKE_QUALITY, LIKE_WRONG = 0.53, 0.28, 0.80, 0.785, 0.42
"""What the weights of correspondence must reach: its mean with right prompts and at most with wrong ones, the share of
right prompts' scores above wrong ones', and the highest SRCC with quality, and of wrong prompts' scores with people's
scores of the right ones."""


@torch.inference_mode()
def look(model: Compact, images: ScoredImages) -> Seen:
    """Compute what the towers see of all images."""
    parts = [model.forward_features(pixels.load(path)[None]) for path in tqdm(images.paths, desc="held out")]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@torch.inference_mode()
def judge(model: Compact, images: ScoredImages, seen: Seen) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the scores (N,) of both views, the match (N, P) with all prompts in order, and the distance (N,)."""
    matches = []
    for rows in each_prompt(model, images):
        matches.append(model.matcher(seen, {name: rows.rows(name) for name in rows.tensors})[0])
    whole, native = (getattr(model.head, view)(model.head.statistics(seen[view]))[:, 0] for view in ("whole", "native"))
    return whole, native, torch.stack(matches, dim=1), model.head.distance(seen["whole"])


def each_prompt(model: Compact, images: ScoredImages) -> Iterator[PromptFeatures]:
    """Encode each of the prompts, in order, for all of the images."""
    texts = model.encode_prompts(sorted(set(images.prompts)))
    for number in range(len(texts.texts)):
        yield texts[number : number + 1].expand(len(images))


def cross_validate(model: Compact, images: ScoredImages, seen: Seen, best: tuple[float, float]) -> Predictions:
    """Score the images by scalars that were fitted to the other half of their prompts."""
    halves, parts = group_folds(images.prompts, 2, seed=0), []
    for half in (0, 1):
        fitted, mine = copy.deepcopy(model), torch.from_numpy(halves == half)
        other = {name: x[~mine] for name, x in seen.items()}
        fit_scalars(fitted, images.subset((~mine).numpy()), other, best)
        some = {name: x[mine] for name, x in seen.items()}
        parts.append(predict(fitted, images.subset(mine.numpy()), some, best[0], half))
    return Predictions.join(parts)


@torch.inference_mode()
def predict(model: Compact, images: ScoredImages, seen: Seen, best: float, fold: int) -> Predictions:
    """Score images with their own and all other prompts; quality in the benchmark's units, whose highest is `best`."""
    outputs = [model.forward_head(seen, prompts, None) for prompts in each_prompt(model, images)]
    scores = torch.stack([output.correspondence for output in outputs], dim=1).numpy()
    own = np.unique(images.prompts, return_inverse=True)[1][:, None] == np.arange(scores.shape[1])
    wrong = np.random.default_rng(0).permuted(scores[~own].reshape(len(images), -1), axis=1)
    return Predictions(
        names=images.names,
        prompts=images.prompts,
        generators=images.generators,
        folds=np.full(len(images), fold),
        target_quality=images.quality,
        target_correspondence=images.correspondence,
        predicted_quality=best * outputs[0].quality.numpy(),
        predicted_correspondence=scores[own],
        wrong_prompt_correspondence=wrong,
        image_only_correspondence=wrong.mean(axis=1),
        shuffled_prompt_correspondence=wrong[:, 0],
        predicted_uncertainty=best * outputs[0].details["uncertainty"].numpy(),
    )


@torch.no_grad()
def fit_scalars(model: Compact, images: ScoredImages, seen: Seen, best: tuple[float, float]) -> None:
    """Fit the scales of quality and match, quality's error, correspondence and the known distance.

    `best` are the best quality and correspondence that people gave to any image; the model's `known` must be 1.
    """
    whole, native, match, distance = (part.double().numpy() for part in judge(model, images, seen))
    head, matcher = model.head, model.matcher
    raw, target = (whole + native) / 2, images.quality / best[0]
    standard = (raw - raw.mean()) / raw.std()
    a, b = minimize(lambda x: np.square(expit(x[0] * standard + x[1]) - target).mean(), [1.0, 0.0]).x
    quality = a * standard + b
    head.quality.copy_(torch.tensor([a / raw.std(), b - a * raw.mean() / raw.std()]))
    own, aligned = np.unique(images.prompts, return_inverse=True)[1], images.correspondence / best[1]
    scale, bias = match_scale(match, own, aligned)
    matcher.scales *= scale
    matcher.bias.copy_(scale * matcher.bias + bias)
    weights = search(quality, scale * match + bias, own, aligned)
    head.correspondence.copy_(torch.tensor(weights[:3]))
    head.gamma.fill_(weights[3])
    error, views = np.abs(expit(quality) - target), np.abs(whole - native)

    def surprise(x: np.ndarray) -> float:  # of errors with a Laplace distribution
        return float((x[0] + x[1] * views + error * np.exp(-x[0] - x[1] * views)).mean())

    head.error.copy_(torch.tensor(minimize(surprise, [np.log(error.mean()), 0.0]).x))
    head.known.fill_(float(np.quantile(distance, KNOWN)))


def match_scale(match: np.ndarray, own: np.ndarray, aligned: np.ndarray) -> np.ndarray:
    """Fit scale and bias of the match as a logit: right prompts, by people's scores, against all wrong ones."""
    is_own = own[:, None] == np.arange(match.shape[1])

    def loss_of(x: np.ndarray) -> float:
        right, wrong = log_expit(x[0] * match[is_own] + x[1]), log_expit(-(x[0] * match[~is_own] + x[1]))
        return float(-(aligned * right).sum() / aligned.sum() - wrong.mean())

    return minimize(loss_of, [1.0, 2.0]).x


def search(quality: np.ndarray, match: np.ndarray, own: np.ndarray, aligned: np.ndarray) -> np.ndarray:
    """Search the weights of correspondence for the best SRCC with people's scores, less some of the error."""
    draw, rng, rows = np.random.default_rng(0), np.random.default_rng(1), np.arange(len(own))
    other = np.array([draw.choice(np.delete(np.arange(match.shape[1]), number)) for number in own])
    matches = np.stack([match[rows, own], match[rows, other]])

    def merit(x: np.ndarray) -> float:
        right, wrong = np.exp(log_expit(x[0] * quality + x[1] * matches + x[2]) + x[3] * log_expit(matches))
        above = (right[:, None] > wrong).mean()
        missed = [wrong.mean() - WRONG, RIGHT - right.mean(), ABOVE - above]
        missed += [srcc(right, quality) - LIKE_QUALITY, srcc(wrong, aligned) - LIKE_WRONG]
        error = np.sqrt(np.square(right - aligned).mean())
        return srcc(right, aligned) - 0.2 * error - 10 * sum(max(0.0, each) for each in missed)

    best, found = -np.inf, np.zeros(4)
    for trial in tqdm(range(TRIALS), desc="correspondence"):
        near = trial >= TRIALS // 2
        drawn = found * np.exp(rng.normal(0, 0.08, 4)) if near else rng.uniform(LOWEST, HIGHEST)
        if (merits := merit(drawn)) > best:
            best, found = merits, drawn
    return found
