"""Z-Image: lists of images and texts of unequal length, time running upwards, negated velocity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from aigiqa_reward.sampling.families.base import Family, Rows, linear_shift


class ZImage(Family):
    """Z-Image and Z-Image-Turbo. Guidance is positive + w (positive - negative), on for any w above 0."""

    pipelines = ("ZImagePipeline",)
    text_inputs: ClassVar[tuple[str, ...]] = ("cap_feats",)
    flow: ClassVar[bool] = True
    float32_noise: ClassVar[bool] = True

    @property
    def guided(self) -> bool:
        return self.guidance > 0  # as do_classifier_free_guidance of this pipeline in diffusers 0.42

    def size(self) -> tuple[int, int]:
        return self.options.height or 1024, self.options.width or 1024

    def schedule(self, scheduler: Any, latents: Tensor) -> dict[str, Any]:
        steps = self.options.num_inference_steps
        mu = linear_shift((latents.shape[2] // 2) * (latents.shape[3] // 2), scheduler)
        return {"sigmas": torch.linspace(1.0, 1 / steps, steps).tolist(), "mu": mu}

    def denoise(self, latents: Tensor, time: Tensor, rows: Rows, shared: Mapping[str, Tensor]) -> Tensor:
        frames = latents.to(self.pipe.transformer.dtype).unsqueeze(2)
        predicted = self.pipe.transformer(
            list(frames.unbind(dim=0)),
            (1000 - time.expand(len(latents))) / 1000,
            rows["cap_feats"],
            joint_attention_kwargs=self.options.joint_attention_kwargs,
            return_dict=False,
        )[0]
        return torch.stack([output.float() for output in predicted]).squeeze(2)

    def guide(self, negative: Tensor, positive: Tensor, time: Tensor) -> Tensor:
        truncation = self.options.cfg_truncation
        if truncation is not None and float(truncation) <= 1 and (1000 - float(time)) / 1000 > truncation:
            return positive
        guided = positive + self.guidance * (positive - negative)
        limit = float(self.options.cfg_normalization or 0.0)
        if limit <= 0:
            return guided
        axes = tuple(range(1, guided.ndim))
        wanted, norm = (torch.linalg.vector_norm(value, dim=axes, keepdim=True) for value in (positive, guided))
        return guided * (limit * wanted / norm).clamp(max=1)

    def finish(self, output: Tensor) -> Tensor:
        return -output
