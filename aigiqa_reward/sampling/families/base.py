"""What all architectures share: options, conditioning, guidance, the VAE; and what those with packed latents share."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from aigiqa_reward import images as pixels
from aigiqa_reward.utils.checks import check_prompt

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

Rows: TypeAlias = Mapping[str, Tensor | list[Tensor] | None]
"""Named inputs of a denoiser of which row i belongs to candidate i: tensors, or lists of tensors of unequal length."""


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Arguments of a pipeline's call that a family supports; those not given have the pipeline's own defaults."""

    num_inference_steps: int = 50
    timesteps: list[int] | None = None
    sigmas: list[float] | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    guidance_rescale: float = 0.0
    cfg_normalization: bool | float = False
    cfg_truncation: float | None = None
    eta: float = 0.0
    height: int | None = None
    width: int | None = None
    use_resolution_binning: bool = False
    negative_prompt: str | None = None
    clip_skip: int | None = None
    max_sequence_length: int | None = None
    clean_caption: bool | None = None
    complex_human_instruction: list[str] | None = None
    text_encoder_out_layers: tuple[int, ...] | None = None
    original_size: tuple[int, int] | None = None
    crops_coords_top_left: tuple[int, int] = (0, 0)
    target_size: tuple[int, int] | None = None
    cross_attention_kwargs: dict[str, Any] | None = None
    joint_attention_kwargs: dict[str, Any] | None = None
    attention_kwargs: dict[str, Any] | None = None

    @classmethod
    def of(cls, pipe: DiffusionPipeline, given: Mapping[str, Any]) -> SamplingOptions:
        """Collect the options of a call of `pipe` with the arguments `given`; an unsupported one is an error."""
        parameters = inspect.signature(type(pipe).__call__).parameters
        served = sorted({field.name for field in fields(cls)} & set(parameters))
        given = {name: value for name, value in given.items() if value is not None}
        if unknown := [name for name in given if name not in served]:
            raise ValueError(
                f"{unknown[0]}: this sampling method runs the loop of {type(pipe).__name__} itself and does not serve "
                f"that argument; leave it out, or use plain best of N. It serves {', '.join(served)}"
            )
        defaults = {name: parameters[name].default for name in served if parameters[name].default is not None}
        options = cls(**{**defaults, **given})
        check_prompt(options.negative_prompt, "negative_prompt")
        return options


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """Prompts as inputs of a denoiser, one row per candidate."""

    positive: Rows  # named inputs for the prompts
    negative: Rows | None = None  # the same names for the negative prompts; None without classifier-free guidance

    def __getitem__(self, rows: Sequence[int]) -> Conditioning:
        """The rows at these places; a place may come several times."""
        negative = None if self.negative is None else _at(self.negative, rows)
        return Conditioning(positive=_at(self.positive, rows), negative=negative)

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Join the rows of several conditionings of one call, in order."""
        negatives = [part.negative for part in parts if part.negative is not None]
        negative = joined(negatives) if negatives else None
        return Conditioning(positive=joined([part.positive for part in parts]), negative=negative)


def _at(rows: Rows, places: Sequence[int]) -> Rows:
    def take(value: Tensor | list[Tensor] | None) -> Tensor | list[Tensor] | None:
        if isinstance(value, Tensor):
            return value[torch.as_tensor(places, dtype=torch.long, device=value.device)]
        return value if value is None else [value[place] for place in places]

    return {name: take(value) for name, value in rows.items()}


def joined(parts: Sequence[Rows]) -> dict[str, Any]:
    """Join rows name by name; texts of unequal length are padded with zeros, hidden by NAME_mask (None: all counts)."""
    columns: dict[str, list[Any]] = {name: [part[name] for part in parts] for name in parts[0]}
    masked = {name.removesuffix("_mask") for name in columns if name.endswith("_mask")} & columns.keys()
    for name in masked:
        texts, masks = columns[name], columns[f"{name}_mask"]
        if len({text.shape[1] for text in texts}) > 1 or any(mask is not None for mask in masks):
            whole = [text.new_ones(text.shape[:2], dtype=torch.int64) for text in texts]
            columns[f"{name}_mask"] = [one if mask is None else mask for one, mask in zip(whole, masks, strict=True)]
    return {name: _cat(values, padded=name.removesuffix("_mask") in masked) for name, values in columns.items()}


def _cat(values: list[Any], *, padded: bool) -> Any:
    if isinstance(values[0], list):
        return [entry for value in values for entry in value]
    if values[0] is None:
        return None
    if padded:  # (B, L, ...) to the greatest L
        longest = max(value.shape[1] for value in values)
        values = [F.pad(v, (*[0] * 2 * (v.ndim - 2), 0, longest - v.shape[1])) for v in values]
    return torch.cat(values)


class Family(ABC):
    """One architecture of diffusers' text-to-image pipelines, split into its parts.

    They run the pipeline's own modules and methods as its call does, without changing it or disabling gradients.
    """

    pipelines: ClassVar[tuple[str, ...]]  # names of the diffusers classes that it supports
    denoiser_name: ClassVar[str] = "transformer"  # the pipeline's attribute that holds the denoiser
    text_inputs: ClassVar[tuple[str, ...]] = ("encoder_hidden_states",)  # names for what `encode_prompt` returns
    float32_noise: ClassVar[bool] = False  # whether noise is drawn in float32, not in the text embeddings' type
    scales_noise: ClassVar[bool] = False  # whether initial latents are multiplied by `init_noise_sigma`
    flow: ClassVar[bool] = False  # whether it was trained by flow matching: it predicts noise minus image
    standardizes: ClassVar[bool] = False  # whether it uses the VAE's `latents_mean` and `latents_std`
    packing: ClassVar[int] = 1  # pixels of the latents per token
    one_pass: ClassVar[bool] = True  # whether one call of twice the rows predicts for both kinds of prompts

    def __init__(self, pipe: DiffusionPipeline, options: SamplingOptions) -> None:
        self.pipe: Any = pipe
        self.options = options

    @abstractmethod
    def denoise(self, latents: Tensor, time: Tensor, rows: Rows, shared: Mapping[str, Tensor]) -> Tensor:
        """Run the denoiser for one branch; the output has the latents' shape.

        Args:
            latents: (B, ...) scaled as the scheduler wants a model's input.
            time: () entry of `scheduler.timesteps`, or (B,) one per row.
            rows: `positive`, `negative`, or both joined.
            shared: inputs that all candidates share, as `start` returns them.
        """

    @property
    def denoiser(self) -> Any:
        """The network that is called once per step."""
        return getattr(self.pipe, self.denoiser_name)

    @property
    def device(self) -> torch.device:
        """Device on which the pipeline computes."""
        return self.pipe._execution_device

    @property
    def guidance(self) -> float:
        """Weight w of classifier-free guidance."""
        return float(self.options.guidance_scale or 0.0)

    @property
    def guided(self) -> bool:
        """Whether there is a second branch for the negative prompt."""
        return self.guidance > 1

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode (B,) prompts by the pipeline's own text encoders."""
        guided, negatives = self.guided, self.negatives(prompts)
        found = self.encoded(prompts, do_classifier_free_guidance=guided, negative_prompt=negatives)
        # Each output for the prompts, then the same for the negative prompts.
        positive, negative = (dict(zip(self.text_inputs, found[branch::2], strict=True)) for branch in (0, 1))
        return Conditioning(positive=positive, negative=negative if guided else None)

    def encoded(self, prompts: Sequence[str], **more: Any) -> Any:
        """Call `pipe.encode_prompt` with these prompts, those of the options that it takes, and `more`."""
        taken, own = inspect.signature(self.pipe.encode_prompt).parameters, self.options
        attention = own.cross_attention_kwargs or own.joint_attention_kwargs or own.attention_kwargs or {}
        options = {name: getattr(own, name, None) for name in taken if name != "negative_prompt"}
        values = {name: value for name, value in options.items() if value is not None}
        values |= {"prompt": list(prompts), "prompt_2": None, "prompt_3": None, "device": self.device}
        values |= {"num_images_per_prompt": 1, **more}
        if "scale" in attention:  # strength of LoRA layers
            values["lora_scale"] = attention["scale"]
        return self.pipe.encode_prompt(**{name: value for name, value in values.items() if name in taken})

    def negatives(self, prompts: Sequence[str]) -> list[str] | None:
        """The negative prompt of each row."""
        return [self.options.negative_prompt or ""] * len(prompts)

    def size(self) -> tuple[int, int]:
        """Height and width in pixels that the latents represent."""
        side = self.pipe.default_sample_size * self.pipe.vae_scale_factor
        return self.options.height or side, self.options.width or side

    def start(
        self, generators: Sequence[torch.Generator], conditioning: Conditioning
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw noise (B, ...) as the pipeline does, candidate i from generator i; and the denoiser's shared inputs."""
        texts: Any = conditioning.positive[self.text_inputs[0]]
        kind = torch.float32 if self.float32_noise else texts.dtype
        channels = self.denoiser.config.in_channels // self.packing
        sources, size = list(generators), self.size()
        drawn = self.pipe.prepare_latents(len(sources), channels, *size, kind, self.device, sources, None)
        return (drawn, {}) if isinstance(drawn, Tensor) else (drawn[0], {"img_ids": drawn[1]})

    def set_timesteps(self, scheduler: Any, latents: Tensor) -> None:
        """Give a scheduler the steps that the pipeline would take from these latents."""
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps

        options, more = self.options, self.schedule(scheduler, latents)
        more |= {} if options.sigmas is None else {"sigmas": options.sigmas}
        retrieve_timesteps(scheduler, options.num_inference_steps, self.device, options.timesteps, **more)

    def schedule(self, scheduler: Any, latents: Tensor) -> dict[str, Any]:
        """Return the pipeline's own `sigmas` and `mu`, where it sets them."""
        return {}

    def as_started(self, latents: Tensor, scheduler: Any) -> Tensor:
        """Rescale initial latents for a scheduler that knows its initial std only now; the pipeline used its own's."""
        wanted, used = (getattr(s, "init_noise_sigma", 1.0) for s in (scheduler, self.pipe.scheduler))
        return latents / used * wanted if self.scales_noise and wanted != used else latents

    def as_passed(self, latents: Tensor, scheduler: Any) -> Tensor:
        """Convert initial latents (B, ...) to the form in which the pipeline's call takes them as `latents=`."""
        return latents / scheduler.init_noise_sigma if self.scales_noise else latents

    def predict(
        self, latents: Tensor, time: Tensor, conditioning: Conditioning, shared: Mapping[str, Tensor]
    ) -> Tensor:
        """Return the model's output after guidance, of the latents' shape; what the scheduler steps with."""
        if conditioning.negative is None:
            with self.branch("cond"):
                return self.finish(self.denoise(latents, time, conditioning.positive, shared))
        if self.one_pass:
            rows = joined([conditioning.negative, conditioning.positive])
            negative, positive = self.denoise(torch.cat([latents, latents]), time, rows, shared).chunk(2)
        else:
            with self.branch("cond"):
                positive = self.denoise(latents, time, conditioning.positive, shared)
            with self.branch("uncond"):
                negative = self.denoise(latents, time, conditioning.negative, shared)
        return self.finish(self.guide(negative, positive, time))

    def guide(self, negative: Tensor, positive: Tensor, time: Tensor) -> Tensor:
        """Apply classifier-free guidance (Ho & Salimans 2022): negative + w (positive - negative)."""
        return negative + self.guidance * (positive - negative)

    def finish(self, output: Tensor) -> Tensor:
        """Apply what the pipeline does to the output before the scheduler's step."""
        return output

    def branch(self, name: str) -> AbstractContextManager[Any]:
        """Name the branch of guidance, by which diffusers' caches of a denoiser distinguish them."""
        context = getattr(self.denoiser, "cache_context", None)
        return nullcontext() if context is None or self.one_pass else context(name)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents without noise to images (B, 3, H, W), nominally in [0, 1], not clamped; differentiable."""
        with self._without_overflow(latents):
            return self._decoded(latents)

    def encode_images(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [0, 1], of the size that is sampled, to the scheduler's latents without noise.

        They are in at least float32. Where the encoder gives a distribution, its mode is taken, so that an image always
        has the same latents (as diffusers' FLUX pipelines do; its training scripts draw a sample).
        """
        wanted = self.size()
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, *wanted):
            raise ValueError(
                f"images: expected (B, 3, {wanted[0]}, {wanted[1]}), as the pipeline is asked to sample, got shape "
                f"{tuple(images.shape)}; resize them, or pass their height and width"
            )
        with self._without_overflow(images):
            encoded = self._encoded(pixels.to_vae(images.to(self.pipe.vae.dtype)))
            latents = self.pack(self.normalize(encoded))
        return latents.to(torch.promote_types(latents.dtype, torch.float32))

    def unpack(self, latents: Tensor) -> Tensor:
        """Lay latents out as the VAE does."""
        return latents

    def pack(self, latents: Tensor) -> Tensor:
        """Lay latents out as the scheduler sees them."""
        return latents

    def denormalize(self, latents: Tensor) -> Tensor:
        """Undo `normalize`."""
        shift, std = self._statistics(latents)
        return latents * std / getattr(self.pipe.vae.config, "scaling_factor", 1.0) + shift

    def normalize(self, encoded: Tensor) -> Tensor:
        """Shift and scale the VAE's latents to about unit variance."""
        shift, std = self._statistics(encoded)
        return (encoded - shift) * getattr(self.pipe.vae.config, "scaling_factor", 1.0) / std

    def _statistics(self, like: Tensor) -> tuple[Any, Any]:
        """Mean and std of the VAE's latents, as far as its configuration states them and the pipeline uses them."""
        config = self.pipe.vae.config
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if not self.standardizes or mean is None or std is None:
            return getattr(config, "shift_factor", None) or 0.0, 1.0
        shape = (1, -1, *[1] * (like.ndim - 2))
        return like.new_tensor(mean).view(shape), like.new_tensor(std).view(shape)

    @contextmanager
    def _without_overflow(self, given: Tensor) -> Iterator[None]:
        """Keep a VAE that overflows in float16 in float32, outside of float16 autocast."""
        vae, kind = self.pipe.vae, given.device.type
        overflows = getattr(vae.config, "force_upcast", False)
        narrowed = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        half = overflows and vae.dtype == torch.float16
        if half and torch.is_grad_enabled() and given.requires_grad:
            raise ValueError(
                "the pipeline's VAE overflows in float16 (its configuration says force_upcast), and its type cannot "
                "change during backpropagation; load it in bfloat16, or call pipe.vae.to(torch.float32)"
            )
        with torch.autocast(kind, enabled=False) if overflows and narrowed else nullcontext():
            vae.to(torch.float32) if half else None
            try:
                yield
            finally:
                vae.to(torch.float16) if half else None

    def _encoded(self, frames: Tensor) -> Tensor:
        """Run the VAE's encoder on images (B, 3, H, W) in [-1, 1]."""
        result = self.pipe.vae.encode(frames)  # a distribution, or `latents`, or the deep compression one's `latent`
        return result.latent_dist.mode() if hasattr(result, "latent_dist") else result[0]

    def _decoded(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        decoded = vae.decode(self.denormalize(self.unpack(latents.to(vae.dtype))), return_dict=False)[0]
        return pixels.from_vae(decoded[:, :, 0] if decoded.ndim == 5 else decoded)

    def marked(self, images: Tensor) -> Tensor:
        """Apply the pipeline's watermark, where it has one, to images nominally in [0, 1]; without gradients."""
        return images

    def flagged(self, images: Tensor) -> list[bool]:
        """Return whether the pipeline's safety checker, where there is one, would withhold each image."""
        return [False] * len(images)


def linear_shift(tokens: int, scheduler: Any, *, highest: float = 1.15) -> float:
    """Return the mu of a dynamically shifted schedule, linear in the number of image tokens, as in SD3 and FLUX."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    defaults = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": highest}
    return calculate_shift(tokens, *(scheduler.config.get(name, default) for name, default in defaults.items()))


class TwoPass(Family):
    """Architectures with packed latents, whose prompts and negative prompts are encoded and predicted separately."""

    flow: ClassVar[bool] = True
    one_pass: ClassVar[bool] = False
    packing: ClassVar[int] = 4
    own_sigmas: ClassVar[bool] = False  # whether the pipeline gives its sigmas even where the scheduler has flow sigmas

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        negatives = self.negatives(prompts) or []
        return Conditioning(positive=self.rows(prompts), negative=self.rows(negatives) if self.guided else None)

    @abstractmethod
    def rows(self, texts: Sequence[str]) -> Rows:
        """Return inputs of the denoiser for these texts."""

    def schedule(self, scheduler: Any, latents: Tensor) -> dict[str, Any]:
        steps, flow_sigmas = self.options.num_inference_steps, scheduler.config.get("use_flow_sigmas")
        linear = np.linspace(1.0, 1 / steps, steps)  # noise levels before shifting
        sigmas = None if flow_sigmas and not self.own_sigmas else linear
        return {"sigmas": sigmas, "mu": self.shift(latents.shape[1], scheduler)}

    def shift(self, tokens: int, scheduler: Any) -> float:
        """Return the mu of the schedule for a number of image tokens."""
        return linear_shift(tokens, scheduler)

    def guidance_input(self, latents: Tensor) -> Tensor | None:
        """Guidance scale (B,), an input of guidance-distilled denoisers; None for others."""
        if not getattr(self.denoiser.config, "guidance_embeds", True):
            return None
        return latents.new_full((len(latents),), float(self.options.guidance_scale or 0), dtype=torch.float32)


class TrueGuidance(TwoPass):
    """Guided by `true_cfg_scale`, and only where there is a negative prompt; `guidance_scale` is an input."""

    @property
    def guidance(self) -> float:
        return float(self.options.true_cfg_scale or 0.0)

    @property
    def guided(self) -> bool:
        return self.guidance > 1 and self.options.negative_prompt is not None
