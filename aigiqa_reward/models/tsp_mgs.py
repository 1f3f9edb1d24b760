"""TSP-MGS: task-specific prompts and multi-granularity similarity (Xia et al.).

A CLIP model compares the image, and crops of it, with five level texts a task and with the words of the prompt:

    p_j   = softmax_j(s cos(F, T_j)),                 s CLIP's logit scale                                        (3)
    Q_cg  = L / (L - 1) (sum_j j p_j - 1)                                                                         (5)
    w     = mean_k cos(F, F_Wk) over the words k                                                                  (4)
    Q_fg  = (w_I + w_P) / 2 * L                                                                                   (6)
    Q     = alpha Q_cg^I + (1 - alpha) Q_cg^P + Q_fg                                                              (7)

with the whole image I and the mean P of its crops; alpha = 0 for perception and 1 for alignment, the paper's best.

Our inferences: the scale s (the printed equation has none, which leaves p nearly uniform); the crops (15 of 224 px,
evenly spaced, after the short side is brought up to 512 px); the whole image is letterboxed to keep its aspect ratio;
perception leaves Q_fg out unless `words_in_quality`, so that quality does not depend on the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from aigiqa_reward import images as pixels
from aigiqa_reward.models.base import ModelOutput, QualityModel
from aigiqa_reward.models.blocks import expected_level, level_probabilities
from aigiqa_reward.types import Context, Images, PromptFeatures

ALIGNMENT_LEVELS = ("badly", "poorly", "fairly", "well", "perfectly")
PERCEPTION_LEVELS = ("bad", "poor", "fair", "good", "perfect")
ANTONYMS = ("Bad", "Good")


class ContrastiveEncoder(Protocol):
    """What this model needs of a CLIP: images and texts in one space, and the words of a text."""

    image_size: int
    mean: tuple[float, float, float]

    @property
    def logit_scale(self) -> float:
        """Inverse temperature of the similarities."""
        ...

    def describe(self) -> dict[str, Any]:
        """What is needed besides the weights to build it again, as JSON."""
        ...

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) in [0, 1] to (B, d)."""
        ...

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """P texts to (P, d)."""
        ...

    def encode_words(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """P texts to the states of their words (P, L, d) and a mask (P, L); warns of words beyond the window."""
        ...


@dataclass(frozen=True, kw_only=True)
class TSPMGSConfig:
    """Settings of TSP-MGS.

    Attributes:
        crops: crops scored beside the whole image.
        short_side: images smaller than this are enlarged before cropping, in px.
        perception: "adjectives" (five levels, the paper's best) or "antonyms" (two).
        words_in_quality: add the prompt's words to perception as the paper does; quality then needs prompts.
    """

    crops: int = 15
    short_side: int = 512
    perception: str = "adjectives"
    words_in_quality: bool = False

    def __post_init__(self) -> None:
        if self.crops < 1:
            raise ValueError(f"crops: expected at least 1, got {self.crops}")
        if self.short_side < 1:
            raise ValueError(f"short_side: expected a positive number of pixels, got {self.short_side}")
        if self.perception not in ("adjectives", "antonyms"):
            raise ValueError(f"perception: expected 'adjectives' or 'antonyms', got {self.perception!r}")


class TSPMGS(QualityModel):
    """Zero-shot TSP-MGS on any contrastive encoder: usable without training, uncalibrated.

    Scores are Q_cg / L plus Q_fg / L, halved where both are present: at most 1, at least -0.5.
    """

    name = "tsp_mgs"

    def __init__(self, config: TSPMGSConfig, encoder: ContrastiveEncoder) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.needs_prompts = config.words_in_quality
        texts = [f"A photo of {level} quality." for level in PERCEPTION_LEVELS]
        if config.perception == "antonyms":
            texts = [f"{level} photo." for level in ANTONYMS]
        self._perception_texts = texts

    def describe(self) -> dict[str, Any]:
        """The settings and open_clip's description of the encoder."""
        return {"config": asdict(self.config), "open_clip": self.encoder.describe()}

    def encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Level texts (P, 5, d), words (P, L, d) and their mask (P, L)."""
        words, mask = self.encoder.encode_words(texts)
        levels = [f"A photo that {level} matches {text}." for text in texts for level in ALIGNMENT_LEVELS]
        encoded = self.encoder.encode_text(levels).unflatten(0, (len(texts), len(ALIGNMENT_LEVELS)))
        return {"levels": encoded, "words": words, "mask": mask}

    def forward(self, images: Images, prompts: PromptFeatures | None, context: Context | None = None) -> ModelOutput:
        """Quality from the crops and the perception texts; correspondence from the whole image and the prompt's."""
        del context
        whole, crops = self._image_features(images)
        with torch.no_grad():
            perception = self.encoder.encode_text(self._perception_texts).to(whole.dtype)
        quality_levels = level_probabilities(crops, perception.expand(len(images), -1, -1), self.encoder.logit_scale)
        quality = expected_level(quality_levels) / quality_levels.shape[1]
        details = {"quality_levels": quality_levels}
        if prompts is None:
            return ModelOutput(quality=quality, correspondence=None, details=details)
        levels = level_probabilities(whole, prompts.rows("levels").to(whole.dtype), self.encoder.logit_scale)
        words, mask = prompts.rows("words").to(whole.dtype), prompts.rows("mask")
        similarity = (self._word_similarity(whole, words, mask) + self._word_similarity(crops, words, mask)) / 2
        correspondence = (expected_level(levels) / levels.shape[1] + similarity) / 2
        if self.config.words_in_quality:
            quality = (quality + similarity) / 2
        details |= {"correspondence_levels": levels, "word_similarity": similarity}
        return ModelOutput(quality=quality, correspondence=correspondence, details=details)

    def _image_features(self, images: Images) -> tuple[Tensor, Tensor]:
        """Embeddings of the whole image and the mean of its crops', each (B, d)."""
        side = self.encoder.image_size
        fill = images.new_tensor(self.encoder.mean)
        whole = self.encoder.encode_image(pixels.letterbox(images, side, fill=fill))
        large = pixels.enlarge_to(images, self.config.short_side)
        crops = pixels.even_crops(large, side, self.config.crops)
        patches = self.encoder.encode_image(crops.flatten(0, 1)).unflatten(0, crops.shape[:2])
        return whole, patches.mean(dim=1)

    @staticmethod
    def _word_similarity(image: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """Mean cosine similarity of each image to the words of its prompt (eq. 4), (B,)."""
        similarity = F.cosine_similarity(image[:, None], words, dim=-1) * mask
        return similarity.sum(dim=1) / mask.sum(dim=1)
