"""The embedded reward: statistics of two small towers at every depth, scored by likeness to images that people rated.

Both towers see the whole image, the second one also square crops at native resolution. Means and stds over places
are taken after each stage, and averaged over the crops; x joins them. In their principal directions

    u = B (x - m) / s,    k_j = exp(-|u - u_j|^2),    raw = A k + b,

with centers u_j the training images. raw holds quality, the part of correspondence that the image alone predicts, and
the log of quality's variance. Correspondence adds how well the image's place among texts matches the prompt's sentence
embedding t. That place is s, from ImageNet's class names, plus a linear map of d, the towers' last means and the
image's colors; all are centered on their means over the training images:

    match = <s - s0 + W d + g V d, t - t0> / sigma,    correspondence = c_raw + w match.

V is such a map for pictures of the embedded world, which g, a fourth row of A, recognizes: about 1 there, else 0.

Optimizing pixels moves x far in directions in which images hardly differ. With those directions H, whitened,

    quality = t raw,    e = max(0, (rms(H x + h) - l) / m),    t = 1 / (1 + e^2),

and correspondence alike; 99.8 % of rated images on unseen prompts have t = 1 exactly. The guard slows reward hacking
down; it does not end it. Training on other scores scales quality and c_raw and adds a linear function of u to them.

The design is ours: coarse and fine views after MST-CLIPIQA, and a Gaussian process (its mean is kernel ridge
regression, fitted in closed form).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from aigiqa_reward import images as pixels
from aigiqa_reward.encoders.compact import CompactImageTower, CompactTextTower
from aigiqa_reward.encoders.timm import TimmEncoder
from aigiqa_reward.models.base import FullPrecision, ModelConfig, ModelOutput, Seen, TrainedModel
from aigiqa_reward.models.blocks import color_histogram
from aigiqa_reward.types import Context, Images, PromptFeatures

ASPECTS = 2
"""Quality and correspondence."""

OUTPUTS = ASPECTS + 2
"""The aspects, the log of quality's variance, and g."""


class Likeness(FullPrecision):
    """Principal directions u of the statistics x, and raw scores by likeness to centers; fitted in closed form."""

    def __init__(self, columns: int, directions: int, centers: int, guards: int) -> None:
        super().__init__()
        self.mean, self.deviation = nn.Buffer(torch.zeros(columns)), nn.Buffer(torch.ones(columns))
        self.basis = nn.Buffer(torch.zeros(directions, columns))
        self.centres = nn.Buffer(torch.zeros(centers, directions))
        self.weights, self.bias = nn.Buffer(torch.zeros(OUTPUTS, centers)), nn.Buffer(torch.zeros(OUTPUTS))
        self.guard, self.guard_bias = nn.Buffer(torch.zeros(guards, columns)), nn.Buffer(torch.zeros(guards))
        self.thresholds, self.guard_limits = nn.Buffer(torch.ones(2)), nn.Buffer(torch.ones(2))

    def project(self, statistics: Float[Tensor, "batch columns"]) -> Float[Tensor, "batch directions"]:
        """Compute u from x."""
        return ((statistics - self.mean) / self.deviation) @ self.basis.T

    def forward(self, directions: Float[Tensor, "batch directions"]) -> Float[Tensor, "batch outputs"]:
        squares = directions.square().sum(dim=1, keepdim=True) + self.centres.square().sum(dim=1)
        likeness = torch.exp(2 * directions @ self.centres.T - squares)
        return likeness @ self.weights.T + self.bias

    def distances(self, statistics: Float[Tensor, "batch columns"]) -> Float[Tensor, "batch two"]:
        """Compute root mean squares of standardized x: in all columns, and outside the principal directions."""
        standard = (statistics - self.mean) / self.deviation
        within = standard @ (self.basis / self.basis.norm(dim=1, keepdim=True)).T
        whole = standard.square().sum(dim=1)
        outside = (whole - within.square().sum(dim=1)).clamp_min(0)
        return (torch.stack([whole, outside], dim=1) / statistics.shape[1] + 1e-12).sqrt()

    def strangeness(self, statistics: Float[Tensor, "batch columns"]) -> Float[Tensor, " batch"]:
        """Compute the larger distance over its threshold: above 1, x is unlike the images that people rated."""
        return (self.distances(statistics) / self.thresholds).amax(dim=1)

    def pushed(self, statistics: Float[Tensor, "batch columns"]) -> Float[Tensor, " batch"]:
        """Compute the root mean square of x along H, in stds of the images that H was fitted to."""
        standard = (statistics - self.mean) / self.deviation
        return ((standard @ self.guard.T + self.guard_bias).square().mean(dim=1) + 1e-12).sqrt()

    def trust(self, statistics: Float[Tensor, "batch columns"]) -> Float[Tensor, " batch"]:
        """Compute t: 1 up to the first limit of `pushed`, 1/2 at a second limit beyond it."""
        excess = ((self.pushed(statistics) - self.guard_limits[0]) / self.guard_limits[1]).clamp_min(0)
        return 1 / (1 + excess.square())


COLORS = 5  # levels per channel in the histogram of an image's colors


@dataclass(frozen=True, kw_only=True)
class CompactConfig(ModelConfig):
    """Settings of the compact model."""

    area: int = 256  # square root of the pixels to which whole images are scaled, keeping their aspect ratio
    crop: int = 224  # side of the crops in px
    crops: int = 4  # of a square image; longer ones get up to four times as many, squares of at most `crop` px one
    resolution: int = 512  # short side in px to which larger images are scaled down before they are cropped
    directions: int = 256  # rows of B
    centers: int = 4102  # training images compared with
    place_rank: int = 128  # of W
    world_rank: int = 72  # of V
    guards: int = 32  # rows of H


