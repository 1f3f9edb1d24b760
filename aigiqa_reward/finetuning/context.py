"""The parts of a training that algorithms use: pipeline, adapter, reward, reference model, processes."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from aigiqa_reward.finetuning.batch import Batch
from aigiqa_reward.finetuning.config import FinetuneConfig
from aigiqa_reward.finetuning.lora import LoRA
from aigiqa_reward.finetuning.optimizers import accelerator_of
from aigiqa_reward.images import finite_rows
from aigiqa_reward.rewards.bound import BoundReward
from aigiqa_reward.rewards.composite import CompositeReward
from aigiqa_reward.rewards.reward import Reward
from aigiqa_reward.sampling.families import Conditioning
from aigiqa_reward.sampling.pipeline_utils import moves
from aigiqa_reward.sampling.rollout import Prediction, Rollout, State
from aigiqa_reward.types import RewardFunction, RewardOutput
from aigiqa_reward.utils.isolation import check_gradients_allowed, without_autocast

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

REMEMBERED = 512
"""Number of prompts whose conditioning is cached: 2 GB at FLUX's 4 MB per prompt."""


@contextmanager
def with_gradients() -> Iterator[None]:
    """Context with gradients switched on and autocast off, whatever the caller's are; refuses torch.inference_mode."""
    check_gradients_allowed("finetune")
    with torch.enable_grad(), without_autocast():
        yield


