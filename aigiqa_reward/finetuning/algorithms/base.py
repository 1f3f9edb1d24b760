"""The contract between a fine-tuning algorithm and the training loop, and what several algorithms share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast, get_args

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from aigiqa_reward.finetuning.batch import Batch, Memory, Outcome
from aigiqa_reward.rewards.smooth import IMAGE_RADIUS, check_radius, sharpness_aware
from aigiqa_reward.types import RewardOutput

if TYPE_CHECKING:
    from aigiqa_reward.finetuning.config import FinetuneConfig
    from aigiqa_reward.finetuning.context import TrainingContext


Sharpness = Literal["image", "parameters", "both"]

PARAMETER_RADIUS = 0.003
"""Default radius of the ball of LoRA weights, relative to their norm.

With the embedded generator and reward (DRaFT-1, rank 4) the reward falls by 0.012 at the worst weights, and the cosine
of the gradients there and at the weights is 0.85; with 0.01 it is 0.46, with 0.03 it is 0.
"""


def setting(default: Any, text: str) -> Any:
    """Make a dataclass field with a help text for the command line."""
    return field(default=default, metadata={"help": text})


class Algorithm(ABC):
    """A fine-tuning algorithm: a frozen dataclass of its settings, with the mathematics as methods.

    Attributes:
        name: Name on the command line.
        title: Name in errors.
        reward_gradient: Whether the reward must be differentiable with respect to the images.
        learning_rate: Default learning rate.
        kl_coeff: Default weight of the KL penalty.
        steps_per_round: Optimizer steps on the same rows; `prepare` runs before the first of them.
        idle: Settings of `FinetuneConfig` without effect on this algorithm; they are refused.
        rows_per_prompt: Number of consecutive rows of a batch with the same prompt.
        examples: Prompts of the algorithm's own examples, which replace the training prompts; None if it has none.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    reward_gradient: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-4
    kl_coeff: ClassVar[float] = 0.01
    idle: ClassVar[tuple[str, ...]] = ()

    @property
    def steps_per_round(self) -> int:
        return 1

    @property
    def rows_per_prompt(self) -> int:
        return 1

    @property
    def examples(self) -> Sequence[str] | None:
        return None

    @property
    def weight_ball(self) -> float:
        """Radius, relative to the norm of the weights, of the ball at whose worst weights gradients are taken."""
        return 0.0

    def round_of(self, step: int) -> int:
        """Return the round that an optimizer step belongs to; all steps of a round have the same rows."""
        return step // self.steps_per_round

    def split(self, part_size: int, parts: int, processes: int) -> tuple[int, int]:
        """Return the rows per forward pass and the passes per step and process, for those that the user wants."""
        return part_size, parts

    def settings(self) -> dict[str, Any]:
        """Return all settings that decide the result, by name; a checkpoint with other settings is not resumed."""
        return {f"{self.name}.{entry.name}": getattr(self, entry.name) for entry in fields(cast(Any, self))}

    def check(self, context: TrainingContext, prompts: Sequence[str]) -> None:
        """Raise a ValueError for a scheduler, a reward or settings that this algorithm cannot train with."""
        if self.reward_gradient:
            context.bound.check_differentiable(self.title, prompts[0], context.rollout.family.device)

    def ready(
        self, context: TrainingContext, prompts: Sequence[str], folder: Path, config: FinetuneConfig, *, progress: bool
    ) -> Algorithm:
        """Return the algorithm to train with: this one, or a copy with examples, which are found again on resuming."""
        return self

    def prepare(self, context: TrainingContext, batches: Sequence[Batch]) -> Memory:
        """Return what the losses of a round need, for this process's batches in order; runs without gradients."""
        return {}

    @abstractmethod
    def losses(self, context: TrainingContext, batch: Batch, part: int, memory: Memory) -> Iterator[Outcome]:
        """Yield the losses of a batch; the loop runs the backward pass of each before it asks for the next.

        `part` is the index of the batch among those of this process, `memory` the result of `prepare`.
        """

    def old_weights(self, context: TrainingContext, step: int, memory: Memory) -> Mapping[str, Tensor]:
        """Return the weights to keep as `context.old` for the next round, after `step` optimizer steps."""
        return {}


