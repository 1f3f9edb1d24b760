"""What transformers on packed latents share: one pass for each branch of guidance, and guidance as an input."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from aigiqa_reward import images as pixels

Rows: TypeAlias = Mapping[str, Tensor | list[Tensor] | None]
"""Named inputs of a denoiser of which row i belongs to candidate i: tensors, or lists of tensors of unequal length."""


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """The arguments of a pipeline's call that a family serves, named as the pipelines name them.

    Where the caller gave none, a pipeline's own default stands; None where the pipeline has no such argument.
    """

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
    def of(cls, pipe: Any, given: Mapping[str, Any]) -> SamplingOptions:
        """Options for a call of `pipe` with the arguments `given`.

        Raises:
            ValueError: an argument that our own loop does not know how to serve.
        """
        known = {field.name for field in fields(cls)}
        parameters = inspect.signature(type(pipe).__call__).parameters
        served = sorted(known & set(parameters))
        for name, value in given.items():
            if name not in served and value is not None:
                raise ValueError(
                    f"{name}: this way of sampling runs the loop of {type(pipe).__name__} itself and does not serve "
                    f"that argument; leave it out, or sample with plain best of N. It serves {', '.join(served)}"
                )
        values = {name: parameters[name].default for name in served if parameters[name].default is not None}
        values |= {name: value for name, value in given.items() if value is not None}
        options = cls(**values)
        if isinstance(options.negative_prompt, list | tuple):
            raise TypeError("negative_prompt: expected one text for all candidates, got a list")
        return options


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What a denoiser is told of the prompts, one row a candidate.

    Attributes:
        positive: named inputs for the prompts.
        negative: the same names for the negative prompts; None without classifier-free guidance.
    """

    positive: Rows
    negative: Rows | None = None

    def __getitem__(self, rows: Sequence[int]) -> Conditioning:
        """The rows at these places; a place may come several times."""
        return Conditioning(
            positive=_at(self.positive, rows),
            negative=None if self.negative is None else _at(self.negative, rows),
        )

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Rows of several conditionings of one call, in order."""
        negatives = [part.negative for part in parts if part.negative is not None]
        return Conditioning(
            positive=joined([part.positive for part in parts]),
            negative=joined(negatives) if negatives else None,
        )


def _at(rows: Rows, places: Sequence[int]) -> Rows:
    def take(value: Tensor | list[Tensor] | None) -> Tensor | list[Tensor] | None:
        return (
            [value[place] for place in places]
            if isinstance(value, list)
            else value
            if value is None
            else value[torch.as_tensor(places, dtype=torch.long, device=value.device)]
        )

    return {name: take(value) for name, value in rows.items()}


def joined(parts: Sequence[Rows]) -> dict[str, Any]:
    """Several rows one after the other, name by name.

    Texts of unequal length are padded with zeros, which their mask (NAME_mask, None for "all of it") then hides.

    Raises:
        ValueError: texts of unequal length without a mask.
    """
    result: dict[str, Any] = {}
    for name, first in parts[0].items():
        values: list[Any] = [part[name] for part in parts]
        if name.endswith("_mask") and name.removesuffix("_mask") in parts[0]:
            values = _masks(parts, name)
        if isinstance(first, list):
            result[name] = [entry for value in values for entry in value]
        elif all(value is None for value in values):
            result[name] = None
        else:
            if len({value.shape[1:] for value in values}) > 1 and f"{name.removesuffix('_mask')}_mask" not in parts[0]:
                raise ValueError(f"{name}: expected equal shapes to join, got {[tuple(v.shape) for v in values]}")
            result[name] = torch.cat(_padded(values))
    return result


def _masks(parts: Sequence[Rows], name: str) -> list[Any]:
    """Masks of all parts; all None where there is nothing to hide."""
    texts: list[Any] = [part[name.removesuffix("_mask")] for part in parts]
    masks = [part[name] for part in parts]
    if all(mask is None for mask in masks) and len({text.shape[1] for text in texts}) == 1:
        return masks
    whole = [text.new_ones(text.shape[:2], dtype=torch.int64) for text in texts]
    return [whole[place] if mask is None else mask for place, mask in enumerate(masks)]


def _padded(values: Sequence[Tensor]) -> list[Tensor]:
    """Tensors (B, L, ...) with zeros at the end of the shorter ones."""
    if values[0].ndim < 2:
        return list(values)
    longest = max(value.shape[1] for value in values)
    return [F.pad(v, (*[0] * 2 * (v.ndim - 2), 0, longest - v.shape[1])) for v in values]


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where sampling starts.

    Attributes:
        latents: (B, ...) noise, in the layout in which the pipeline's scheduler sees it.
        shared: named inputs of the denoiser that all candidates have in common (places of the latents' tokens).
    """

    latents: Tensor
    shared: Mapping[str, Tensor]


