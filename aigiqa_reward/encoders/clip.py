"""transformers' CLIP as the tower of published rewards: images of any size, prompts, and both naming schemes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from aigiqa_reward import images as pixels
from aigiqa_reward.encoders._text import clip_tokens
from aigiqa_reward.types import Images, at_least_float32
from aigiqa_reward.utils.io import read_json

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Channel statistics that all CLIP models share."""

_VISION_H = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
_TEXT_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_VISION_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_TEXT_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}


def _sizes(vision: dict[str, int], text: dict[str, int], projection: int, act: str) -> dict[str, Any]:
    return {
        "projection_dim": projection,
        "vision_config": {**vision, "image_size": 224, "patch_size": 14, "hidden_act": act},
        "text_config": {**text, "hidden_act": act, "eos_token_id": 2},
    }


VIT_H = _sizes(_VISION_H, _TEXT_H, 1024, "gelu")
"""laion/CLIP-ViT-H-14-laion2B-s32B-b79K, as fields of `transformers.CLIPConfig`."""

VIT_L = _sizes(_VISION_L, _TEXT_L, 768, "quick_gelu")
"""openai/clip-vit-large-patch14, likewise."""

UNUSED = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
"""Tensors of files by transformers before 4.31, which today's model computes."""

Fit: TypeAlias = Literal["crop", "torchvision crop", "letterbox"]
"""How an image becomes a square: its center, by transformers or torchvision (half a pixel apart), or black bars."""


class CLIPTower(nn.Module):
    """A `transformers.CLIPModel` without its logit scale. Embeddings are not normalized, and at least float32.

    Args:
        config: fields of `transformers.CLIPConfig`.
        fit: how an image becomes a square.
    """

    def __init__(self, config: Mapping[str, Any], fit: Fit = "crop") -> None:
        super().__init__()
        import open_clip
        from transformers import CLIPConfig, CLIPModel

        self.config, self.fit = dict(config), fit
        self.clip: Any = CLIPModel(CLIPConfig(**self.config))
        del self.clip.logit_scale  # kept at full precision by the model around
        self.window: int = self.clip.config.text_config.max_position_embeddings
        self.image_size: int = self.clip.config.vision_config.image_size
        self.tokenizer = open_clip.SimpleTokenizer(context_length=self.window)

    @property
    def dtype(self) -> torch.dtype:
        return self.clip.visual_projection.weight.dtype

    def square(self, images: Images) -> Float[Tensor, "batch 3 side side"]:
        """Bring images in [0, 1] to the tower's square, and normalize them."""
        if self.fit == "letterbox":
            images = pixels.letterbox(images, self.image_size, fill=images.new_zeros(3))
        else:
            images = pixels.center_crop(images, self.image_size, nearest=self.fit == "torchvision crop")
        return pixels.normalize(images, CLIP_MEAN, CLIP_STD).to(self.dtype)

    def encode_image(self, images: Images) -> Float[Tensor, "batch embedding"]:
        """Embed images in [0, 1] of any size."""
        return pooled(self.clip.get_image_features(pixel_values=self.square(images)))

    def tokenize(self, texts: Sequence[str], *, padding: int = 0) -> Int[Tensor, "texts window"]:
        """Return token ids on the tower's device; longer texts are cut with a warning and keep their end token."""
        tokens = clip_tokens(self.tokenizer, texts, tower="CLIP")
        after = tokens.argmax(dim=1, keepdim=True) < torch.arange(self.window)
        return tokens.masked_fill(after, padding).to(self.clip.visual_projection.weight.device)

    def encode_text(self, texts: Sequence[str]) -> Float[Tensor, "texts embedding"]:
        """Embed texts by the state of the end token."""
        return pooled(self.clip.get_text_features(input_ids=self.tokenize(texts)))


