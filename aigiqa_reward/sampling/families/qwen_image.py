"""Qwen-Image: packed latents of a video VAE, true guidance whose norm is that of the prompt's own prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from aigiqa_reward.sampling.families.base import Conditioning, Rows, Start, TrueGuidance, linear_shift


class QwenImage(TrueGuidance):
    """Qwen-Image, text to image."""

    pipelines = ("QwenImagePipeline",)
    flow: ClassVar[bool] = True

    def rows(self, texts: Sequence[str]) -> dict[str, Tensor | None]:
        embeddings, mask = self.encoded(texts)
        return {"encoder_hidden_states": embeddings, "encoder_hidden_states_mask": mask}

    def start(self, generators: Sequence[torch.Generator], conditioning: Conditioning) -> Start:
        embeddings = conditioning.positive["encoder_hidden_states"]
        assert isinstance(embeddings, Tensor)
        return Start(latents=self.draw(generators, self.channels, embeddings.dtype), shared={})

    def set_timesteps(self, scheduler: Any, latents: Tensor) -> None:
        steps = self.options.num_inference_steps
        mu = linear_shift(latents.shape[1], scheduler)
        self.retrieve_timesteps(scheduler, sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)

    def denoise(self, latents: Tensor, time: Tensor, rows: Rows, shared: Mapping[str, Tensor]) -> Tensor:
        block = self.pipe.vae_scale_factor * 2
        height, width = self.size()
        return self.pipe.transformer(
            hidden_states=latents,
            timestep=time.expand(len(latents)).to(latents.dtype) / 1000,
            guidance=self.told_guidance(latents) if self.pipe.transformer.config.guidance_embeds else None,
            encoder_hidden_states_mask=rows["encoder_hidden_states_mask"],
            encoder_hidden_states=rows["encoder_hidden_states"],
            img_shapes=[[(1, height // block, width // block)]] * len(latents),
            attention_kwargs=self.options.attention_kwargs or {},
            return_dict=False,
        )[0]

    def guide(self, negative: Tensor, positive: Tensor, time: Tensor) -> Tensor:
        guided = super().guide(negative, positive, time)
        return guided * (positive.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    def latents_to_decode(self, latents: Tensor) -> Tensor:
        unpacked = self.pipe._unpack_latents(latents, *self.size(), self.pipe.vae_scale_factor)
        mean, std = self._statistics(unpacked)
        return unpacked * std + mean

    def latents_from_encoded(self, encoded: Tensor) -> Tensor:
        mean, std = self._statistics(encoded)
        normalized = ((encoded - mean) / std)[:, :, 0]
        return self.pipe._pack_latents(normalized, *normalized.shape)

    def _encoded(self, frames: Tensor) -> Tensor:
        return super()._encoded(frames.unsqueeze(2))

    def _statistics(self, like: Tensor) -> tuple[Tensor, ...]:
        config = self.pipe.vae.config
        return tuple(like.new_tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
