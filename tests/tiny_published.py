"""Tiny published rewards of the real classes with random weights; no downloads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_language_models import CHAT, qwen_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from aigiqa_reward import Reward
from aigiqa_reward.models.mps import CONDITION
from aigiqa_reward.rewards.factory import get_reward_spec
from aigiqa_reward.rewards.published import PUBLISHED
from aigiqa_reward.utils.weights import ASSETS

_IMAGE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
_TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_CLIP = {"projection_dim": 16, "vision_config": _IMAGE, "text_config": {**_TEXT, "eos_token_id": 2}}


def _words() -> str:
    """A tokenizer of whole words that ends texts with one token, as SigLIP's does."""
    words = "a red apple on table castle in the clouds oil painting two cats fox , blue car"
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *words.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return tokenizer.to_str()


_BLIP = {
    "config": {
        "vision_config": {**_IMAGE, "layer_norm_eps": 1e-6},
        "text_config": {**_TEXT, "encoder_hidden_size": 32, "vocab_size": 30524, "layer_norm_eps": 1e-12},
    },
    "tokenizer": (ASSETS / "towers" / "tokenizer.json").read_text(encoding="utf-8"),
}
_CROSS = {"dim": 16, "layer_num": 2, "dim_head": 8, "heads": 2, "ff_mult": 4}

DESCRIPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"config": _CLIP} for name in ("pickscore", "hpsv2.1", "hpsv2", "laion_aesthetic")},
    "clipscore": {"config": _CLIP, "prefix": "A photo depicts "},
    "mps": {"config": _CLIP, "cross_model": _CROSS, "condition": CONDITION},
    "siglip2": {
        "config": {
            "vision_config": _IMAGE,
            "text_config": {**_TEXT, "vocab_size": 32, "projection_size": 32, "max_position_embeddings": 64},
        },
        "tokenizer": _words(),
    },
    "imagereward": _BLIP,
    "cyclereward": _BLIP,
}
"""What `describe` returns for a tiny model, by the reward's name."""


def _qwen() -> tuple[dict[str, str], dict[str, Any]]:
    """The tokenizer and chat template of a tiny Qwen2-VL, and the fields of its configuration."""
    tokenizer = qwen_tokenizer()
    special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    tokens = dict(zip(names, tokenizer.convert_tokens_to_ids(special), strict=True))
    rope = {"type": "mrope", "mrope_section": [1, 1, 2]}
    text = {**_TEXT, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "rope_scaling": rope}
    sizes = {"tie_word_embeddings": False, "rope_theta": 1e6, "vocab_size": len(tokenizer) + 1}  # with <|Reward|>
    chat = {"tokenizer": tokenizer.backend_tokenizer.to_str(), "template": CHAT}
    return chat, {**text, **tokens, **sizes}


_CHAT, _QWEN = _qwen()
_SEES = {"depth": 2, "hidden_size": 32, "num_heads": 2}
_QWEN_2_5 = {**_SEES, "intermediate_size": 32, "out_hidden_size": 32, "patch_size": 8, "fullatt_block_indexes": [1]}
DESCRIPTIONS |= {
    "vqascore": {
        "config": {"model_type": "qwen2_5_vl", **_QWEN, "vision_config": {**_QWEN_2_5, "window_size": 32}},
        "chat": _CHAT,
        "picture": {"mean": [0.5] * 3, "std": [0.3] * 3, "least": 1024, "most": 4096},
    },
    "hpsv3": {
        "config": {
            "model_type": "qwen2_vl",
            **_QWEN,
            "vision_config": {**_SEES, "embed_dim": 32, "mlp_ratio": 2, "patch_size": 8},
            "hpsv3": {"min_pixels": 4096, "max_pixels": 4096},
        },
        "chat": _CHAT,
    },
}


def tiny_published(name: str, seed: int = 0, dtype: torch.dtype | None = None) -> Reward:
    """A published reward of the real class with tiny random weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        model = PUBLISHED[name].model.from_description(DESCRIPTIONS[name])
    for parameter in model.parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.1 * drawn if parameter.ndim < 2 else 0.2 * drawn
    return Reward(model, get_reward_spec(name)).to(dtype)


def tensors_of_clip() -> dict[str, Tensor]:
    """The tensors of a tiny PickScore by the authors' names."""
    own = tiny_published("pickscore").model.state_dict()
    names = {"cosine.logit_scale": "logit_scale"}
    return {names.get(name, name.removeprefix("tower.clip.")): tensor for name, tensor in own.items()}


def write_pickscore(folder: Path) -> Path:
    """Write a tiny PickScore in the authors' layout."""
    folder.mkdir(parents=True, exist_ok=True)
    counters = {f"{tower}_model.embeddings.position_ids": torch.arange(16)[None] for tower in ("text", "vision")}
    save_file(tensors_of_clip() | counters, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(DESCRIPTIONS["pickscore"]["config"]))
    return folder
