"""FLUX.1: packed and shifted latents, embedded guidance, optional true guidance in a second pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from aigiqa_reward.sampling.families.base import Rows, TrueGuidance


class PackedLatents(TrueGuidance):
    """Latents of 2 x 2 patches, (B, tokens, channels), as FLUX.1 and Qwen-Image pack them."""

    def unpack(self, latents: Tensor) -> Tensor:
        return self.pipe._unpack_latents(latents, *self.size(), self.pipe.vae_scale_factor)

    def pack(self, latents: Tensor) -> Tensor:
        return self.pipe._pack_latents(latents, *latents.shape)


class Flux(PackedLatents):
    """FLUX.1 dev and schnell."""

    pipelines = ("FluxPipeline",)

    def rows(self, texts: Sequence[str]) -> dict[str, Tensor]:
        embeddings, pooled, positions = self.encoded(texts)
        return {
            "encoder_hidden_states": embeddings,
            "pooled_projections": pooled,
            # The same for all rows; kept once per row, so that they can be selected with the rest.
            "txt_ids": positions.expand(len(embeddings), *positions.shape),
        }

    def denoise(self, latents: Tensor, time: Tensor, rows: Rows, shared: Mapping[str, Tensor]) -> Tensor:
        positions: Any = rows["txt_ids"]
        return self.pipe.transformer(
            hidden_states=latents,
            timestep=time.expand(len(latents)).to(latents.dtype) / 1000,
            guidance=self.guidance_input(latents),
            **{**rows, "txt_ids": positions[0]},
            img_ids=shared["img_ids"],
            joint_attention_kwargs=self.options.joint_attention_kwargs or {},
            return_dict=False,
        )[0]