class Family(ABC):
    """One architecture of diffusers' text-to-image pipelines, taken apart.

    The parts run the pipeline's own modules and methods, one for one as its `__call__` does; what is left out is the
    loop, which `sampling.rollout` holds. Nothing here changes the pipeline. Gradients flow wherever the caller lets
    them.

    Attributes:
        pipelines: names of the classes of diffusers that it serves.
        denoiser_name: the pipeline's attribute that holds the denoiser.
        scales_noise: whether the pipeline multiplies initial latents by its scheduler's `init_noise_sigma`.
        flow: whether the denoiser was trained by flow matching: it predicts noise minus image.
        one_pass: whether the prompt's and the negative prompt's predictions are made in one call of twice the rows.
        pipe: the pipeline.
        options: the arguments of its call.
    """

    pipelines: ClassVar[tuple[str, ...]]
    denoiser_name: ClassVar[str] = "transformer"
    scales_noise: ClassVar[bool] = False
    flow: ClassVar[bool] = False
    one_pass: ClassVar[bool] = True

    def __init__(self, pipe: Any, options: SamplingOptions) -> None:
        self.pipe = pipe
        self.options = options

    # ----------------------------------------------------------------------------------------- what differs

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of (B,) prompts, by the pipeline's own text encoders."""

    @abstractmethod
    def denoise(self, latents: Tensor, time: Tensor, rows: Rows, shared: Mapping[str, Tensor]) -> Tensor:
        """The denoiser's output for one branch, of the latents' shape.

        Args:
            latents: (B, ...) scaled as the scheduler wants a model's input.
            time: () the step's entry of `scheduler.timesteps`, or (B,) one for each row.
            rows: `positive`, `negative`, or both joined.
            shared: of `Start`.
        """

    @abstractmethod
    def start(self, generators: Sequence[torch.Generator], conditioning: Conditioning) -> Start:
        """Noise as the pipeline draws it, candidate i from generator i."""

    @abstractmethod
    def set_timesteps(self, scheduler: Any, latents: Tensor) -> None:
        """Tell a scheduler the steps that the pipeline would take from these latents."""

    @abstractmethod
    def latents_to_decode(self, latents: Tensor) -> Tensor:
        """What the VAE's decoder takes: unpacked, scaled and shifted."""

    @abstractmethod
    def latents_from_encoded(self, encoded: Tensor) -> Tensor:
        """Latents as the scheduler sees them, of what the VAE's encoder gives: the inverse of `latents_to_decode`."""

    # ----------------------------------------------------------------------------------------- what is shared

    @property
    def denoiser(self) -> Any:
        """The network that is called once a step."""
        return getattr(self.pipe, self.denoiser_name)

    @property
    def guidance(self) -> float:
        """Weight w of classifier-free guidance."""
        return float(self.options.guidance_scale or 0.0)

    @property
    def guided(self) -> bool:
        """Whether there is a second branch for the negative prompt."""
        return self.guidance > 1

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes."""
        return self.pipe._execution_device

    def predict(
        self, latents: Tensor, time: Tensor, conditioning: Conditioning, shared: Mapping[str, Tensor]
    ) -> Tensor:
        """The model's output after guidance, of the latents' shape; what the scheduler steps with."""
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
        """Classifier-free guidance (Ho & Salimans 2022): negative + w (positive - negative)."""
        return negative + self.guidance * (positive - negative)

    def finish(self, output: Tensor) -> Tensor:
        """What the pipeline does to the output before the scheduler's step."""
        return output

    def branch(self, name: str) -> AbstractContextManager[Any]:
        """Diffusers' caches of a denoiser tell the branches of guidance apart by name."""
        context = getattr(self.denoiser, "cache_context", None)
        return nullcontext() if context is None or self.one_pass else context(name)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), nominally in [0, 1], not clamped, from latents without noise; differentiable."""
        with self._without_overflow(latents):
            return self._decoded(latents)

    def encode_images(self, images: Tensor) -> Tensor:
        """Latents without noise, laid out, scaled and shifted as the scheduler sees them, in at least float32.

        Where the encoder gives a distribution, its mode is taken, so that an image has the same latents whenever it is
        encoded. (Diffusers' FLUX pipelines that take images do so too; its training scripts draw a sample. The
        deviation of a trained VAE is a small part of its latents'.)

        Args:
            images: (B, 3, H, W) in [0, 1], of the size that is sampled.

        Raises:
            ValueError: images of another size.
        """
        wanted = self.size()
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, *wanted):
            raise ValueError(
                f"images: expected (B, 3, {wanted[0]}, {wanted[1]}), as the pipeline is asked to sample, got shape "
                f"{tuple(images.shape)}; resize them, or pass their height and width"
            )
        with self._without_overflow(images):
            latents = self.latents_from_encoded(self._encoded(pixels.to_vae(images.to(self.pipe.vae.dtype))))
        return latents.to(torch.promote_types(latents.dtype, torch.float32))

    @contextmanager
    def _without_overflow(self, given: Tensor) -> Iterator[None]:
        """With the VAE in float32, if it is one that float16 is too narrow for, whoever would narrow it."""
        vae, kind = self.pipe.vae, given.device.type
        if not getattr(vae.config, "force_upcast", False):
            yield
            return
        narrowed = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        with torch.autocast(kind, enabled=False) if narrowed else nullcontext():
            if vae.dtype != torch.float16:
                yield
                return
            if torch.is_grad_enabled() and given.requires_grad:
                raise ValueError(
                    "the pipeline's VAE overflows in float16 (its configuration says force_upcast), and cannot change "
                    "its type below a gradient; load it in bfloat16, or call pipe.vae.to(torch.float32)"
                )
            vae.to(torch.float32)
            try:
                yield
            finally:
                vae.to(torch.float16)

    def _encoded(self, frames: Tensor) -> Tensor:
        """What the VAE's encoder says of images (B, 3, H, W) in [-1, 1]."""
        result = self.pipe.vae.encode(frames)
        if hasattr(result, "latent_dist"):
            return result.latent_dist.mode()
        return result.latents if hasattr(result, "latents") else result.latent  # the deep compression autoencoder's

    def _decoded(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        decoded = vae.decode(self.latents_to_decode(latents.to(vae.dtype)), return_dict=False)[0]
        return pixels.from_vae(decoded[:, :, 0] if decoded.ndim == 5 else decoded)

    def as_passed(self, latents: Tensor, scheduler: Any) -> Tensor:
        """Initial latents (B, ...) in the form in which the pipeline's call takes them as `latents=`."""
        return latents / scheduler.init_noise_sigma if self.scales_noise else latents

    def as_started(self, latents: Tensor, scheduler: Any) -> Tensor:
        """Initial latents that the pipeline has drawn, for a scheduler whose steps are set only now.

        Some schedulers know their initial deviation only then, and the pipeline has multiplied by its own's.
        """
        wanted, used = (getattr(s, "init_noise_sigma", 1.0) for s in (scheduler, self.pipe.scheduler))
        return latents / used * wanted if self.scales_noise and wanted != used else latents

    def marked(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), nominally in [0, 1], with the pipeline's watermark, where it has one; no gradients."""
        return images

    def flagged(self, images: Tensor) -> list[bool]:
        """Whether the pipeline's safety checker would withhold the images; never, where there is none."""
        return [False] * len(images)

    # ----------------------------------------------------------------------------------------- for the adapters

    def encoded(self, prompts: Sequence[str], **more: Any) -> Any:
        """`pipe.encode_prompt` of these prompts with those of the options that it takes, and `more`."""
        function = self.pipe.encode_prompt
        taken = inspect.signature(function).parameters
        values: dict[str, Any] = {
            name: value
            for name in taken
            if (value := getattr(self.options, name, None)) is not None and name != "negative_prompt"
        }
        values |= {"prompt": list(prompts), "device": self.device, "num_images_per_prompt": 1} | more
        if "lora_scale" in taken and (scale := self.lora_scale) is not None:
            values["lora_scale"] = scale
        return function(**{name: value for name, value in values.items() if name in taken})

    @property
    def attention(self) -> dict[str, Any] | None:
        """Arguments for the attention processors, among them a LoRA's scale."""
        options = self.options
        return options.cross_attention_kwargs or options.joint_attention_kwargs or options.attention_kwargs

    @property
    def lora_scale(self) -> float | None:
        """Strength of LoRA layers that the caller asked for."""
        return (self.attention or {}).get("scale")

    def negatives(self, prompts: Sequence[str]) -> list[str]:
        """The negative prompt of each row."""
        return [self.options.negative_prompt or ""] * len(prompts)

    def size(self) -> tuple[int, int]:
        """Height and width in pixels that the latents stand for."""
        side = self.pipe.default_sample_size * self.pipe.vae_scale_factor
        return self.options.height or side, self.options.width or side

    def draw(self, generators: Sequence[torch.Generator], channels: int, dtype: torch.dtype) -> Any:
        """`pipe.prepare_latents` for these generators; some pipelines give places of the tokens besides."""
        height, width = self.size()
        return self.pipe.prepare_latents(
            len(generators), channels, height, width, dtype, self.device, list(generators), None
        )

    def retrieve_timesteps(self, scheduler: Any, *, sigmas: Iterable[float] | None = None, **more: Any) -> None:
        """As the pipelines' function of that name: the caller's own steps, or sigmas, or a number of steps."""
        options = self.options
        own = {"timesteps": options.timesteps, "sigmas": options.sigmas}
        for name, value in own.items():
            if value is not None and name not in inspect.signature(scheduler.set_timesteps).parameters:
                raise ValueError(
                    f"{name}: {type(scheduler).__name__} does not take its own; leave the argument out, or use a "
                    "scheduler that does"
                )
        if options.timesteps is not None:
            scheduler.set_timesteps(timesteps=options.timesteps, device=self.device, **more)
        elif options.sigmas is not None or sigmas is not None:
            given = options.sigmas if options.sigmas is not None else sigmas
            scheduler.set_timesteps(sigmas=given, device=self.device, **more)
        else:
            scheduler.set_timesteps(options.num_inference_steps, device=self.device, **more)


def linear_shift(tokens: int, scheduler: Any, *, highest: float = 1.15) -> float:
    """The mu of a dynamically shifted schedule, linear in the number of image tokens, as SD3 and FLUX have it."""
    get = scheduler.config.get
    low, high = get("base_image_seq_len", 256), get("max_image_seq_len", 4096)
    first, last = get("base_shift", 0.5), get("max_shift", highest)
    slope = (last - first) / (high - low)
    return tokens * slope + first - slope * low


class TwoPass(Family):
    """Prompts and negative prompts are encoded alike and predicted apart; channels are packed by four."""

    one_pass: ClassVar[bool] = False

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning(
            positive=self.rows(prompts), negative=self.rows(self.negatives(prompts)) if self.guided else None
        )

    @abstractmethod
    def rows(self, texts: Sequence[str]) -> Rows:
        """Inputs of the denoiser for these texts."""

    @property
    def channels(self) -> int:
        """Of the latents before they are packed."""
        return self.pipe.transformer.config.in_channels // 4

    def told_guidance(self, latents: Tensor) -> Tensor:
        """The guidance scale (B,) that a distilled denoiser is told."""
        return latents.new_full((len(latents),), float(self.options.guidance_scale or 0), dtype=torch.float32)


class TrueGuidance(TwoPass):
    """Guided by `true_cfg_scale`, and only where there is a negative prompt; `guidance_scale` is an input."""

    @property
    def guidance(self) -> float:
        return float(self.options.true_cfg_scale or 0.0)

    @property
    def guided(self) -> bool:
        return self.guidance > 1 and self.options.negative_prompt is not None
