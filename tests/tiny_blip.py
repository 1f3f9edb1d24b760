"""A tiny BLIP with random weights, as a folder of transformers: 32 px, 2 layers a tower, no downloads."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import BertTokenizerFast, BlipConfig, BlipForImageTextRetrieval

from aigiqa_reward.encoders.compact import TOWERS

_SPREAD = 0.2
"""Deviation of the weights drawn. transformers draws vision towers at 1e-10, which says the same of every image."""

TEXT = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


def write_tiny_blip(folder: Path, seed: int, **text: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = Tokenizer.from_file(str(TOWERS / "tokenizer.json")).get_vocab()
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    config = BlipConfig(
        text_config={**TEXT, "vocab_size": len(vocabulary) + 2, "initializer_range": _SPREAD, **text},
        vision_config={**VISION, "initializer_range": _SPREAD},
        image_text_hidden_size=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        model = BlipForImageTextRetrieval(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
