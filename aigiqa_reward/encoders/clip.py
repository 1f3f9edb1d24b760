"""transformers' CLIP as the tower of published rewards: images of any size, prompts, and both naming schemes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from aigiqa_reward import images as pixels
from aigiqa_reward.encoders._text import clip_tokens
from aigiqa_reward.types import Images

if TYPE_CHECKING:
    from transformers import CLIPModel

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Channel statistics that all CLIP models share."""

UNUSED = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
"""Tensors of files by transformers before 4.31, which today's model computes."""

Fit: TypeAlias = Literal["crop", "letterbox", "squash"]
"""How an image becomes a square: its center, the whole with black bars, or the whole without its aspect ratio."""


class CLIPTower(nn.Module):
    """A `transformers.CLIPModel` without its logit scale. Embeddings are not normalized, and at least float32.

    Args:
        config: fields of `transformers.CLIPConfig`.
        fit: how an image becomes a square. "crop" is the crop of transformers, whose offset is rounded down.
    """

    def __init__(self, config: Mapping[str, Any], fit: Fit = "crop") -> None:
        super().__init__()
        import open_clip
        from transformers import CLIPConfig, CLIPModel

        self.config, self.fit = dict(config), fit
        self.clip = CLIPModel(CLIPConfig(**self.config))
        del self.clip.logit_scale  # kept at full precision by the model around
        self.window: int = self.clip.config.text_config.max_position_embeddings
        self.side: int = self.clip.config.vision_config.image_size
        self.tokenizer = open_clip.SimpleTokenizer(context_length=self.window)

    @property
    def dtype(self) -> torch.dtype:
        return self.clip.visual_projection.weight.dtype

    def square(self, images: Images) -> Float[Tensor, "batch 3 side side"]:
        """Bring images in [0, 1] to the tower's square, and normalize them."""
        if self.fit == "crop":
            images = pixels.center_crop(images, self.side)
        elif self.fit == "letterbox":
            images = pixels.letterbox(images, self.side, fill=images.new_zeros(3))
        else:
            images = pixels.resize(images, (self.side, self.side))
        return pixels.normalize(images, CLIP_MEAN, CLIP_STD).to(self.dtype)

    def encode_image(self, images: Images) -> Float[Tensor, "batch embedding"]:
        """Embed images in [0, 1] of any size."""
        found: Any = self.clip.get_image_features(pixel_values=self.square(images))  # type: ignore[arg-type]
        return _at_least_float32(getattr(found, "pooler_output", found))

    def tokenize(self, texts: Sequence[str], *, padding: int = 0) -> Int[Tensor, "texts window"]:
        """Return token ids on the tower's device; longer texts are cut with a warning and keep their end token."""
        tokens = clip_tokens(self.tokenizer, texts, tower="CLIP")
        after = tokens.argmax(dim=1, keepdim=True) < torch.arange(self.window)
        return tokens.masked_fill(after, padding).to(self.clip.visual_projection.weight.device)

    def encode_text(self, texts: Sequence[str]) -> Float[Tensor, "texts embedding"]:
        """Embed texts by the state of the end token."""
        found: Any = self.clip.get_text_features(input_ids=self.tokenize(texts))
        return _at_least_float32(getattr(found, "pooler_output", found))


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


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
