"""What all published rewards share: one raw number per image, its place on our scale, and the authors' file layout."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from aigiqa_reward.encoders.clip import UNUSED, VIT_H, CLIPTower, Fit, read_clip_sizes
from aigiqa_reward.models.base import FullPrecision, QualityModel
from aigiqa_reward.types import Context, Images, PromptFeatures, RewardOutput, Scores
from aigiqa_reward.utils.io import read_regular


class PublishedModel(QualityModel):
    """A published reward. Its total is `scale * raw + shift`; `details["raw"]` is the number that its paper reports."""

    needs_prompts = True
    aspect: ClassVar[Literal["quality", "correspondence"] | None] = None
    """The aspect that it judges; None if it judges both in one number."""
    scale: ClassVar[float] = 1.0
    shift: ClassVar[float] = 0.0

    @abstractmethod
    def raw_scores(self, images: Images, prompts: PromptFeatures | None) -> dict[str, Tensor]:
        """Return "raw" (B,), and other details (B, ...)."""

    @classmethod
    @abstractmethod
    def from_description(cls, description: Mapping[str, Any]) -> Self:
        """Build a model from what `describe` returned, with weights still to be loaded."""

    @classmethod
    @abstractmethod
    def read_description(cls, folder: Path | None) -> dict[str, Any]:
        """Read the authors' configuration files in a folder; the published sizes if there are none, or no folder."""

    head_file: ClassVar[str | None] = None
    """A second file of weights that may lie beside the first; its tensors get the prefix "head."."""

    @classmethod
    def rename(cls, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the tensors of the authors' file to this model's, and drop those that it does not use, by name."""
        return tensors

    def checkpoint_blocks(self) -> None:
        """Let the towers recompute their blocks in the backward pass: less memory, more time."""
        names = "activation_checkpointing_enable", "gradient_checkpointing_enable"  # transformers from 5.x, and before
        for tower in self.modules():
            if getattr(tower, "supports_gradient_checkpointing", False):  # not BLIP's text encoder, its smaller tower
                next(getattr(tower, name) for name in names if hasattr(tower, name))({"use_reentrant": False})
            elif enable := getattr(tower, "set_grad_checkpointing", None):  # open_clip
                enable()

    def forward(self, images: Images, prompts: PromptFeatures | None, context: Context | None = None) -> RewardOutput:
        del context
        details = self.raw_scores(images, prompts)
        total = details["raw"] * self.scale + self.shift
        aspects = {} if self.aspect is None else {self.aspect: total}
        return RewardOutput(total=total, **aspects, details=details)


def read_tokenizer(folder: Path | None, default: Path | None = None) -> str:
    """Read the tokenizer.json of a folder, or of `tokenizer/` in it, else the default."""
    places = [] if folder is None else [folder / "tokenizer.json", folder / "tokenizer" / "tokenizer.json"]
    file = next((place for place in places if place.is_file()), default or places[0])
    return read_regular(file, most=100_000_000).decode("utf-8")


class Cosine(FullPrecision):
    """Cosine of two embeddings (B, d), and the learned logit scale, at least in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def forward(self, first: Float[Tensor, "batch d"], second: Float[Tensor, "batch d"]) -> Scores:
        return (F.normalize(first, dim=-1) * F.normalize(second, dim=-1)).sum(dim=-1)


class CLIPReward(PublishedModel):
    """A published reward that is one CLIP model, by default the cosine of image and prompt."""

    fit: Fit = "crop"
    sizes: Mapping[str, Any] = VIT_H
    """The published sizes, as fields of `transformers.CLIPConfig`."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.tower = tower
        self.cosine = Cosine()

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> Self:
        return cls(CLIPTower(description["config"], cls.fit))

    def describe(self) -> dict[str, Any]:
        return {"config": self.tower.config}

    @classmethod
    def read_description(cls, folder: Path | None) -> dict[str, Any]:
        return {"config": read_clip_sizes(folder) or cls.sizes}

    @classmethod
    def rename(cls, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the tensors of `transformers.CLIPModel`."""
        own = {"logit_scale": "cosine.logit_scale"}
        return {own.get(name, f"tower.clip.{name}"): tensor for name, tensor in tensors.items() if name not in UNUSED}

    def encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return {"text": self.tower.encode_text(texts)}

    def raw_scores(self, images: Images, prompts: PromptFeatures | None) -> dict[str, Tensor]:
        return {"raw": self.cosines(images, prompts)}

    def cosines(self, images: Images, prompts: PromptFeatures | None) -> Scores:
        assert prompts is not None  # a reward that needs prompts refuses a call without them
        return self.cosine(self.tower.encode_image(images), prompts.rows("text"))
