"""DiffusionNFT: learning from better and worse images by the forward process, for rewards without gradients.

Zheng et al. 2026, "DiffusionNFT: Online Diffusion Reinforcement with Forward Process". A slowly following copy of the
adapter, the old policy, samples images with any sampler. Their rewards become shares r in [0, 1]: 1/2 for an average
image. At noise levels of the model's training, with predictions v of the trained and v_old of the old policy, let

    v+ = b v + (1 - b) v_old,        v- = (1 + b) v_old - b v
    loss = 1/b (r |x0(v+) - x0|^2 / w+  +  (1 - r) |x0(v-) - x0|^2 / w-)

where w is the mean absolute error of the same prediction, without gradients. Better images thus attract v, and worse
ones repel it; r = 1/2 pulls it to v_old. No likelihoods and no noise in the sampler are needed.

As in the authors' code (NVlabs/DiffusionNFT), rewards are centered per prompt, divided by the std of the batch and
clipped at 5. Their factor of 5 on the loss, which Adam hardly sees, is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from aigiqa_reward.finetuning.advantages import compare, part_of
from aigiqa_reward.finetuning.algorithms.base import (
    Algorithm,
    mean_square,
    row_noise,
    score_latents,
    setting,
    where_rows,
)
from aigiqa_reward.finetuning.batch import Batch, Memory, Outcome, generator_of
from aigiqa_reward.finetuning.context import TrainingContext
from aigiqa_reward.finetuning.noising import Noising
from aigiqa_reward.sampling.families import Conditioning
from aigiqa_reward.types import at_least_float32
from aigiqa_reward.utils.checks import integer, number

CLIP = 5.0
"""Largest advantage, in standard deviations of the reward, which has the share 1."""
LEVELS = 4
"""Noise levels drawn per image and step: sampling an image costs many calls of the denoiser, a level three."""
ERROR_FLOOR = 1e-5
"""Least mean absolute error to divide by, as in the authors' code."""


def shares(advantages: Tensor) -> Tensor:
    """Return the shares r (B,) in [0, 1] of advantages (B,), 1/2 for 0."""
    return (advantages / CLIP).clamp(-1, 1) / 2 + 0.5


def error(predicted: Tensor, clean: Tensor) -> Tensor:
    """Return the mean square error (B,) of predicted x0 (B, ...), divided by its detached mean absolute error."""
    far = predicted - clean
    return mean_square(far) / far.detach().abs().flatten(1).mean(dim=1).clamp(min=ERROR_FLOOR)


def contrast(current: Tensor, old: Tensor, clean: Tensor, share: Tensor, beta: float) -> Tensor:
    """Return the loss (B,) for the x0 (B, ...) that the trained and the old policy predict, and shares r (B,).

    x0 is linear in the model's output and the weights of v+ and of v- sum to 1, so their x0 are those means of x0.
    """
    positive = beta * current + (1 - beta) * old
    negative = (1 + beta) * old - beta * current
    return (share * error(positive, clean) + (1 - share) * error(negative, clean)) / beta