@dataclass(kw_only=True, eq=False)
class TrainingContext:
    """Pipeline, adapter, reward and processes of a training.

    Args:
        rollout: sampler over the pipeline's parts, with the arguments that training samples with.
        lora: the trained adapter.
        reward: a Reward or any RewardFunction, frozen.
        accelerator: device, precision and processes.
        checkpointed: whether to recompute activations of denoiser and decoder in the backward pass.
        ceiling: total above which an image gets no gradient; None for no ceiling.
        penalty: weight of the KL penalty, `kl_coeff`.
        preview: the rollout with a smaller decoder, for the images to train on; None for the same one.
    """

    rollout: Rollout
    lora: LoRA
    reward: RewardFunction
    accelerator: Accelerator
    checkpointed: bool = False
    ceiling: float | None = None
    penalty: float = 0.0
    preview: Rollout | None = None

    def __post_init__(self) -> None:
        self.bound = BoundReward(self.reward)
        self.seen: Counter[str] = Counter()  # images of this step, and those with broken pixels or a broken total
        self.old: Mapping[str, Tensor] = {}  # weights that an algorithm keeps from round to round; in checkpoints
        self._conditionings: dict[str, Conditioning] = {}

    @property
    def decoding(self) -> Rollout:
        """The rollout that decodes images to train on; those of validations are decoded by `rollout`."""
        return self.preview or self.rollout

    @property
    def members(self) -> Mapping[str, float]:
        """Weights of the rewards of a mixture by name, which sum to 1; empty for one reward."""
        return self.reward.weights if isinstance(self.reward, CompositeReward) else {}

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode B prompts, each distinct one once, in the precision of the text encoders."""
        distinct = dict.fromkeys(prompts)
        found = {prompt: known for prompt in distinct if (known := self._conditionings.pop(prompt, None)) is not None}
        with torch.autocast(self.rollout.family.device.type, enabled=False):
            found |= {prompt: self.rollout.encode([prompt]) for prompt in distinct if prompt not in found}
        self._conditionings |= found  # at the end: the least recently used come first
        while len(self._conditionings) > REMEMBERED:
            del self._conditionings[next(iter(self._conditionings))]
        return Conditioning.cat([found[prompt] for prompt in prompts])

    def start(self, batch: Batch, purpose: str = "noise") -> State:
        """Draw noise for the rows of a batch, each with its own generator."""
        return self.rollout.start(self.encode(batch.prompts), batch.generators(purpose))

    def predict(self, state: State, *, alone: bool = False) -> Prediction:
        """Run the denoiser, with its activations recomputed in the backward pass if `checkpointed`.

        With `alone` no other step has gradients: a denoiser that checkpoints its blocks needs none around the whole.
        """
        blocks = alone and bool(getattr(self.lora.denoiser, "is_gradient_checkpointing", False))
        return self.rollout.predict(state, checkpointed=self.checkpointed and torch.is_grad_enabled() and not blocks)

    def first_state(self, prompt: str) -> State:
        """Return one candidate before its first step, for the dtype, the shared inputs and the levels of sampling."""
        return self.rollout.start(self.encode([prompt]), [torch.Generator("cpu").manual_seed(0)])

    def predict_at(
        self, latents: Tensor, times: Tensor, conditioning: Conditioning, shared: Mapping[str, Tensor]
    ) -> Tensor:
        """Run the denoiser on noised latents (B, ...), each at its own time (B,); recomputed if `checkpointed`."""
        arguments, predict = (latents, times.to(latents.device), conditioning, shared), self.rollout.family.predict
        if self.checkpointed and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(predict, *arguments, use_reentrant=False))
        return predict(*arguments)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images (B, 3, H, W), differentiable and not clamped; recomputed if `checkpointed`."""
        blocks = bool(getattr(self.decoding.pipe.vae, "is_gradient_checkpointing", False))
        if self.checkpointed and torch.is_grad_enabled() and not blocks:
            return cast(Tensor, checkpoint(self.decoding.decode, latents, use_reentrant=False))
        return self.decoding.decode(latents)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Context without the trained adapter and without gradients: the reference model."""
        with torch.no_grad(), self.lora.off():
            yield

    @contextmanager
    def unpenalized(self) -> Iterator[None]:
        """Context without the KL penalty."""
        penalty, self.penalty = self.penalty, 0.0
        try:
            yield
        finally:
            self.penalty = penalty

    def distance(self, state: State, prediction: Prediction) -> Tensor:
        """Return the mean squared difference (B,) between a prediction and the reference model's.

        The KL divergence between the two sampling steps is this times a factor that depends only on the step. Where
        the latents depend on the adapter, the gradient also flows through the reference model's prediction.
        """
        if torch.is_grad_enabled() and state.latents.requires_grad:
            with self.lora.off():
                own = self.lora.checkpoint(self.rollout.predict, state).output
        else:
            with self.reference():
                own = self.rollout.predict(state).output
        least = torch.promote_types(own.dtype, torch.float32)
        return (prediction.output.to(least) - own.to(least)).square().flatten(1).mean(dim=1)

    @contextmanager
    def gradient_checkpointing(self) -> Iterator[None]:
        """Context in which denoiser and decoder recompute their blocks, if `checkpointed` or already enabled."""
        denoiser, decoder = self.lora.denoiser, self.decoding.pipe.vae
        modules = [m for part in (denoiser, decoder) for m in part.modules() if hasattr(m, "gradient_checkpointing")]
        before = [(m.gradient_checkpointing, getattr(m, "_gradient_checkpointing_func", None)) for m in modules]
        if self.checkpointed or getattr(denoiser, "is_gradient_checkpointing", False):
            # Recomputed blocks must see the adapter's scale of the forward pass: `distance` runs some without it.
            denoiser.enable_gradient_checkpointing(self.lora.checkpoint)
        if self.checkpointed and getattr(decoder, "_supports_gradient_checkpointing", False):
            decoder.enable_gradient_checkpointing()
        try:
            yield
        finally:
            for module, (wanted, how) in zip(modules, before, strict=True):
                module.gradient_checkpointing, module._gradient_checkpointing_func = wanted, how

    def score(self, images: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Score images (B, 3, H, W), differentiably and in the reward's precision."""
        return self.bound(images, prompts)

    def note(self, images: Tensor, totals: Tensor | None = None) -> Tensor:
        """Count images (B, 3, H, W) of this step, and return which (B,) have finite pixels and, if given, totals."""
        pixels = finite_rows(images)
        fine = pixels if totals is None else pixels & totals.isfinite().to(pixels.device)
        self.seen.update(images=len(fine), pixels=int((~pixels).sum()), totals=int((pixels & ~fine).sum()))
        return fine

    def nothing_finite(self) -> bool:
        """Whether no image of this step has finite pixels and a finite total, in any process."""
        fine = self.seen["images"] - self.seen["pixels"] - self.seen["totals"]
        return not bool(self.gather(torch.tensor([fine], device=self.accelerator.device)).any())

    def broken(self) -> str:
        """Return what is not finite among the images of this step; an empty text if all are, or none was made."""
        images, pixels, totals = (self.seen[name] for name in ("images", "pixels", "totals"))
        if totals:
            return f"{self.bound.name} gave NaN or infinity for {totals} of {images - pixels} finite images; "
        return f"{pixels} of {images} images have NaN or infinite pixels; " if pixels else ""

    def capped(self, total: Tensor) -> Tensor:
        """Clamp totals (B,) to the ceiling, so that the gradient above it is zero."""
        return total if self.ceiling is None else total.clamp(max=self.ceiling)

    def above_ceiling(self, total: Tensor) -> dict[str, Tensor]:
        """Return which totals (B,) get no gradient from `capped`, by the name to log; nothing without a ceiling."""
        return {} if self.ceiling is None else {"above_ceiling": (total.detach() > self.ceiling).float()}

    def gather(self, values: Tensor) -> Tensor:
        """Gather the rows of all processes, (B,) to (processes * B,), in the order of the processes."""
        return cast(Tensor, self.accelerator.gather(values))


