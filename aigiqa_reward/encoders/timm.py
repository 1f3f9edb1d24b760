"""Several blocks of a timm model as one tower."""

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

from aigiqa_reward import images as pixels
from aigiqa_reward.types import Images
from aigiqa_reward.utils.weights import load_strictly, read_weights

_LEAST_VARIANCE = 1e-6
"""Under the root of a variance, whose slope at 0 is infinite."""

_CLASSIFIERS = ("head.", "classifier.", "fc.")
"""How timm names the classifiers that published files hold and models without classes lack."""


@dataclass(frozen=True, kw_only=True)
class TimmConfig:
    """Which timm model, and the statistics of its pretraining.

    Attributes:
        architecture: a timm model name, without a pretrained tag.
        mean: channel means of its pretraining images, in [0, 1]. The default is ImageNet's; many transformers were
            trained with 0.5 instead: `timm.get_pretrained_cfg(architecture)` says `mean` and `std`.
        std: channel deviations of its pretraining images; the default is ImageNet's.
        pretrained: fetch timm's published weights from the Hub; False leaves them to `weights` or a checkpoint.
        smooth: half width of the rounding put in place of the corners of ReLU6; 0 keeps the corners.
        image_size: side in px to build a model of fixed size for, such as a ViT; None takes the size in its name.
        weights: path of a .safetensors file in timm's layout, with or without its classifier, instead of `pretrained`.

    Example:
        >>> half = (0.5, 0.5, 0.5)
        >>> TimmConfig(architecture="vit_base_patch16_224", mean=half, std=half, pretrained=True).smooth
        0.0
    """

    architecture: str
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    pretrained: bool = False
    smooth: float = 0.0
    image_size: int | None = None
    weights: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.smooth < 3:
            raise ValueError(f"smooth: expected a half width in [0, 3), got {self.smooth}")
        if min(self.std) <= 0:
            raise ValueError(f"std: expected positive deviations, got {self.std}")
        if self.image_size is not None and self.image_size < pixels.MIN_SIDE:
            raise ValueError(f"image_size: expected None or at least {pixels.MIN_SIDE} px, got {self.image_size}")
        if self.weights is None:
            return
        if self.pretrained:
            raise ValueError("weights: pretrained=True fetches other weights than this file; pass one of the two")
        if Path(self.weights).suffix != ".safetensors":
            raise ValueError(
                f"weights: expected a .safetensors file, got {self.weights!r}; pickled checkpoints are never opened: "
                "convert it with safetensors.torch.save_file"
            )


class SmoothReLU6(nn.Module):
    """ReLU6 with its corners at 0 and 6 rounded to parabolas of half width `smooth`: continuously differentiable.

    (h(x) - h(x - 6) + 6) / 2 with h the Huber function; it differs from ReLU6 by at most smooth / 4, at the corners.
    """

    def __init__(self, smooth: float) -> None:
        super().__init__()
        self.smooth = smooth

    def forward(self, inputs: Tensor) -> Tensor:
        """Elementwise, any shape; computed in at least float32, since the two terms nearly cancel."""
        exact = inputs.float() if inputs.dtype in (torch.float16, torch.bfloat16) else inputs
        low, high = (exact.new_full((), corner).expand_as(exact) for corner in (0.0, 6.0))
        below = F.smooth_l1_loss(exact, low, reduction="none", beta=self.smooth)
        above = F.smooth_l1_loss(exact, high, reduction="none", beta=self.smooth)
        return below.sub_(above).add_(6).mul_(0.5).to(inputs.dtype)  # in place: a third of the time on a CPU


def _round_corners(module: nn.Module, smooth: float) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU6):
            setattr(module, name, SmoothReLU6(smooth))
        else:
            _round_corners(child, smooth)


