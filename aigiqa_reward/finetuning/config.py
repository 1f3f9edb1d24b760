"""Settings of a fine-tuning that do not depend on the algorithm."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

from aigiqa_reward.utils.checks import integer, number

MixedPrecision = Literal["no", "bf16", "fp16"]
Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine"]


def _option(default: Any, text: str) -> Any:
    given: Any = {"default_factory" if callable(default) else "default": default}
    return field(**given, metadata={"help": text})


def _launched() -> MixedPrecision:
    return cast(MixedPrecision, os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Settings of a fine-tuning, apart from pipeline, reward, training data and algorithm.

    Each field's help is in its metadata: `dataclasses.fields(FinetuneConfig)[0].metadata["help"]`.

    Example:
        >>> from aigiqa_reward.finetuning import FinetuneConfig
        >>> FinetuneConfig(max_train_steps=200, sampling={"num_inference_steps": 30}).learning_rate is None
        True
        >>> FinetuneConfig(rank=0)
        Traceback (most recent call last):
            ...
        ValueError: rank: expected an integer of at least 1, got 0; pass rank=1 or more
    """

    rank: int = _option(8, "LoRA rank.")
    lora_alpha: float | None = _option(None, "LoRA alpha; None takes the rank.")
    target_modules: tuple[str, ...] | None = _option(
        None, "Name endings of the layers to adapt; None takes the attention projections."
    )
    train_batch_size: int = _option(4, "Rows per forward pass of the denoiser and process.")
    gradient_accumulation_steps: int = _option(1, "Batches accumulated per optimizer step.")
    gradient_checkpointing: bool = _option(
        False, "Recompute activations of denoiser and decoder in the backward pass to save memory."
    )
    learning_rate: float | None = _option(None, "Learning rate; by default 1e-4, and 3e-4 for ddpo, grpo and nft.")
    lr_scheduler: Schedule = _option("constant", "Learning rate schedule of diffusers.")  # noqa: RUF009
    lr_warmup_steps: int = _option(0, "Optimizer steps of learning rate warmup.")
    max_train_steps: int = _option(500, "Total number of optimizer steps.")
    max_grad_norm: float = _option(1.0, "Maximum gradient norm for clipping.")
    weight_decay: float = _option(1e-4, "Weight decay of AdamW.")
    use_8bit_adam: bool = _option(False, "Use the 8-bit AdamW of bitsandbytes.")
    ema_decay: float = _option(
        0.0, "Decay in [0, 1) of an EMA of the weights, which is then validated and saved; 0 uses none."
    )
    mixed_precision: MixedPrecision = _option(  # noqa: RUF009
        _launched,
        "Precision of denoiser and decoder, by default that of `accelerate launch`, else no; LoRA weights and reward "
        "stay in float32.",
    )
    decoder: str | None = _option(
        None,
        "Folder or Hub id of diffusers' AutoencoderTiny for the pipeline's latents, which decodes the images that the "
        "reward sees in training; validation images are always decoded by the pipeline's VAE.",
    )
    kl_coeff: float | None = _option(
        None,
        "Weight of the KL penalty to the pipeline without the adapter; by default 0.01, 1e-4 for nft, and 0 (none) for "
        "dpo.",
    )
    reward_ceiling: float | Literal["auto"] | None = _option(
        "auto",
        "Total above which an image gets no gradient; auto takes 1 (the best human score) for one embedded reward, "
        "and none for published ones, mixtures and functions.",
    )
    checkpointing_steps: int = _option(100, "Steps between checkpoints; 0 for only one at the end.")
    checkpoints_total_limit: int | None = _option(2, "Checkpoints to keep; None keeps all.")
    validation_steps: int = _option(50, "Optimizer steps between validations.")
    validation_seeds: int = _option(4, "Number of images per validation prompt.")
    patience: int = _option(2, "Consecutive validations with a falling held-out reward before the training stops.")
    sampling: Mapping[str, Any] = _option(
        dict,
        "Arguments of the pipeline call for training and validation images (num_inference_steps, guidance_scale, "
        "height, width, ...).",
    )
    seed: int = _option(0, "Random seed.")
    push_to_hub: bool = _option(False, "Upload the output folder to the Hugging Face Hub.")
    hub_model_id: str | None = _option(None, "Hub repository, by default the folder's name.")

    def __post_init__(self) -> None:
        optional = ("lora_alpha", "learning_rate", "checkpoints_total_limit", "kl_coeff")
        given = {name: value for name, value in vars(self).items() if value is not None or name not in optional}
        for name in [name for name in given if name in _LEAST]:
            integer(name, given[name], least=_LEAST[name])
        for name in [name for name in given if name in _RANGES]:
            number(name, given[name], *_RANGES[name])
        if self.reward_ceiling not in ("auto", None):
            number("reward_ceiling", self.reward_ceiling, "or 'auto', or None for no ceiling", math.isfinite)
        for name, values in (("lr_scheduler", get_args(Schedule)), ("mixed_precision", get_args(MixedPrecision))):
            if getattr(self, name) not in values:
                raise ValueError(f"{name}: expected one of {', '.join(values)}, got {getattr(self, name)!r}")
        warmup = {"constant": "constant_with_warmup", "constant_with_warmup": "constant"}
        if (other := warmup.get(self.lr_scheduler)) and (self.lr_scheduler == "constant") == bool(self.lr_warmup_steps):
            raise ValueError(
                f"lr_warmup_steps: expected {'0' if self.lr_warmup_steps else '1 or more'} with "
                f"lr_scheduler={self.lr_scheduler!r}, got {self.lr_warmup_steps}; or pass lr_scheduler={other!r}"
            )
        if self.hub_model_id is not None and not self.push_to_hub:
            raise ValueError(f"hub_model_id: expected None without push_to_hub, got {self.hub_model_id!r}; pass both")
        if not isinstance(self.sampling, Mapping):
            raise TypeError(f"sampling: expected a dict such as {{'num_inference_steps': 30}}, got {self.sampling!r}")
        if isinstance(self.target_modules, str) or self.target_modules == ():
            raise ValueError(f"target_modules: expected a tuple of layer names or None, got {self.target_modules!r}")

    def refuse_idle(self, names: Sequence[str], where: str) -> None:
        """Refuse settings that have no effect in a training unless they have their defaults."""
        for name in names:
            if (value := getattr(self, name)) != (default := type(self).__dataclass_fields__[name].default):
                raise ValueError(
                    f"{name}: expected {default!r} {where}, where it has no effect, got {value!r}; leave it out"
                )


_LEAST: dict[str, int] = {"lr_warmup_steps": 0, "checkpointing_steps": 0, "seed": 0, "rank": 1, "patience": 1}
_LEAST |= {"train_batch_size": 1, "gradient_accumulation_steps": 1, "max_train_steps": 1}
_LEAST |= {"checkpoints_total_limit": 1, "validation_steps": 1, "validation_seeds": 1}
_RANGES = {
    "lora_alpha": ("above 0", lambda value: 0 < value < math.inf),
    "learning_rate": ("above 0", lambda value: 0 < value < math.inf),
    "max_grad_norm": ("above 0, math.inf for no clipping", lambda value: value > 0),
    "weight_decay": ("of at least 0", lambda value: 0 <= value < math.inf),
    "ema_decay": ("in [0, 1)", lambda value: 0 <= value < 1),
    "kl_coeff": ("of at least 0", lambda value: 0 <= value < math.inf),
}
