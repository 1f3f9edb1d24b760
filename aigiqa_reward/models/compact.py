"""The embedded reward: the MST-CLIPIQA design on towers small enough to travel with the package.

A coarse stream sees the whole image, a fine stream square crops at native resolution; a gate fuses both for each crop:

    f_c = coarse(whole),  f_n = fine(crop_n),  g_n = sigmoid(W_g relu(W_h [f_c; f_n])),
    z_n = g_n * (W_c f_c) + (1 - g_n) * (W_f f_n),  quality = mean_n head_q(z_n)

Correspondence reads z = mean_n z_n after it has attended to the prompt's words, and adds how well the image's place
among texts matches the prompt's sentence embedding t. That place is s, from ImageNet's class names, and what a linear
map of the pretrained tower's features p and of the image's colours h adds to it; all are less their means over the
training images, and the product is divided by its deviation there:

    m = <s - s0 + W_m [p; h], t - t0> / sigma,  correspondence = head_c(z + alpha attention(z, words)) + w m

What is ours, not the paper's: EfficientNet-Lite0 in place of CLIP's image towers and MiniLM in place of its text tower;
crops as the fine stream's input, at native resolution up to 512 px; a gate for each crop; towers fine-tuned rather than
frozen; the match m; the colour histogram h.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from aigiqa_reward import images as pixels
from aigiqa_reward.models.base import FullPrecision, ModelOutput, QualityModel
from aigiqa_reward.models.blocks import GatedFusion, PromptCrossAttention, ScoreHead, colour_histogram
from aigiqa_reward.types import Context, Images, PromptFeatures

COLOURS = 5
"""Steps of each channel in the histogram of an image's colours."""


class MapEncoder(Protocol):
    """A convolutional tower: images to a map, and the mean over a map."""

    width: int

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to (B, width, h, w)."""
        ...

    def pool(self, features: Tensor) -> Tensor:
        """(B, width, h, w) to (B, width)."""
        ...


class SemanticTower(Protocol):
    """A tower that places images among texts."""

    semantic_width: int

    def __call__(self, images: Tensor) -> Any:
        """An object with `pooled` (B, width of the streams) and `semantic` (B, semantic_width)."""
        ...


class TextTower(Protocol):
    """A tower that reads prompts."""

    width: int

    def encode(self, texts: Sequence[str]) -> Any:
        """An object with `tokens` (P, L, width), `mask` (P, L) and `pooled` (P, width)."""
        ...


@dataclass(frozen=True, kw_only=True)
class CompactConfig:
    """Settings of the compact model.

    Attributes:
        width: joint width d of the fused embedding.
        area: the coarse stream scales images to about area x area pixels, keeping their aspect ratio.
        crop: side of the fine stream's crops in px, at native resolution.
        crops: how many on a square image, evenly spaced; longer images get more, up to four times as many, and squares
            of at most `crop` px one, which is all of them.
        resolution: short side in px up to which the fine stream sees native pixels. Larger images are scaled down to it
            first, as those of the benchmark were: the model knows no others.
        rank: of the prompt's cross-attention.
        place_rank: of W_m.
    """

    width: int = 256
    area: int = 256
    crop: int = 224
    crops: int = 4
    resolution: int = 512
    rank: int = 32
    place_rank: int = 72

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")


class CompactHead(FullPrecision):
    """Everything of the compact model behind its towers; small enough to train in seconds on stored features."""

    def __init__(self, config: CompactConfig, image: int, semantic: int, text: int) -> None:
        super().__init__()
        self.fusion = GatedFusion(image, image, config.width)
        self.quality = ScoreHead(config.width)
        self.attend = PromptCrossAttention(config.width, text, rank=config.rank)
        self.correspondence = ScoreHead(config.width)
        self.place_in = nn.Linear(image + COLOURS**3, config.place_rank, bias=False)
        self.place_out = nn.Linear(config.place_rank, semantic, bias=False)
        nn.init.zeros_(self.place_out.weight)
        self.match_weight = nn.Parameter(torch.zeros(()))
        for name, width in (
            ("image_mean", image),
            ("image_std", image),
            ("colour_mean", COLOURS**3),
            ("colour_std", COLOURS**3),
            ("semantic_mean", semantic),
            ("text_mean", text),
        ):
            self.register_buffer(name, torch.zeros(width))
        self.register_buffer("match_deviation", torch.ones(()))
        self.match_deviation: Tensor
        self.image_mean: Tensor
        self.image_std: Tensor
        self.colour_mean: Tensor
        self.colour_std: Tensor
        self.semantic_mean: Tensor
        self.text_mean: Tensor

    def fuse(
        self, coarse: Float[Tensor, "batch image"], fine: Float[Tensor, "batch crops image"]
    ) -> tuple[Float[Tensor, "batch crops width"], Float[Tensor, "batch crops width"]]:
        """Fused embedding and gate of every crop, from features standardised as in training."""
        coarse = ((coarse - self.image_mean) / self.image_std)[:, None].expand(-1, fine.shape[1], -1)
        return self.fusion(coarse, (fine - self.image_mean) / self.image_std)

    def describe(
        self, pooled: Float[Tensor, "batch image"], colours: Float[Tensor, "batch colours"]
    ) -> Float[Tensor, "batch features"]:
        """[p; h]: the pretrained tower's features and the colour histogram, standardised as in training."""
        parts = ((pooled - self.image_mean) / self.image_std, (colours - self.colour_mean) / self.colour_std)
        return torch.cat(parts, dim=1)

    def match(
        self,
        described: Float[Tensor, "batch features"],
        semantic: Float[Tensor, "batch semantic"],
        text: Float[Tensor, "batch semantic"],
    ) -> Float[Tensor, " batch"]:
        """How much nearer this image is to this prompt than images are to prompts on average, in deviations."""
        place = semantic - self.semantic_mean + self.place_out(self.place_in(described))
        return (place * (text - self.text_mean)).sum(dim=1) / self.match_deviation

    def judge_correspondence(
        self,
        fused: Float[Tensor, "batch width"],
        match: Float[Tensor, " batch"],
        words: Float[Tensor, "batch length text"],
        mask: Bool[Tensor, "batch length"],
    ) -> Float[Tensor, " batch"]:
        """Correspondence of each image to the words of its prompt, given how well their meanings match."""
        return self.correspondence(self.attend(fused, words, mask)) + self.match_weight * match


