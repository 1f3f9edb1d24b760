"""The reward users hold: one model with its calibration, or several combined. Differentiable in the pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelHubMixin
from torch import Tensor, nn

from aigiqa_reward import images as pixels
from aigiqa_reward.models.base import (
    FullPrecision,
    ModelSpec,
    QualityModel,
    check_context,
    check_prompts,
    warn_ignored_context,
)
from aigiqa_reward.rewards.reward_fn import RewardFn
from aigiqa_reward.types import Context, PromptFeatures, RewardOutput

_CARD = """---
library_name: aigiqa-reward
tags: [image-quality-assessment, reward-model, text-to-image]
---

# {spec.title}

A reward for AI-generated images, saved by the Python package aigiqa-reward.

| | |
| --- | --- |
| model | {spec.paper} |
| scale | {spec.scale} |
| sees | {spec.input_size} |
| gradients | {spec.gradient_path} |
| license of the code, and of the weights that it came with | {spec.license} |

```python
from aigiqa_reward import create_reward

reward = create_reward("{spec.name}", weights="...")  # this folder, or its id on the Hub
scores = reward(images, prompts)  # images (B, 3, H, W) in [0, 1], B prompts
```

If it was trained further: say here on whose scores, of which images and prompts, and
under which license you pass it on.
"""
"""Without the numbers of any training: those are known to whoever trained it."""


class Calibration(FullPrecision):
    """An affine map of each raw score onto [0, 1], where 1 is the best human score of the training benchmark."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("quality", torch.tensor([1.0, 0.0]))
        self.register_buffer("correspondence", torch.tensor([1.0, 0.0]))
        self.quality: Tensor
        self.correspondence: Tensor

    def forward(self, raw: Tensor, aspect: str) -> Tensor:
        """Scale and shift; never clamps."""
        scale, shift = getattr(self, aspect).to(raw)
        return raw * scale + shift


