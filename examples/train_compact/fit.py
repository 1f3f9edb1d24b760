"""Fit the head of the compact reward to what the towers saw, all in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from recipe import Recipe
from torch import Tensor
from world import wanted, world_quality

from aigiqa_reward.datasets import group_folds
from aigiqa_reward.models.compact import ASPECTS, Compact, CompactHead, Likeness

NORMAL_80 = 1.2816
"""Half width of the central 80 % of a normal distribution, in its deviations."""


@dataclass(frozen=True)
class Material:
    """What the towers saw, and what is known about it.

    Attributes:
        scored: of N images that people scored, as `Compact.forward_features` gives it.
        spoilt: of S of the same images, `rows` (S,), each spoilt in one way at one of `levels` (S,).
        world: of pictures of the embedded world, with `pairs` and `levels`.
        targets: (N, 2) human scores, as shares of the best.
        prompts: N prompts.
        texts: (P, 384) sentence embeddings, and `of` (N,) which of them each image has.
        captions: (C, 384) sentence embeddings of the world's captions.
    """

    scored: dict[str, Tensor]
    spoilt: dict[str, Tensor]
    world: dict[str, Tensor]
    targets: Tensor
    prompts: tuple[str, ...]
    texts: Tensor
    of: Tensor
    captions: Tensor


def principal(standard: Tensor, count: int) -> Tensor:
    """The first principal directions (count, columns) of rows."""
    torch.manual_seed(0)  # of the random start of this script, which owns its process
    return torch.svd_lowrank(standard, q=count + 32, niter=4)[2][:, :count].T.contiguous()


def kernel(first: Tensor, second: Tensor) -> Tensor:
    """exp(-|u - v|^2) of every pair of rows."""
    squares = first.square().sum(dim=1)[:, None] + second.square().sum(dim=1)
    return torch.exp(2 * first @ second.T - squares)


def ridge_weights(likeness: Tensor, noise: Tensor, target: Tensor) -> Tensor:
    """(K + noise)^-1 y, for the mean of a Gaussian process."""
    factor = torch.linalg.cholesky(likeness + torch.diag(noise))
    return torch.cholesky_solve(target[:, None], factor)[:, 0]


def fit_likeness(head: Likeness, model: Compact, material: Material, rows: np.ndarray, recipe: Recipe) -> None:
    """Directions, centers and weights, from the scored images of these rows, their spoilt versions and the world."""
    index = torch.from_numpy(rows)
    scored = model.statistics({name: tensor[index] for name, tensor in material.scored.items()})
    bad = torch.isin(material.spoilt["rows"], index)
    spoilt = model.statistics({name: tensor[bad] for name, tensor in material.spoilt.items()})
    other = torch.arange(0, len(material.world["pairs"]), recipe.world_every)
    world = model.statistics({name: tensor[other] for name, tensor in material.world.items()})
    head.mean.copy_(scored.mean(dim=0))
    deviation = scored.std(dim=0)
    head.deviation.copy_(deviation + 0.05 * deviation.mean())  # rarely active channels would be blown up
    standard = [(part - head.mean) / head.deviation for part in (scored, spoilt, world)]
    basis = principal(torch.cat(standard[:2]), len(head.basis))
    length = (standard[0] @ basis.T).square().sum(dim=1).mean().sqrt()
    head.basis.copy_(basis * recipe.width**0.5 / length)
    directions = [head.project(part) for part in (scored, spoilt, world)]
    worst = spoilt_targets(material, bad, recipe)
    targets = [material.targets[index], worst, world_targets(material, index, other, recipe)]
    bias = targets[0].mean(dim=0)
    noises = (recipe.noise, recipe.spoilt_noise, recipe.world_noise)
    noise = torch.cat([torch.full((len(part),), value) for part, value in zip(directions, noises, strict=True)])
    centers, likeness = torch.cat(directions), kernel(torch.cat(directions), torch.cat(directions))
    target = torch.cat(targets) - bias
    head.centres[: len(centers)].copy_(centers)
    quality = ridge_weights(likeness, noise, target[:, 0])
    own = ridge_weights(likeness, recipe.correspondence_noise * noise, target[:, 1])
    head.weights[0, : len(centers)] = quality
    head.weights[1, : len(centers)] = recipe.quality_share * quality + (1 - recipe.quality_share) * own
    head.bias[:ASPECTS] = bias
    of = np.concatenate([rows, material.spoilt["rows"][bad].numpy(), np.full(len(world), -1)])
    fit_variance(head, material, of, likeness, noise, target, recipe)
    of_world = torch.from_numpy(of == -1).float()
    head.weights[ASPECTS + 1, : len(centers)] = ridge_weights(likeness, torch.full_like(noise, recipe.noise), of_world)


def spoilt_targets(material: Material, bad: Tensor, recipe: Recipe) -> Tensor:
    """What spoilt images are taught as: a share of their scores that falls with the level."""
    falls = torch.tensor([recipe.spoilt_quality, recipe.spoilt_correspondence])
    return material.targets[material.spoilt["rows"][bad]] * (1 - falls * material.spoilt["levels"][bad, None])


def world_targets(material: Material, index: Tensor, other: Tensor, recipe: Recipe) -> Tensor:
    """Quality by the level of degradation; correspondence without the prompt is the mean score."""
    quality = world_quality(material.world["levels"][other], recipe)
    return torch.stack([quality, material.targets[index, 1].mean().expand(len(other))], dim=1)


def fit_variance(
    head: Likeness, material: Material, of: np.ndarray, likeness: Tensor, noise: Tensor, target: Tensor, recipe: Recipe
) -> None:
    """The log variance of quality, from errors on prompts that were left out in turn.

    Its constant makes 80 % of those errors fall within the interval that should hold 80 %. `of` says which image each
    center is or was made from, -1 for none; the first centers are the scored images themselves.
    """
    count = int((noise == recipe.noise).sum())
    prompts = np.array(material.prompts)
    folds = group_folds(prompts[of[:count]].tolist(), 5, seed=1)
    errors = torch.zeros(count)
    for fold in range(5):
        held = np.flatnonzero(folds == fold)
        same = np.isin(prompts[of], np.unique(prompts[of[held]])) & (of >= 0)
        inner = torch.from_numpy(np.flatnonzero(~same))
        weights = ridge_weights(likeness[inner][:, inner], noise[inner], target[inner, 0])
        errors[held] = target[held, 0] - likeness[held][:, inner] @ weights
    logs = torch.log(errors.square() + recipe.least_error**2)
    own = likeness[:count, :count]
    weights = ridge_weights(own, torch.full((count,), recipe.variance_noise), logs - logs.mean())
    deviation = torch.exp((own @ weights + logs.mean()) / 2)
    scale = torch.quantile(errors.abs() / deviation, 0.8) / NORMAL_80
    head.weights[ASPECTS, :count] = weights
    head.bias[ASPECTS] = logs.mean() + 2 * scale.log()


def two_sided(images: Tensor, texts: Tensor, target: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """W (texts' width, images' width) with images W' texts' near the target, by ridge regression on both sides."""
    gram, other = images.T @ images + torch.diag(left), texts.T @ texts + torch.diag(right)
    return torch.linalg.solve(other, (torch.linalg.solve(gram, images.T @ target @ texts)).T)


def ridge(rows: Tensor, share: float) -> Tensor:
    """This share of the mean diagonal of the rows' Gram matrix, once a column."""
    return (share * rows.square().sum() / rows.shape[1]).expand(rows.shape[1])


