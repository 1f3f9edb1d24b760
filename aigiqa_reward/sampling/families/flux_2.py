"""FLUX.2: packed latents with explicit positions, normalized by the VAE's batch statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from aigiqa_reward.sampling.families.base import Rows, TwoPass


class Flux2(TwoPass):
    """FLUX.2 dev, whose guidance is embedded; text to image, without condition images."""

    pipelines = ("Flux2Pipeline",)

    @property
    def guided(self) -> bool:
        return False

    def rows(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return dict(zip(("encoder_hidden_states", "txt_ids"), self.encoded(texts), strict=True))

    def shift(self, tokens: int, scheduler: Any) -> float:
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return compute_empirical_mu(tokens, self.options.num_inference_steps)

    def denoise(self, latents: Tensor, time: Tensor, rows: Rows, shared: Mapping[str, Tensor]) -> Tensor:
        positions = shared["img_ids"][:1]
        return self.pipe.transformer(
            hidden_states=latents.to(self.pipe.transformer.dtype),
            timestep=time.expand(len(latents)).to(latents.dtype) / 1000,
            guidance=self.guidance_input(latents),
            **rows,
            img_ids=positions.expand(len(latents), *positions.shape[1:]),
            joint_attention_kwargs=self.options.attention_kwargs,
            return_dict=False,
        )[0][:, : latents.shape[1]]

    def as_passed(self, latents: Tensor, scheduler: Any) -> Tensor:
        return self.unpack(latents)  # the pipeline packs them itself

    def unpack(self, latents: Tensor) -> Tensor:
        height, width = self.size()
        block = self.pipe.vae_scale_factor * 2
        return latents.transpose(1, 2).unflatten(2, (height // block, width // block)).contiguous()

    def pack(self, latents: Tensor) -> Tensor:
        return self.pipe._pack_latents(latents)

    def denormalize(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return self.pipe._unpatchify_latents(latents * std + mean)

    def normalize(self, encoded: Tensor) -> Tensor:
        mean, std = self._statistics(encoded)
        return (self.pipe._patchify_latents(encoded) - mean) / std

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance = (
            value.view(1, -1, 1, 1) for value in (self.pipe.vae.bn.running_mean, self.pipe.vae.bn.running_var)
        )
        return mean.to(like), (variance + self.pipe.vae.config.batch_norm_eps).sqrt().to(like)


class Flux2Klein(Flux2):
    """FLUX.2 klein: the same latents, guided by a second pass for the empty prompt unless it is distilled."""

    pipelines = ("Flux2KleinPipeline",)

    @property
    def guided(self) -> bool:
        return self.guidance > 1 and not self.pipe.config.is_distilled

    def guidance_input(self, latents: Tensor) -> None:
        return None
