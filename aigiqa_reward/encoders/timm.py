"""Any timm model as an image tower: feature maps, pooled features, the maps of several blocks, and statistics."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from aigiqa_reward import images as pixels
from aigiqa_reward.types import Images
from aigiqa_reward.utils.weights import load_strictly, read_weights

_CLASSIFIERS = ("head.", "classifier.", "fc.")  # in published files, not in models without classes


@dataclass(frozen=True, kw_only=True)
class TimmConfig:
    """Choice of a timm model, and the statistics of its pretraining images.

    Attributes:
        architecture: timm model name, without a pretrained tag.
        mean, std: of the channels in [0, 1], as `timm.get_pretrained_cfg(architecture)` lists; default: ImageNet's.
        pretrained: whether to fetch timm's published weights from the Hub.
        image_size: side in px to build a model of fixed size for, such as a ViT; None takes the size in its name.
        weights: path of a .safetensors file in timm's layout, with or without its classifier, instead of `pretrained`.
        blocks: numbers of the blocks whose maps `levels` joins, from 0, or from -1 backwards, in the model's order.
        folded: whether the convolutions of an EfficientNet do the work of BatchNorm, as its weights are then stored.

    Example:
        >>> from aigiqa_reward.encoders.timm import TimmConfig
        >>> half = (0.5, 0.5, 0.5)
        >>> TimmConfig(architecture="vit_base_patch8_224", mean=half, std=half, blocks=(6, 7, 8, 9)).pretrained
        False
    """

    architecture: str
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    pretrained: bool = False
    image_size: int | None = None
    weights: str | None = None
    blocks: tuple[int, ...] = ()
    folded: bool = False

    def __post_init__(self) -> None:
        if min(self.std) <= 0:
            raise ValueError(f"std: expected positive stds, got {self.std}")
        if self.image_size is not None and self.image_size < pixels.MIN_SIDE:
            raise ValueError(f"image_size: expected None or at least {pixels.MIN_SIDE} px, got {self.image_size}")
        if self.weights is not None and self.pretrained:
            raise ValueError("weights: pretrained=True fetches other weights than this file; pass one of the two")
        if self.weights is not None and Path(self.weights).suffix != ".safetensors":
            raise ValueError(f"weights: expected a .safetensors file, got {self.weights!r}; convert pickled ones to it")


class TimmEncoder(nn.Module):
    """A timm model's feature maps and pooled features; differentiable in the pixels, in at least float32.

    `image_size` is the side in px of its images, the only one of a model of fixed size; else that of its training.
    """

    def __init__(self, config: TimmConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk: Any = _create(config).to(memory_format=torch.channels_last)
        if config.folded:
            fold_batch_norms(self.trunk)
        self.width = int(self.trunk.num_features)
        self._size = _fixed_size(self.trunk)
        self.image_size = self._size[0] if self._size else int(self.trunk.pretrained_cfg["input_size"][-1])
        self._blocks = self._numbered(config.blocks) if config.blocks else []
        self.level_channels = sum(int(list(self.trunk.feature_info)[block]["num_chs"]) for block in self._blocks)
        if config.weights is not None:  # without a classifier; all else must fit
            tensors, expected = read_weights(config.weights), self.trunk.state_dict()
            kept = {name: x for name, x in tensors.items() if name in expected or not name.startswith(_CLASSIFIERS)}
            load_strictly(self.trunk, kept, source=config.weights)

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> TimmEncoder:
        settings: Any = {name: tuple(x) if isinstance(x, list) else x for name, x in description.items()}
        settings.pop("smooth", None)  # in older descriptions: ReLU6 was rounded by that much
        return cls(TimmConfig(**settings))

    def describe(self) -> dict[str, Any]:
        fields = {name: value for name, value in asdict(self.config).items() if name not in ("pretrained", "weights")}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @property
    def level_side(self) -> int:
        return self.image_size // int(list(self.trunk.feature_info)[self._blocks[-1]]["reduction"])

    def forward(self, images: Images) -> Float[Tensor, "batch channels *grid"]:
        features = self.trunk.forward_features(self._inputs(images))
        if features.ndim == 3:  # a transformer's (B, tokens, width)
            features = features.transpose(1, 2)
        return features.to(torch.promote_types(images.dtype, torch.float32))

    def pool(self, features: Float[Tensor, "batch channels *grid"]) -> Float[Tensor, "batch channels"]:
        return features.flatten(2).mean(dim=2)

    def levels(self, images: Images) -> Float[Tensor, "batch channels rows columns"]:
        """Join the maps after the configured blocks on the grid of the last, which is the coarsest.

        Of a transformer these are the patch tokens after each block, without class tokens and before the final norm;
        of a convolutional model the maps after each stage, finer ones averaged over the cells of the coarsest.
        """
        maps = self.trunk.forward_intermediates(
            self._inputs(images), indices=self._blocks, stop_early=True, intermediates_only=True
        )
        return _joined(maps, images.dtype)

    def observe(self, images: Images) -> tuple[Tensor, Tensor]:
        """Compute the last feature map of a convolutional model and `levels` in one pass."""
        last, maps = self.trunk.forward_intermediates(self._inputs(images), indices=self._blocks)
        return last.to(torch.promote_types(images.dtype, torch.float32)), _joined(maps, images.dtype)

    def _numbered(self, blocks: Sequence[int]) -> list[int]:
        """Block numbers counted from 0."""
        name = self.config.architecture
        if not hasattr(self.trunk, "forward_intermediates"):
            raise ValueError(f"architecture: timm's {name!r} gives no maps of its blocks; choose a ViT or EfficientNet")
        count = len(list(self.trunk.feature_info))
        numbers = [block + count if block < 0 else block for block in blocks]
        if not all(0 <= block < count for block in numbers) or numbers != sorted(set(numbers)):
            raise ValueError(f"blocks: expected increasing numbers from {-count} to {count - 1}, got {list(blocks)}")
        return numbers

    def _inputs(self, images: Images) -> Images:
        """Images of the model's size, normalized, in its weights' precision."""
        size, got = self._size, tuple(images.shape[2:])
        if size is not None and got != size:
            raise ValueError(f"images: expected {size} px, got {got}; resize them, or pass TimmConfig(image_size=...)")
        inputs = pixels.normalize(images, self.config.mean, self.config.std)
        return inputs.to(next(self.trunk.parameters()).dtype, memory_format=torch.channels_last)


def _joined(maps: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Maps averaged to the grid of the last and joined along the channels, in at least float32."""
    grid: Any = maps[-1].shape[2:]
    maps = [level.to(torch.promote_types(dtype, torch.float32)) for level in maps]
    return torch.cat([m if m.shape[2:] == grid else F.adaptive_avg_pool2d(m, grid) for m in maps], dim=1)