class Compact(QualityModel):
    """The compact model: two image streams, a semantic tower, a text tower and `CompactHead`.

    Args:
        config: settings.
        coarse: tower of the whole image.
        fine: tower of the crops, of the same width.
        semantic: frozen tower that places the whole image among texts.
        text: frozen tower of the prompts.
    """

    name = "compact"

    def __init__(
        self, config: CompactConfig, *, coarse: MapEncoder, fine: MapEncoder, semantic: SemanticTower, text: TextTower
    ) -> None:
        super().__init__()
        self.config = config
        self.coarse = coarse
        self.fine = fine
        self.semantic = semantic
        self.text = text
        self.head = CompactHead(config, coarse.width, semantic.semantic_width, text.width)

    def describe(self) -> dict[str, Any]:
        """The settings; the towers are always the embedded ones' architectures."""
        return {"config": asdict(self.config)}

    def encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Word states (P, L, 384), their mask (P, L) and sentence embeddings (P, 384)."""
        features = self.text.encode(texts)
        return {"tokens": features.tokens, "mask": features.mask, "pooled": features.pooled}

    def crops(self, images: Images) -> Float[Tensor, "batch crops 3 side side"]:
        """What the fine stream looks at."""
        height, width = images.shape[2:]
        native = pixels.reduce_to(images, self.config.resolution)
        if height == width <= self.config.crop:
            return pixels.even_crops(native, self.config.crop, 1)
        elongation = min(4, round(max(height, width) / min(height, width)))
        return pixels.even_crops(native, self.config.crop, self.config.crops * elongation)

    def forward(self, images: Images, prompts: PromptFeatures | None, context: Context | None = None) -> ModelOutput:
        """Quality from both streams; correspondence from them, the prompt's words and the semantic match."""
        del context
        whole = pixels.resize_to_area(images, self.config.area**2, least=32)
        crops = self.crops(images)
        coarse = self.coarse.pool(self.coarse(whole))
        fine = self.fine.pool(self.fine(crops.flatten(0, 1))).unflatten(0, crops.shape[:2])
        fused, gate = self.head.fuse(coarse, fine)
        crop_quality = self.head.quality(fused)
        details = {"crop_quality": crop_quality, "gate": gate.mean(dim=(1, 2))}
        correspondence = None
        if prompts is not None:
            seen = self.semantic(whole)
            text, words = (prompts.rows(name).to(seen.semantic.dtype) for name in ("pooled", "tokens"))
            described = self.head.describe(seen.pooled, colour_histogram(whole, COLOURS).to(seen.pooled.dtype))
            match = self.head.match(described, seen.semantic, text)
            correspondence = self.head.judge_correspondence(fused.mean(dim=1), match, words, prompts.rows("mask"))
            details["semantic_match"] = match
        return ModelOutput(quality=crop_quality.mean(dim=1), correspondence=correspondence, details=details)