def row_noise(like: Tensor, generators: Sequence[torch.Generator], dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw standard normal noise of the shape and device of `like` (B, ...), row i from generator i."""
    return randn_tensor(like.shape, generator=list(generators), device=like.device, dtype=dtype)


def where_rows(rows: Tensor, values: Tensor, others: Tensor | float) -> Tensor:
    """Select `values` (B, ...) in the rows (B,) that are True, else `others`."""
    return torch.where(rows.to(values.device).reshape(-1, *[1] * (values.ndim - 1)), values, others)


def mean_square(values: Tensor) -> Tensor:
    """Return the mean square (B,) of each row of `values` (B, ...)."""
    return values.square().flatten(1).mean(dim=1)


def named_scores(scores: RewardOutput) -> dict[str, Tensor]:
    """Return the scores (B,) that there are, by the names under which they are logged, without gradients."""
    named = {"reward": scores.total, "quality": scores.quality, "correspondence": scores.correspondence}
    return {name: value.detach() for name, value in named.items() if value is not None}


def score_latents(context: TrainingContext, latents: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Score the images (B,) of finished latents; all scores are NaN where the pixels or the total are not finite.

    Totals of a mixture's members are named "reward/NAME".
    """
    images = context.decoding.show(latents)
    output = context.bound.score(images, prompts)
    members = {f"reward/{name}": output.details[name] for name in context.members if name in output.details}
    scores = named_scores(output) | members
    finite = context.note(images, scores["reward"])
    return {name: torch.where(finite.to(value.device), value, math.nan) for name, value in scores.items()}


@dataclass(frozen=True, kw_only=True)
class RewardBackpropagation(Algorithm):
    """An algorithm that differentiates the reward of decoded images: their loss, and sharpness-aware gradients.

    Kim and Sim 2026, "Reward Sharpness-Aware Fine-Tuning for Diffusion Models": gradients at the worst point nearby
    follow a sharp rise of the reward, as that of an exploit, less than a broad one. The image part takes the reward's
    gradient at the worst image (`SharpnessAwareReward`), for one more forward and backward pass of the reward per step.
    The parameter part (SAM; Foret et al. 2021) first takes the gradient of the reward at the LoRA weights w, without
    the KL penalty, then that of the loss at w - radius ||w|| g / ||g||, and applies it to w: one more sampling and
    backward pass per step. The logged scores are those of w and of the images themselves; loss and kl are those at the
    worst weights.
    """

    reward_gradient: ClassVar[bool] = True

    sharpness_aware: Sharpness | None = setting(
        None, "Take the reward's gradient at the worst image, the worst LoRA parameters or both, within a small ball."
    )
    image_radius: float | None = setting(
        None, "Radius of the ball around an image, as RMS per pixel; by default 0.4 / 255."
    )
    parameter_radius: float | None = setting(
        None, "Radius of the ball around the LoRA weights, relative to their norm; by default 0.003."
    )

    def __post_init__(self) -> None:
        if self.sharpness_aware not in (None, *get_args(Sharpness)):
            kinds = ", ".join(map(repr, get_args(Sharpness)))
            raise ValueError(f"sharpness_aware: expected one of {kinds} or None, got {self.sharpness_aware!r}")
        for part, example in (("image", "0.4 / 255"), ("parameters", PARAMETER_RADIUS)):
            name = f"{part.removesuffix('s')}_radius"
            if (value := getattr(self, name)) is None:
                continue
            check_radius(name, value, str(example))
            if not self._at_worst(part):
                raise ValueError(
                    f"{name}: expected None with sharpness_aware={self.sharpness_aware!r}, where it has no effect, got "
                    f"{value!r}; pass sharpness_aware={part!r} or 'both'"
                )

    def _at_worst(self, part: str) -> bool:
        return self.sharpness_aware in (part, "both")

    @property
    def weight_ball(self) -> float:
        radius = PARAMETER_RADIUS if self.parameter_radius is None else self.parameter_radius
        return radius if self._at_worst("parameters") else 0.0

    def loss(self, context: TrainingContext, batch: Batch, images: Tensor, kl: Tensor) -> Outcome:
        """Return the mean loss -min(total, ceiling) + penalty * kl (B,) of images (B, 3, H, W); NaN for NaN pixels."""
        if not bool(images.isfinite().all()):
            context.note(images)
            return Outcome(loss=images.new_tensor(math.nan))
        radius = IMAGE_RADIUS if self.image_radius is None else self.image_radius
        reward: Any = sharpness_aware(context.score, radius if self._at_worst("image") else 0.0)
        scores: RewardOutput = reward(images, batch.prompts)
        context.note(images, scores.total)
        if images.requires_grad:
            context.bound.require_gradient(scores.total, self.title)
        loss = (context.penalty * kl - context.capped(scores.total).to(images.device)).mean()
        measures = named_scores(scores) | context.above_ceiling(scores.total)
        return Outcome(loss=loss, measures=measures | ({"kl": kl.detach()} if context.penalty else {}))
