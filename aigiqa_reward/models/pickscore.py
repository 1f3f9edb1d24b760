"""PickScore: CLIP ViT-H/14, fine-tuned on half a million human choices between two images of one prompt.

Kirstain et al. 2023, "Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation". The raw score is
exp(logit_scale) cos(image, prompt), about 15 to 26; it compares images of one prompt.
"""

from __future__ import annotations

from torch import Tensor

from aigiqa_reward.models.published import CLIPReward
from aigiqa_reward.types import Images, PromptFeatures


class PickScore(CLIPReward):
    """PickScore v1; the total is raw / 26."""

    name = "pickscore"
    scale = 1 / 26

    def raw_scores(self, images: Images, prompts: PromptFeatures | None) -> dict[str, Tensor]:
        return {"raw": self.cosine.logit_scale.exp() * self.cosines(images, prompts)}