def _create(config: TimmConfig) -> Any:
    import timm

    name = config.architecture
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3) or "one of timm.list_models()"
        raise ValueError(f"architecture: timm knows no {name!r}; did you mean {close}?")
    try:
        return timm.create_model(name, pretrained=config.pretrained, num_classes=0, img_size=config.image_size)
    except TypeError as error:
        raise ValueError(f"image_size: timm cannot build {name!r} for a fixed size ({error}); pass None") from error
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"pretrained: timm could not load {name!r}: {error}; go online, or pass weights= with a .safetensors file"
        ) from error


def fold_batch_norms(trunk: Any) -> None:
    """Fold each BatchNorm of an EfficientNet into the convolution before it; its activation takes its place."""
    for stage in (trunk, *(block for blocks in trunk.blocks for block in blocks)):
        stage.eval()
        norms = [name for name, part in stage.named_children() if isinstance(part, nn.BatchNorm2d)]
        convolutions = [name for name, part in stage.named_children() if isinstance(part, nn.Conv2d)]
        for convolution, norm in zip(convolutions, norms, strict=True):
            after: Any = getattr(stage, norm)
            setattr(stage, convolution, fuse_conv_bn_eval(getattr(stage, convolution), after))
            setattr(stage, norm, after.act)


def _fixed_size(trunk: nn.Module) -> tuple[int, int] | None:
    """The only (height, width) that the patch embedding takes; None if any."""
    for module in trunk.modules():
        size: Any = getattr(module, "img_size", None)
        if size is not None and getattr(module, "strict_img_size", False):
            return (size[0], size[1])
    return None
