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
from aigiqa_reward.types import Images, PromptError
from aigiqa_reward.utils.io import read_json, read_regular

ARCHITECTURES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""The supported values of `model_type`."""

_CHAT = ("tokenizer.json", "tokenizer_config.json")


class QwenVL(nn.Module):
    """The model without its vocabulary's output layer.

    Args:
        config: fields of its `config.json`, `model_type` among them.
        chat: "tokenizer" (content of `tokenizer.json`) and "template" (the chat template).
        picture: "mean", "std" (3) of the channels and "least", "most" pixels of a resized image.
        special: a special token that the texts hold besides those of the tokenizer.
    """

    def __init__(
        self, config: Mapping[str, Any], chat: Mapping[str, str], picture: Mapping[str, Any], special: str | None = None
    ) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

        self.config, self.chat, self.picture = dict(config), dict(chat), dict(picture)
        if self.config.get("model_type") not in ARCHITECTURES:
            raise ValueError(f"model_type: expected one of {ARCHITECTURES}, got {self.config.get('model_type')!r}")
        sizes = AutoConfig.for_model(**self.config)
        self.model = AutoModel.from_config(sizes, attn_implementation="sdpa", dtype=torch.float32)
        vision = self.model.config.vision_config
        self.patch, self.merge, self.frames = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        self.tokenizer = Tokenizer.from_str(self.chat["tokenizer"])
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.add_special_tokens([] if special is None else [special])
        self._render = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(self.chat["tokenizer"]))
        self.image_token: int = self.model.config.image_token_id
        self._before, _ = self._read("?")

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QwenVL:
        """Move the rotary frequencies with the weights, but never round them: they stay float32."""
        exact = [(module, dict(module._buffers)) for module in self.modules()]
        super()._apply(fn, recurse)
        for module, buffers in exact:
            for name, buffer in buffers.items():
                moved = module._buffers[name]
                module._buffers[name] = None if buffer is None or moved is None else buffer.to(moved.device)
        return self

    def token(self, text: str) -> int:
        """Return the id of a text's first token."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids[0]

    def tokenize(self, texts: Sequence[str]) -> Int[Tensor, "texts length"]:
        """Return the ids that follow the image in the user's turn and the start of the answer, then -1 as padding."""
        rows = [self._read(text)[1] for text in texts]
        longest = max(len(row) for row in rows)
        return torch.tensor([row + [-1] * (longest - len(row)) for row in rows], device=self.device)

    def _read(self, text: str) -> tuple[list[int], list[int]]:
        """Return the ids before and after the image of a conversation that asks `text` about it."""
        content = [{"type": "image"}, {"type": "text", "text": text}]
        turns = [{"role": "user", "content": content}]
        written = self._render.apply_chat_template(
            turns, chat_template=self.chat["template"], tokenize=False, add_generation_prompt=True
        )
        parts = str(written).split(self.tokenizer.id_to_token(self.image_token))
        if len(parts) != 2:
            raise ValueError(f"chat_template: expected one place of an image, got {len(parts) - 1}")
        before, after = (self.tokenizer.encode(part, add_special_tokens=False).ids for part in parts)
        return before, after

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse prompts without a visible character, or with a token that steers the conversation."""
        special = [token.content for token in self.tokenizer.get_added_tokens_decoder().values() if token.special]
        for prompt in prompts:
            if not any(letter.isprintable() and not letter.isspace() for letter in prompt):
                raise PromptError(prompt)
            if found := [token for token in special if token in prompt]:
                raise ValueError(
                    f"prompts: {prompt[:60]!r} holds {found[0]!r}, a control token of the model; leave it out of the prompt"
                )

    def patches(self, images: Images) -> tuple[Float[Tensor, "patches values"], tuple[int, int]]:
        """Resize and normalize images in [0, 1] and cut them into patches; return these and an image's rows, columns."""
        size = self.patch, self.merge
        height, width = _resized(*images.shape[2:], math.prod(size), self.picture["least"], self.picture["most"])
        images = pixels.normalize(
            pixels.resize(images, (height, width)), self.picture["mean"], self.picture["std"]
        )
        rows, columns = height // self.patch, width // self.patch
        cells = images.unflatten(3, (-1, *size[::-1])).unflatten(2, (-1, *size[::-1]))
        cells = cells.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)  # groups that are merged later lie together
        cells = cells.expand(*[-1] * 6, self.frames, -1, -1)  # an image is a video of equal frames
        return cells.reshape(len(images) * rows * columns, -1), (rows, columns)

    def forward(
        self, images: Images, tokens: Int[Tensor, "batch length"], place: Int[Tensor, " batch"], *, flat: bool = False
    ) -> Float[Tensor, "batch hidden"]:
        """Return the last hidden state of one token per row, at least float32.

        Padding is on the right, where no earlier token sees it, so that rows do not depend on each other.

        Args:
            images: in [0, 1].
            tokens: rows of `tokenize`.
            place: the token's column in `tokens`.
            flat: whether positions count tokens, also within an image; else they are rows and columns there (M-RoPE).
        """
        cut = tokens[:, : int((tokens >= 0).sum(dim=1).max())].clamp_min(0)
        patches, (rows, columns) = self.patches(images)
        grid = torch.tensor([[1, rows, columns]] * len(images), device=images.device)
        rows, columns = rows // self.merge, columns // self.merge
        before = torch.tensor(self._before, device=cut.device).expand(len(cut), -1)
        image = cut.new_full((len(cut), rows * columns), self.image_token)
        ids = torch.cat([before, image, cut], dim=1)
        start = before.shape[1]
        positions = torch.arange(ids.shape[1], device=ids.device).expand(3, -1)
        if not flat:
            row, column = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
            inside = torch.stack([torch.zeros_like(row), row, column]).to(ids.device) + start
            after = positions[:, : cut.shape[1]] + start + max(rows, columns)
            positions = torch.cat([positions[:, :start], inside, after], dim=1)
        found: Any = self.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=positions[:, None].expand(-1, len(ids), -1),
            pixel_values=patches,
            image_grid_thw=grid,
            use_cache=False,
        )
        state = found.last_hidden_state[torch.arange(len(ids)), start + image.shape[1] + place]
        return state.to(torch.promote_types(state.dtype, torch.float32))


