"""FLUX.1: packed and shifted latents, embedded guidance, true guidance in a second pass where it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from aigiqa_reward.sampling.families.base import Conditioning, Rows, Start, TrueGuidance, linear_shift


class Flux(TrueGuidance):
    """FLUX.1 dev and schnell."""

    pipelines = ("FluxPipeline",)
    flow: ClassVar[bool] = True

    def rows(self, texts: Sequence[str]) -> dict[str, Tensor]:
        embeddings, pooled, places = self.encoded(texts, prompt_2=None)
        # The text's places are the same for all rows; held once a row, they can be picked along with the rest.
        return {
            "encoder_hidden_states": embeddings,
            "pooled_projections": pooled,
            "txt_ids": places.expand(len(embeddings), *places.shape),
        }

    def start(self, generators: Sequence[torch.Generator], conditioning: Conditioning) -> Start:
        embeddings = conditioning.positive["encoder_hidden_states"]
        assert isinstance(embeddings, Tensor)
        latents, places = self.draw(generators, self.channels, embeddings.dtype)
        return Start(latents=latents, shared={"img_ids": places})

    def set_timesteps(self, scheduler: Any, latents: Tensor) -> None:
        steps = self.options.num_inference_steps
        sigmas = None if scheduler.config.get("use_flow_sigmas") else np.linspace(1.0, 1 / steps, steps)
        self.retrieve_timesteps(scheduler, sigmas=sigmas, mu=linear_shift(latents.shape[1], scheduler))

    def denoise(self, latents: Tensor, time: Tensor, rows: Rows, shared: Mapping[str, Tensor]) -> Tensor:
        places = rows["txt_ids"]
        assert isinstance(places, Tensor)
        return self.pipe.transformer(
            hidden_states=latents,
            timestep=time.expand(len(latents)).to(latents.dtype) / 1000,
            guidance=self.told_guidance(latents) if self.pipe.transformer.config.guidance_embeds else None,
            pooled_projections=rows["pooled_projections"],
            encoder_hidden_states=rows["encoder_hidden_states"],
            txt_ids=places[0],
            img_ids=shared["img_ids"],
            joint_attention_kwargs=self.options.joint_attention_kwargs or {},
            return_dict=False,
        )[0]

    def latents_to_decode(self, latents: Tensor) -> Tensor:
        config = self.pipe.vae.config
        unpacked = self.pipe._unpack_latents(latents, *self.size(), self.pipe.vae_scale_factor)
        return unpacked / config.scaling_factor + config.shift_factor

    def latents_from_encoded(self, encoded: Tensor) -> Tensor:
        config = self.pipe.vae.config
        return self.pipe._pack_latents((encoded - config.shift_factor) * config.scaling_factor, *encoded.shape)
