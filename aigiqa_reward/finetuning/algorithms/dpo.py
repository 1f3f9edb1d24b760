"""Diffusion-DPO: fine-tuning by which of two images of a prompt is the better one.

Wallace et al. 2024, "Diffusion Model Alignment Using Direct Preference Optimization", equation 14: at one noise level,
with one noise, the denoiser should improve over the reference at predicting the winner more than at predicting the
loser. With the mean square errors e of the denoiser and r of the reference (the adapter switched off),

    inside = -beta / 2 ((e_winner - r_winner) - (e_loser - r_loser)),        loss = -log sigmoid(inside)

where beta is the paper's beta T omega, and 1/2 is that of the authors' code (SalesforceAIResearch/DiffusionDPO,
train.py). For models that predict a velocity, errors are those of the velocity, as in diffusers' train_diffusion_dpo.

Two other losses: "hinge", max(0, 1 - inside) (Zhao et al. 2023, SLiC); "ipo", (inside / beta - 1 / (2 beta))^2 (Azar et
al. 2024, equation 17), which pulls `inside` to 1/2 and no further.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from aigiqa_reward.datasets import PreferencePairs
from aigiqa_reward.finetuning.algorithms.base import (
    Algorithm,
    mean_square,
    row_noise,
    score_latents,
    setting,
    where_rows,
)
from aigiqa_reward.finetuning.batch import Batch, Memory, Outcome, generator_of
from aigiqa_reward.finetuning.config import FinetuneConfig
from aigiqa_reward.finetuning.context import TrainingContext
from aigiqa_reward.finetuning.noising import Noising
from aigiqa_reward.finetuning.pairs import PairLatents, check_pairing, fingerprint, own_pairs
from aigiqa_reward.sampling.families import Conditioning
from aigiqa_reward.sampling.rollout import State
from aigiqa_reward.types import at_least_float32
from aigiqa_reward.utils.checks import integer, number

Loss = Literal["sigmoid", "hinge", "ipo"]
Timesteps = Literal["uniform", "sampler"]

_ONLY_FIRST: dict[str, Any] = {"pairs_per_prompt": 1, "guidance_scales": (), "reward_guidance": 0.0}
_ONLY_SAMPLED: dict[str, Any] = {"candidates": 4, "margin": 0.0}
"""Defaults of settings for pairs that are sampled before the training, and for all sampled pairs."""


@dataclass(frozen=True, kw_only=True)
class DPO(Algorithm):
    """Diffusion-DPO on given pairs, on pairs of the pipeline's images made first, or on pairs made during training.

    Without `pairs`, `build_preference_pairs` makes them in `output_dir`/pairs before the first step, or, with
    `refresh_every`, each round samples the candidates of its rows from the current model. With both, the first
    `refresh_every` steps train on the given pairs, other rows in each. A row whose rewards differ by no more than
    `margin` has no gradient. The loss uses no guidance. The default `kl_coeff` is 0, since beta is such a pull already.
    """

    name: ClassVar[str] = "dpo"
    title: ClassVar[str] = "DPO"
    kl_coeff: ClassVar[float] = 0.0
    idle: ClassVar[tuple[str, ...]] = ("reward_ceiling", "decoder")  # images are only compared

    pairs: PreferencePairs | None = field(default=None, repr=False)
    beta: float = setting(
        2000.0, "Strength of the pull towards the reference model; the paper has 2000 and 5000 (SDXL)."
    )
    loss: Loss = setting(
        "sigmoid", "Loss of a pair: 'sigmoid' as in the paper, 'hinge' (SLiC) or 'ipo' (Azar et al. 2024)."
    )
    timesteps: Timesteps = setting(
        "uniform", "Noise levels to train on: 'uniform' over the model's training, or those of the 'sampler'."
    )
    refresh_every: int = setting(
        0, "Optimizer steps between samplings of new pairs from the trained model; 0 is never."
    )
    candidates: int = setting(4, "Images sampled per prompt, of which the best and the worst become a pair.")
    pairs_per_prompt: int = setting(1, "Pairs per prompt, for pairs that are sampled before the training.")
    guidance_scales: tuple[float, ...] = setting(
        (), "Guidance scales to sample each noise at before the training, for pairs of one noise."
    )
    reward_guidance: float = setting(
        0.0, "Scale of a reward guidance to sample each noise with once more before the training."
    )
    margin: float = setting(0.0, "Difference of rewards that a pair must exceed to be trained on.")

    def __post_init__(self) -> None:
        number("beta", self.beta, "above 0; the paper has 2000 and 5000", lambda value: 0 < value < math.inf)
        number("margin", self.margin, "of at least 0, a difference of rewards", lambda value: 0 <= value < math.inf)
        for name, kind in (("loss", Loss), ("timesteps", Timesteps)):
            if (value := getattr(self, name)) not in get_args(kind):
                raise ValueError(f"{name}: expected one of {', '.join(get_args(kind))}, got {value!r}")
        integer("refresh_every", self.refresh_every, least=0)
        n = integer("candidates", self.candidates, least=2)
        scales = check_pairing(self.guidance_scales, self.reward_guidance, self.pairs_per_prompt, n, "candidates")
        object.__setattr__(self, "guidance_scales", scales)
        given = self.pairs is not None
        unused = _ONLY_FIRST if given or self.refresh_every else {}
        for name, default in (unused | (_ONLY_SAMPLED if given and not self.refresh_every else {})).items():
            if getattr(self, name) != default:
                raise ValueError(
                    f"{name}: applies to pairs that are sampled before the training, but pairs or refresh_every is "
                    "given; leave it out"
                )
        if given and not isinstance(self.pairs, PreferencePairs):
            raise TypeError(f"pairs: expected PreferencePairs, got {self.pairs!r}; pass read_preference_pairs(folder)")
        if self.pairs is not None and not len(self.pairs):
            raise ValueError("pairs: expected at least one, got none")

    @cached_property
    def latents(self) -> PairLatents:
        """Latents of the given pairs."""
        assert self.pairs is not None
        return PairLatents(self.pairs)

    @property
    def steps_per_round(self) -> int:
        return self.refresh_every or 1

    def round_of(self, step: int) -> int:
        """Return the round of a step; each step on given pairs is a round, so that all pairs are seen."""
        given = self.refresh_every if self.pairs is not None else 0
        return step if step < given else max(given - 1, 0) + step // self.steps_per_round

    @property
    def examples(self) -> Sequence[str] | None:
        return None if self.pairs is None else self.pairs.prompts

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"dpo.pairs": None if self.pairs is None else fingerprint(self.pairs)}

    def check(self, context: TrainingContext, prompts: Sequence[str]) -> None:
        self.noising(context.first_state(prompts[0]))

    def ready(
        self, context: TrainingContext, prompts: Sequence[str], folder: Path, config: FinetuneConfig, *, progress: bool
    ) -> DPO:
        """Return a copy with pairs of the pipeline's own images, if neither pairs nor `refresh_every` is given."""
        if self.pairs is not None or self.refresh_every:
            return self
        named = {name: getattr(self, name) for name in ("margin", *_ONLY_FIRST)}
        pairs = own_pairs(context, prompts, folder, config, n=self.candidates, progress=progress, **named)
        # From here on the pairs and their folder say how they were made.
        return replace(self, pairs=pairs, **_ONLY_FIRST, **_ONLY_SAMPLED)

    def noising(self, state: State) -> Noising:
        """Return the noise levels to draw from."""
        return Noising.of(state.scheduler) if self.timesteps == "uniform" else Noising.of_sampler(state.scheduler)

    def prepare(self, context: TrainingContext, batches: Sequence[Batch]) -> Memory:
        """Sample pairs for the rows of a round, unless it is one on given pairs."""
        if not self.refresh_every or (self.pairs is not None and batches[0].step < self.refresh_every):
            return {}
        made = [self.sample_pairs(context, batch) for batch in batches]
        if context.nothing_finite():
            made[0]["winners"].fill_(math.nan)  # the loop stops at a loss that is NaN
        return {f"{name}/{part}": tensor for part, named in enumerate(made) for name, tensor in named.items()}

    def sample_pairs(self, context: TrainingContext, batch: Batch) -> dict[str, Tensor]:
        """Return the best and the worst candidate of each row, `winners` and `losers` (B, ...), and mean `reward` (B,).

        Candidates without a finite reward do not count. If the rest differ by no more than the margin, winner and loser
        are the same, so that the loss has no gradient.
        """
        found = []
        for place in range(self.candidates):
            latents = context.rollout.run(context.start(batch, f"candidate {place}")).latents
            total = score_latents(context, latents, batch.prompts)["reward"].to(latents.device)
            found.append((at_least_float32(latents), total))
        latents, totals = (torch.stack(columns) for columns in zip(*found, strict=True))
        rows = torch.arange(len(batch), device=latents.device)
        best = torch.where(totals.isnan(), -torch.inf, totals).argmax(dim=0)
        worst = torch.where(totals.isnan(), torch.inf, totals).argmin(dim=0)
        apart = totals[best, rows] - totals[worst, rows] > self.margin  # False if all are NaN
        winners = torch.where(latents.isfinite(), latents, 0)[best, rows]
        losers = where_rows(apart, latents[worst, rows], winners)
        mean = totals.nanmean().nan_to_num()  # for rows without any, so that a checkpoint holds no NaN
        return {"winners": winners, "losers": losers, "reward": torch.where(totals.isnan(), mean, totals).mean(dim=0)}

    def losses(self, context: TrainingContext, batch: Batch, part: int, memory: Memory) -> Iterator[Outcome]:
        """Yield one loss.

        It logs `accuracy`, the share of winners that gained more than their losers (ties count half); `margin`, the
        `inside` of the equation; `kl`, the mean square of what the adapter changed in the model output; and the mean
        `reward` of candidates that were sampled during training.
        """
        family = context.rollout.family
        pair = (memory[f"winners/{part}"], memory[f"losers/{part}"]) if memory else self.latents(family, batch.places)
        winners, losers = (latents.to(family.device) for latents in pair)
        state = context.first_state(batch.prompts[0])
        noising = self.noising(state)
        levels, noise = self.draw(noising, batch, winners)
        levels, noise, clean = (torch.cat(both) for both in ((levels, levels), (noise, noise), (winners, losers)))
        target = noising.target(clean, noise, levels)
        noised = noising.noised(clean, noise, levels).to(state.latents.dtype)
        positive = Conditioning(positive=context.encode(batch.prompts).positive)[[*range(len(batch))] * 2]
        predict = partial(context.predict_at, noised, noising.times[levels], positive, state.shared)
        output = at_least_float32(predict())
        with context.reference():  # second: autocast caches the cast weights, and those with a graph serve both
            reference = at_least_float32(predict())
        gained = mean_square(output - target) - mean_square(reference - target)
        better, worse = gained.chunk(2)
        inside = -0.5 * self.beta * (better - worse)
        kl = torch.stack(mean_square(output - reference).chunk(2)).mean(dim=0)
        loss = (self.pair_loss(inside) + context.penalty * kl).mean()
        measures = {"accuracy": accuracy(inside.detach()), "margin": inside.detach(), "kl": kl.detach()}
        if memory:
            measures["reward"] = memory[f"reward/{part}"]
        yield Outcome(loss=loss, measures=measures)

    def draw(self, noising: Noising, batch: Batch, like: Tensor) -> tuple[Tensor, Tensor]:
        """Draw levels (B,) and noise (B, ...), which winner and loser share; new in each step, also within a round."""
        generators = [generator_of(batch.seed, "dpo", batch.step, row) for row in batch.rows]
        levels = noising.draw(generators)
        return levels, row_noise(like, generators).to(like)

    def pair_loss(self, inside: Tensor) -> Tensor:
        """Return the losses (B,) of `inside` (B,)."""
        if self.loss == "ipo":
            return (inside / self.beta - 1 / (2 * self.beta)).square()
        return F.relu(1 - inside) if self.loss == "hinge" else -F.logsigmoid(inside)


def accuracy(inside: Tensor) -> Tensor:
    """Return 1 where the winner gained more, 0 where the loser did, 1/2 for a tie."""
    return (inside > 0).to(inside) + 0.5 * (inside == 0).to(inside)