def _resized(height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """Return the nearest multiples of `factor` with `least` to `most` pixels, about at the same aspect ratio."""
    tall, wide = (max(factor, round(side / factor) * factor) for side in (height, width))
    if tall * wide > most:
        scale = math.sqrt(most / (height * width))
        return _multiple(math.floor, height * scale, factor), _multiple(math.floor, width * scale, factor)
    if tall * wide < least:
        scale = math.sqrt(least / (height * width))
        return _multiple(math.ceil, height * scale, factor), _multiple(math.ceil, width * scale, factor)
    return tall, wide


def _multiple(to: Callable[[float], int], side: float, factor: int) -> int:
    return max(factor, to(side / factor) * factor)


def rename(name: str) -> str:
    """Return the name in `QwenVL` of a tensor of the authors' files."""
    name = name.removeprefix("model.")
    return f"model.{name}" if name.startswith(("visual.", "language_model.")) else f"model.language_model.{name}"


def read_chat(folder: Path, repo: str | None = None) -> dict[str, str]:
    """Read the tokenizer and the chat template of a folder, of `tokenizer/` in it, or else of a Hub id."""
    place = next((place for place in (folder, folder / "tokenizer") if (place / _CHAT[0]).is_file()), None)
    if place is None:
        if repo is None:
            raise FileNotFoundError(f"no {_CHAT[0]} there")
        from huggingface_hub import hf_hub_download

        try:
            place = Path([hf_hub_download(repo, file) for file in _CHAT][0]).parent
        except (OSError, ValueError) as error:
            raise FileNotFoundError(f"no {_CHAT[0]} there; put it and {_CHAT[1]} of {repo} beside the weights") from error
    files = [place / name for name in ("chat_template.jinja", "chat_template.json", _CHAT[1])]
    for file in (file for file in files if file.is_file()):
        found = read_regular(file, most=1_000_000).decode() if file.suffix == ".jinja" else read_json(file)
        template = found if isinstance(found, str) else found.get("chat_template")
        if isinstance(template, str):
            tokenizer = read_regular(place / _CHAT[0], most=100_000_000).decode()
            return {"tokenizer": tokenizer, "template": template}
    raise ValueError(f"no chat template in {place}; expected chat_template.jinja, or one in {_CHAT[1]}")


def read_picture(folder: Path) -> dict[str, Any]:
    """Read what a folder says about images: `mean`, `std`, and the `least` and `most` pixels of a resized one."""
    file = folder / "preprocessor_config.json"
    found = read_json(file) if file.is_file() else read_json(folder / "processor_config.json")["image_processor"]
    size = found.get("size") or {}
    least = found.get("min_pixels") or size.get("shortest_edge") or size["min_pixels"]
    most = found.get("max_pixels") or size.get("longest_edge") or size["max_pixels"]
    return {"mean": found["image_mean"], "std": found["image_std"], "least": int(least), "most": int(most)}
