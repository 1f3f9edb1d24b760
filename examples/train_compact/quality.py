"""Train the quality tower: EfficientNet-Lite0 on people's scores of generated images and of photographs.

    python examples/train_compact/quality.py --agiqa3k DIR --biq2021 DIR --flickr8k DIR --visor DIR --runs DIR

A step sees crops of both views, scaled as the whole image is and at native resolution: a grid of some prompts and
generators of AGIQA-3K, photographs of BIQ2021, some of these degraded, pictures of the emoji world clean and with
failures of a generator, and some of the crops after a step along their own gradient. Losses are correlations with
people's scores, in all, within generators and centered by both; the order of images and their degradations; how far the
world's pictures are from the best of people's scores and, by their failure, from the worst; and how much a step along
the gradient adds. A clean picture at the top leaves nothing to climb to but clean pictures.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from crops import Batches, QualitySettings
from data import Sources, read_options
from loop import fit
from torch import Tensor, nn
from towers import published_tower

from aigiqa_reward.encoders.compact import QUALITY_TOWER
from aigiqa_reward.models.base import Standardize
from aigiqa_reward.models.compact import map_statistics
from aigiqa_reward.utils.weights import write_weights


class QualityTower(nn.Module):
    """The tower and a linear map of its statistics for each view."""

    def __init__(self, frozen: int) -> None:
        super().__init__()
        self.tower = published_tower(QUALITY_TOWER).encoder
        for part in (*self.tower.trunk.blocks[frozen:], self.tower.trunk.conv_head):
            part.requires_grad_(True)
        width = 2 * self.tower.width
        self.statistics = Standardize(width)
        self.whole, self.native = nn.Linear(width, 1), nn.Linear(width, 1)
        for linear in (self.whole, self.native):
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)

    def forward(self, crops: Tensor, views: Tensor) -> Tensor:
        """Score crops (N, 3, H, W) of `views` (N,), WHOLE or NATIVE."""
        seen = self.statistics(map_statistics(self.tower(crops)))
        return torch.cat([self.whole(seen), self.native(seen)], dim=1).gather(1, views[:, None])[:, 0]

    def product(self) -> dict[str, Tensor]:
        """Return the weights under the names that the compact reward has for them."""
        state = {name: x for name, x in self.state_dict().items() if not name.startswith("tower.")}
        tower = {f"quality.{name}": x for name, x in self.tower.state_dict().items()}
        return tower | {f"head.{name}": x for name, x in state.items()}


def uncorrelated(scores: Tensor, target: Tensor) -> Tensor:
    """One minus Pearson's correlation."""
    scores, target = scores - scores.mean(), target - target.mean()
    return 1 - (scores * target).sum() / (scores.norm() * target.norm() + 1e-6)


def below(worse: Tensor, better: Tensor, unit: Tensor) -> Tensor:
    """Loss of the order of two scores, which is to be kept by some margin."""
    return F.softplus(-4 * (better - worse) / unit + 1).mean()


def loss_of(model: QualityTower, rng: np.random.Generator, *, batches: Batches) -> Tensor:
    """Compute the loss of one step."""
    settings, batch = batches.settings, batches(rng)
    grid, scored = len(batch.generated), len(batch.generated) + len(batch.photographs)
    chosen = torch.from_numpy(rng.choice(len(batch.crops), settings.pushed, replace=False))
    leaf = batch.crops[chosen].requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf, batch.views[chosen]).sum(), leaf)
    length = float(rng.uniform(0.5, 1.5)) / 255
    pushed = leaf.detach() + length * gradient / gradient.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    scores = model(torch.cat([batch.crops, pushed]), torch.cat([batch.views, batch.views[chosen]]))

    generated, photographs, worse, pictures, up = scores.split(
        [grid, scored - grid, settings.degraded, 2 * settings.pictures, settings.pushed]
    )
    unit = torch.cat([part - part.mean() for part in (generated, photographs) if len(part)]).std() + 1e-6
    found, wanted = (x.view(settings.prompts, settings.generators) for x in (generated, batch.generated))
    by_generator = [(x - x.mean(dim=0)) for x in (found, wanted)]
    by_both = [x - x.mean(dim=1, keepdim=True) for x in by_generator]
    loss = uncorrelated(generated, batch.generated)
    if len(photographs):
        loss = loss + uncorrelated(photographs, batch.photographs)
    loss = loss + settings.within * uncorrelated(*(x.flatten() for x in by_generator))
    loss = loss + settings.centered * uncorrelated(*(x.flatten() for x in by_both))
    placed = (pictures - generated.mean().detach()) / (generated.std().detach() + 1e-6)
    loss = loss + settings.anchor * F.smooth_l1_loss(placed, batch.pictures)
    loss = loss + settings.order * below(worse, scores[batch.source], unit)
    return loss + settings.push * ((up - scores[chosen]).abs() / unit).mean()


@torch.no_grad()
def standardize(model: QualityTower, *, batches: Batches) -> None:
    """Take mean and std of the tower's statistics from crops of six batches."""
    rng = np.random.default_rng([batches.settings.seed, batches.settings.steps])
    drawn = [batches(rng) for _ in range(6)]
    scored = [batch.crops[: len(batch.generated) + len(batch.photographs)] for batch in drawn]
    model.statistics.fit(torch.cat([map_statistics(model.tower(crops)) for crops in scored]))
    model.statistics.deviation += 1e-3


def train(sources: Sources, runs: Path, settings: QualitySettings, position: int = 0) -> None:
    """Train, or resume, and write `quality.safetensors`."""
    torch.set_num_threads(1)
    batches = Batches(sources, settings)
    torch.manual_seed(settings.seed)
    model = fit(
        QualityTower(settings.frozen),
        partial(loss_of, batches=batches),
        settings=settings,
        checkpoint=runs / "quality.pt",
        sources=sources.describe(),
        start=partial(standardize, batches=batches),
        position=position,
    )
    write_weights(runs / "quality.safetensors", model.product())


if __name__ == "__main__":
    train(*read_options(__doc__), QualitySettings())