@dataclass(frozen=True, kw_only=True)
class DiffusionNFT(Algorithm):
    """Negative-aware fine-tuning by the forward process.

    A step trains on `images_per_prompt` images of at least one prompt: the batch of a step is enlarged to whole
    prompts, so that `train_batch_size` only decides how much memory a forward pass takes. The loss uses no guidance.

    Example:
        >>> from aigiqa_reward.finetuning import DiffusionNFT
        >>> DiffusionNFT(images_per_prompt=8).split(2, 1, 1)
        (2, 4)
    """

    name: ClassVar[str] = "nft"
    title: ClassVar[str] = "DiffusionNFT"
    learning_rate: ClassVar[float] = 3e-4
    kl_coeff: ClassVar[float] = 1e-4

    images_per_prompt: int = setting(4, "Images per prompt and step, which are compared with each other.")
    beta: float = setting(
        1.0, "Distance b of the positive and negative predictions from the old policy's, in (0, 1]; the paper has 1."
    )
    old_decay: float = setting(
        0.5,
        "Largest decay of the old policy, an EMA that samples, in [0, 1); the paper has 0.5 and 0.999.",
    )
    old_decay_slope: float = setting(0.001, "Growth of the old policy's decay per optimizer step, from 0.")

    def __post_init__(self) -> None:
        integer("images_per_prompt", self.images_per_prompt, least=2)
        number("beta", self.beta, "in (0, 1]; the paper has 1", lambda value: 0 < value <= 1)
        number("old_decay", self.old_decay, "in [0, 1)", lambda value: 0 <= value < 1)
        number("old_decay_slope", self.old_decay_slope, "of at least 0", lambda value: 0 <= value < math.inf)

    @property
    def rows_per_prompt(self) -> int:
        return self.images_per_prompt

    def split(self, part_size: int, parts: int, processes: int) -> tuple[int, int]:
        unit = math.lcm(self.images_per_prompt, processes) // processes
        own = math.ceil(part_size * parts / unit) * unit
        size = max(size for size in range(1, part_size + 1) if own % size == 0)
        return size, own // size

    def check(self, context: TrainingContext, prompts: Sequence[str]) -> None:
        Noising.of(context.rollout.pipe.scheduler)

    @torch.no_grad()
    def prepare(self, context: TrainingContext, batches: Sequence[Batch]) -> Memory:
        """Sample this process's batches with the old policy, and compare their scores with those of all processes.

        Images with pixels or scores that are not finite get zeros in place of their latents, and no loss. The memory
        has the weights of the old policy as "old/NAME"; and for each batch, as "NAME/PART": latents (B, ...) and what
        `compare` returns.
        """
        old = context.old or context.lora.state()
        memory, scores = {f"old/{name}": weight for name, weight in old.items()}, []
        with context.lora.replaced(old):
            for part, batch in enumerate(batches):
                latents = context.rollout.run(context.start(batch)).latents
                scores.append(score_latents(context, latents, batch.prompts))
                finite = scores[-1]["reward"].isfinite()
                memory[f"latents/{part}"] = where_rows(finite, at_least_float32(latents), 0)
        compared = compare(context, batches, scores, self.images_per_prompt, deviation="batch", limit=CLIP)
        return memory | compared

    def losses(self, context: TrainingContext, batch: Batch, part: int, memory: Memory) -> Iterator[Outcome]:
        """Yield one loss per noise level; their sum is the mean over the levels.

        It logs `kl`, the mean square of what the adapter changed in the model output, and `old_kl`, the same for what
        was changed since the old policy.
        """
        own, state = part_of(memory, part), context.first_state(batch.prompts[0])
        logged = {name: value for name, value in own.items() if name not in ("latents", "advantages")}
        logged |= context.above_ceiling(own["reward"])
        noising, clean = Noising.of(state.scheduler), own["latents"].to(state.latents.device)
        share, alive = shares(own["advantages"]).to(clean), 1 - own["dropped"].to(clean)
        positive = Conditioning(positive=context.encode(batch.prompts).positive)
        drawn = self.draw(noising, batch, clean)

        def predict(levels: Tensor, noised: Tensor) -> Tensor:
            latents, times = noised.to(state.latents.dtype), noising.times[levels]
            return at_least_float32(context.predict_at(latents, times, positive, state.shared))

        # The weights are replaced before any graph is built that would see the change.
        with torch.no_grad(), context.lora.replaced(old_of(memory)):
            before = [predict(*each) for each in drawn]
        for (levels, noised), old in zip(drawn, before, strict=True):
            output = predict(levels, noised)
            current, followed = (noising.clean(noised, each, levels) for each in (output, old))
            loss = contrast(current, followed, clean, share, self.beta) * alive
            measures = {"old_kl": mean_square(output - old) * alive}
            if context.penalty:
                with context.reference():
                    measures["kl"] = kl = mean_square(output - predict(levels, noised)) * alive
                loss = loss + context.penalty * kl
            measures = {name: value.detach() for name, value in measures.items()}
            yield Outcome(loss=loss.mean() / LEVELS, measures={**logged, **measures})

    def draw(self, noising: Noising, batch: Batch, clean: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Draw levels (B,) for clean latents (B, ...), and noise them; new ones in each step."""
        generators = [generator_of(batch.seed, "nft", batch.step, row) for row in batch.rows]
        drawn = []
        for _ in range(LEVELS):
            levels = noising.draw(generators)
            drawn.append((levels, noising.noised(clean, row_noise(clean, generators).to(clean), levels)))
        return drawn

    def old_weights(self, context: TrainingContext, step: int, memory: Memory) -> dict[str, Tensor]:
        """Return the old policy's weights, moved towards the trained ones."""
        decay, old = min(step * self.old_decay_slope, self.old_decay), old_of(memory)
        return {name: decay * old[name].to(new) + (1 - decay) * new for name, new in context.lora.state().items()}


def old_of(memory: Memory) -> dict[str, Tensor]:
    """Return the old policy's weights of a round."""
    return {name.removeprefix("old/"): weight for name, weight in memory.items() if name.startswith("old/")}
