"""One model with its calibration: the reward that users hold. Differentiable in the pixels, saved and loaded whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download
from torch import Tensor, nn

from aigiqa_reward import __version__
from aigiqa_reward import images as pixels
from aigiqa_reward.assistants import Assistants
from aigiqa_reward.models.base import FullPrecision, ModelSpec, QualityModel, check_context, warn_ignored_context
from aigiqa_reward.rewards.build import empty_model
from aigiqa_reward.rewards.published import is_hub_id
from aigiqa_reward.rewards.reward_fn import RewardFn
from aigiqa_reward.rewards.specs import SPECS
from aigiqa_reward.types import Context, PromptFeatures, RewardOutput
from aigiqa_reward.utils.io import read_json, write_atomically
from aigiqa_reward.utils.isolation import building, isolated
from aigiqa_reward.utils.weights import WeightsError, load_strictly, read_weights, write_weights

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

If it was trained further: say here on whose scores of which images and prompts, and under which license you share it.
"""

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_CONFIG_BYTES = 100_000_000  # it may hold a tokenizer
_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


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

    The weights are frozen, gradients with respect to images are not. The module always stays in evaluation mode, so
    that a trainer that calls `train()` on it cannot change scores.

    Args:
        model: quality model.
        spec: its entry in the table of rewards.
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
    """

    @building()
    def __init__(
        self, model: QualityModel, spec: ModelSpec, *, quality_weight: float = 0.5, correspondence_weight: float = 0.5
    ) -> None:
        super().__init__()
        check_aspect_weights(quality_weight, correspondence_weight)
        self.model = model
        self.spec = spec
        self.name = spec.name
        self.calibration = Calibration()
        self.quality_weight = quality_weight
        self.correspondence_weight = correspondence_weight
        self.call_device: torch.device | None = None
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Reward:
        """Stay in evaluation mode, whatever the mode asked for."""
        super().train(False)
        for module in self.modules():  # transformers checkpoints a block that trains; the dropout in it stays off
            module.training = bool(getattr(module, "gradient_checkpointing", False))
        return self

    @property
    def device(self) -> torch.device:
        """Device of the weights in a call; images must be on it as well."""
        return self.call_device or self.calibration.quality.device

    @contextmanager
    def _on_call_device(self) -> Iterator[None]:
        """Replace the model's weights by copies on `call_device`; a graph keeps those that its backward pass needs."""
        modules = () if self.call_device is None else self.model.modules()
        stores: list[dict[str, Any]] = [store for module in modules for store in (module._parameters, module._buffers)]
        parked = [dict(store) for store in stores]
        try:
            for store in stores:
                for name, tensor in store.items():
                    if tensor is not None:
                        copy = tensor.to(self.call_device)
                        store[name] = nn.Parameter(copy, False) if isinstance(tensor, nn.Parameter) else copy
            yield
        finally:
            for store, tensors in zip(stores, parked, strict=True):
                store.update(tensors)

    @property
    def needs_prompts(self) -> bool:
        """Whether `prompts=None` is an error: the model needs them, or quality has no weight in `total`."""
        return self.model.needs_prompts or self.quality_weight == 0

    @isolated()
    def encode_prompts(self, prompts: Sequence[str]) -> PromptFeatures:
        """Encode B prompts, each distinct one once, to be passed instead of the strings.

        `features.expand(B)` repeats one prompt for a batch.
        """
        with self._on_call_device():
            return self.model.encode_prompts(prompts)

    @isolated()
    def prepare(self, images: Tensor, prompts: Sequence[str] | PromptFeatures | None = None) -> Context | None:
        """Run the model's assistants, if it has any; pass the result as `context`, which is fixed in gradients."""
        pixels.check(images)
        return self.model.prepare(images.to(self.calibration.quality.dtype), self._features(images, prompts))

    @isolated()
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
            validate: check the range of the values, which synchronizes the device once.

        Returns:
            Scores (B,) of float32, or float64 if the reward was cast to it. `correspondence` is None without prompts;
            `total` is the weighted mean of both, or quality alone.
        """
        pixels.check(images, validate=validate)
        if images.device != self.device:
            raise ValueError(f"images: on {images.device}, but the reward is on {self.device}; move one by .to(device)")
        if context is not None and not self.model.context_names:
            warn_ignored_context(self.name)
        elif context is not None:
            check_context(context, self.model.context_names, len(images))
        with self._on_call_device():
            raw = self.model(images.to(self.calibration.quality.dtype), self._features(images, prompts), context)
        if isinstance(raw, RewardOutput):
            return raw
        quality = self.calibration(raw.quality, "quality")
        details = dict(raw.details)
        if "uncertainty" in details:  # a std of quality, on the same scale
            details["uncertainty"] = details["uncertainty"] * self.calibration.quality[0].abs()
        if raw.correspondence is None:
            return RewardOutput(total=quality, quality=quality, details=details)
        correspondence = self.calibration(raw.correspondence, "correspondence")
        total = self.quality_weight * quality + self.correspondence_weight * correspondence
        total = total / (self.quality_weight + self.correspondence_weight)
        return RewardOutput(total=total, quality=quality, correspondence=correspondence, details=details)

    def as_reward_fn(self) -> RewardFn:
        """Wrap this reward as `f(images, prompts, metadata) -> (rewards, info)`, for policy-gradient trainers."""
        return RewardFn(self)

    def _features(self, images: Tensor, prompts: Sequence[str] | PromptFeatures | None) -> PromptFeatures | None:
        if prompts is None:
            if self.needs_prompts:
                raise ValueError(
                    f"prompts: {self.name} needs one prompt per image here, got None; pass a list of strings"
                    + (" or a quality_weight above 0" if self.quality_weight == 0 else "")
                )
            return None
        features = prompts if isinstance(prompts, PromptFeatures) else self.encode_prompts(prompts)
        check_features(features, self.name, len(images))
        return features if features.index.device == self.device else features.to(self.device)

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write config.json and model.safetensors, from which `from_pretrained` makes the same reward to the bit."""
        config = {
            "name": self.name,
            "library_version": __version__,
            "dtype": str(next(self.model.parameters(), self.calibration.quality).dtype).removeprefix("torch."),
            "quality_weight": self.quality_weight,
            "correspondence_weight": self.correspondence_weight,
            "model": self.model.describe(),
        }
        write_weights(save_directory / _WEIGHTS, self.state_dict(), lossless=True)
        write_atomically(
            save_directory / _CONFIG, json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False).encode()
        )

    def generate_model_card(self, *args: object, **kwargs: object) -> ModelCard:
        """Return what `save_pretrained` writes as README.md where there is none; the arguments are ignored."""
        del args, kwargs
        return ModelCard(_CARD.format(spec=self.spec))

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]  (no other arguments)
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        name: str | None = None,
        quality_weight: float | None = None,
        correspondence_weight: float | None = None,
        assistants: Assistants | None = None,
        settings: Mapping[str, Any] | None = None,
        revision: str | None = None,
        **hub: str | bool | Path | None,
    ) -> Reward:
        """Load what `save_pretrained` wrote, in the dtype it was saved in.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            name: name that the reward must have.
            quality_weight: share of quality in `total` instead of the saved one.
            correspondence_weight: share of correspondence in `total` instead of the saved one.
            assistants: assistants of a reward that was trained with some; they are not saved with it.
            settings: fields of the model's configuration that differ from the saved ones.
            revision: branch, tag or commit of the Hub id.
            **hub: options of `huggingface_hub.snapshot_download`, such as token, cache_dir and local_files_only.

        Example:
            >>> from aigiqa_reward import Reward, create_reward
            >>> create_reward("mst_clipiqa").save_pretrained("mine")
            >>> Reward.from_pretrained("mine", quality_weight=0.8).quality_weight
            0.8
        """
        folder = _folder(pretrained_model_name_or_path, revision, hub)
        given = {"quality_weight": quality_weight, "correspondence_weight": correspondence_weight}
        try:
            config = read_json(folder / _CONFIG, most=_CONFIG_BYTES)
            spec, dtype = SPECS[config["name"]], _DTYPES[config["dtype"]]
            shares = {key: float(config[key]) for key in given}
            check_aspect_weights(**shares)
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise WeightsError(
                f"weights: {folder}/config.json does not describe a reward ({type(error).__name__}: {error}); "
                "expected a folder written by reward.save_pretrained"
            ) from error
        if name not in (None, spec.name):
            raise WeightsError(f"weights: {folder} holds a {spec.name!r} reward, expected {name!r}")
        shares |= {key: share for key, share in given.items() if share is not None}
        reward = cls(_empty(folder, spec.name, config["model"], assistants, settings or {}), spec, **shares).to(dtype)
        load_strictly(reward, read_weights(folder / _WEIGHTS), source=str(folder))
        return reward

    def extra_repr(self) -> str:
        """Return what distinguishes this reward from another of its name."""
        weights = f"quality_weight={self.quality_weight}, correspondence_weight={self.correspondence_weight}"
        return f"name={self.name!r}, {weights}"


