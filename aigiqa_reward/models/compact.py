"""The embedded reward: an image tower for quality; an image tower and a text tower for the match with the prompt.

Quality. EfficientNet-Lite0, fine-tuned on human scores, sees the whole image and the image at native resolution. With
x_v the means and stds of its last map over the places of view v,

    q = s (<w_1, x_whole> + b_1 + <w_2, x_native> + b_2) / 2 + c,    quality = sigmoid(q).

Match. EfficientNet-Lite2 sees the image at 256 x 256 px: v is a unit vector of the whole, c the image's place among
ImageNet's class names, p_j are unit vectors of its places. MiniLM, its last layer trained, gives s of the prompt, of
which t is a map, and w_l and a weight a_l of each token. A token's support is its likeness to the nearest places, and
the match weighs the sentence and all tokens:

    u_l = g / k log mean_j exp(k <w_l, p_j>) + h_l,    m = r <v, t> + r' <c, s> + d sum_l a_l u_l / sum_l a_l + e,
    match = sigmoid(m).

Correspondence is what people would score if the prompt were right, times a power of the probability that it is:

    correspondence = sigmoid(f_1 q + f_2 m + f_3) match^gamma.

Both scores lie in (0, 1). Training fits all parts to
AGIQA-3K, BIQ2021, Flickr8k, VISOR and the emoji world (examples/train_compact); fitting it to other scores changes the
linear maps of quality and of correspondence.

The design is ours: coarse and fine views after MST-CLIPIQA, token-wise attention after FILIP (Yao et al. 2022).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from aigiqa_reward import images as pixels
from aigiqa_reward.encoders.compact import CompactImageTower, CompactTextTower, TextFeatures
from aigiqa_reward.encoders.timm import TimmEncoder
from aigiqa_reward.models.base import FullPrecision, ModelConfig, ModelOutput, Seen, Standardize, TrainedModel
from aigiqa_reward.types import Context, Images, PromptFeatures


@dataclass(frozen=True, kw_only=True)
class CompactConfig(ModelConfig):
    """Settings of the compact model."""

    area: int = 384  # square root of the pixels to which the quality tower's whole images are scaled
    crop: int = 512  # largest side in px of a view at native resolution
    crops: int = 4  # largest number of such views of an image with larger sides
    match_side: int = 256  # side in px of the match tower's images, whose aspect ratio is not kept
    least: int = 224  # side in px to which the views of smaller images are enlarged
    sentence: int = 512  # width of v and t
    words: int = 192  # width of w and p


class Matcher(FullPrecision):
    """Image and prompt in one space, as a whole and by place and token."""

    def __init__(self, config: CompactConfig, pooled: int, places: int, text: int) -> None:
        super().__init__()
        self.standard_pooled, self.standard_places = Standardize(pooled), Standardize(places)
        self.pooled = nn.Sequential(nn.Linear(pooled, 1024), nn.GELU(), nn.Linear(1024, config.sentence))
        self.places = nn.Sequential(nn.Linear(places, 512), nn.GELU(), nn.Linear(512, config.words))
        self.sentence = nn.Sequential(nn.Linear(text, 1024), nn.GELU(), nn.Linear(1024, config.sentence))
        self.words = nn.Sequential(nn.Linear(text, 512), nn.GELU(), nn.Linear(512, config.words))
        self.weights = nn.Linear(text, 2)  # of a token: its weight a, before a softplus, and its offset h
        self.text_mean = nn.Buffer(torch.zeros(text))
        self.scales = nn.Parameter(torch.ones(3))  # r, r', d
        self.bias = nn.Parameter(torch.zeros(()))  # e
        self.attention_scale, self.support_scale = (nn.Parameter(torch.ones(())) for _ in range(2))  # k, g

    def look(self, pooled: Tensor, semantic: Tensor, places: Tensor) -> dict[str, Tensor]:
        """Map what the match tower saw: v and c (B, d), and p (B, 64, d')."""
        semantic = F.normalize(semantic - self.text_mean, dim=-1)
        image = F.normalize(self.pooled(self.standard_pooled(torch.cat([pooled, semantic], dim=1))), dim=-1)
        spots = F.normalize(self.places(self.standard_places(places)), dim=-1)
        return {"image": image, "semantic": semantic, "places": spots}

    def read(self, text: TextFeatures) -> dict[str, Tensor]:
        """Map what the text tower read of P texts: s and t (P, d), w (P, L, d'), a and h (P, L)."""
        weight, offset = self.weights(text.tokens).unbind(dim=-1)
        return {
            "text": F.normalize(text.pooled - self.text_mean, dim=-1),
            "sentence": F.normalize(self.sentence(text.pooled * text.pooled.shape[1] ** 0.5), dim=-1),
            "words": F.normalize(self.words(text.tokens), dim=-1),
            "weight": F.softplus(weight) * text.mask,
            "offset": offset,
        }

    def forward(self, seen: Seen, text: Seen) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch tokens"]]:
        """Compute m, and the tokens' support u."""
        sharp = self.attention_scale * (text["words"] @ seen["places"].transpose(1, 2))
        nearest = (sharp.logsumexp(dim=-1) - math.log(sharp.shape[2])) / self.attention_scale
        support = self.support_scale * nearest + text["offset"]
        weight = text["weight"] / text["weight"].sum(dim=1, keepdim=True)
        pairs = (seen["image"], text["sentence"]), (seen["semantic"], text["text"]), (weight, support)
        parts = torch.stack([(one * other).sum(dim=1) for one, other in pairs])
        return self.scales @ parts + self.bias, support


class CompactHead(FullPrecision):
    """The scores, by what the towers saw and by the match."""

    def __init__(self, statistics: int) -> None:
        super().__init__()
        self.statistics = Standardize(statistics)
        self.whole, self.native = nn.Linear(statistics, 1), nn.Linear(statistics, 1)
        self.quality = nn.Parameter(torch.tensor([1.0, 0.0]))  # s, c
        self.correspondence = nn.Parameter(torch.zeros(3))  # f
        self.gamma = nn.Parameter(torch.ones(()))
        self.error = nn.Buffer(torch.zeros(2))  # log of quality's expected error, and its slope in |q_whole - q_native|
        self.known = nn.Buffer(torch.ones(()))  # distance below which 99.5 % of scored images are

    def distance(self, whole: Float[Tensor, "batch statistics"]) -> Float[Tensor, " batch"]:
        """Compute the root mean square of the standardized statistics over its limit."""
        return (self.statistics(whole).square().mean(dim=1) + 1e-12).sqrt() / self.known


class Compact(TrainedModel):
    """The compact model: `quality` and `match` see images, `text` reads prompts, `matcher` compares them."""

    name = "compact"
    feature_settings = ("area", "crop", "crops", "match_side", "least")
    head: CompactHead

    def __init__(
        self, config: CompactConfig, *, quality: TimmEncoder, match: CompactImageTower, text: CompactTextTower
    ) -> None:
        super().__init__()
        self.config = config
        self.quality = quality
        self.match = match
        self.text = text
        places, pooled = match.encoder.level_channels, match.encoder.width
        self.matcher = Matcher(config, 2 * (pooled + places) + match.semantic_width, places, text.width)
        self.head = CompactHead(2 * quality.width)

    def encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        read = self.text.encode(texts)
        return self.matcher.read(read) | {"word": self.text.word_numbers(texts).to(read.mask.device)}

    def native(self, images: Images) -> Float[Tensor, "batch views 3 view_height view_width"]:
        """Cut views at native resolution: the image, or squares of one with a side above `crop` or below `least`."""
        height, width = images.shape[2:]
        short = min(height, width)
        if short >= self.config.least and max(height, width) <= self.config.crop:
            return images[:, None]
        side = min(self.config.crop, max(self.config.least, short))
        covering = math.ceil(height * width / min(side, short) ** 2 - 0.25)
        return pixels.even_crops(images, side, min(self.config.crops, max(1, covering)))

    def forward_features(self, images: Images, *, generator: Generator | None = None, crops: int | None = None) -> Seen:
        """Compute `whole`, `native` (B, 2560), `image` (B, 512), `semantic` (B, 384) and `places` (B, 64, 192)."""
        return {**self.quality_features(images), **self.match_features(images)}

    def quality_features(self, images: Images) -> Seen:
        views = self.native(images)
        native = map_statistics(self.quality(views.flatten(0, 1))).unflatten(0, views.shape[:2]).mean(dim=1)
        whole = map_statistics(self.quality(pixels.resize_to_area(images, self.config.area**2, least=32)))
        return {"whole": whole, "native": native}

    def match_features(self, images: Images) -> Seen:
        square = pixels.resize(images, (self.config.match_side, self.config.match_side))
        last, levels = self.match.encoder.observe(square)
        pooled = torch.cat([map_statistics(last, 1e-6), map_statistics(levels, 1e-6)], dim=1)
        semantic = self.match.place(self.match.encoder.pool(last))
        return self.matcher.look(pooled, semantic, levels.flatten(2).transpose(1, 2))

    def forward(self, images: Images, prompts: PromptFeatures | None, context: Context | None = None) -> ModelOutput:
        seen = self.quality_features(images) if prompts is None else self.forward_features(images)
        return self.forward_head(seen, prompts, context)

    def forward_head(self, seen: Seen, prompts: PromptFeatures | None, context: Context | None) -> ModelOutput:
        head = self.head
        first = head.whole(head.statistics(seen["whole"]))[:, 0]
        second = head.native(head.statistics(seen["native"]))[:, 0]
        q = head.quality[0] * (first + second) / 2 + head.quality[1]
        details = {
            "uncertainty": torch.exp(head.error[0] + head.error[1] * (first - second).abs()),
            "out_of_distribution": head.distance(seen["whole"]),
        }
        if prompts is None:
            return ModelOutput(quality=torch.sigmoid(q), correspondence=None, details=details)
        m, support = self.matcher(seen, {name: prompts.rows(name) for name in prompts.tensors})
        weights = head.correspondence
        right = F.logsigmoid(weights[0] * q + weights[1] * m + weights[2])
        details["match"] = torch.sigmoid(m)
        details["word_scores"] = by_word(support.sigmoid(), prompts.rows("word"))
        correspondence = torch.exp(right + head.gamma * F.logsigmoid(m))
        return ModelOutput(quality=torch.sigmoid(q), correspondence=correspondence, details=details)


def map_statistics(
    maps: Float[Tensor, "batch channels rows columns"], least: float = 1e-4
) -> Float[Tensor, "batch twice"]:
    """Compute means and stds over places; `least`, added to a variance, keeps the root's slope finite."""
    mean = maps.mean(dim=(2, 3))
    variance = (maps - mean[:, :, None, None]).square().mean(dim=(2, 3))  # Tensor.var takes several times as long
    return torch.cat([mean, (variance + least).sqrt()], dim=1)


def by_word(scores: Float[Tensor, "batch tokens"], word: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch words"]:
    """Average tokens' scores over the words that they are parts of, by number from 0; -1 marks padding.

    NaN beyond a prompt's words.
    """
    of = F.one_hot(word + 1, int(word.max()) + 2)[:, :, 1:].to(scores.dtype)  # (B, L, W)
    return torch.einsum("bl,blw->bw", scores, of) / of.sum(dim=1)
