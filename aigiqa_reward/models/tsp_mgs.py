"""TSP-MGS: task-specific prompts and multi-granularity similarity (Xia et al.).

A CLIP model compares the image, and crops of it, with L level texts T for the task at hand and with the words W of the
prompt:

    p_j   = softmax_j(s cos(F, T_j)),                 s CLIP's logit scale                                        (3)
    w     = mean_k cos(F, F_Wk) over the words k                                                                  (4)
    Q_cg  = L / (L - 1) (sum_j j p_j - 1)                                                                         (5)
    Q_fg  = (w_I + w_P) / 2 * L                                                                                   (6)
    Q     = alpha Q_cg^I + (1 - alpha) Q_cg^P + Q_fg                                                              (7)

with F of the whole image I and the mean P over its crops; alpha = 0 for perception and 1 for alignment, the paper's
best, or learned. Scores here are Q / L, so that levels span [0, 1].

Our inferences: the scale s (the printed equation has none, which leaves p nearly uniform); the crops (15 of 224 px,
evenly spaced, after the short side is brought up to 512 px; IPCE's code, whose splits the paper reuses, does so); the
whole image is letterboxed to keep its aspect ratio; perception leaves Q_fg out unless `words_in_quality`, so that
quality does not depend on the prompt; zero-shot halves Q where both terms are in it, so that it stays below 1.

The paper fine-tunes CLIP end to end, once for each task. Where the towers stay frozen, an adapter of low rank for each
task (`adapter_rank`) takes that place: F = project(f) + B A f, T = t + D C t, starting at zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aigiqa_reward.models.base import FullPrecision, ModelOutput, Seen, Standardize, TrainedModel
from aigiqa_reward.models.blocks import LowRank, expected_level, level_probabilities
from aigiqa_reward.models.towers import ContrastiveEncoder, FixedTexts, native_crops, whole_view
from aigiqa_reward.types import Context, Images, PromptFeatures

ALIGNMENT_LEVELS = ("badly", "poorly", "fairly", "well", "perfectly")
PERCEPTION_LEVELS = ("bad", "poor", "fair", "good", "perfect")
ANTONYMS = ("Bad", "Good")


@dataclass(frozen=True, kw_only=True)
class TSPMGSConfig:
    """Settings of TSP-MGS.

    Attributes:
        crops: crops scored beside the whole image.
        train_crops: drawn at random for each image in training.
        short_side: images smaller than this are looked at as if enlarged to it, in px.
        resolution: larger ones are scaled down to this short side first; None crops at native resolution.
        levels: "five" level texts; or "one", the best level's alone, to measure what the levels are worth.
        perception: "adjectives" (five levels, the paper's best) or "antonyms" (two).
        alpha: "fixed" (0 for perception, 1 for alignment), or "learned" for both.
        words_in_quality: add the prompt's words to perception as the paper does; quality then needs prompts.
        adapter_rank: of the trained adapters on frozen towers; 0 leaves them out.
        zero_shot: nothing is trained at all.
    """

    crops: int = 15
    train_crops: int = 8
    short_side: int = 512
    resolution: int | None = None
    levels: str = "five"
    perception: str = "adjectives"
    alpha: str = "fixed"
    words_in_quality: bool = False
    adapter_rank: int = 0
    zero_shot: bool = False

    def __post_init__(self) -> None:
        for name in ("crops", "train_crops"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.short_side < 1:
            raise ValueError(f"short_side: expected a positive number of pixels, got {self.short_side}")
        if self.resolution is not None and self.resolution < self.short_side:
            raise ValueError(
                f"resolution: expected None or at least short_side {self.short_side}, got {self.resolution}"
            )
        if self.adapter_rank < 0:
            raise ValueError(f"adapter_rank: expected at least 0, got {self.adapter_rank}")
        choices = {
            "levels": ("five", "one"),
            "perception": ("adjectives", "antonyms"),
            "alpha": ("fixed", "learned"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {allowed}, got {getattr(self, name)!r}")


class TaskAdapter(FullPrecision):
    """What one task adds to frozen towers: low-rank maps of image features and texts, and what Q is worth."""

    def __init__(self, features: int, width: int, rank: int) -> None:
        super().__init__()
        self.image = LowRank(features, width, rank)
        self.text = LowRank(width, width, rank)
        self.words = nn.Parameter(torch.tensor(0.1))
        self.scale = nn.Parameter(torch.ones(()))
        self.shift = nn.Parameter(torch.zeros(()))


class TSPHead(FullPrecision):
    """The trained part: an adapter for each task, and alpha where it is learned."""

    def __init__(self, config: TSPMGSConfig, features: int, width: int) -> None:
        super().__init__()
        self.standard = Standardize(features)
        self.adapters = nn.ModuleDict()
        if config.adapter_rank:
            self.adapters.update(
                {task: TaskAdapter(features, width, config.adapter_rank) for task in ("quality", "correspondence")}
            )
        self.alpha = nn.Parameter(torch.tensor([-2.0, 2.0])) if config.alpha == "learned" else None

    def adapt(self, task: str, features: Tensor, projected: Tensor) -> Tensor:
        """Image embeddings for a task, from features and what the frozen tower makes of them."""
        if task not in self.adapters:
            return projected
        adapter: Any = self.adapters[task]
        return projected + adapter.image(self.standard(features))

    def adapt_texts(self, task: str, texts: Tensor) -> Tensor:
        """Level texts for a task."""
        if task not in self.adapters:
            return texts
        adapter: Any = self.adapters[task]
        return texts + adapter.text(texts)


class TSPMGS(TrainedModel):
    """TSP-MGS on any contrastive encoder; zero-shot, or with trained adapters, or with a fine-tuned encoder.

    Zero-shot scores are uncalibrated: Q_cg / L plus Q_fg / L, halved where both are present: at most 1, at least -0.5.
    """

    name = "tsp_mgs"
    crop_features = ("crops",)
    feature_settings = ("crops", "short_side", "resolution")

    def __init__(self, config: TSPMGSConfig, encoder: ContrastiveEncoder) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.needs_prompts = config.words_in_quality
        self.head = TSPHead(config, encoder.feature_width, encoder.width)
        texts = [f"A photo of {level} quality." for level in PERCEPTION_LEVELS]
        if config.perception == "antonyms":
            texts = [f"{level} photo." for level in ANTONYMS]
        self._perception = FixedTexts(texts)

    @property
    def zero_shot(self) -> bool:
        """Whether nothing was trained."""
        return self.config.zero_shot

    @property
    def standardized(self) -> Mapping[str, Standardize]:
        """The adapters see the crops' and the whole image's features on one scale, the crops'."""
        return {"crops": self.head.standard} if self.head.adapters else {}

    def describe(self) -> dict[str, Any]:
        """Settings and tower."""
        return {"config": asdict(self.config), "towers": {"clip": self.encoder.describe()}}

    def encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Level texts (P, 5, d), words (P, L, d) and their mask (P, L)."""
        words, mask = self.encoder.encode_words(texts)
        levels = [f"A photo that {level} matches {text}." for text in texts for level in ALIGNMENT_LEVELS]
        encoded = self.encoder.encode_text(levels).unflatten(0, (len(texts), len(ALIGNMENT_LEVELS)))
        return {"levels": encoded, "words": words, "mask": mask}

    def forward_features(
        self, images: Images, *, generator: torch.Generator | None = None, crops: int | None = None
    ) -> Seen:
        """Features of the whole image, `whole` (B, d_f), and of the crops, `crops` (B, N, d_f)."""
        side = self.encoder.image_size
        large = native_crops(
            images,
            side,
            crops or (self.config.crops if generator is None else self.config.train_crops),
            short_side=self.config.short_side,
            resolution=self.config.resolution,
            generator=generator,
        )
        return {
            "whole": self.encoder.features(whole_view(images, self.encoder, side)),
            "crops": self.encoder.features(large.flatten(0, 1)).unflatten(0, large.shape[:2]),
        }

    def forward_head(self, seen: Seen, prompts: PromptFeatures | None, context: Context | None) -> ModelOutput:
        """Quality from the crops and the perception texts; correspondence from the whole image and the prompt's."""
        del context
        projected = {name: self.encoder.project(features) for name, features in seen.items()}
        perception = self._perception(self.encoder, projected["whole"]).expand(len(seen["whole"]), -1, -1)
        quality, levels = self._coarse("quality", seen, projected, perception)
        details = {"quality_levels": levels}
        if prompts is None:
            return ModelOutput(quality=quality, correspondence=None, details=details)
        if self.config.words_in_quality:
            quality, _ = self._with_words("quality", quality, seen, projected, prompts)
        texts = prompts.rows("levels").to(projected["whole"].dtype)
        correspondence, details["correspondence_levels"] = self._coarse("correspondence", seen, projected, texts)
        correspondence, details["word_similarity"] = self._with_words(
            "correspondence", correspondence, seen, projected, prompts
        )
        return ModelOutput(quality=quality, correspondence=correspondence, details=details)

    def _embedded(self, task: str, raw: Mapping[str, Tensor], projected: Mapping[str, Tensor], part: str) -> Tensor:
        """F of the whole image or the mean F over its crops, (B, d)."""
        adapted = self.head.adapt(task, raw[part], projected[part])
        return adapted if part == "whole" else adapted.mean(dim=1)

    def _coarse(
        self, task: str, raw: Mapping[str, Tensor], projected: Mapping[str, Tensor], texts: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Alpha Q_cg^I + (1 - alpha) Q_cg^P, over L, and the probabilities that weigh most in it."""
        texts = self.head.adapt_texts(task, texts)
        alpha = float(task == "correspondence")
        if self.head.alpha is not None:
            alpha = self.head.alpha[int(task == "correspondence")].sigmoid()
        parts = {"whole": alpha, "crops": 1 - alpha}
        score, kept = torch.zeros(len(texts), device=texts.device, dtype=texts.dtype), None
        for part, weight in parts.items():
            if isinstance(weight, float) and weight == 0:
                continue
            embedded = self._embedded(task, raw, projected, part)
            if self.config.levels == "one":
                similarity = F.cosine_similarity(embedded, texts[:, -1], dim=1)
                score, kept = score + weight * similarity, similarity[:, None]
            else:
                probabilities = level_probabilities(embedded, texts, self.encoder.logit_scale)
                score = score + weight * expected_level(probabilities) / probabilities.shape[1]
                main = kept is None or part == ("whole" if task == "correspondence" else "crops")
                kept = probabilities if main else kept
        assert kept is not None, "alpha leaves at least one part"
        if task in self.head.adapters:
            adapter = self.head.adapters[task]
            score = adapter.scale * score + adapter.shift
        return score, kept

    def _with_words(
        self,
        task: str,
        coarse: Tensor,
        raw: Mapping[str, Tensor],
        projected: Mapping[str, Tensor],
        prompts: PromptFeatures,
    ) -> tuple[Tensor, Tensor]:
        """Q with Q_fg, over L, and (w_I + w_P) / 2."""
        words, mask = prompts.rows("words").to(coarse.dtype), prompts.rows("mask")
        seen = [self._embedded(task, raw, projected, part) for part in ("whole", "crops")]
        similarity = sum((self._word_similarity(part, words, mask) for part in seen), coarse.new_zeros(())) / 2
        if task in self.head.adapters:
            return coarse + self.head.adapters[task].words * similarity, similarity
        return (coarse + similarity) / (2 if self.config.zero_shot else 1), similarity

    @staticmethod
    def _word_similarity(image: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """Mean cosine similarity of each image to the words of its prompt (eq. 4), (B,)."""
        similarity = F.cosine_similarity(image[:, None], words, dim=-1) * mask
        return similarity.sum(dim=1) / mask.sum(dim=1)
