"""The embedded reward: statistics of two small towers at every depth, judged by likeness to images that people scored.

The whole image goes through both towers, square crops at native resolution through the second one. After each stage
means and deviations over places are taken, over crops their mean; x joins them. In their principal directions

    u = B (x - m) / s,    k_j = exp(-|u - u_j|^2),    raw = A k + b,

with centers u_j the training images. That gives quality, what of correspondence the image alone tells, and the log
of quality's variance. Correspondence adds how well the image's place among texts matches the prompt's sentence
embedding t. That place is s, from ImageNet's class names, and what a linear map of d, the towers' last means and the
image's colors, adds to it; all are less their means over the training images:

    match = <s - s0 + W d + g V d, t - t0> / sigma,    correspondence = c_raw + w match.

V is such a map for pictures of the embedded world, which g, a fourth row of A, tells from others: about 1, or else 0.

Frozen towers can be deceived: twenty steps of a 255th along the gradient of a score lift it beyond 1 without a visible
change. Such steps move x far in directions in which images hardly differ. With H those directions, whitened,

    quality = t raw,    e = max(0, (rms(H x + h) - l) / m),    t = 1 / (1 + e^2),

and correspondence alike; 99.8 % of scored images on unseen prompts have t = 1 exactly. It holds climbing back, it does
not end it.

A further training scales quality and c_raw and adds a linear function of u to them; the embedded weights do not.

The design is ours. After MST-CLIPIQA it sees an image coarsely and finely; a Gaussian process (its mean is kernel ridge
regression, fitted in closed form) takes the place of gated fusion, which had learned less from as many images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from aigiqa_reward import images as pixels
from aigiqa_reward.models.base import FullPrecision, ModelOutput, Seen, TrainedModel
from aigiqa_reward.models.blocks import color_histogram
from aigiqa_reward.types import Context, Images, PromptFeatures

ASPECTS = 2
"""Quality and correspondence; after them come the log of quality's variance and what tells the embedded world."""

OUTPUTS = ASPECTS + 2


class Likeness(FullPrecision):
    """Principal directions u of the statistics x, and from likeness to centers to raw scores; fitted in closed form.

    Args:
        columns: of x.
        directions: of u.
        centers: how many.
        guards: directions in which images hardly differ, but move far when pixels are pushed to raise a score.
    """

    def __init__(self, columns: int, directions: int, centers: int, guards: int) -> None:
        super().__init__()
        for name, shape in (
            ("mean", (columns,)),
            ("basis", (directions, columns)),
            ("centres", (centers, directions)),
            ("weights", (OUTPUTS, centers)),
            ("bias", (OUTPUTS,)),
            ("guard", (guards, columns)),
            ("guard_bias", (guards,)),
        ):
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("deviation", torch.ones(columns))
        self.register_buffer("thresholds", torch.ones(2))
        self.register_buffer("guard_limits", torch.ones(2))
        self.mean: Tensor
        self.deviation: Tensor
        self.basis: Tensor
        self.centres: Tensor
        self.weights: Tensor
        self.bias: Tensor
        self.thresholds: Tensor
        self.guard: Tensor
        self.guard_bias: Tensor
        self.guard_limits: Tensor

    def project(self, statistics: Float[Tensor, "batch columns"]) -> Float[Tensor, "batch directions"]:
        """U of x."""
        return ((statistics - self.mean) / self.deviation) @ self.basis.T

    def forward(self, directions: Float[Tensor, "batch directions"]) -> Float[Tensor, "batch outputs"]:
        """Quality, correspondence from the image alone, log variance of quality, and g; raw."""
        squares = directions.square().sum(dim=1, keepdim=True) + self.centres.square().sum(dim=1)
        likeness = torch.exp(2 * directions @ self.centres.T - squares)
        return likeness @ self.weights.T + self.bias

    def distances(self, statistics: Float[Tensor, "batch columns"]) -> Float[Tensor, "batch two"]:
        """How far x is from the images that people scored: in all columns, and outside the principal directions.

        Root mean squares in the deviations of those images.
        """
        standard = (statistics - self.mean) / self.deviation
        within = standard @ (self.basis / self.basis.norm(dim=1, keepdim=True)).T
        whole = standard.square().sum(dim=1)
        outside = (whole - within.square().sum(dim=1)).clamp_min(0)
        return (torch.stack([whole, outside], dim=1) / statistics.shape[1] + 1e-12).sqrt()

    def strangeness(self, statistics: Float[Tensor, "batch columns"]) -> Float[Tensor, " batch"]:
        """The larger of both distances over its threshold: above 1, x is unlike the images that people scored."""
        return (self.distances(statistics) / self.thresholds).amax(dim=1)

    def pushed(self, statistics: Float[Tensor, "batch columns"]) -> Float[Tensor, " batch"]:
        """Root mean square of x along the guarded directions, in deviations of the images that they were fitted to."""
        standard = (statistics - self.mean) / self.deviation
        return ((standard @ self.guard.T + self.guard_bias).square().mean(dim=1) + 1e-12).sqrt()

    def trust(self, statistics: Float[Tensor, "batch columns"]) -> Float[Tensor, " batch"]:
        """1 up to the first limit of `pushed`, one half a second limit beyond it.

        It falls like 1 / (1 + e^2) with the excess e, so that far away there is still a gradient that leads back.
        """
        excess = ((self.pushed(statistics) - self.guard_limits[0]) / self.guard_limits[1]).clamp_min(0)
        return 1 / (1 + excess.square())


