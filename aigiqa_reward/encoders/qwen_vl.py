"""transformers' Qwen2-VL, Qwen2.5-VL and Qwen3-VL: one image of any size and one text, differentiable in the pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from torch import Tensor, nn

from aigiqa_reward import images as pixels
from aigiqa_reward.types import Images, PromptError, at_least_float32
from aigiqa_reward.utils.io import read_json, read_regular

ARCHITECTURES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""The supported values of `model_type`."""

CHAT_FILES = ("tokenizer.json", "tokenizer_config.json")


class QwenVL(nn.Module):
    """The model without its vocabulary's output layer.

    Args:
        config: fields of its `config.json`, `model_type` among them.
        chat: "tokenizer" (content of `tokenizer.json`) and "template" (the chat template).
        picture: "mean", "std" (3) of the channels and "least", "most" pixels of a resized image.
        special: a special token of the texts that the tokenizer lacks.
    """

    def __init__(
        self, config: Mapping[str, Any], chat: Mapping[str, str], picture: Mapping[str, Any], special: str | None = None
    ) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

        self.config, self.chat, self.picture = dict(config), dict(chat), dict(picture)
        if (kind := self.config.get("model_type")) not in ARCHITECTURES:
            raise ValueError(f"model_type: expected one of {', '.join(ARCHITECTURES)}, got {kind!r}")
        sizes = AutoConfig.for_model(**self.config)
        self.model = AutoModel.from_config(sizes, attn_implementation="sdpa", dtype=torch.float32)
        vision = sizes.vision_config
        self.patch, self.merge, self.frames = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        self.tokenizer = Tokenizer.from_str(self.chat["tokenizer"])
        self._render = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(self.chat["tokenizer"]))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.add_special_tokens([] if special is None else [special])
        self.special = [token.content for token in self.tokenizer.get_added_tokens_decoder().values() if token.special]
        self.image_token: int = sizes.image_token_id
        self._before, _ = self._read("?")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QwenVL:
        """Move the rotary frequencies with the weights, but never round them: they stay float32."""
        exact = [(module._buffers, name, b) for module in self.modules() for name, b in module._buffers.items()]
        super()._apply(fn, recurse)
        for buffers, name, buffer in exact:
            if buffer is not None:
                buffers[name] = buffer.to(fn(buffer).device)
        return self

    def token(self, text: str) -> int:
        """Return the id of a text's first token."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids[0]

    def tokenize(self, question: str, prompts: Sequence[str]) -> Int[Tensor, "prompts length"]:
        """Return the ids that follow the image when `question` with a prompt in {} is asked, and -1 as padding."""
        for prompt in prompts:
            if not any(letter.isprintable() and not letter.isspace() for letter in prompt):
                raise PromptError(prompt)
            if found := next((token for token in self.special if token in prompt), None):
                raise ValueError(f"prompts: {prompt[:60]!r} holds {found!r}, a control token of the model; remove it")
        rows = [self._read(question.format(prompt))[1] for prompt in prompts]
        longest = max(len(row) for row in rows)
        device = self.model.get_input_embeddings().weight.device
        return torch.tensor([row + [-1] * (longest - len(row)) for row in rows], device=device)

    def _read(self, text: str) -> tuple[list[int], list[int]]:
        """Return the ids before and after the image of a conversation that asks `text` about it."""
        turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        written = self._render.apply_chat_template(
            turns, chat_template=self.chat["template"], tokenize=False, add_generation_prompt=True
        )
        parts = str(written).split(self.tokenizer.id_to_token(self.image_token))
        if len(parts) != 2:
            raise ValueError(f"chat_template: expected it to place one image, got {len(parts) - 1}")
        before, after = (self.tokenizer.encode(part, add_special_tokens=False).ids for part in parts)
        return before, after

    def patches(self, images: Images) -> tuple[Float[Tensor, "patches values"], int, int]:
        """Resize and normalize images in [0, 1], and cut them into patches, rows x columns of each image."""
        limits: tuple[int, int] = self.picture["least"], self.picture["most"]
        size = _resized(images.shape[2], images.shape[3], self.patch * self.merge, *limits)
        images = pixels.normalize(pixels.resize(images, size), self.picture["mean"], self.picture["std"])
        cells = images.unflatten(3, (-1, self.merge, self.patch)).unflatten(2, (-1, self.merge, self.patch))
        cells = cells.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)  # patches that are merged later are neighbors
        cells = cells.expand(*[-1] * 6, self.frames, -1, -1)  # to the model, a video of equal frames
        return cells.flatten(5).flatten(0, 4), size[0] // self.patch, size[1] // self.patch

    def forward(
        self, images: Images, tokens: Int[Tensor, "batch length"], place: Int[Tensor, " batch"], *, flat: bool = False
    ) -> Float[Tensor, "batch hidden"]:
        """Return the last hidden state of one token per row, at least float32.

        Padding is on the right, where a causal model's earlier tokens do not see it: rows do not depend on each other.

        Args:
            images: in [0, 1].
            tokens: rows of `tokenize`.
            place: the token's column in `tokens`.
            flat: whether positions count tokens within an image too; else they are rows and columns there (M-RoPE).
        """
        patches, rows, columns = self.patches(images)
        grid = torch.tensor([[1, rows, columns]] * len(images), device=images.device)
        rows, columns = rows // self.merge, columns // self.merge
        after = tokens[:, : int((tokens >= 0).sum(dim=1).max())].clamp_min(0)
        before = torch.tensor(self._before, device=after.device).expand(len(after), -1)
        image = after.new_full((len(after), rows * columns), self.image_token)
        ids, start = torch.cat([before, image, after], dim=1), before.shape[1]
        positions = torch.arange(ids.shape[1], device=ids.device).expand(3, -1)
        if not flat:
            row, column = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
            inside = torch.stack([torch.zeros_like(row), row, column]).to(ids.device) + start
            rest = positions[:, : after.shape[1]] + start + max(rows, columns)
            positions = torch.cat([positions[:, :start], inside, rest], dim=1)
        found: Any = self.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=positions[:, None].expand(-1, len(ids), -1),
            pixel_values=patches,
            image_grid_thw=grid,
            use_cache=False,
        )
        state = found.last_hidden_state[torch.arange(len(ids)), start + image.shape[1] + place]
        return at_least_float32(state)


def _resized(height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """Return the nearest multiples of `factor` with `least` to `most` pixels, at about the same aspect ratio."""
    tall, wide = (max(factor, round(side / factor) * factor) for side in (height, width))
    if tall * wide > most:
        scale = math.sqrt(height * width / most)  # in the authors' order: the last bit decides some sizes
        tall, wide = (max(factor, math.floor(side / scale / factor) * factor) for side in (height, width))
    elif tall * wide < least:
        scale = math.sqrt(least / (height * width))
        tall, wide = (math.ceil(side * scale / factor) * factor for side in (height, width))
    return tall, wide


def rename(name: str) -> str:
    """Return the name in `QwenVL` of a tensor of the authors' files."""
    name = name.removeprefix("model.")
    return f"model.{name}" if name.startswith(("visual.", "language_model.")) else f"model.language_model.{name}"


