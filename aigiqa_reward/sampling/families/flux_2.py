"""FLUX.2: latents packed with places of their own, normalized by the VAE's batch statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from aigiqa_reward.sampling.families.base import Conditioning, Rows, Start, TwoPass


class Flux2(TwoPass):
    """FLUX.2 dev, whose guidance is embedded; text to image, without condition images."""

    pipelines = ("Flux2Pipeline",)
    flow: ClassVar[bool] = True

    @property
    def guided(self) -> bool:
        return False

    def rows(self, texts: Sequence[str]) -> dict[str, Tensor]:
        embeddings, places = self.encoded(texts)
        return {"encoder_hidden_states": embeddings, "txt_ids": places}

    def start(self, generators: Sequence[torch.Generator], conditioning: Conditioning) -> Start:
        embeddings = conditioning.positive["encoder_hidden_states"]
        assert isinstance(embeddings, Tensor)
        latents, places = self.draw(generators, self.channels, embeddings.dtype)
        return Start(latents=latents, shared={"img_ids": places[:1]})

    def as_passed(self, latents: Tensor, scheduler: Any) -> Tensor:
        return self._on_grid(latents)  # the pipeline packs what it is given

    def _on_grid(self, latents: Tensor) -> Tensor:
        height, width = self.size()
        block = self.pipe.vae_scale_factor * 2
        return latents.transpose(1, 2).unflatten(2, (height // block, width // block)).contiguous()

    def set_timesteps(self, scheduler: Any, latents: Tensor) -> None:
        steps = self.options.num_inference_steps
        sigmas = None if scheduler.config.get("use_flow_sigmas") else np.linspace(1.0, 1 / steps, steps)
        self.retrieve_timesteps(scheduler, sigmas=sigmas, mu=empirical_shift(latents.shape[1], steps))

    def denoise(self, latents: Tensor, time: Tensor, rows: Rows, shared: Mapping[str, Tensor]) -> Tensor:
        places = shared["img_ids"]
        return self.pipe.transformer(
            hidden_states=latents.to(self.pipe.transformer.dtype),
            timestep=time.expand(len(latents)).to(latents.dtype) / 1000,
            guidance=self._guidance_input(latents),
            encoder_hidden_states=rows["encoder_hidden_states"],
            txt_ids=rows["txt_ids"],
            img_ids=places.expand(len(latents), *places.shape[1:]),
            joint_attention_kwargs=self.options.attention_kwargs,
            return_dict=False,
        )[0][:, : latents.shape[1]]

    def _guidance_input(self, latents: Tensor) -> Tensor | None:
        return self.told_guidance(latents)

    def latents_to_decode(self, latents: Tensor) -> Tensor:
        places = self._on_grid(latents)
        mean, std = self._statistics(places)
        return self.pipe._unpatchify_latents(places * std + mean)

    def latents_from_encoded(self, encoded: Tensor) -> Tensor:
        mean, std = self._statistics(encoded)
        return self.pipe._pack_latents((self.pipe._patchify_latents(encoded) - mean) / std)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        statistics = self.pipe.vae.bn
        variance = statistics.running_var.view(1, -1, 1, 1) + self.pipe.vae.config.batch_norm_eps
        return statistics.running_mean.view(1, -1, 1, 1).to(like), variance.sqrt().to(like)


class Flux2Klein(Flux2):
    """FLUX.2 klein: the same latents, guided by a second pass for the empty prompt unless it is distilled."""

    pipelines = ("Flux2KleinPipeline",)

    @property
    def guided(self) -> bool:
        return self.guidance > 1 and not self.pipe.config.is_distilled

    def _guidance_input(self, latents: Tensor) -> Tensor | None:
        return None


def empirical_shift(tokens: int, steps: int) -> float:
    """The mu of FLUX.2's schedule: linear in the tokens at 10 and at 200 steps, and in the steps between."""
    few, many = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return many
    slope = (many - few) / 190
    return slope * steps + many - 200 * slope
