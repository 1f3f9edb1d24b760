"""Stable Diffusion 3 and 3.5: a joint transformer, flow matching, one pass for guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from aigiqa_reward.sampling.families.base import Conditioning, Family, Rows, Start, linear_shift


class StableDiffusion3(Family):
    """Stable Diffusion 3 and 3.5; without guidance on skipped layers, which its pipeline has as an option."""

    pipelines = ("StableDiffusion3Pipeline",)
    flow: ClassVar[bool] = True

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        texts, negatives, pooled, negative_pooled = self.encoded(
            prompts,
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=self.guided,
            negative_prompt=self.negatives(prompts),
        )

        def rows(embeddings: Tensor, pool: Tensor) -> dict[str, Tensor]:
            return {"encoder_hidden_states": embeddings, "pooled_projections": pool}

        return Conditioning(
            positive=rows(texts, pooled), negative=rows(negatives, negative_pooled) if self.guided else None
        )

    def start(self, generators: Sequence[torch.Generator], conditioning: Conditioning) -> Start:
        embeddings = conditioning.positive["encoder_hidden_states"]
        assert isinstance(embeddings, Tensor)
        channels = self.pipe.transformer.config.in_channels
        return Start(latents=self.draw(generators, channels, embeddings.dtype), shared={})

    def set_timesteps(self, scheduler: Any, latents: Tensor) -> None:
        if not scheduler.config.get("use_dynamic_shifting", None):
            return self.retrieve_timesteps(scheduler)
        patch = self.pipe.transformer.config.patch_size
        tokens = (latents.shape[2] // patch) * (latents.shape[3] // patch)
        return self.retrieve_timesteps(scheduler, mu=linear_shift(tokens, scheduler, highest=1.16))

    def denoise(self, latents: Tensor, time: Tensor, rows: Rows, shared: Mapping[str, Tensor]) -> Tensor:
        return self.pipe.transformer(
            hidden_states=latents,
            timestep=time.expand(len(latents)),
            encoder_hidden_states=rows["encoder_hidden_states"],
            pooled_projections=rows["pooled_projections"],
            joint_attention_kwargs=self.options.joint_attention_kwargs,
            return_dict=False,
        )[0]

    def latents_to_decode(self, latents: Tensor) -> Tensor:
        config = self.pipe.vae.config
        return latents / config.scaling_factor + config.shift_factor

    def latents_from_encoded(self, encoded: Tensor) -> Tensor:
        config = self.pipe.vae.config
        return (encoded - config.shift_factor) * config.scaling_factor