def read_chat(folder: Path, repo: str | None = None) -> dict[str, str]:
    """Read the tokenizer and the chat template of a folder, of `tokenizer/` in it, or else of a Hub id."""
    place = next((place for place in (folder, folder / "tokenizer") if (place / CHAT_FILES[0]).is_file()), folder)
    if not (place / CHAT_FILES[0]).is_file() and repo is not None:
        from huggingface_hub import hf_hub_download

        try:
            place = [Path(hf_hub_download(repo, file)) for file in CHAT_FILES][-1].parent
        except (OSError, ValueError) as error:
            raise FileNotFoundError(f"put {' and '.join(CHAT_FILES)} of {repo} beside the weights") from error
    tokenizer = read_regular(place / CHAT_FILES[0], most=100_000_000).decode()
    files = [place / name for name in ("chat_template.jinja", "chat_template.json", CHAT_FILES[1])]
    for file in (file for file in files if file.is_file()):
        jinja = file.suffix == ".jinja"
        template = read_regular(file, most=1_000_000).decode() if jinja else read_json(file).get("chat_template")
        if isinstance(template, str):
            return {"tokenizer": tokenizer, "template": template}
    raise ValueError(f"no chat template in {place}; expected one in chat_template.jinja or {CHAT_FILES[1]}")


def read_picture(folder: Path) -> dict[str, Any]:
    """Read what a folder says about images: `mean`, `std`, and the `least` and `most` pixels of a resized one."""
    file = folder / "preprocessor_config.json"
    found = read_json(file) if file.is_file() else read_json(folder / "processor_config.json")["image_processor"]
    size = found.get("size") or {}
    least = found.get("min_pixels") or size.get("shortest_edge") or size["min_pixels"]
    most = found.get("max_pixels") or size.get("longest_edge") or size["max_pixels"]
    return {"mean": found["image_mean"], "std": found["image_std"], "least": int(least), "most": int(most)}
