"""Regions of an image, by the Segment Anything Model or, without it, by a regular grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from aigiqa_reward import images as pixels
from aigiqa_reward.assistants.base import AssistantConfig, PretrainedAssistant
from aigiqa_reward.types import Images
from aigiqa_reward.utils.checks import integer, number

MASK_SIZE = 64  # rows and columns of a mask over the whole image: a quarter of SAM's, several cells per CLIP patch


@dataclass(frozen=True, kw_only=True)
class SegmenterConfig(AssistantConfig):
    """Which SAM, and which of its masks are kept.

    Attributes:
        batch_size: images per forward pass; 1, since SAM works at 1024 x 1024 px.
        max_regions: masks per image (CPA-IQA: at most 16).
        points_per_side: rows and columns of the grid of points, each of which asks for the object under it. SAM's
            automatic mask generator uses 32 to find everything; 8 suffice for 16 regions.
        max_overlap: largest intersection over union of two kept masks, 0.7 as in SAM's automatic mask generator.
    """

    batch_size: int = 1
    max_regions: int = 16
    points_per_side: int = 8
    max_overlap: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        number("max_overlap", self.max_overlap, "in [0, 1]", lambda overlap: 0 <= overlap <= 1)


class SAMSegmenter(PretrainedAssistant[SegmenterConfig]):
    """Soft masks of an image's regions, for CPA-IQA's local alignment.

    SAM is asked at a regular grid of points. Of its three masks for a point the one with the highest predicted
    quality is taken; of these, from the best down, each that overlaps none of those kept by more than `max_overlap`
    (greedy non-maximum suppression by the masks' intersection over union; a mask is where its value exceeds 0.5).
    The paper states SAM and no settings: which masks are kept is our choice.
    """

    kind = "segmenter"
    recipe: ClassVar[Mapping[str, Any]] = {"mask_size": MASK_SIZE}
    wanted = "a Segment Anything model (SamModel), such as facebook/sam-vit-base"
    parts = ("SamProcessor", "SamModel")

    def _fits(self, description: Any) -> bool:
        return description.model_type == "sam"

    def segment(self, images: Tensor) -> Float[Tensor, "batch regions 64 64"]:
        """Find the regions of images (B, 3, H, W) in [0, 1], which the model sees rounded to 8 bits.

        Returns:
            (B, max_regions, 64, 64) float32 in [0, 1] on the images' device, each mask over the whole image whatever
            its aspect, from the highest predicted quality down; places without a region are zero everywhere.
        """
        pixels.check(images)

        def answer(rows: list[int]) -> list[Tensor]:
            masks, scores = self._candidates(images[rows])
            regions = masks.new_zeros(len(masks), self.config.max_regions, *masks.shape[2:])
            limits = {"count": self.config.max_regions, "max_overlap": self.config.max_overlap}
            for row, found in enumerate(masks):
                kept = distinct(found > 0.5, scores[row], **limits)
                regions[row, : len(kept)] = found[kept]
            return list(regions)

        return torch.stack(self._serve(list(images), answer, Tensor)).to(images.device)

    def _candidates(self, images: Images) -> tuple[Float[Tensor, "batch points 64 64"], Float[Tensor, "batch points"]]:
        """Return the best mask of every point and its predicted intersection over union; float32, on the CPU."""
        model, device, dtype = self._model, self.config.device, self.config.dtype
        points = grid_points(images.shape[2], images.shape[3], self.config.points_per_side)
        asked = [points[:, None].tolist()] * len(images)
        inputs = self._processor(images=pixels.to_pil(images), input_points=asked, return_tensors="pt")
        embeddings = model.get_image_embeddings(inputs["pixel_values"].to(device, dtype))
        masks, scores = [], []
        for some in inputs["input_points"].float().to(device).split(64, dim=1):  # as SAM's points_per_batch
            output = model(image_embeddings=embeddings, input_points=some, multimask_output=True)
            best = output.iou_scores.float().max(dim=2)
            index = best.indices[:, :, None, None, None].expand(-1, -1, 1, *output.pred_masks.shape[-2:])
            logits = output.pred_masks.float().gather(2, index).squeeze(2)
            masks.append(_over_image(logits, inputs["reshaped_input_sizes"][0], inputs["pixel_values"].shape[-2:]))
            scores.append(best.values)
        return torch.cat(masks, dim=1).sigmoid().cpu(), torch.cat(scores, dim=1).cpu()


def _over_image(logits: Tensor, content: Tensor, padded: torch.Size) -> Float[Tensor, "batch points 64 64"]:
    """Resize the part of SAM's logits (B, N, h, w) that shows the image, which is at the top left of the padded input.

    `content` and `padded` are height and width of the image and of the padded input, in px.
    """
    height, width = (
        max(1, round(int(part) * cells / whole))
        for part, cells, whole in zip(content, logits.shape[-2:], padded, strict=True)
    )
    shown = logits[:, :, :height, :width]
    return F.interpolate(shown, size=(MASK_SIZE, MASK_SIZE), mode="bilinear", align_corners=False, antialias=True)


def grid_points(height: int, width: int, per_side: int) -> Float[Tensor, "points 2"]:
    """Return the centers (x, y), in px, of `per_side` x `per_side` equal parts of an image, row by row."""
    steps = (torch.arange(per_side, dtype=torch.float64) + 0.5) / per_side
    y, x = torch.meshgrid(steps * height, steps * width, indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1)


def distinct(
    masks: Bool[Tensor, "masks height width"], scores: Float[Tensor, " masks"], *, count: int, max_overlap: float
) -> list[int]:
    """Return the indices of masks, from the highest score down, that overlap none kept before by more than the limit.

    Empty masks are never kept; of equal scores the earlier goes first.
    """
    flat = masks.flatten(1).float()
    areas = flat.sum(dim=1)
    shared = flat @ flat.T
    overlaps = shared / (areas[:, None] + areas - shared).clamp_min(1)
    kept: list[int] = []
    for index in scores.argsort(descending=True, stable=True).tolist():
        if len(kept) == count:
            break
        if areas[index] > 0 and not bool((overlaps[index, kept] > max_overlap).any()):
            kept.append(index)
    return kept


def grid_regions(rows: int = 4, columns: int = 4, size: int = MASK_SIZE) -> Float[Tensor, "regions size size"]:
    """Make a regular grid in place of SAM's regions: offline, the same for every image.

    Returns:
        (rows * columns, size, size) float32, row by row: 1 in the cell, 0 elsewhere.

    Example:
        >>> from aigiqa_reward.assistants import grid_regions
        >>> masks = grid_regions(rows=2, columns=2)
        >>> masks.shape, bool((masks.sum(dim=0) == 1).all())
        (torch.Size([4, 64, 64]), True)
    """
    for name, value in (("rows", rows), ("columns", columns)):
        if integer(name, value, least=1) > size:
            raise ValueError(f"{name}: expected at most size = {size}, got {value}; a cell would be empty")
    cells = torch.arange(size)
    in_row = F.one_hot(cells * rows // size, rows).T.float()
    in_column = F.one_hot(cells * columns // size, columns).T.float()
    return torch.einsum("ry,cx->rcyx", in_row, in_column).flatten(0, 1)
