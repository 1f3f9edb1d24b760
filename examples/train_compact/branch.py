"""Train the prompt branch on what the streams see, and predict with it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from recipe import Recipe, score_loss
from streams import Streams
from torch import Tensor, nn
from world import World, wanted

from aigiqa_reward.encoders.compact import load_text_tower
from aigiqa_reward.models.compact import CompactHead
from aigiqa_reward.zoo import SPECS

WRONG_PROMPTS = 10
"""Other prompts that each image is held against."""


@dataclass(frozen=True)
class Texts:
    """The prompts of N images as the text tower reads them; `of` maps an image to its row among P prompts."""

    tokens: Tensor
    mask: Tensor
    pooled: Tensor
    of: Tensor


def read_prompts(prompts: tuple[str, ...]) -> Texts:
    distinct = sorted(set(prompts))
    with torch.no_grad():
        read = load_text_tower(sha256=SPECS["compact"].sha256["towers/text.safetensors"]).encode(distinct)
    return Texts(read.tokens, read.mask, read.pooled, torch.tensor([distinct.index(prompt) for prompt in prompts]))


@dataclass(frozen=True)
class Described:
    """Images as the branch sees them, and their prompts."""

    fused: Tensor
    pooled: Tensor
    colours: Tensor
    semantic: Tensor
    texts: Texts


def train_branch(scored: Described, target: Tensor, rows: np.ndarray, streams: Streams, recipe: Recipe) -> None:
    """Train the prompt branch on stored features: human scores, and that a wrong prompt fits less than the right.

    It starts from the head that judges correspondence by the image alone, so that the prompt has to add to that.
    """
    torch.manual_seed(0)  # the dropout of this script, which owns its process
    generator = torch.Generator().manual_seed(1)
    index = torch.from_numpy(rows)
    texts = scored.texts
    prompts = texts.of[index].unique()
    head = streams.head
    head.correspondence.load_state_dict(streams.image_only.state_dict())
    nn.init.constant_(head.match_weight, recipe.branch_match_weight)
    head.semantic_mean.copy_(scored.semantic[index].mean(dim=0))
    head.text_mean.copy_(texts.pooled[prompts].mean(dim=0))
    own = texts.pooled[texts.of[index]]
    described = head.describe(scored.pooled, scored.colours)
    with torch.no_grad():
        head.match_deviation.copy_(head.match(described[index], scored.semantic[index], own).std())
    parameters = [*head.attend.parameters(), *head.correspondence.parameters(), head.match_weight]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.branch_lr, weight_decay=recipe.weight_decay)
    steps = recipe.branch_epochs * (len(rows) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.branch_lr, total_steps=steps)
    for _ in range(steps):
        batch = index[torch.randint(len(index), (64,), generator=generator)]
        flips = torch.randint(2, (64,), generator=generator)
        z = F.dropout(scored.fused[batch, flips], recipe.branch_dropout)
        other = prompts[torch.randint(len(prompts), (64,), generator=generator)]
        seen = (z, described[batch], scored.semantic[batch])
        right = correspondence(head, *seen, texts, texts.of[batch])
        wrong = correspondence(head, *seen, texts, other)
        distinct = other != texts.of[batch]
        gap = F.relu(recipe.mismatch_margin * target[batch] - (right - wrong)) * distinct
        loss = score_loss(right, target[batch], recipe) + recipe.mismatch_weight * gap.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def fit_place(
    world: World, captions: Texts, scored: Described, rows: np.ndarray, head: CompactHead, recipe: Recipe
) -> None:
    """Fit the map of the image's place among texts on the embedded world, by ridge regression on both sides.

    With A the map from images X to texts T, X A T' is to be what a caption's noun and colour are worth in the score,
    and for images that people scored 0: what they taught is not to be unlearned.
    """
    others = recipe.scored_weight * head.describe(scored.pooled[rows], scored.colours[rows])
    images = torch.cat([head.describe(world.pooled, world.colours), others]).double()
    texts = (captions.pooled[captions.of] - head.text_mean).double()
    target = wanted(world.pairs, recipe).double()
    left = ridge(images, recipe.place_ridge)
    right = ridge(texts, recipe.text_ridge)
    place = torch.linalg.solve(left, images[: len(target)].T @ target @ texts) @ torch.linalg.inv(right)
    # What is wanted has one direction for each noun and colour, so that this rank loses nothing.
    outer, scale, inner = torch.linalg.svd(place.T * head.match_deviation / head.match_weight, full_matrices=False)
    rank = head.place_in.out_features
    with torch.no_grad():
        head.place_in.weight.copy_(scale[:rank, None].sqrt() * inner[:rank])
        head.place_out.weight.copy_(outer[:, :rank] * scale[:rank].sqrt())


def ridge(rows: Tensor, share: float) -> Tensor:
    """The Gram matrix of the rows, with this share of its mean diagonal added to the diagonal."""
    gram = rows.T @ rows
    return gram + share * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def correspondence(
    head: CompactHead, fused: Tensor, described: Tensor, semantic: Tensor, texts: Texts, prompts: Tensor
) -> Tensor:
    """Of B images to the prompts of these numbers, (B,)."""
    match = head.match(described, semantic, texts.pooled[prompts])
    return head.judge_correspondence(fused, match, texts.tokens[prompts], texts.mask[prompts])


def predict(
    scored: Described, rows: np.ndarray, head: CompactHead, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Correspondence (N,) to each image's own prompt and (N, K) to K other prompts of these rows."""
    texts = scored.texts
    present = texts.of[rows].unique().numpy()
    others = np.stack(
        [rng.choice(present[present != own], WRONG_PROMPTS, replace=False) for own in texts.of[rows].tolist()]
    )
    with torch.no_grad():
        seen = (scored.fused[rows, 0], head.describe(scored.pooled, scored.colours)[rows], scored.semantic[rows])
        columns = [
            correspondence(head, *seen, texts, prompts).numpy()
            for prompts in (texts.of[rows], *torch.from_numpy(others).T)
        ]
    return columns[0], np.stack(columns[1:], axis=1)
