"""Plain numpy of what networks are made of, for second implementations, and heads that are not at their start."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from clip_models import write_tiny_clip
from scipy.special import softmax
from torch import Tensor, nn

from aigiqa_reward.encoders.open_clip import OpenCLIPConfig, OpenCLIPEncoder
from aigiqa_reward.models.blocks import CrossAttention

Module = TypeVar("Module", bound=nn.Module)


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def linear(layer: nn.Module, x: np.ndarray) -> np.ndarray:
    """W x + b along the last dimension; a 1 x 1 convolution's W too."""
    weight = array(layer.weight)
    y = x @ weight.reshape(len(weight), -1).T
    return y if layer.bias is None else y + array(layer.bias)


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()))


def attend(query: np.ndarray, key: np.ndarray, value: np.ndarray, heads: int) -> np.ndarray:
    """softmax(Q K' / sqrt(w)) V, one head after another: (Q, w), (L, w), (L, w) to (Q, w)."""
    parts = zip(*(np.split(part, heads, axis=-1) for part in (query, key, value)), strict=True)
    return np.concatenate([softmax(q @ k.T / np.sqrt(q.shape[-1]), axis=-1) @ v for q, k, v in parts], axis=-1)


def cross_attend(module: CrossAttention, queries: np.ndarray, memory: np.ndarray) -> np.ndarray:
    """`CrossAttention` on one row without padding: (Q, w) and (L, m) to (Q, w)."""
    inner = module.attention
    if inner.in_proj_weight is None:
        weights = [array(w) for w in (inner.q_proj_weight, inner.k_proj_weight, inner.v_proj_weight)]
    else:
        weights = np.split(array(inner.in_proj_weight), 3)
    biases = np.split(array(inner.in_proj_bias), 3)
    parts = [x @ w.T + b for x, w, b in zip((queries, memory, memory), weights, biases, strict=True)]
    return linear(inner.out_proj, attend(*parts, inner.num_heads))


def stir(module: Module, seed: int = 0) -> Module:
    """Move every parameter away from its start, zeros and identities included, and return the module."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 4
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((noise * 0.5 / fan**0.5).to(parameter))
    return module


def draw(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Float64 images whose blocks of 4 px and grain differ from image to image, in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, -(-height // 4), -(-width // 4), generator=generator, dtype=torch.float64)
    blocks = coarse.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)[:, :, :height, :width]
    return 0.8 * blocks + 0.2 * torch.rand(count, 3, height, width, generator=generator, dtype=torch.float64)


def tiny_clip(folder: Path, seed: int = 0) -> OpenCLIPEncoder:
    """A frozen CLIP of 32 px, in float64."""
    encoder = OpenCLIPEncoder(OpenCLIPConfig(architecture=f"local-dir:{write_tiny_clip(folder, seed)}"))
    return encoder.requires_grad_(False).eval().double()