class Reward(nn.Module, ModelHubMixin):
    """A quality model as a reward function: `reward(images, prompts) -> RewardOutput`.

    The weights are frozen, gradients are not: `reward(images, prompts).total.sum().backward()` fills `images.grad`. The
    module stays in evaluation mode whatever `train()` is called with, so that a trainer around it cannot change scores.

    Args:
        model: the model.
        spec: its entry in the zoo.
        quality_weight: share of quality in `total`, when there are prompts.
        correspondence_weight: share of correspondence in `total`.

    Example:
        >>> import torch
        >>> from aigiqa_reward import Reward, create_reward
        >>> reward: Reward = create_reward("compact")
        >>> images = torch.rand(2, 3, 64, 64, requires_grad=True)
        >>> out = reward(images, ["a fox", "a cat"])
        >>> out.total.sum().backward()
        >>> images.grad.shape
        torch.Size([2, 3, 64, 64])
        >>> features = reward.encode_prompts(["a fox"])  # once, for many batches
        >>> reward(images, features.expand(2)).correspondence.shape
        torch.Size([2])
        >>> assisted = create_reward("cpa_iqa")
        >>> context = assisted.prepare(images, ["a fox", "a cat"])  # what its assistants say, held fixed in gradients
        >>> assisted(images, ["a fox", "a cat"], context=context).quality.shape
        torch.Size([2])
    """

    def __init__(
        self,
        model: QualityModel,
        spec: ModelSpec,
        *,
        quality_weight: float = 0.5,
        correspondence_weight: float = 0.5,
    ) -> None:
        super().__init__()
        check_aspect_weights(quality_weight, correspondence_weight)
        self.model = model
        self.spec = spec
        self.calibration = Calibration()
        self.quality_weight = quality_weight
        self.correspondence_weight = correspondence_weight
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Reward:
        """Stay in evaluation mode: a reward that drops units or updates statistics would not be one function."""
        del mode
        return super().train(False)

    @property
    def name(self) -> str:
        """The name in the zoo."""
        return self.spec.name

    @property
    def device(self) -> torch.device:
        """Where the weights are; images must be there as well."""
        return self.calibration.quality.device

    @property
    def needs_prompts(self) -> bool:
        """Whether `prompts=None` is an error: the model cannot do without, or quality has no weight in `total`."""
        return self.model.needs_prompts or self.quality_weight == 0

    def encode_prompts(self, prompts: Sequence[str]) -> PromptFeatures:
        """Encode prompts once, to be passed instead of the strings; each distinct prompt is encoded once.

        Args:
            prompts: one string an image, B in all.

        Returns:
            Features of B rows; `features.expand(B)` serves one prompt to a batch.
        """
        check_prompts(prompts)
        return self.model.encode_prompts(prompts)

    def prepare(self, images: Tensor, prompts: Sequence[str] | PromptFeatures | None = None) -> Context | None:
        """Run the model's assistants once; pass the result as `context`, where it is held fixed in gradients.

        Returns:
            None for a model without assistants.
        """
        pixels.check(images)
        return self.model.prepare(self._working(images), self._features(images, prompts))

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str] | PromptFeatures | None = None,
        *,
        context: Context | None = None,
        validate: bool = True,
    ) -> RewardOutput:
        """Score a batch.

        Args:
            images: (B, 3, H, W) floating point in [0, 1], any H and W of at least 16 px, on the reward's device.
            prompts: B strings, or their features, or None for quality alone.
            context: what `prepare` returned for these images.
            validate: check the values' range, which synchronizes the device once.

        Returns:
            Scores (B,) of float32, or float64 if the reward was cast to it. `correspondence` is None without prompts;
            `total` is the weighted mean of both, or quality alone.

        Raises:
            TypeError: wrong type or dtype.
            ValueError: wrong shape, device, values, number of prompts, blank prompts, or none where they are needed.
        """
        pixels.check(images, validate=validate)
        if images.device != self.device:
            raise ValueError(
                f"images: are on {images.device}, the reward is on {self.device}; move one with .to(device)"
            )
        if context is not None and not self.model.context_names:
            warn_ignored_context(self.name)
        elif context is not None:
            check_context(context, self.model.context_names, len(images))
        raw = self.model(self._working(images), self._features(images, prompts), context)
        quality = self.calibration(raw.quality, "quality")
        details = dict(raw.details)
        if "uncertainty" in details:  # a deviation of quality, on its scale
            details["uncertainty"] = details["uncertainty"] * self.calibration.quality[0].abs()
        if raw.correspondence is None:
            return RewardOutput(total=quality, quality=quality, details=details)
        correspondence = self.calibration(raw.correspondence, "correspondence")
        total = (self.quality_weight * quality + self.correspondence_weight * correspondence) / (
            self.quality_weight + self.correspondence_weight
        )
        return RewardOutput(total=total, quality=quality, correspondence=correspondence, details=details)

    def as_reward_fn(self) -> RewardFn:
        """This reward as `f(images, prompts, metadata) -> (rewards, info)`, as trainers by policy gradient call one."""
        return RewardFn(self)

    def _working(self, images: Tensor) -> Tensor:
        """The images in the dtype the heads compute in: float32, or float64 for a reward cast to it."""
        return images.to(self.calibration.quality.dtype)

    def _features(self, images: Tensor, prompts: Sequence[str] | PromptFeatures | None) -> PromptFeatures | None:
        if prompts is None:
            if self.needs_prompts:
                raise ValueError(
                    f"prompts: {self.name} needs one prompt per image here, got None; pass a list of strings"
                    + (" or a quality_weight above 0" if self.quality_weight == 0 else "")
                )
            return None
        features = prompts if isinstance(prompts, PromptFeatures) else self.encode_prompts(prompts)
        if features.model != self.name:
            raise ValueError(
                f"prompts: these features were encoded by {features.model!r}, this reward is {self.name!r}; "
                "encode them with this reward's encode_prompts"
            )
        if len(features) != len(images):
            raise ValueError(
                f"prompts: expected one per image, got {len(features)} prompts for {len(images)} images; "
                "encode_prompts([prompt]).expand(B) serves one prompt to a batch"
            )
        return features if features.index.device == self.device else features.to(self.device)

    def _save_pretrained(self, save_directory: Path) -> None:
        from aigiqa_reward.rewards.saved import save_reward

        save_reward(self, save_directory)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """What `save_pretrained` writes as README.md where there is none: what this is and how it is loaded."""
        del args, kwargs  # of the Hub's template, which knows nothing of rewards
        return ModelCard(_CARD.format(spec=self.spec))

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **model_kwargs: Any,
    ) -> Reward:
        from aigiqa_reward.rewards.saved import load_reward

        if unknown := model_kwargs.keys() - {"model", "spec", "quality_weight", "correspondence_weight"}:
            raise TypeError(
                f"from_pretrained: unknown arguments {sorted(unknown)}; quality_weight and correspondence_weight "
                "can be given, device and dtype are changed with .to(...)"
            )
        hub = {
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
            "token": token,
        }
        return load_reward(
            model_id,
            revision=revision,
            hub=hub,
            quality_weight=model_kwargs.get("quality_weight"),
            correspondence_weight=model_kwargs.get("correspondence_weight"),
        )

    def extra_repr(self) -> str:
        """What sets this reward apart from another of its name."""
        return (
            f"name={self.name!r}, quality_weight={self.quality_weight}, "
            f"correspondence_weight={self.correspondence_weight}"
        )


def check_aspect_weights(quality_weight: float, correspondence_weight: float) -> None:
    """Refuse weights of `total` that are negative or all zero."""
    for name, value in (("quality_weight", quality_weight), ("correspondence_weight", correspondence_weight)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise ValueError(f"{name}: expected a finite number of at least 0, got {value!r}")
    if quality_weight + correspondence_weight == 0:
        raise ValueError("quality_weight, correspondence_weight: expected at least one above 0, got 0 and 0")
