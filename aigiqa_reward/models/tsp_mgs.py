"""TSP-MGS: task-specific prompts and multi-granularity similarity (Xia et al.).

A CLIP model compares the image, and crops of it, with L level texts T for the task and with the words W of the
prompt:

    p_j   = softmax_j(s cos(F, T_j)),                 s CLIP's logit scale                                        (3)
    w     = mean_k cos(F, F_Wk) over the words k                                                                  (4)
    Q_cg  = L / (L - 1) (sum_j j p_j - 1)                                                                         (5)
    Q_fg  = (w_I + w_P) / 2 * L                                                                                   (6)
    Q     = alpha Q_cg^I + (1 - alpha) Q_cg^P + Q_fg                                                              (7)

with F of the whole image I, the mean P over its crops, and alpha = 0 for perception and 1 for alignment (the paper's
best) or learned. Scores here are Q / L, so that levels span [0, 1].

Our inferences: the scale s; 15 even crops of 224 px after the short side is brought up to 512 px, as in IPCE's code;
the whole image is letterboxed; perception leaves Q_fg out unless `words_in_quality`; zero-shot halves Q where both
terms are in it, so that it stays below 1. The paper fine-tunes CLIP once per task; on frozen towers each task has a
low-rank adapter instead (`adapter_rank`): F = project(f) + B A f, T = t + D C t, starting at zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from aigiqa_reward.models.base import FullPrecision, ModelOutput, Seen, Standardize, TrainedModel
from aigiqa_reward.models.blocks import LowRank, expected_level, level_probabilities
from aigiqa_reward.models.towers import ContrastiveEncoder, CropsConfig, FixedTexts, native_crops, whole_view
from aigiqa_reward.types import Context, Images, PromptFeatures

ALIGNMENT_LEVELS = ("badly", "poorly", "fairly", "well", "perfectly")
PERCEPTION_LEVELS = ("bad", "poor", "fair", "good", "perfect")
ANTONYMS = ("Bad", "Good")


@dataclass(frozen=True, kw_only=True)
class TSPMGSConfig(CropsConfig):
    """Settings of TSP-MGS.

    Attributes:
        levels: "five" level texts; or "one", the best level's alone, as an ablation.
        perception: "adjectives" (five levels, the paper's best) or "antonyms" (two).
        alpha: "fixed" (0 for perception, 1 for alignment), or "learned" for both.
        words_in_quality: whether the prompt's words are added to perception, which then needs prompts (the paper).
        adapter_rank: rank of the trained adapters on frozen towers; 0 leaves them out.
        zero_shot: whether nothing is trained.
    """

    train_crops: int = 8
    levels: Literal["five", "one"] = "five"
    perception: Literal["adjectives", "antonyms"] = "adjectives"
    alpha: Literal["fixed", "learned"] = "fixed"
    words_in_quality: bool = False
    adapter_rank: int = 0
    zero_shot: bool = False


class TaskAdapter(FullPrecision):
    """The trained part of a task: low-rank maps of image features and texts, and a linear map of Q."""

    def __init__(self, features: int, width: int, rank: int) -> None:
        super().__init__()
        self.image = LowRank(features, width, rank)
        self.text = LowRank(width, width, rank)
        self.words = nn.Parameter(torch.tensor(0.1))
        self.scale = nn.Parameter(torch.ones(()))
        self.shift = nn.Parameter(torch.zeros(()))


class TSPHead(FullPrecision):
    """The trained part: an adapter per task, and alpha where it is learned."""

    def __init__(self, config: TSPMGSConfig, features: int, width: int) -> None:
        super().__init__()
        self.standard = Standardize(features)
        tasks = ("quality", "correspondence") if config.adapter_rank else ()
        self.adapters = nn.ModuleDict({task: TaskAdapter(features, width, config.adapter_rank) for task in tasks})
        self.alpha = nn.Parameter(torch.tensor([-2.0, 2.0])) if config.alpha == "learned" else None


class TSPMGS(TrainedModel):
    """TSP-MGS on a contrastive encoder: with trained adapters, fine-tuned, or zero-shot, uncalibrated in [-0.5, 1]."""

    name = "tsp_mgs"
    crop_features = ("crops",)
    feature_settings = ("crops", "short_side", "resolution")
    tower_roles: ClassVar = {"clip": "encoder"}

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
        return self.config.zero_shot

    @property
    def standardized(self) -> Mapping[str, Standardize]:
        return {"crops": self.head.standard} if self.head.adapters else {}

    def encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Encode level texts (P, 5, d), words (P, L, d) and their mask (P, L)."""
        words, mask = self.encoder.encode_words(texts)
        levels = [f"A photo that {level} matches {text}." for text in texts for level in ALIGNMENT_LEVELS]
        encoded = self.encoder.encode_text(levels).unflatten(0, (len(texts), len(ALIGNMENT_LEVELS)))
        return {"levels": encoded, "words": words, "mask": mask}

    def forward_features(self, images: Images, *, generator: Generator | None = None, crops: int | None = None) -> Seen:
        """Compute features of the whole image, `whole` (B, d_f), and of the crops, `crops` (B, N, d_f)."""
        side = self.encoder.image_size
        cut = native_crops(images, side, self.config, generator=generator, crops=crops)
        return {
            "whole": self.encoder.features(whole_view(images, self.encoder, side)),
            "crops": self.encoder.features(cut.flatten(0, 1)).unflatten(0, cut.shape[:2]),
        }

    def forward_head(self, seen: Seen, prompts: PromptFeatures | None, context: Context | None) -> ModelOutput:
        projected = {name: self.encoder.project(features) for name, features in seen.items()}
        perception = self._perception(self.encoder, projected["whole"]).expand(len(seen["whole"]), -1, -1)
        quality, levels = self._coarse("quality", self._embedded("quality", seen, projected), perception)
        details = {"quality_levels": levels}
        if prompts is None:
            return ModelOutput(quality=quality, correspondence=None, details=details)
        if self.config.words_in_quality:
            quality, _ = self._with_words("quality", quality, self._embedded("quality", seen, projected), prompts)
        texts = prompts.rows("levels").to(projected["whole"].dtype)
        embedded = self._embedded("correspondence", seen, projected)
        coarse, details["correspondence_levels"] = self._coarse("correspondence", embedded, texts)
        embedded = self._embedded("correspondence", seen, projected)  # again: gradients add up in the same order
        correspondence, details["word_similarity"] = self._with_words("correspondence", coarse, embedded, prompts)
        return ModelOutput(quality=quality, correspondence=correspondence, details=details)

    def _embedded(self, task: str, seen: Seen, projected: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """F of the whole image and the mean F over its crops, (B, d) each."""
        adapted = dict(projected)
        if task in self.head.adapters:
            image = self.head.adapters[task].image
            adapted = {name: projected[name] + image(self.head.standard(seen[name])) for name in projected}
        return {"whole": adapted["whole"], "crops": adapted["crops"].mean(dim=1)}

    def _coarse(self, task: str, embedded: Mapping[str, Tensor], texts: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha Q_cg^I + (1 - alpha) Q_cg^P) / L, and the probabilities of the task's own view."""
        adapter: Any = dict(self.head.adapters).get(task)
        if adapter is not None:
            texts = texts + adapter.text(texts)
        main = "whole" if task == "correspondence" else "crops"
        weights: dict[str, Tensor | float] = {main: 1.0}
        if self.head.alpha is not None:
            alpha = self.head.alpha[int(task == "correspondence")].sigmoid()
            weights = {"whole": alpha, "crops": 1 - alpha}
        score, kept = texts.new_zeros(len(texts)), texts
        for part, weight in weights.items():
            if self.config.levels == "one":
                similarity = F.cosine_similarity(embedded[part], texts[:, -1], dim=1)
                score, levels = score + weight * similarity, similarity[:, None]
            else:
                levels = level_probabilities(embedded[part], texts, self.encoder.logit_scale)
                score = score + weight * expected_level(levels) / levels.shape[1]
            kept = levels if part == main else kept
        return (score if adapter is None else adapter.scale * score + adapter.shift), kept

    def _with_words(
        self, task: str, coarse: Tensor, embedded: Mapping[str, Tensor], prompts: PromptFeatures
    ) -> tuple[Tensor, Tensor]:
        """Q / L with the words, and (w_I + w_P) / 2 by eq. 4."""
        words, mask = prompts.rows("words").to(coarse.dtype), prompts.rows("mask")
        similarity = coarse.new_zeros(())
        for image in embedded.values():
            cosines = F.cosine_similarity(image[:, None], words, dim=-1) * mask
            similarity = similarity + cosines.sum(dim=1) / mask.sum(dim=1) / 2
        if task in self.head.adapters:
            return coarse + self.head.adapters[task].words * similarity, similarity
        return (coarse + similarity) / (2 if self.config.zero_shot else 1), similarity
