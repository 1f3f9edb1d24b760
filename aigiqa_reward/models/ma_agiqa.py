"""MA-AGIQA: a quality network assisted by a large multimodal model that is asked two questions.

MANIQA's head on a vision transformer gives f_1 = S * W, one number per place of the map (784 in the paper). A frozen
multimodal model M reads the image with two questions, "... due to a lack of meaningful semantic content" and
"... due to violations of coherence"; the mean over the tokens of its last hidden layer gives f_a and f_b (3). The
adaptive fusion module brings all to one width and weighs them:

    f_1' = W_1 f_1,   f_i' = dropout(relu(W_i f_i)) for i in {a, b},   alpha = sigmoid(W_g [f_1'; f_a'; f_b'])     (4)
    quality = w_2 (W_3 sum_i alpha_i f_i')

Source: MA-AGIQA (the paper, by equation number); the sigmoid is the paper's, the released code has none. MANIQA's
layout is the released code's. The paper has no score of correspondence: where a `matcher` is given, ours adds one, by a
second fusion whose fourth vector f_t comes from e * t, the products of the image's and the prompt's joint embeddings,
and by the anchor (see `blocks.Anchor`). Scores are means over the crops.

Without a multimodal model f_a and f_b are two pooled features of the compact tower: mean and std over the places of the
whole image, marked in `details`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torchvision.models.swin_transformer import SwinTransformerBlock

from aigiqa_reward.assistants.base import SemanticsReader
from aigiqa_reward.models.base import FullPrecision, ModelOutput, Seen, Standardize, TrainedModel
from aigiqa_reward.models.blocks import Anchor
from aigiqa_reward.models.towers import ContrastiveEncoder, CropsConfig, LevelsEncoder, native_crops, whole_view
from aigiqa_reward.types import Context, Images, PromptFeatures

WHOLE_SIDE = 256  # px of the whole image, for the compact tower's substitute features and the match


@dataclass(frozen=True, kw_only=True)
class MAAGIQAConfig(CropsConfig):
    """Settings of MA-AGIQA.

    Attributes:
        width: width of the MANIQA head's first stage; the second has half.
        heads, window: heads of its Swin blocks, and their windows in places of the map.
        swin_scale: scale of its Swin blocks' contribution (0.1 in the source).
        semantics_width: width of f_a and f_b: the multimodal model's hidden size.
        semantics: "features", or "zeros" as an ablation.
        dropout: dropout in the head and the fusion.
        smooth: softplus instead of the score branch's relu. Ours.
    """

    width: int = 768
    heads: int = 4
    window: int = 4
    swin_scale: float = 0.1
    semantics_width: int = 4096
    semantics: Literal["features", "zeros"] = "features"
    train_crops: int = 1
    short_side: int = 224
    dropout: float = 0.1
    smooth: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % (2 * self.heads):
            raise ValueError(f"width: expected a multiple of 2 heads = {2 * self.heads}, got {self.width}")


class TransposedAttention(FullPrecision):
    """Self-attention of channels, (B, channels, places): y = x + softmax(W_q x (W_k x)' / sqrt(n)) W_v x."""

    def __init__(self, places: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(places, places) for _ in range(3))
        self.places = places

    def forward(self, maps: Float[Tensor, "batch channels places"]) -> Float[Tensor, "batch channels places"]:
        weights = (self.query(maps) @ self.key(maps).transpose(1, 2) / self.places**0.5).softmax(dim=-1)
        return maps + weights @ self.value(maps)


class ScaledSwin(FullPrecision):
    """Two Swin blocks, the second with shifted windows, behind a residual scale: y = x + scale blocks(x)."""

    def __init__(self, width: int, side: int, *, heads: int, window: int, scale: float) -> None:
        super().__init__()
        window = min(window, side)
        self.scale = scale
        shifts = (0, window // 2 if side > window else 0)
        self.blocks = nn.Sequential(
            *(SwinTransformerBlock(width, heads, [window] * 2, [shift] * 2, mlp_ratio=2.0) for shift in shifts)
        )

    def forward(self, maps: Float[Tensor, "batch width rows columns"]) -> Float[Tensor, "batch width rows columns"]:
        return maps + self.scale * self.blocks(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ManiqaHead(FullPrecision):
    """MANIQA's head: from a tower's maps to the quality feature f_1 = S * W, one number per place.

    maps -> transposed attention x 2 -> 1 x 1 to width -> Swin -> transposed attention x 2 -> 1 x 1 to width / 2
    -> Swin; S = relu(MLP), W = sigmoid(MLP). With `smooth`, S = softplus(MLP): unlike the paper's relu it leaves no
    image without a gradient. In the paper 3072 channels of 28 x 28 places, width 768. Returns S * W and W, (B, places).
    """

    def __init__(self, config: MAAGIQAConfig, channels: int, side: int) -> None:
        super().__init__()
        places, width, half = side * side, config.width, config.width // 2
        swin = {"heads": config.heads, "window": config.window, "scale": config.swin_scale}
        self.smooth = config.smooth
        self.standard = Standardize(channels, axis=-3)
        self.first = nn.Sequential(TransposedAttention(places), TransposedAttention(places))
        self.reduce = nn.Conv2d(channels, width, 1)
        self.first_swin = ScaledSwin(width, side, **swin)
        self.second = nn.Sequential(TransposedAttention(places), TransposedAttention(places))
        self.halve = nn.Conv2d(width, half, 1)
        self.second_swin = ScaledSwin(half, side, **swin)
        self.score, self.weight = (
            nn.Sequential(nn.Linear(half, half), nn.ReLU(), nn.Dropout(config.dropout), nn.Linear(half, 1))
            for _ in range(2)
        )

    def forward(self, maps: Float[Tensor, "batch channels rows columns"]) -> tuple[Tensor, Tensor]:
        rows = maps.shape[2]
        x = self.first(self.standard(maps).flatten(2)).unflatten(2, (rows, -1))
        x = self.first_swin(self.reduce(x)).flatten(2)
        x = self.second(x).unflatten(2, (rows, -1))
        places = self.second_swin(self.halve(x)).flatten(2).transpose(1, 2)
        weight = torch.sigmoid(self.weight(places))[..., 0]
        score = F.softplus(self.score(places)) if self.smooth else F.relu(self.score(places))
        return score[..., 0] * weight, weight


class AdaptiveFusion(FullPrecision):
    """AFM (eq. 4): vectors, weighted by a gate and added, to a score (B,); and the weights (B, vectors)."""

    def __init__(self, places: int, assisting: Sequence[int], dropout: float) -> None:
        super().__init__()
        self.own = nn.Linear(places, places)
        self.assisting = nn.ModuleList(
            nn.Sequential(nn.Linear(width, places), nn.ReLU(), nn.Dropout(dropout)) for width in assisting
        )
        self.gate = nn.Linear(places * (1 + len(assisting)), 1 + len(assisting))
        self.mix = nn.Linear(places, places)
        self.out = nn.Linear(places, 1)

    def forward(self, own: Tensor, assisting: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        vectors = [self.own(own), *(layer(part) for layer, part in zip(self.assisting, assisting, strict=True))]
        weights = torch.sigmoid(self.gate(torch.cat(vectors, dim=1)))
        fused = (torch.stack(vectors, dim=1) * weights[..., None]).sum(dim=1)
        return self.out(self.mix(fused))[:, 0], weights


class MAHead(FullPrecision):
    """Everything behind the towers."""

    def __init__(self, config: MAAGIQAConfig, channels: int, side: int, joint: int | None) -> None:
        super().__init__()
        self.maniqa = ManiqaHead(config, channels, side)
        places, two = side * side, [config.semantics_width] * 2
        self.semantics = Standardize(config.semantics_width)
        self.quality = AdaptiveFusion(places, two, config.dropout)
        self.correspondence = None if joint is None else AdaptiveFusion(places, [*two, joint], config.dropout)
        self.anchor = None if joint is None else Anchor()


class MAAGIQA(TrainedModel):
    """MA-AGIQA on an image tower, with a multimodal model or its substitute, and a matcher for the prompt.

    Args:
        config: settings.
        vision: tower of the crops.
        side: rows and columns of the tower's maps.
        matcher: tower of images and prompts for our correspondence score; None for none, as in the paper.
        semantics: the multimodal model; None for the matcher's pooled features.
    """

    name = "ma_agiqa"
    context_names = ("semantics", "substitute_semantics")
    crop_features = ("levels",)
    feature_settings = ("crops", "short_side", "resolution")
    tower_roles: ClassVar = {"vision": "vision", "matcher": "matcher"}
    assistant_roles = ("semantics",)

    def __init__(
        self,
        config: MAAGIQAConfig,
        vision: LevelsEncoder,
        *,
        side: int,
        matcher: ContrastiveEncoder | None = None,
        semantics: SemanticsReader | None = None,
    ) -> None:
        super().__init__()
        self.config, self.side, self.vision, self.semantics = config, side, vision, semantics
        self.matcher = None if matcher is vision else matcher
        self._matched = matcher is not None
        if semantics is not None and semantics.width != (width := config.semantics_width):
            raise ValueError(f"semantics_width: expected {semantics.width} as in the multimodal model, got {width}")
        self.head = MAHead(config, vision.level_channels, side, matcher.width if matcher is not None else None)

    @property
    def _match(self) -> Any:
        return self.vision if self.matcher is None else self.matcher

    @property
    def standardized(self) -> Mapping[str, Standardize]:
        return {"levels": self.head.maniqa.standard, "context.semantics": self.head.semantics}

    def start_at(self, quality: float, correspondence: float) -> None:
        nn.init.constant_(self.head.quality.out.bias, quality)
        if self.head.correspondence is not None:
            nn.init.constant_(self.head.correspondence.out.bias, correspondence)

    def encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Encode prompts (P, d); without a matcher to zeros (P, 1)."""
        if not self._matched:
            return {"pooled": torch.zeros(len(texts), 1, device=self.head.semantics.mean.device)}
        self._match.encode_words(texts)  # for its warnings of unread words
        return {"pooled": self._match.encode_text(texts)}

    def prepare(self, images: Images, prompts: PromptFeatures | None) -> Context:
        """Compute f_a and f_b (B, 2, width), and whether they are the substitute's."""
        with torch.no_grad():
            read = self._substitute(images) if self.semantics is None else self.semantics.read(images)
        substitute = torch.full((len(images),), self.semantics is None, device=images.device)
        return {"semantics": read.to(images), "substitute_semantics": substitute}

    def _substitute(self, images: Images) -> Tensor:
        if not hasattr(self._match, "feature_map"):
            raise ValueError(
                "assistants: expected Assistants(semantics=LMMSemantics(...)) for ma_agiqa without the compact towers"
            )
        features = self._match.feature_map(whole_view(images, self._match, WHOLE_SIDE)).flatten(2)
        return torch.stack([features.mean(dim=2), features.std(dim=2, unbiased=False)], dim=1)

    def forward_features(self, images: Images, *, generator: Generator | None = None, crops: int | None = None) -> Seen:
        """Compute maps of the crops, `levels` (B, N, C, h, w), and with a matcher `whole` (B, d_f)."""
        cut = native_crops(images, self.vision.image_size, self.config, generator=generator, crops=crops)
        seen = {"levels": self.vision.levels(cut.flatten(0, 1)).unflatten(0, cut.shape[:2])}
        if self._matched:
            seen["whole"] = self._match.features(whole_view(images, self._match, WHOLE_SIDE))
        return seen

    def digest(self, seen: Seen) -> Seen:
        """Add f_1 of each crop, `own`, and its weight map, `weight`, (B N, places) each."""
        own, weight = self.head.maniqa(seen["levels"].flatten(0, 1))
        return {**seen, "own": own, "weight": weight}

    def forward_head(self, seen: Seen, prompts: PromptFeatures | None, context: Context | None) -> ModelOutput:
        if context is None or "semantics" not in context:
            raise ValueError("context: expected what prepare returned for these images, got none")
        head, (batch, count) = self.head, seen["levels"].shape[:2]
        digested = seen if "own" in seen else self.digest(seen)
        own, weight = digested["own"], digested["weight"]
        read = head.semantics(context["semantics"].to(own.dtype))
        if self.config.semantics == "zeros":
            read = torch.zeros_like(read)
        two = [part.repeat_interleave(count, dim=0) for part in read.unbind(dim=1)]
        scores, gate = head.quality(own, two)
        details = {
            "crop_quality": scores.unflatten(0, (batch, count)),
            "fusion": gate.unflatten(0, (batch, count)).mean(dim=1),
            "weight_map": weight.unflatten(0, (batch, count)),
            "substitute_semantics": context["substitute_semantics"],
        }
        quality = details["crop_quality"].mean(dim=1)
        if prompts is None or head.correspondence is None:
            return ModelOutput(quality=quality, correspondence=None, details=details)
        image = self._match.project(seen["whole"].to(own.dtype))
        text = prompts.rows("pooled").to(own.dtype)
        products = F.normalize(image, dim=1) * F.normalize(text, dim=1) * image.shape[1] ** 0.5
        matched, _ = head.correspondence(own, [*two, products.repeat_interleave(count, dim=0)])
        added, details["similarity"] = head.anchor(image, text)
        correspondence = matched.unflatten(0, (batch, count)).mean(dim=1) + added
        return ModelOutput(quality=quality, correspondence=correspondence, details=details)
