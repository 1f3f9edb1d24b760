"""VQAScore: the probability that a multimodal model answers "Yes" when asked whether an image shows its prompt.

Lin et al. 2024, "Evaluating Text-to-Visual Generation with Image-to-Text Generation"; with Qwen2.5-VL and Qwen3-VL as
the authors' library t2v_metrics asks them. The raw score is the softmax of the plain logits over the whole vocabulary:
a `repetition_penalty` in a generation_config.json, which changes the authors' numbers, is not applied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aigiqa_reward.encoders.qwen_vl import QwenVL, read_chat, read_picture, rename
from aigiqa_reward.models.published import PublishedModel
from aigiqa_reward.types import Images, PromptFeatures
from aigiqa_reward.utils.io import read_json

_QUESTION = 'Does this figure show "{}"? Please answer Yes or No.'
_ROWS = 2**14  # of the vocabulary that are in float32 at a time


class VQAScore(PublishedModel):
    """VQAScore by a Qwen2.5-VL or Qwen3-VL; the total is P("Yes").

    `details["log_odds"]` is log P("Yes") - log P("No"), whose gradient does not vanish where P("Yes") is near 0 or 1.
    """

    name = "vqascore"
    aspect = "correspondence"

    def __init__(self, tower: QwenVL) -> None:
        super().__init__()
        self.tower = tower
        words = tower.model.get_input_embeddings().weight
        tied = tower.model.config.tie_word_embeddings
        self.head = None if tied else nn.Linear(*reversed(words.shape), bias=False)
        self.yes, self.no = tower.token("Yes"), tower.token("No")

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> Self:
        return cls(QwenVL(description["config"], description["chat"], description["picture"]))

    def describe(self) -> dict[str, Any]:
        return {"config": self.tower.config, "chat": self.tower.chat, "picture": self.tower.picture}

    @classmethod
    def read_description(cls, folder: Path | None) -> dict[str, Any]:
        if folder is None:
            return {}
        config = read_json(folder / "config.json")
        return {"config": config, "chat": read_chat(folder), "picture": read_picture(folder)}

    @classmethod
    def rename(cls, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        own = {"lm_head.weight": "head.weight"}
        found = {own.get(name, f"tower.{rename(name)}"): tensor for name, tensor in tensors.items()}
        head, words = (found.get(name) for name in ("head.weight", "tower.model.language_model.embed_tokens.weight"))
        if head is not None and words is not None and head.dtype == words.dtype and torch.equal(head, words):
            del found["head.weight"]  # some files of models whose input and output layer are one hold it twice
        return found

    def encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return {"tokens": self.tower.tokenize(_QUESTION, texts)}

    def raw_scores(self, images: Images, prompts: PromptFeatures | None) -> dict[str, Tensor]:
        assert prompts is not None
        tokens = prompts.rows("tokens")
        state = self.tower(images, tokens, (tokens >= 0).sum(dim=1) - 1)
        words = (self.tower.model.get_input_embeddings() if self.head is None else self.head).weight
        parts = [checkpoint(_logits, state, rows, use_reentrant=False) for rows in words.split(_ROWS)]
        logits = torch.cat(parts, dim=1)
        odds = logits[:, self.yes] - logits[:, self.no]
        return {"raw": logits.softmax(dim=1)[:, self.yes], "log_odds": odds}


def _logits(state: Tensor, rows: Tensor) -> Tensor:
    """Logits of some tokens, at least in float32; their weights are converted again for the backward pass."""
    return state @ rows.to(state.dtype).T