COLORS = 5
"""Steps of each channel in the histogram of an image's colors."""


class StatisticsTower(Protocol):
    """A convolutional tower that tells means and deviations of its stages, the last feature map's means last."""

    width: int

    @property
    def statistics_columns(self) -> int:
        """How many columns `statistics` has."""
        ...

    def statistics(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to (B, statistics_columns)."""
        ...


class SemanticTower(Protocol):
    """A tower that places images among texts."""

    semantic_width: int

    @property
    def encoder(self) -> StatisticsTower:
        """The tower before its classifier."""
        ...

    def place(self, pooled: Tensor) -> Tensor:
        """(B, width) to (B, semantic_width)."""
        ...


class TextTower(Protocol):
    """A tower that reads prompts."""

    width: int

    def encode(self, texts: Sequence[str]) -> Any:
        """An object with `pooled` (P, width)."""
        ...


@dataclass(frozen=True, kw_only=True)
class CompactConfig:
    """Settings of the compact model.

    Attributes:
        area: whole images are scaled to about area x area pixels, keeping their aspect ratio.
        crop: side of the crops in px, at native resolution.
        crops: how many on a square image, evenly spaced; longer images get more, up to four times as many, and squares
            of at most `crop` px one, which is all of them.
        resolution: short side in px up to which crops show native pixels. Larger images are scaled down to it first, as
            those of the benchmark were: the model knows no others.
        directions: principal directions of the statistics.
        centers: training images that a new one is held against.
        place_rank: of the map W.
        world_rank: of the map V.
        guards: directions H.
    """

    area: int = 256
    crop: int = 224
    crops: int = 4
    resolution: int = 512
    directions: int = 256
    centers: int = 4102
    place_rank: int = 128
    world_rank: int = 72
    guards: int = 32

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")


class CompactHead(FullPrecision):
    """Everything of the compact model behind its towers."""

    def __init__(self, config: CompactConfig, columns: int, described: int, semantic: int) -> None:
        super().__init__()
        self.likeness = Likeness(columns, config.directions, config.centers, config.guards)
        self.scale = nn.Parameter(torch.ones(ASPECTS))
        self.learned = nn.Linear(config.directions, ASPECTS)
        nn.init.zeros_(self.learned.weight)
        nn.init.zeros_(self.learned.bias)
        self.place_in = nn.Linear(described, config.place_rank, bias=False)
        self.place_out = nn.Linear(config.place_rank, semantic, bias=False)
        self.world_in = nn.Linear(described, config.world_rank, bias=False)
        self.world_out = nn.Linear(config.world_rank, semantic, bias=False)
        nn.init.zeros_(self.place_out.weight)
        nn.init.zeros_(self.world_out.weight)
        self.match_weight = nn.Parameter(torch.zeros(()))
        for name, width in (
            ("described_mean", described),
            ("described_deviation", described),
            ("semantic_mean", semantic),
            ("text_mean", semantic),
        ):
            self.register_buffer(name, torch.zeros(width))
        nn.init.ones_(self.described_deviation)
        self.register_buffer("match_deviation", torch.ones(()))
        self.described_mean: Tensor
        self.described_deviation: Tensor
        self.semantic_mean: Tensor
        self.text_mean: Tensor
        self.match_deviation: Tensor

    def describe(self, described: Float[Tensor, "batch described"]) -> Float[Tensor, "batch described"]:
        """d, standardized as in training."""
        return (described - self.described_mean) / self.described_deviation

    def match(
        self,
        described: Float[Tensor, "batch described"],
        semantic: Float[Tensor, "batch semantic"],
        text: Float[Tensor, "batch semantic"],
        world: Float[Tensor, " batch"],
    ) -> Float[Tensor, " batch"]:
        """How much nearer this image is to this prompt than images are to prompts on average, in deviations."""
        standard = self.describe(described)
        place = semantic - self.semantic_mean + self.place_out(self.place_in(standard))
        place = place + world[:, None] * self.world_out(self.world_in(standard))
        return (place * (text - self.text_mean)).sum(dim=1) / self.match_deviation


class Compact(TrainedModel):
    """The compact model: two image towers, a text tower, all frozen, and `CompactHead`.

    Args:
        config: settings.
        semantic: tower that sees the whole image and places it among texts.
        fine: tower that sees the whole image and its crops.
        text: tower of the prompts.
    """

    name = "compact"
    feature_settings = ("area", "crop", "crops", "resolution")
    head: CompactHead

    def __init__(
        self, config: CompactConfig, *, semantic: SemanticTower, fine: StatisticsTower, text: TextTower
    ) -> None:
        super().__init__()
        self.config = config
        self.semantic = semantic
        self.fine = fine
        self.text = text
        columns = semantic.encoder.statistics_columns + 2 * fine.statistics_columns
        described = semantic.encoder.width + 2 * fine.width + COLORS**3
        self.head = CompactHead(config, columns, described, semantic.semantic_width)

    def describe(self) -> dict[str, Any]:
        """The settings; the towers are always the embedded ones' architectures."""
        return {"config": asdict(self.config), "towers": {}}

    def encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Sentence embeddings (P, 384)."""
        return {"pooled": self.text.encode(texts).pooled}

    def crops(self, images: Images) -> Float[Tensor, "batch crops 3 side side"]:
        """What the second tower looks at beside the whole image."""
        height, width = images.shape[2:]
        native = pixels.reduce_to(images, self.config.resolution)
        if height == width <= self.config.crop:
            return pixels.even_crops(native, self.config.crop, 1)
        elongation = min(4, round(max(height, width) / min(height, width)))
        return pixels.even_crops(native, self.config.crop, self.config.crops * elongation)

    def forward_features(
        self, images: Images, *, generator: torch.Generator | None = None, crops: int | None = None
    ) -> Seen:
        """Statistics of both towers, the place among texts, and the colors.

        `tower` (B, c), `whole` and `crops` (B, c'), `semantic` (B, 384), `colors` (B, 125). Crops are always the
        evenly spaced ones, of which only the mean is kept.
        """
        del generator, crops
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
        """X of what `forward_features` saw."""
        return torch.cat([seen["tower"], seen["whole"], seen["crops"]], dim=1)

    def described(self, seen: Seen) -> Float[Tensor, "batch described"]:
        """The features d of what `forward_features` saw, not yet standardized."""
        width = self.fine.width
        last = (seen["tower"][:, -self.semantic.encoder.width :], seen["whole"][:, -width:], seen["crops"][:, -width:])
        return torch.cat([*last, seen["colors"]], dim=1)

    def forward_head(self, seen: Seen, prompts: PromptFeatures | None, context: Context | None) -> ModelOutput:
        """Quality and its uncertainty, correspondence, how unlike the training images this one is, and the trust t."""
        del context
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
