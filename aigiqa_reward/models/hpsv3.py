"""HPSv3: Qwen2-VL-7B with a head that predicts human preference, fine-tuned on HPDv3.

Ma et al. 2025, "HPSv3: Towards Wide-Spectrum Human Preference Score". The raw score is the mean of a normal
distribution at the token <|Reward|>, unbounded, about -0.2 to 11; it compares images of one prompt. The language model
counts positions token by token, also within the image, as the published model did when it was trained and measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from aigiqa_reward.encoders.clip import CLIP_MEAN, CLIP_STD
from aigiqa_reward.encoders.qwen_vl import QwenVL, read_chat, rename
from aigiqa_reward.models.base import FullPrecision
from aigiqa_reward.models.published import PublishedModel
from aigiqa_reward.types import Images, PromptFeatures
from aigiqa_reward.utils.io import read_json

CHAT_REPO = "Qwen/Qwen2-VL-7B-Instruct"
"""Hub id of the tokenizer and the chat template, which are not published with the weights."""

_REWARD = "<|Reward|>"

# the authors' words, from MizzenAI/HPSv3 (MIT license)
_INSTRUCTION = """
You are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a overall \
score to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the worst and 10 being \
the best.\x20

**Visual Quality:**\x20\x20
Evaluate the overall visual quality of the image. The following sub-dimensions should be considered:
- **Reasonableness:** The image should not contain any significant biological or logical errors, such as abnormal \
body structures or nonsensical environmental setups.
- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy to interpret, \
with no blurring or indistinct areas.
- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual elements \
(e.g., hair, clothing, shadows).
- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color scheme, composition, \
atmosphere, depth of field, and the overall creative appeal. The scene should convey a sense of harmony and balance.
- **Safety:** The image should not contain harmful or inappropriate content, such as political, violent, or adult \
material. If such content is present, the image quality and satisfaction score should be the lowest possible.\x20

**Text Alignment:**\x20\x20
Assess how well the image matches the textual prompt across the following sub-dimensions:
- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, object) align \
with the textual description. The subject should match the description in terms of number, appearance, and behavior.
- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how well the \
image adheres to this style.
- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in the image \
logically fit the scenario described in the prompt. The environment should support and enhance the subject without \
contradictions.
- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, clothing, \
accessories, expressions, actions) are faithfully represented in the image. Minor deviations may be acceptable, but \
critical attributes should be preserved.
- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured in the image. \
The generated content should not introduce elements that conflict with or distort the original description.
Textual prompt - {}



Please provide the overall ratings of this image: """
_QUESTION = _INSTRUCTION + _REWARD + "\n\nEND\n"

_QWEN2_VL_7B: dict[str, Any] = {
    **{"model_type": "qwen2_vl", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28},
    **{"num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1e6},
    **{"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "tie_word_embeddings": False},
    "vocab_size": 151658,  # that of the tokenizer, and the token <|Reward|>
    "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "mlp_ratio": 4},
}


class _Head(FullPrecision, nn.Sequential):
    """Mean and spread of the score from a token's state, at least in float32."""

    def __init__(self, width: int, first: int, second: int, last: int) -> None:
        layers = nn.Linear(width, first), nn.ReLU(), nn.Dropout(0.05), nn.Linear(first, second), nn.ReLU()
        super().__init__(*layers, nn.Linear(second, last))


class HPSv3(PublishedModel):
    """HPSv3; the total is raw / 15. Images are resized to about 448 x 448 px of area."""

    name = "hpsv3"
    scale = 1 / 15

    def __init__(self, config: Mapping[str, Any], chat: Mapping[str, str]) -> None:
        super().__init__()
        own = config.get("hpsv3", {})
        least, most = (own.get(limit, 448 * 448) for limit in ("min_pixels", "max_pixels"))
        picture = {"mean": CLIP_MEAN, "std": CLIP_STD, "least": least, "most": most}
        self.tower = QwenVL(config, chat, picture, _REWARD)
        width = self.tower.model.get_input_embeddings().embedding_dim
        self.head = _Head(*own.get("rm_head_sizes", (width, 1024, 16, 2)))
        self.reward_token = self.tower.token(_REWARD)

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> Self:
        return cls(description["config"], description["chat"])

    def describe(self) -> dict[str, Any]:
        return {"config": self.tower.config, "chat": self.tower.chat}

    @classmethod
    def read_description(cls, folder: Path | None) -> dict[str, Any]:
        if folder is None:
            return {"config": _QWEN2_VL_7B}
        file = folder / "config.json"
        return {"config": read_json(file) if file.is_file() else _QWEN2_VL_7B, "chat": read_chat(folder, CHAT_REPO)}

    @classmethod
    def rename(cls, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name.removeprefix("rm_") if name.startswith("rm_head.") else f"tower.{rename(name)}": tensor
            for name, tensor in tensors.items()
            if name != "lm_head.weight"  # left from Qwen2-VL
        }

    def encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return {"tokens": self.tower.tokenize(_QUESTION, texts)}

    def raw_scores(self, images: Images, prompts: PromptFeatures | None) -> dict[str, Tensor]:
        assert prompts is not None
        tokens = prompts.rows("tokens")
        place = (tokens == self.reward_token).int().argmax(dim=1)
        return {"raw": self.head(self.tower(images, tokens, place, flat=True))[:, 0]}
