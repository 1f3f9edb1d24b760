"""Stable Diffusion 1.x and 2.x, and SDXL: a UNet, any of diffusers' discrete schedulers, one pass for guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from aigiqa_reward import images as pixels
from aigiqa_reward.sampling.families.base import Conditioning, Family, Rows


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x, and other models with the same pipeline."""

    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline",)
    denoiser_name: ClassVar[str] = "unet"
    scales_noise: ClassVar[bool] = True

    @property
    def guided(self) -> bool:
        return self.guidance > 1 and self.pipe.unet.config.time_cond_proj_dim is None

    def size(self) -> tuple[int, int]:
        if self.options.height and self.options.width:  # this pipeline drops a height that comes without a width
            return self.options.height, self.options.width
        side, factor = self.pipe.unet.config.sample_size, self.pipe.vae_scale_factor
        height, width = (side, side) if isinstance(side, int) else side
        return height * factor, width * factor

    def denoise(self, latents: Tensor, time: Tensor, rows: Rows, shared: Mapping[str, Tensor]) -> Tensor:
        return self.pipe.unet(
            latents,
            time,
            encoder_hidden_states=rows["encoder_hidden_states"],
            timestep_cond=self._guidance_embedding(latents),
            cross_attention_kwargs=self.options.cross_attention_kwargs,
            added_cond_kwargs=self._added(rows),
            return_dict=False,
        )[0]

    def _added(self, rows: Rows) -> dict[str, Any] | None:
        return None

    def _guidance_embedding(self, latents: Tensor) -> Tensor | None:
        # The guidance scale is an input of latent consistency models, in place of guidance.
        width = self.pipe.unet.config.time_cond_proj_dim
        if width is None:
            return None
        scale = torch.tensor(self.guidance - 1).repeat(len(latents))
        embedding = self.pipe.get_guidance_scale_embedding(scale, embedding_dim=width)
        return embedding.to(device=latents.device, dtype=latents.dtype)

    def guide(self, negative: Tensor, positive: Tensor, time: Tensor) -> Tensor:
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

        guided, share = super().guide(negative, positive, time), self.options.guidance_rescale
        return rescale_noise_cfg(guided, positive, share) if share else guided

    def flagged(self, images: Tensor) -> list[bool]:
        if getattr(self.pipe, "safety_checker", None) is None:
            return super().flagged(images)
        decoded = pixels.to_vae(images).clone()  # the checker blanks the images that it flags
        _, found = self.pipe.run_safety_checker(decoded, self.device, self.pipe.text_encoder.dtype)
        return [bool(flag) for flag in found]


class StableDiffusionXL(StableDiffusion):
    """SDXL: two text encoders, pooled text and sizes as further inputs, a VAE that may have to run in float32."""

    pipelines = ("StableDiffusionXLPipeline",)
    text_inputs: ClassVar[tuple[str, ...]] = ("encoder_hidden_states", "text_embeds")
    standardizes: ClassVar[bool] = True

    def size(self) -> tuple[int, int]:
        return Family.size(self)

    def negatives(self, prompts: Sequence[str]) -> list[str] | None:
        # Without a negative prompt SDXL may want zeros in place of the empty text.
        return None if self.options.negative_prompt is None else super().negatives(prompts)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        found, second = super().encode(prompts), self.pipe.text_encoder_2
        texts, pooled = (found.positive[name] for name in self.text_inputs)
        assert isinstance(texts, Tensor) and isinstance(pooled, Tensor)
        sizes = self.pipe._get_add_time_ids(
            self.options.original_size or self.size(),
            self.options.crops_coords_top_left,
            self.options.target_size or self.size(),
            dtype=texts.dtype,
            text_encoder_projection_dim=pooled.shape[-1] if second is None else second.config.projection_dim,
        )
        added = {"time_ids": sizes.to(texts.device).repeat(len(prompts), 1)}
        negative = None if found.negative is None else {**found.negative, **added}
        return Conditioning(positive={**found.positive, **added}, negative=negative)

    def _added(self, rows: Rows) -> dict[str, Any]:
        return {name: rows[name] for name in ("text_embeds", "time_ids")}

    def marked(self, images: Tensor) -> Tensor:
        watermark = getattr(self.pipe, "watermark", None)  # on by default where invisible-watermark is installed
        marked = images if watermark is None else pixels.from_vae(watermark.apply_watermark(pixels.to_vae(images)))
        return marked.to(images)
