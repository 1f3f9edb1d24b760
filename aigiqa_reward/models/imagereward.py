"""ImageReward and CycleReward: BLIP's text encoder reads the prompt while it looks at the image.

Xu et al. 2023, "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation"; its raw score is
standardized on its own data, so mostly within -2 and 2. Bahng et al. 2025, "Cycle Consistency as Reward: Learning
Image-Text Alignment without Human Preferences"; its raw score is not scaled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from tokenizers import Tokenizer
from torch import Tensor, nn

from aigiqa_reward import images as pixels
from aigiqa_reward.encoders._text import read_tokens
from aigiqa_reward.encoders.blip import blip_towers
from aigiqa_reward.encoders.clip import CLIP_MEAN, CLIP_STD
from aigiqa_reward.models.base import FullPrecision
from aigiqa_reward.models.published import PublishedModel, read_tokenizer
from aigiqa_reward.types import Images, PromptFeatures, at_least_float32
from aigiqa_reward.utils.io import read_json
from aigiqa_reward.utils.weights import ASSETS

_HEAD = (1024, 128, 64, 16, 1)
_IMAGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_SIZES = {
    "vision_config": {**_IMAGE, "image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6},
    "text_config": {**_TEXT, "encoder_hidden_size": 1024, "vocab_size": 30524, "layer_norm_eps": 1e-12},
}
_UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
_VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


class ImageReward(PublishedModel):
    """ImageReward v1.0; the total is (raw + 2) / 4."""

    name = "imagereward"
    scale, shift = 1 / 4, 1 / 2
    window: ClassVar[int] = 35
    activation: ClassVar[type[nn.Module] | None] = None
    mean: ClassVar[float] = 0.16717362830052426
    std: ClassVar[float] = 1.0333394966054072

    def __init__(self, config: Mapping[str, Any], tokenizer: str) -> None:
        super().__init__()
        self.config, self.tokenizer_json = dict(config), tokenizer
        self.vision, self.text = blip_towers(config["vision_config"], config["text_config"])
        self.mlp = _MLP(config["text_config"]["hidden_size"], self.activation)
        self.tokenizer = Tokenizer.from_str(tokenizer)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.image_size: int = config["vision_config"]["image_size"]

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> Self:
        return cls(description["config"], description["tokenizer"])

    def describe(self) -> dict[str, Any]:
        return {"config": self.config, "tokenizer": self.tokenizer_json}

    @classmethod
    def read_description(cls, folder: Path | None) -> dict[str, Any]:
        """Read the sizes; the tokenizer is BERT's uncased one, which is embedded, unless another lies in the folder."""
        file = None if folder is None else folder / "config.json"
        found = read_json(file) if file is not None and file.is_file() else _SIZES
        tokenizer = read_tokenizer(folder, default=ASSETS / "towers" / "tokenizer.json")
        return {"config": {key: found[key] for key in _SIZES}, "tokenizer": tokenizer}

    @classmethod
    def rename(cls, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {_renamed(name): tensor for name, tensor in tensors.items() if not name.startswith(_UNUSED)}

    def encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        ids, mask = read_tokens(self.tokenizer, texts, self.window, tower="BLIP", argument="prompts")
        device = self.text.embeddings.word_embeddings.weight.device
        room = (0, self.window - ids.shape[1])
        return {name: nn.functional.pad(t, room).to(device) for name, t in (("ids", ids), ("mask", mask.long()))}

    def raw_scores(self, images: Images, prompts: PromptFeatures | None) -> dict[str, Tensor]:
        assert prompts is not None
        square = pixels.normalize(pixels.center_crop(images, self.image_size, nearest=True), CLIP_MEAN, CLIP_STD)
        weight = self.text.embeddings.word_embeddings.weight
        seen = self.vision(pixel_values=square.to(weight.dtype)).last_hidden_state
        states = self.text(
            input_ids=prompts.rows("ids"), attention_mask=prompts.rows("mask"), encoder_hidden_states=seen
        ).last_hidden_state
        return {"raw": (self.mlp(states[:, 0]) - self.mean) / self.std}


class CycleReward(ImageReward):
    """CycleReward-Combo; the total is raw."""

    name = "cyclereward"
    scale, shift = 1.0, 0.0
    window = 128
    activation = nn.GELU
    mean, std = 0.0, 1.0


class _MLP(FullPrecision):
    """Five linear layers, whose names are their places among the published activations or dropouts."""

    def __init__(self, width: int, activation: type[nn.Module] | None) -> None:
        super().__init__()
        places = (0, 2, 4, 6, 7) if activation is None else (0, 2, 4, 6, 8)
        widths = zip((width, *_HEAD[:-1]), _HEAD, strict=True)
        self.layers = nn.ModuleDict({str(p): nn.Linear(*sizes) for p, sizes in zip(places, widths, strict=True)})
        self.between = nn.Identity() if activation is None else activation()

    def forward(self, states: Tensor) -> Tensor:
        first, *others = self.layers.values()
        states = first(at_least_float32(states))
        for layer in others:
            states = layer(self.between(states))
        return states[:, 0]


def _renamed(name: str) -> str:
    """Return our name of a tensor of the authors' file; unknown names stay, and are refused."""
    if name.startswith("blip.text_encoder."):
        return name.replace("blip.text_encoder.", "text.", 1)
    own = name.removeprefix("blip.visual_encoder.")
    if own == name:
        return name
    if found := re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", own):
        block, part, kind = found.groups()
        return f"vision.encoder.layers.{block}.{_BLOCK.get(part, part)}.{kind}"
    if own in _VISION:
        return f"vision.{_VISION[own]}"
    module, _, kind = own.rpartition(".")
    return f"vision.{_VISION.get(module, module)}.{kind}"
