"""Qwen-Image: packed latents of a video VAE, true guidance whose norm is that of the prompt's own prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from aigiqa_reward.sampling.families.base import Rows
from aigiqa_reward.sampling.families.flux import PackedLatents


class QwenImage(PackedLatents):
    """Qwen-Image, text to image."""

    pipelines = ("QwenImagePipeline",)
    standardizes: ClassVar[bool] = True
    own_sigmas: ClassVar[bool] = True

    def rows(self, texts: Sequence[str]) -> dict[str, Tensor | None]:
        return dict(zip(("encoder_hidden_states", "encoder_hidden_states_mask"), self.encoded(texts), strict=True))

    def denoise(self, latents: Tensor, time: Tensor, rows: Rows, shared: Mapping[str, Tensor]) -> Tensor:
        block = self.pipe.vae_scale_factor * 2
        height, width = self.size()
        return self.pipe.transformer(
            hidden_states=latents,
            timestep=time.expand(len(latents)).to(latents.dtype) / 1000,
            guidance=self.guidance_input(latents),
            **rows,
            img_shapes=[[(1, height // block, width // block)]] * len(latents),
            attention_kwargs=self.options.attention_kwargs or {},
            return_dict=False,
        )[0]

    def guide(self, negative: Tensor, positive: Tensor, time: Tensor) -> Tensor:
        guided = super().guide(negative, positive, time)
        return guided * (positive.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    def pack(self, latents: Tensor) -> Tensor:
        return super().pack(latents[:, :, 0])  # the only frame

    def _encoded(self, frames: Tensor) -> Tensor:
        return super()._encoded(frames.unsqueeze(2))