class TimmEncoder(nn.Module):
    """A timm model's feature maps and pooled features; frozen by its owner, differentiable in the pixels.

    Raises:
        ValueError: if timm does not know the architecture, cannot build it for `image_size` or cannot fetch its
            weights; if `weights` does not fit (WeightsError).
    """

    def __init__(self, config: TimmConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk: Any = _create(config)
        self.width = int(self.trunk.num_features)
        self._size = _fixed_size(self.trunk)
        if config.weights is not None:
            _load(self.trunk, config.weights)
        if config.smooth:
            _round_corners(self.trunk, config.smooth)

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> TimmEncoder:
        """Build the model that `describe` described, with weights still to be loaded."""
        statistics = {name: tuple(description[name]) for name in ("mean", "std")}
        return cls(TimmConfig(**{**description, **statistics}))

    def describe(self) -> dict[str, Any]:
        """The configuration as JSON, without where the weights came from."""
        fields = {name: value for name, value in asdict(self.config).items() if name not in ("pretrained", "weights")}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @property
    def image_size(self) -> int | None:
        """Side in px that images must have; None where any size is taken."""
        return None if self._size is None else self._size[0]

    def forward(self, images: Images) -> Float[Tensor, "batch channels *grid"]:
        """The last feature map: (B, width, h, w) of a convolutional model, (B, width, tokens) of a transformer.

        At least float32.

        Raises:
            ValueError: if the model has a fixed size and the images another.
        """
        features = self.trunk.forward_features(self._inputs(images))
        if features.ndim == 3:  # a transformer's (B, tokens, width)
            features = features.transpose(1, 2)
        return features.to(torch.promote_types(images.dtype, torch.float32))

    def pool(self, features: Float[Tensor, "batch channels *grid"]) -> Float[Tensor, "batch channels"]:
        """The mean over the map."""
        return features.flatten(2).mean(dim=2)

    def levels(self, images: Images, blocks: Sequence[int]) -> Float[Tensor, "batch channels rows columns"]:
        """The maps after several blocks as one, on the grid of the last, which is the coarsest.

        A transformer counts its blocks, whose tokens agree in their grid; class tokens are left out and the final
        norm is not applied. A convolutional model counts its stages; finer maps are brought to the last one's grid by
        the mean over the cells (adaptive average pooling). Blocks after the last named one are not run.

        Args:
            images: (B, 3, H, W) in [0, 1], of `image_size` px a side where that is not None.
            blocks: numbers from 0, or from -1 backwards, in the order in which the model runs them.

        Returns:
            (B, `level_channels(blocks)`, h, w) in the blocks' order; at least float32.

        Raises:
            ValueError: no blocks, unknown or unordered ones, an architecture without them, or images of another size.
        """
        taken = self._taken(blocks)
        inputs = self._inputs(images)
        maps = self.trunk.forward_intermediates(inputs, indices=taken, stop_early=True, intermediates_only=True)
        return _joined(maps, images.dtype)

    def observe(
        self, images: Images, blocks: Sequence[int]
    ) -> tuple[Float[Tensor, "batch channels rows columns"], Float[Tensor, "batch joined some_rows some_columns"]]:
        """The last feature map of a convolutional model, as calling it gives, and `levels` of it, in one pass."""
        inputs = self._inputs(images)
        last, maps = self.trunk.forward_intermediates(inputs, indices=self._taken(blocks))
        return last.to(torch.promote_types(images.dtype, torch.float32)), _joined(maps, images.dtype)

    def statistics(self, images: Images) -> Float[Tensor, "batch columns"]:
        """What an EfficientNet sees at every depth: means and deviations over places.

        The deviations after each of its seven stages, their means, and last the mean of the last feature map, which is
        `pool` of it.

        Returns:
            (B, `statistics_columns`); at least float32.
        """
        trunk, dtype = self.trunk, torch.promote_types(images.dtype, torch.float32)
        features, flat = trunk.bn1(trunk.conv_stem(self._inputs(images))), []
        for stage in trunk.blocks:
            features = stage(features)
            flat.append(features.to(dtype).flatten(2))
        last = trunk.bn2(trunk.conv_head(features)).to(dtype)
        deviations = [(level.var(dim=2, correction=0) + _LEAST_VARIANCE).sqrt() for level in flat]
        return torch.cat([*deviations, *(level.mean(dim=2) for level in flat), self.pool(last)], dim=1)

    @property
    def statistics_columns(self) -> int:
        """How many columns `statistics` has."""
        stages = (list(stage[-1].modules()) for stage in self.trunk.blocks)
        norms = ([part for part in parts if isinstance(part, nn.BatchNorm2d)] for parts in stages)
        return 2 * sum(int(found[-1].num_features) for found in norms) + self.width

    def level_channels(self, blocks: Sequence[int]) -> int:
        """How many channels `levels(images, blocks)` has.

        Raises:
            ValueError: no blocks, unknown or unordered ones, or an architecture without them.
        """
        info = list(self.trunk.feature_info)
        return sum(int(info[block]["num_chs"]) for block in self._taken(blocks))

    def _taken(self, blocks: Sequence[int]) -> list[int]:
        """Block numbers counted from 0."""
        name = self.config.architecture
        if not hasattr(self.trunk, "forward_intermediates"):
            raise ValueError(
                f"architecture: timm's {name!r} gives no maps of its blocks; choose a ViT or an EfficientNet"
            )
        count = len(list(self.trunk.feature_info))
        taken = [block + count if block < 0 else block for block in blocks]
        if not taken or not all(0 <= block < count for block in taken):
            raise ValueError(f"blocks: expected numbers from {-count} to {count - 1} for {name!r}, got {list(blocks)}")
        if taken != sorted(set(taken)):
            raise ValueError(f"blocks: expected each block once, first to last, got {list(blocks)}")
        return taken

    def _inputs(self, images: Images) -> Images:
        """Images as the model takes them: of its size, normalized, in its weights' precision."""
        size = self._size
        if size is not None and tuple(images.shape[2:]) != size:
            raise ValueError(
                f"images: {self.config.architecture!r} takes {size[0]} x {size[1]} px, got {images.shape[2]} x "
                f"{images.shape[3]}; resize or crop them, or pass TimmConfig(image_size=...)"
            )
        weight = next(self.trunk.parameters())
        return pixels.normalize(images, self.config.mean, self.config.std).to(weight.dtype)


def _joined(maps: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Maps on the grid of the last, along the channels; at least float32."""
    height, width = maps[-1].shape[2:]
    precise = torch.promote_types(dtype, torch.float32)
    return torch.cat([_on_grid(level.to(precise), height, width) for level in maps], dim=1)


def _on_grid(level: Tensor, height: int, width: int) -> Tensor:
    """A map on a coarser grid: the mean over each cell."""
    return level if level.shape[2:] == (height, width) else F.adaptive_avg_pool2d(level, (height, width))


def _create(config: TimmConfig) -> Any:
    import timm

    name = config.architecture
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        meant = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists the names"
        raise ValueError(f"architecture: timm knows no {name!r}; {meant}")
    try:
        return timm.create_model(name, pretrained=config.pretrained, num_classes=0, img_size=config.image_size)
    except TypeError as error:
        if config.image_size is None or "img_size" not in str(error):
            raise
        raise ValueError(f"image_size: {name!r} is built for no fixed size; leave image_size at None") from error
    except (OSError, RuntimeError) as error:
        if not config.pretrained:
            raise
        first_line = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise ValueError(
            f"pretrained: timm could not fetch the weights of {name!r}: {first_line}; "
            "go online, or pass weights= with the path of a .safetensors file"
        ) from error


def _fixed_size(trunk: nn.Module) -> tuple[int, int] | None:
    """The one size of images that a model takes, as its patch embedding says; None if it takes any."""
    for module in trunk.modules():
        size: Any = getattr(module, "img_size", None)
        if size is not None and getattr(module, "strict_img_size", False):
            height, width = size
            return height, width
    return None


def _load(trunk: nn.Module, path: str) -> None:
    """Load a timm checkpoint; its classifier is left out where the model has none, all else must fit."""
    expected = trunk.state_dict().keys()
    tensors = read_weights(path)
    kept = {name: tensor for name, tensor in tensors.items() if name in expected or not name.startswith(_CLASSIFIERS)}
    load_strictly(trunk, kept, source=path)


@dataclass(frozen=True, kw_only=True)
class TimmLevelsConfig:
    """Several blocks of a timm model, read together.

    Attributes:
        tower: which model; one of a fixed size, such as a ViT.
        blocks: numbers of the blocks, in the model's order.

    Example:
        >>> TimmLevelsConfig(tower=TimmConfig(architecture="vit_base_patch8_224"), blocks=(6, 7, 8, 9)).blocks
        (6, 7, 8, 9)
    """

    tower: TimmConfig
    blocks: tuple[int, ...]


class TimmLevels(nn.Module):
    """A timm model of a fixed size as a tower whose last blocks are read together.

    Raises:
        ValueError: a model without a fixed size, or blocks that it does not have.
    """

    def __init__(self, config: TimmLevelsConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = TimmEncoder(config.tower)
        size = self.encoder.image_size
        if size is None:
            raise ValueError(
                f"tower: {config.tower.architecture!r} has no fixed size; choose a vision transformer such as "
                "vit_base_patch16_224"
            )
        self.image_size: int = size
        self.level_channels = self.encoder.level_channels(config.blocks)
        last = list(self.encoder.trunk.feature_info)[config.blocks[-1]]
        self.level_side = size // int(last["reduction"])

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> TimmLevels:
        """Build the tower that `describe` described, with weights still to be loaded."""
        tower = TimmEncoder.from_description(description["tower"]).config
        return cls(TimmLevelsConfig(tower=tower, blocks=tuple(description["blocks"])))

    def describe(self) -> dict[str, Any]:
        """The configuration as JSON, without where the weights came from."""
        return {"tower": self.encoder.describe(), "blocks": list(self.config.blocks)}

    def levels(self, images: Images) -> Float[Tensor, "batch channels rows columns"]:
        """The concatenated maps of the blocks, of images in [0, 1] of `image_size` px a side."""
        return self.encoder.levels(images, self.config.blocks)
