"""A tiny open_clip model with random weights, as a folder: 32 px, 2 layers a tower, no downloads.

The layers that carry content from pixels and tokens to the pooled token are scaled up, so that outputs differ between
inputs.
"""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file

CONFIG = {
    "model_cfg": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]},
}
"""What open_clip_config.json says; the mean and deviation are OpenAI CLIP's."""


def write_tiny_clip(folder: Path, seed: int) -> Path:
    """Write `open_clip_config.json` and `open_clip_model.safetensors`; `local-dir:FOLDER` is the model's name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.random.default_generator.manual_seed(seed)
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
        _turn_up(model)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors")
    return folder


def _turn_up(model: torch.nn.Module) -> None:
    """Let content outweigh what is alike for all inputs: the class token, the places, the layers' own bias."""
    visual = model.visual
    visual.class_embedding.mul_(0.1)
    visual.conv1.weight.mul_(4)
    model.token_embedding.weight.mul_(50)
    for block in (*visual.transformer.resblocks, *model.transformer.resblocks):
        block.attn.in_proj_weight.mul_(2)
        block.attn.out_proj.weight.mul_(3)
