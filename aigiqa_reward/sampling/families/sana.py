"""Sana and PixArt: transformers on plain latents with masked texts, sizes rounded to the nearest trained one."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from aigiqa_reward.sampling.families.base import Family, Rows


class _Binned(Family):
    """Text with a mask, and `use_resolution_binning`: sampled at the nearest trained size, then resized and cropped."""

    text_inputs: ClassVar[tuple[str, ...]] = ("encoder_hidden_states", "encoder_attention_mask")
    bins: ClassVar[Mapping[int, int]]  # px of the pipeline's list of trained sizes, by the transformer's sample size

    def encoded(self, prompts: Sequence[str], **more: Any) -> Any:
        texts, mask, negatives, negative_mask = super().encoded(prompts, **more)
        return texts, negatives, mask, negative_mask

    def wanted_size(self) -> tuple[int, int]:
        side = self.pipe.transformer.config.sample_size * self.pipe.vae_scale_factor
        return self.options.height or side, self.options.width or side

    def size(self) -> tuple[int, int]:
        wanted = self.wanted_size()
        if not self.options.use_resolution_binning:
            return wanted
        trained = self.pipe.transformer.config.sample_size
        if trained not in self.bins:
            raise ValueError(
                f"use_resolution_binning: {type(self.pipe).__name__} lists no trained sizes for a transformer of "
                f"sample size {trained}; pass use_resolution_binning=False"
            )
        ratios = getattr(sys.modules[type(self.pipe).__module__], f"ASPECT_RATIO_{self.bins[trained]}_BIN")
        return self.pipe.image_processor.classify_height_width_bin(*wanted, ratios=ratios)

    def finish(self, output: Tensor) -> Tensor:
        """Drop the variance that some denoisers predict as well."""
        config = self.pipe.transformer.config
        return output.chunk(2, dim=1)[0] if config.out_channels // 2 == config.in_channels else output

    def _decoded(self, latents: Tensor) -> Tensor:
        images, (height, width) = super()._decoded(latents), self.wanted_size()
        same = images.shape[-2:] == (height, width)
        return images if same else self.pipe.image_processor.resize_and_crop_tensor(images, width, height)


class Sana(_Binned):
    """Sana: flow matching by DPM-Solver++, latents of a deep compression autoencoder in float32."""

    pipelines = ("SanaPipeline",)
    flow: ClassVar[bool] = True
    float32_noise: ClassVar[bool] = True
    bins: ClassVar[Mapping[int, int]] = {128: 4096, 64: 2048, 32: 1024, 16: 512}

    def wanted_size(self) -> tuple[int, int]:
        return self.options.height or 1024, self.options.width or 1024

    def denoise(self, latents: Tensor, time: Tensor, rows: Rows, shared: Mapping[str, Tensor]) -> Tensor:
        transformer = self.pipe.transformer
        texts: Any = rows["encoder_hidden_states"]
        return transformer(
            latents.to(transformer.dtype),
            encoder_hidden_states=texts.to(transformer.dtype),
            encoder_attention_mask=rows["encoder_attention_mask"],
            timestep=time.expand(len(latents)) * transformer.config.timestep_scale,
            return_dict=False,
            attention_kwargs=self.options.attention_kwargs,
        )[0].float()


class PixArt(_Binned):
    """PixArt-alpha and PixArt-Sigma: a DiT with cross-attention to the text, on Stable Diffusion's latents."""

    pipelines = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    scales_noise: ClassVar[bool] = True
    bins: ClassVar[Mapping[int, int]] = {256: 2048, 128: 1024, 64: 512, 32: 256}

    def denoise(self, latents: Tensor, time: Tensor, rows: Rows, shared: Mapping[str, Tensor]) -> Tensor:
        return self.pipe.transformer(
            latents,
            **rows,
            timestep=time.expand(len(latents)),
            added_cond_kwargs=self._sizes(latents),
            return_dict=False,
        )[0]

    def _sizes(self, latents: Tensor) -> dict[str, Tensor | None]:
        alpha = type(self.pipe).__name__ == "PixArtAlphaPipeline"
        if not alpha or self.pipe.transformer.config.sample_size != 128:  # inputs of PixArt-alpha at 1024 px
            return {"resolution": None, "aspect_ratio": None}
        height, width = self.size()
        values = {"resolution": [height, width], "aspect_ratio": [height / width]}
        return {name: latents.new_tensor(value).repeat(len(latents), 1) for name, value in values.items()}