def _with_decoder(pipe: Any, source: str) -> Any:
    """Return a copy of a pipeline, which shares all of its parts but the VAE: an AutoencoderTiny, frozen."""
    from diffusers import AutoencoderKL, AutoencoderTiny  # pyright: ignore[reportPrivateImportUsage]

    served: Any = (AutoencoderKL, AutoencoderTiny)
    if not isinstance(pipe.vae, served):
        raise ValueError(
            f"decoder: expected None, got {source!r}: {type(pipe).__name__} prepares latents for its "
            f"{type(pipe.vae).__name__} in a form that an AutoencoderTiny does not take; leave it out"
        )
    try:
        config: Any = AutoencoderTiny.load_config(source)
        kind = config.get("_class_name")
        tiny: Any = AutoencoderTiny.from_pretrained(source) if kind == "AutoencoderTiny" else None
    except OSError as error:
        raise ValueError(
            f"decoder: expected a folder or Hub id of an AutoencoderTiny, got {source!r} ({error})"
        ) from error
    if tiny is None:
        raise ValueError(
            f"decoder: expected an AutoencoderTiny in {source}, got {kind}; pass one such as madebyollin/taesd"
        )
    tiny = tiny.to(device=pipe.vae.device, dtype=pipe.vae.dtype).requires_grad_(False).eval()
    channels, wanted = tiny.config.latent_channels, pipe.vae.config.latent_channels
    if channels != wanted:
        raise ValueError(
            f"decoder: expected {wanted} latent channels as in the pipeline's VAE, got {channels} in {source}; pass "
            "the one that was made for this model"
        )
    with torch.no_grad():
        scale = tiny.decode(torch.zeros(1, channels, 2, 2).to(tiny.device, tiny.dtype)).sample.shape[-1] // 2
    if scale != pipe.vae_scale_factor:
        raise ValueError(
            f"decoder: expected {pipe.vae_scale_factor} pixels per latent side as in the pipeline's VAE, got {scale} "
            f"in {source}; pass the one that was made for this model"
        )
    other = copy.copy(pipe)
    other.vae = tiny
    return other


def create_context(
    pipe: DiffusionPipeline, reward: RewardFunction, config: FinetuneConfig, folder: Path, report_to: str | None
) -> TrainingContext:
    """Add the adapter to a pipeline, and check that the pipeline can be trained."""
    rollout = Rollout(pipe, need="fine-tuning", **config.sampling)
    if moves(pipe, [rollout.family.denoiser, rollout.pipe.vae]):
        raise ValueError(
            "pipe: expected all parts on one device, got a pipeline with CPU offload or a device_map, or a denoiser or "
            "VAE with group offload, which a backward pass does not support; load it without, call pipe.to(device), "
            "and save memory with a base in nf4 (--quantize nf4), gradient_checkpointing and small batches; "
            "text encoders may have group offload"
        )
    for name, part in (("denoiser", rollout.family.denoiser), ("decoder", rollout.pipe.vae)):
        if config.mixed_precision != "fp16" and any(weight.dtype == torch.float16 for weight in part.parameters()):
            raise ValueError(
                f"pipe: its {name} is in float16, in which small gradients vanish; load it in bfloat16 "
                "(torch_dtype=torch.bfloat16), or pass mixed_precision='fp16', which scales them"
            )
    preview = Rollout(_with_decoder(pipe, config.decoder), **config.sampling) if config.decoder else None
    accelerator = accelerator_of(config, folder, rollout.family.device, report_to)
    settings = {"rank": config.rank, "alpha": config.lora_alpha, "targets": config.target_modules, "seed": config.seed}
    ceiling = config.reward_ceiling
    if isinstance(ceiling, str):  # "auto"
        ceiling = 1.0 if isinstance(reward, Reward) and reward.spec.embedded else None
    return TrainingContext(
        rollout=rollout,
        lora=LoRA(rollout.family, **settings),
        reward=reward,
        accelerator=accelerator,
        checkpointed=config.gradient_checkpointing,
        ceiling=ceiling,
        penalty=config.kl_coeff or 0.0,
        preview=preview,
    )
