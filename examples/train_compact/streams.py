"""Fine-tune both image streams; store what they then see of every image."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from features import StoredFeatures, Tail
from recipe import Recipe, score_loss
from torch import Tensor, nn
from tqdm import tqdm
from world import World, order_loss

from aigiqa_reward.encoders.compact import CompactImageTower
from aigiqa_reward.encoders.timm import SmoothReLU6, TimmEncoder
from aigiqa_reward.models.blocks import ScoreHead
from aigiqa_reward.models.compact import CompactConfig, CompactHead
from aigiqa_reward.weights import load_strictly, read_weights, write_weights

EVALUATED_CROPS = (0, 2, 6, 8)
"""Corners of the 3 x 3 grid: what the model itself takes of a square image."""


class Streams(nn.Module):
    """Both trained streams with the head, and a head for correspondence from the image alone (the control)."""

    def __init__(self, config: CompactConfig, recipe: Recipe, encoder: TimmEncoder) -> None:
        super().__init__()
        self.coarse = Tail(copy.deepcopy(encoder)).to(memory_format=torch.channels_last)
        self.fine = Tail(copy.deepcopy(encoder)).to(memory_format=torch.channels_last)
        self.head = CompactHead(config, encoder.width, CompactImageTower.semantic_width, 384)
        self.image_only = ScoreHead(config.width)
        self.dropout = nn.Dropout(recipe.dropout)

    def fused(self, whole: Tensor, crops: list[Tensor]) -> Tensor:
        """(B, crops, width)."""
        coarse = self.dropout(self.coarse(whole))
        return self.head.fuse(coarse, torch.stack([self.dropout(self.fine(crop)) for crop in crops], dim=1))[0]

    def forward(self, whole: Tensor, crop: Tensor) -> tuple[Tensor, Tensor]:
        """Quality and image-only correspondence, (B,) each."""
        fused = self.fused(whole, [crop])
        return self.head.quality(fused).mean(dim=1), self.image_only(fused).mean(dim=1)


def with_corners(module: nn.Module) -> nn.Module:
    """Put ReLU6 back in place of its rounded form: half the time of a step, and scores differ by less than 0.004."""
    for name, child in module.named_children():
        setattr(module, name, nn.ReLU6() if isinstance(child, SmoothReLU6) else with_corners(child))
    return module


def train_streams(
    stored: StoredFeatures,
    targets: Tensor,
    rows: np.ndarray,
    world: World,
    streams: Streams,
    recipe: Recipe,
    seed: int,
) -> Streams:
    """Fine-tune the streams for quality, and at half weight for correspondence; returns their moving average.

    A quarter of each batch is pictures of the embedded world, whose quality has to follow their degradation.
    """
    rng = np.random.default_rng(seed)
    with_corners(streams)
    towers = [*streams.coarse.parameters(), *streams.fine.parameters()]
    heads = [p for part in (streams.head.fusion, streams.head.quality, streams.image_only) for p in part.parameters()]
    optimizer = torch.optim.AdamW(
        [{"params": towers, "lr": recipe.tower_lr}, {"params": heads, "lr": recipe.head_lr}],
        weight_decay=recipe.weight_decay,
    )
    steps = recipe.epochs * (len(rows) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [recipe.tower_lr, recipe.head_lr], total_steps=steps, pct_start=0.1
    )
    average = torch.optim.swa_utils.AveragedModel(
        streams, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(recipe.ema)
    )
    streams.eval()  # batch statistics stay ImageNet's
    streams.dropout.train()
    bar = tqdm(total=steps, desc="streams", unit="step")
    for _ in range(recipe.epochs):
        order = rng.permutation(rows)[: len(rows) // recipe.batch_size * recipe.batch_size]
        for batch in order.reshape(-1, recipe.batch_size):
            whole = stored.maps(stored.whole, batch, rng.integers(2, size=len(batch)))
            crop = stored.maps(stored.crops, batch, rng.integers(stored.crops.shape[1], size=len(batch)))
            extra = rng.choice(len(world.pairs), recipe.world_batch, replace=False)
            quality, correspondence = streams(
                *(torch.cat(maps) for maps in zip((whole, crop), world.maps(extra), strict=True))
            )
            scored, degraded = slice(None, len(batch)), slice(len(batch), None)
            loss = (
                score_loss(quality[scored], targets[batch, 0], recipe)
                + 0.5 * score_loss(correspondence[scored], targets[batch, 1], recipe)
                + recipe.world_weight * order_loss(quality[degraded], world.levels[extra], recipe)
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([*towers, *heads], 5.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(streams)
            bar.update()
    return average.module.eval()


def fit_streams(
    stored: StoredFeatures, targets: Tensor, rows: np.ndarray, world: World, encoder: TimmEncoder, path: Path
) -> Streams:
    """The streams trained on these rows, from `path` if they were trained before."""
    torch.manual_seed(0)  # initial weights and dropout of this script, which owns its process
    recipe = Recipe()
    streams = Streams(CompactConfig(), recipe, encoder)
    pooled = torch.from_numpy(stored.pooled[rows])
    streams.head.image_mean.copy_(pooled.mean(dim=0))
    streams.head.image_std.copy_(pooled.std(dim=0) + 0.05)  # rarely active channels would be blown up
    streams.head.colour_mean.copy_(world.colours.mean(dim=0))
    streams.head.colour_std.copy_((world.colours.std(dim=0) + 0.02) / recipe.colour_scale)
    if path.exists():
        load_strictly(streams, read_weights(path), source=str(path))
        return streams.eval()
    for head, aspect in ((streams.head.quality, 0), (streams.image_only, 1)):
        nn.init.constant_(head.out.bias, float(targets[rows, aspect].mean()))
    trained = train_streams(stored, targets, rows, world, copy.deepcopy(streams), recipe, seed=0)
    write_weights(path, trained.state_dict())
    streams.load_state_dict(trained.state_dict())
    return streams.eval()


@torch.no_grad()
def describe_all(stored: StoredFeatures, streams: Streams) -> dict[str, Tensor]:
    """Quality and image-only correspondence (N,) at scoring crops, and fused embeddings (N, 2, width), one a flip."""
    quality, image_only, fused = [], [], []
    batches = np.array_split(np.arange(len(stored.whole)), len(stored.whole) // 16)
    for rows in tqdm(batches, desc="describe", unit="16 images"):
        crops = [streams.fine(stored.maps(stored.crops, rows, np.full(len(rows), c))) for c in EVALUATED_CROPS]
        fine = torch.stack(crops, dim=1)
        whole = [streams.coarse(stored.maps(stored.whole, rows, np.full(len(rows), flip))) for flip in (0, 1)]
        both = [streams.head.fuse(coarse, fine)[0] for coarse in whole]
        quality.append(streams.head.quality(both[0]).mean(dim=1))
        image_only.append(streams.image_only(both[0]).mean(dim=1))
        fused.append(torch.stack([z.mean(dim=1) for z in both], dim=1))
    return {"quality": torch.cat(quality), "image_only": torch.cat(image_only), "fused": torch.cat(fused)}


def described(stored: StoredFeatures, streams: Streams, path: Path) -> dict[str, Tensor]:
    """`describe_all`, from `path` if it was done before."""
    if not path.exists():
        write_weights(path, describe_all(stored, streams))
    return read_weights(path)