def read_clip_sizes(folder: Path | None) -> dict[str, Any] | None:
    """Read the fields of `transformers.CLIPConfig` in a folder's config.json or open_clip_config.json; None without."""
    files = [] if folder is None else [folder / "config.json", folder / "open_clip_config.json"]
    for file in files:
        if file.is_file():
            found = read_json(file)
            if "model_cfg" in found:
                return _from_model_cfg(found["model_cfg"])
            if (kind := found.get("model_type", "clip")) != "clip":
                raise ValueError(f"{file.name}: expected model_type 'clip', CLIP's own towers, got {kind!r}")
            return {key: found[key] for key in ("projection_dim", "text_config", "vision_config")}
    return None


_MODEL_CFG = {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"}
_VISION_CFG = {"image_size", "patch_size", "layers", "width", "head_width", "mlp_ratio"}
_TEXT_CFG = {"context_length", "vocab_size", "layers", "width", "heads", "mlp_ratio"}
"""The fields of open_clip's description that are translated; any other describes another architecture."""


def _from_model_cfg(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Translate open_clip's description of a model with a plain text and vision transformer."""
    vision, text = sizes["vision_cfg"], sizes["text_cfg"]
    for part, known in (("model_cfg", _MODEL_CFG), ("vision_cfg", _VISION_CFG), ("text_cfg", _TEXT_CFG)):
        found = sizes if part == "model_cfg" else sizes[part]
        if other := sorted(set(found) - known):
            expected = "expected a CLIP with its own text and vision transformer"
            raise ValueError(f"{part}: {expected}, got {', '.join(other)}")
    act = "quick_gelu" if sizes.get("quick_gelu") else "gelu"

    def tower(cfg: Mapping[str, Any], heads: int) -> dict[str, Any]:
        width = cfg["width"]
        found = {"hidden_size": width, "intermediate_size": int(width * cfg.get("mlp_ratio", 4)), "hidden_act": act}
        return {**found, "num_hidden_layers": cfg["layers"], "num_attention_heads": heads}

    image = {"image_size": vision["image_size"], "patch_size": vision["patch_size"]}
    words = {"max_position_embeddings": text.get("context_length", 77), "vocab_size": text.get("vocab_size", 49408)}
    return {
        "projection_dim": sizes["embed_dim"],
        "vision_config": {**tower(vision, vision["width"] // vision.get("head_width", 64)), **image},
        "text_config": {**tower(text, text["heads"]), **words, "eos_token_id": 2},
    }


def from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of an open_clip model with a text transformer to those of `transformers.CLIPModel`."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name == "attn_mask":  # a constant
            continue
        if name in ("text_projection", "visual.proj"):
            found[("text" if name == "text_projection" else "visual") + "_projection.weight"] = tensor.T.contiguous()
            continue
        tower = "vision_model" if name.startswith("visual.") else "text_model"
        own = name.removeprefix("visual.")
        if own.startswith("transformer.resblocks."):
            layer, part = own.removeprefix("transformer.resblocks.").split(".", 1)
            prefix = f"{tower}.encoder.layers.{layer}."
            if part.startswith("attn.in_proj_"):
                kind = part.removeprefix("attn.in_proj_")
                for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                    found[f"{prefix}self_attn.{letter}_proj.{kind}"] = third.contiguous()
                continue
            module, kind = part.rsplit(".", 1)
            found[f"{prefix}{_BLOCK.get(module, module)}.{kind}"] = tensor
        else:
            module, _, kind = own.rpartition(".")
            known = _VISION if tower == "vision_model" else _TEXT
            found[known.get(own) or (f"{known[module]}.{kind}" if module in known else name)] = tensor
    return found


_BLOCK = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TEXT = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding": "text_model.embeddings.token_embedding",
    "ln_final": "text_model.final_layer_norm",
}
_VISION = {
    "class_embedding": "vision_model.embeddings.class_embedding",
    "conv1": "vision_model.embeddings.patch_embedding",
    "positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "ln_pre": "vision_model.pre_layrnorm",  # transformers' own spelling
    "ln_post": "vision_model.post_layernorm",
}


def pooled(found: Any) -> Tensor:
    """Return the embedding among a tower's outputs, all of which transformers 5 returns, at least in float32."""
    return at_least_float32(getattr(found, "pooler_output", found))