def fit_match(head: CompactHead, model: Compact, material: Material, rows: np.ndarray, recipe: Recipe) -> None:
    """The image's place among texts: from scored images and their prompts, then from the world and its captions.

    A prompt's own images are to lie nearer to it, the better they fit.
    """
    index = torch.from_numpy(rows)
    described = model.described({name: tensor[index] for name, tensor in material.scored.items()})
    head.described_mean.copy_(described.mean(dim=0))
    deviation = described.std(dim=0)
    head.described_deviation.copy_(deviation + 0.05 * deviation[:-125].mean())
    head.described_deviation[-125:] = (deviation[-125:] + 0.02) / recipe.color_scale
    seen = head.describe(described).double()
    prompts, own = material.of[index].unique(return_inverse=True)
    head.text_mean.copy_(material.texts[prompts].mean(dim=0))
    head.semantic_mean.copy_(material.scored["semantic"][index].mean(dim=0))
    texts = (material.texts[prompts] - head.text_mean).double()
    target = torch.zeros(len(rows), len(prompts), dtype=torch.float64)
    target[torch.arange(len(rows)), own] = material.targets[index, 1].double()
    target -= target.mean(dim=0)
    learned = two_sided(seen, texts, target, ridge(seen, recipe.match_ridge), ridge(texts, recipe.match_text_ridge))
    semantic = (material.scored["semantic"][index] - head.semantic_mean).double()
    learned *= recipe.match_learned * (semantic @ texts.T).std() / (seen @ learned.T @ texts.T).std()
    matches = ((semantic + seen @ learned.T) * texts[own]).sum(dim=1)
    head.match_deviation.copy_(matches.std())
    head.match_weight.data.fill_(recipe.match_weight)
    factorize(learned, head.place_in.weight.data, head.place_out.weight.data)
    added = world_part(head, model, material, learned, recipe)
    factorize(added, head.world_in.weight.data, head.world_out.weight.data)


def factorize(whole: Tensor, inwards: Tensor, outwards: Tensor) -> None:
    """Into two maps of as low a rank as they have, by the largest singular values."""
    outer, scale, inner = torch.linalg.svd(whole, full_matrices=False)
    rank = len(inwards)
    inwards.copy_(scale[:rank, None].sqrt() * inner[:rank])
    outwards.copy_(outer[:, :rank] * scale[:rank].sqrt())


def world_part(head: CompactHead, model: Compact, material: Material, learned: Tensor, recipe: Recipe) -> Tensor:
    """Compute the part of the map that separates the world's captions."""
    world = head.describe(model.described(material.world)).double()
    texts = (material.captions - head.text_mean).double()
    semantic = (material.world["semantic"] - head.semantic_mean).double()
    unit = head.match_deviation / head.match_weight.detach()
    already = (semantic + world @ learned.T) @ texts.T / unit
    missing = wanted(material.world["pairs"], recipe).double() - (already - already.mean(dim=1, keepdim=True))
    added = two_sided(world, texts, missing, ridge(world, recipe.place_ridge), ridge(texts, recipe.text_ridge))
    return added * unit