def check_aspect_weights(quality_weight: float, correspondence_weight: float) -> None:
    """Refuse weights of `total` that are negative or all zero."""
    for name, value in (("quality_weight", quality_weight), ("correspondence_weight", correspondence_weight)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise ValueError(f"{name}: expected a finite number of at least 0, got {value!r}")
    if quality_weight + correspondence_weight == 0:
        raise ValueError("quality_weight, correspondence_weight: expected at least one above 0, got 0 and 0")


def check_features(features: PromptFeatures, model: str, count: int) -> None:
    """Refuse features that another reward encoded, or of another number of prompts than images."""
    if features.model != model:
        raise ValueError(
            f"prompts: these features were encoded by {features.model!r}, this reward is {model!r}; "
            "encode them with this reward's encode_prompts"
        )
    if len(features) != count:
        raise ValueError(
            f"prompts: expected one per image, got {len(features)} prompts for {count} images; "
            "encode_prompts([prompt]).expand(B) repeats one prompt for a batch"
        )


def is_saved_reward(source: str | Path, revision: str | None = None) -> bool:
    """Whether this is a folder written by `save_pretrained`, or its Hub id, and not the authors' files."""
    path = Path(os.path.expanduser(source))  # noqa: PTH111
    try:
        if is_hub_id(source):
            path = Path(hf_hub_download(str(source), _CONFIG, revision=revision)).parent
        return path.is_dir() and "library_version" in read_json(path / _CONFIG, most=_CONFIG_BYTES)
    except (OSError, ValueError):
        return False


def _empty(
    folder: Path, name: str, saved: Any, assistants: Assistants | None, settings: Mapping[str, Any]
) -> QualityModel:
    """Build the model that config.json describes, if it is no larger than model.safetensors."""
    try:
        size = (folder / _WEIGHTS).stat().st_size
        description = {**saved, "config": {**saved["config"], **settings}} if settings else saved
        with torch.device("meta"):  # takes no memory
            sketch = empty_model(name, description, assistants)
        numbers = sum(tensor.numel() for tensor in (*sketch.parameters(), *sketch.buffers()))
        if numbers > size + 2**25:  # a number takes at least a byte; load_strictly names smaller differences
            raise ValueError(f"it is larger than the {size:,} bytes of {_WEIGHTS} can fill")
        with building():
            return empty_model(name, description, assistants)
    except Exception as error:  # a description by somebody else may break any library that builds from it
        raise WeightsError(f"weights: {folder}: cannot build the {name!r} of config.json: {error}") from error


def _folder(source: str | Path, revision: str | None, hub: Mapping[str, Any]) -> Path:
    """Return the local folder, or download the files of a Hub id."""
    folder = Path(os.path.expanduser(source))  # noqa: PTH111  (Path's own raises for an unknown ~name)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision: {source} is a local folder, which has no revisions; pass None")
        if hub:
            raise TypeError(f"{', '.join(hub)}: expected only for a Hub id, got it for the folder {source}")
        return folder
    if folder.exists() or folder.is_absolute() or len(folder.parts) != 2:
        raise WeightsError(
            f"weights: expected a folder written by reward.save_pretrained or a Hub id owner/name, got {str(source)!r}"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=[_CONFIG, _WEIGHTS], **hub))
    except (OSError, ValueError) as error:
        raise WeightsError(f"weights: could not fetch {str(source)!r} from the Hub: {error}") from error