class CompactHead(FullPrecision):
    """Everything behind the towers."""

    def __init__(self, config: CompactConfig, columns: int, described: int, semantic: int) -> None:
        super().__init__()
        self.likeness = Likeness(columns, config.directions, config.centers, config.guards)
        self.scale = nn.Parameter(torch.ones(ASPECTS))
        self.learned = nn.Linear(config.directions, ASPECTS)
        self.place_in = nn.Linear(described, config.place_rank, bias=False)
        self.place_out = nn.Linear(config.place_rank, semantic, bias=False)
        self.world_in = nn.Linear(described, config.world_rank, bias=False)
        self.world_out = nn.Linear(config.world_rank, semantic, bias=False)
        for weight in (*self.learned.parameters(), self.place_out.weight, self.world_out.weight):
            nn.init.zeros_(weight)
        self.match_weight = nn.Parameter(torch.zeros(()))
        self.described_mean, self.described_deviation = (nn.Buffer(f(described)) for f in (torch.zeros, torch.ones))
        self.semantic_mean, self.text_mean = nn.Buffer(torch.zeros(semantic)), nn.Buffer(torch.zeros(semantic))
        self.match_deviation = nn.Buffer(torch.ones(()))

    def describe(self, described: Float[Tensor, "batch described"]) -> Float[Tensor, "batch described"]:
        return (described - self.described_mean) / self.described_deviation

    def match(self, described: Tensor, semantic: Tensor, text: Tensor, world: Tensor) -> Float[Tensor, " batch"]:
        """Compute how much nearer this image is to this prompt than the average pair, in stds."""
        standard = self.describe(described)
        place = semantic - self.semantic_mean + self.place_out(self.place_in(standard))
        place = place + world[:, None] * self.world_out(self.world_in(standard))
        return (place * (text - self.text_mean)).sum(dim=1) / self.match_deviation


class Compact(TrainedModel):
    """The compact model: `semantic` and `fine` see the whole image, `fine` its crops as well; `text` reads prompts."""

    name = "compact"
    feature_settings = ("area", "crop", "crops", "resolution")
    head: CompactHead

    def __init__(
        self, config: CompactConfig, *, semantic: CompactImageTower, fine: TimmEncoder, text: CompactTextTower
    ) -> None:
        super().__init__()
        self.config = config
        self.semantic = semantic
        self.fine = fine
        self.text = text
        columns = semantic.encoder.statistics_columns + 2 * fine.statistics_columns
        described = semantic.encoder.width + 2 * fine.width + COLORS**3
        self.head = CompactHead(config, columns, described, semantic.semantic_width)

    def encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return {"pooled": self.text.encode(texts).pooled}

    def crops(self, images: Images) -> Float[Tensor, "batch crops 3 side side"]:
        height, width = images.shape[2:]
        native = pixels.reduce_to(images, self.config.resolution)
        if height == width <= self.config.crop:
            return pixels.even_crops(native, self.config.crop, 1)
        elongation = min(4, round(max(height, width) / min(height, width)))
        return pixels.even_crops(native, self.config.crop, self.config.crops * elongation)

    def forward_features(self, images: Images, *, generator: Generator | None = None, crops: int | None = None) -> Seen:
        """Compute `tower` (B, c), `whole`, `crops` (B, c'; means over even crops), `semantic` (B, 384), `colors`."""
        whole = pixels.resize_to_area(images, self.config.area**2, least=32)
        patches = self.crops(images)
        tower = self.semantic.encoder.statistics(whole)
        fine = self.fine.statistics(patches.flatten(0, 1)).unflatten(0, patches.shape[:2])
        return {
            "tower": tower,
            "whole": self.fine.statistics(whole),
            "crops": fine.mean(dim=1),
            "semantic": self.semantic.place(tower[:, -self.semantic.encoder.width :]),
            "colors": color_histogram(whole, COLORS).to(tower.dtype),
        }

    def statistics(self, seen: Seen) -> Float[Tensor, "batch columns"]:
        """Compute x."""
        return torch.cat([seen["tower"], seen["whole"], seen["crops"]], dim=1)

    def described(self, seen: Seen) -> Float[Tensor, "batch described"]:
        """Compute d, not yet standardized."""
        width = self.fine.width
        last = (seen["tower"][:, -self.semantic.encoder.width :], seen["whole"][:, -width:], seen["crops"][:, -width:])
        return torch.cat([*last, seen["colors"]], dim=1)

    def forward_head(self, seen: Seen, prompts: PromptFeatures | None, context: Context | None) -> ModelOutput:
        head = self.head
        statistics = self.statistics(seen)
        directions = head.likeness.project(statistics)
        raw = head.likeness(directions)
        trust = head.likeness.trust(statistics)
        scores = head.scale * raw[:, :ASPECTS] + head.learned(directions)
        details = {
            "uncertainty": head.scale[0].abs() * torch.exp(raw[:, ASPECTS] / 2),
            "out_of_distribution": head.likeness.strangeness(statistics),
            "trust": trust,
        }
        correspondence = None
        if prompts is not None:
            text = prompts.rows("pooled").to(directions.dtype)
            match = head.match(self.described(seen), seen["semantic"], text, raw[:, ASPECTS + 1])
            correspondence = trust * (scores[:, 1] + head.match_weight * match)
            details["semantic_match"] = match
        return ModelOutput(quality=trust * scores[:, 0], correspondence=correspondence, details=details)
