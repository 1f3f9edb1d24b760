"""MST-CLIPIQA: two streams of different granularity, fused by a gate, with an optional branch for the prompt.

Two frozen CLIP towers see the image, a coarse one (ViT-B/32) and a fine one (ViT-B/16), as embeddings that are
projected but not normalized:

    g = sigmoid(W_g relu(W_h [f_c; f_f])),   z = g * (W_c f_c) + (1 - g) * (W_f f_f)
    quality = w_2 relu(W_1 z)
    z' = z + alpha A(z, words of the prompt),   correspondence = v_2 relu(V_1 z')

With both towers' 512 dimensions the quality path has 788,353 trainable parameters, the paper's "0.8 M".

Source: Meng, MST-CLIPIQA (arXiv), and the released code's equations. The "information bottleneck" has no counterpart in
that code; `bottleneck` is a variational one, beta KL(N(mu, s^2) || N(0, 1)) on z. Our inferences: the quality head's
two layers; the prompt branch's low rank; a separate head for correspondence; W_c and W_f start as the identity. On the
compact towers the streams are the whole image at two resolutions, and correspondence has a `blocks.Anchor`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from aigiqa_reward.models import blocks
from aigiqa_reward.models.base import FullPrecision, ModelConfig, ModelOutput, Seen, Standardize, TrainedModel
from aigiqa_reward.models.towers import ContrastiveEncoder, FixedTexts, whole_view
from aigiqa_reward.types import Context, Images, PromptFeatures

QUALITY_LEVELS = tuple(f"a photo of {level} quality" for level in ("bad", "poor", "fair", "good", "excellent"))
"""The five texts of `quality_head="levels"`; the wording is our inference."""


@dataclass(frozen=True, kw_only=True)
class MSTCLIPIQAConfig(ModelConfig):
    """Settings of MST-CLIPIQA.

    Attributes:
        width: joint width d.
        hidden, head_hidden: widths of the gate's and the heads' hidden layers.
        coarse_side, fine_side: sides in px of the towers' views; towers of a fixed size ignore them.
        fusion: "gate", or "mean" (g = 1/2 everywhere) as an ablation.
        quality_head: "regression"; or "levels", a softmax over five quality texts with a trained temperature
            (the released variant A, whose quality path has 722,561 parameters).
        prompt_branch: "low_rank"; "full" (the released variant B: full-rank attention to projected words); or None.
        rank: rank of the low-rank branch.
        anchor: whether the similarity of image and prompt is added to correspondence.
        bottleneck: beta of the variational bottleneck; 0 leaves it out.
        dropout: dropout of both towers' features. Ours, for features much wider than a CLIP's.
    """

    width: int = 512
    hidden: int = 128
    head_hidden: int = 128
    coarse_side: int = 224
    fine_side: int = 224
    fusion: Literal["gate", "mean"] = "gate"
    quality_head: Literal["regression", "levels"] = "regression"
    prompt_branch: Literal["low_rank", "full", None] = "low_rank"
    rank: int = 32
    heads: int = 8
    anchor: bool = False
    bottleneck: float = 0.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.bottleneck < float("inf"):
            raise ValueError(f"bottleneck: expected a finite weight of at least 0, got {self.bottleneck!r}")


RELEASED_A = MSTCLIPIQAConfig(quality_head="levels", prompt_branch=None)
"""The released variant A: five level texts with a trained temperature."""

RELEASED_B = MSTCLIPIQAConfig(prompt_branch="full", head_hidden=512)
"""The released variant B: full-rank cross-attention to the prompt's words. Fusion, branch and one head have its
2,299,010 parameters; their division is our inference, and a head for each aspect is ours."""


class FullPromptAttention(FullPrecision):
    """z' = z + alpha attention(z, W_t T): the prompt branch of the released variant B, full rank."""

    def __init__(self, width: int, words: int, *, heads: int) -> None:
        super().__init__()
        self.words = nn.Linear(words, width)
        self.attend = blocks.CrossAttention(width, width, heads=heads)
        self.alpha = nn.Parameter(torch.zeros(()))

    def forward(self, image: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        return image + self.alpha * self.attend(image[:, None], self.words(words), mask)[:, 0]


class Bottleneck(FullPrecision):
    """z ~ N(mu, sigma^2), sigma from a small layer, in evaluation mu; and KL(N(mu, sigma^2) || N(0, 1)) (B,)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, 64)  # the whole stays below 1.1 M parameters
        self.log_variance = nn.Linear(64, width)
        nn.init.constant_(self.log_variance.bias, -4.0)
        nn.init.zeros_(self.log_variance.weight)

    def forward(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        log_variance = self.log_variance(F.relu(self.hidden(mean)))
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).mean(dim=1) / 2
        if self.training:
            mean = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        return mean, divergence


class MSTHead(FullPrecision):
    """Everything behind the towers."""

    def __init__(self, config: MSTCLIPIQAConfig, coarse: int, fine: int, words: int) -> None:
        super().__init__()
        width, hidden = config.width, config.head_hidden
        self.coarse, self.fine = Standardize(coarse), Standardize(fine)
        self.dropout = nn.Dropout(config.dropout)
        self.fusion = blocks.GatedFusion(coarse, fine, width, config.hidden)
        if coarse == fine == width:
            nn.init.eye_(self.fusion.coarse.weight)
            nn.init.eye_(self.fusion.fine.weight)
        self.bottleneck = Bottleneck(width) if config.bottleneck else None
        self.quality = blocks.ScoreHead(width, hidden) if config.quality_head == "regression" else None
        self.temperature = nn.Parameter(torch.tensor(100.0).log()) if config.quality_head == "levels" else None
        self.attend: nn.Module | None = None
        if config.prompt_branch == "full":
            self.attend = FullPromptAttention(width, words, heads=config.heads)
        elif config.prompt_branch == "low_rank":
            self.attend = blocks.PromptCrossAttention(width, words, rank=config.rank, heads=config.heads)
        if self.attend is not None:
            self.correspondence = blocks.ScoreHead(width, hidden)
        self.anchor = blocks.Anchor() if config.anchor else None


class MSTCLIPIQA(TrainedModel):
    """MST-CLIPIQA on any two contrastive encoders.

    Args:
        config: settings.
        coarse: tower of the coarse stream; its text tower reads the prompts.
        fine: tower of the fine stream; None takes the coarse tower at `fine_side`.
    """

    name = "mst_clipiqa"
    feature_settings = ("coarse_side", "fine_side")
    tower_roles: ClassVar = {"coarse": "coarse", "fine": "fine"}

    def __init__(
        self, config: MSTCLIPIQAConfig, coarse: ContrastiveEncoder, fine: ContrastiveEncoder | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.coarse, self.fine = coarse, fine
        if config.quality_head == "levels" and config.width != coarse.width:
            raise ValueError(f"width: expected {coarse.width} for quality_head='levels', got {config.width}")
        self.head = MSTHead(config, coarse.feature_width, (fine or coarse).feature_width, coarse.width)
        self._levels = FixedTexts(QUALITY_LEVELS)

    @property
    def standardized(self) -> Mapping[str, Standardize]:
        return {"coarse": self.head.coarse, "fine": self.head.fine} if self.coarse.any_size else {}

    def start_at(self, quality: float, correspondence: float) -> None:
        if self.head.quality is not None:
            nn.init.constant_(self.head.quality.out.bias, quality)
        if self.head.attend is not None:
            nn.init.constant_(self.head.correspondence.out.bias, correspondence)

    def encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Encode words (P, L, d), their mask (P, L), and the texts (P, d)."""
        words, mask = self.coarse.encode_words(texts)
        return {"words": words, "mask": mask, "pooled": self.coarse.encode_text(texts)}

    def forward_features(self, images: Images, *, generator: Generator | None = None, crops: int | None = None) -> Seen:
        """Compute both towers' features of the whole image: `coarse` (B, d_c) and `fine` (B, d_f)."""
        fine = self.fine or self.coarse
        return {
            "coarse": self.coarse.features(whole_view(images, self.coarse, self.config.coarse_side)),
            "fine": fine.features(whole_view(images, fine, self.config.fine_side)),
        }

    def forward_head(self, seen: Seen, prompts: PromptFeatures | None, context: Context | None) -> ModelOutput:
        head = self.head
        coarse, fine = head.dropout(head.coarse(seen["coarse"])), head.dropout(head.fine(seen["fine"]))
        z, gate = head.fusion(coarse, fine)
        if self.config.fusion == "mean":
            z = (head.fusion.coarse(coarse) + head.fusion.fine(fine)) / 2
            gate = torch.full_like(gate, 0.5)
        details = {"gate": gate.mean(dim=1)}
        if head.bottleneck is not None:
            z, divergence = head.bottleneck(z)
            details["penalty"] = self.config.bottleneck * divergence
        if head.quality is not None:
            quality = head.quality(z)
        else:
            levels = self._levels(self.coarse, z).expand(len(z), -1, -1)
            details["quality_levels"] = blocks.level_probabilities(z, levels, head.temperature.exp())
            quality = blocks.expected_level(details["quality_levels"]) / levels.shape[1]
        if prompts is None or head.attend is None:
            return ModelOutput(quality=quality, correspondence=None, details=details)
        words = prompts.rows("words").to(z.dtype)
        correspondence = head.correspondence(head.attend(z, words, prompts.rows("mask")))
        if head.anchor is not None:
            embedded = self.coarse.project(seen["coarse"].to(z.dtype))
            added, details["similarity"] = head.anchor(embedded, prompts.rows("pooled"))
            correspondence = correspondence + added
        return ModelOutput(quality=quality, correspondence=correspondence, details=details)
