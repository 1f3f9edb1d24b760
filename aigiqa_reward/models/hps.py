"""HPS v2 and v2.1: CLIP ViT-H/14, fine-tuned on human choices between images of one prompt.

Wu et al. 2023, "Human Preference Score v2: A Solid Benchmark for Evaluating Human Preferences of Text-to-Image
Synthesis". The raw score is the cosine of image and prompt, about .14 to .33; the authors' tables multiply it by 100.
The whole image is scaled to 224 px on its longer side, with antialiasing, and centered on black: published scores made
by torchvision before 0.17 had no antialiasing and differ.
"""

from __future__ import annotations

from torch import Tensor

from aigiqa_reward.encoders.clip import from_open_clip
from aigiqa_reward.models.published import CLIPReward


class HPSv2(CLIPReward):
    """HPS v2.0; the total is the cosine."""

    name = "hpsv2"
    fit = "letterbox"

    @classmethod
    def rename(cls, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return super().rename(from_open_clip(tensors))


class HPSv21(HPSv2):
    """HPS v2.1: the same model, trained on more and cleaner choices."""

    name = "hpsv2.1"
