"""Stable Diffusion 3 and 3.5: a joint transformer, flow matching, one pass for guidance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from aigiqa_reward.sampling.families.base import Family, Rows, linear_shift


class StableDiffusion3(Family):
    """Stable Diffusion 3 and 3.5; without its pipeline's optional skip-layer guidance."""

    pipelines = ("StableDiffusion3Pipeline",)
    text_inputs: ClassVar[tuple[str, ...]] = ("encoder_hidden_states", "pooled_projections")
    flow: ClassVar[bool] = True

    def schedule(self, scheduler: Any, latents: Tensor) -> dict[str, Any]:
        rows, columns = (side // self.pipe.transformer.config.patch_size for side in latents.shape[2:])
        dynamic = scheduler.config.get("use_dynamic_shifting", None)
        return {"mu": linear_shift(rows * columns, scheduler, highest=1.16)} if dynamic else {}

    def denoise(self, latents: Tensor, time: Tensor, rows: Rows, shared: Mapping[str, Tensor]) -> Tensor:
        return self.pipe.transformer(
            hidden_states=latents,
            timestep=time.expand(len(latents)),
            **rows,
            joint_attention_kwargs=self.options.joint_attention_kwargs,
            return_dict=False,
        )[0]
