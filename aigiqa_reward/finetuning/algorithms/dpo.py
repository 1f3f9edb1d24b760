"""Diffusion-DPO: fine-tuning by which of two images of a prompt is the better one.

Wallace et al. 2024, "Diffusion Model Alignment Using Direct Preference Optimization", equation 14: at one noise level,
under one noise, the denoiser should get better than the reference at predicting the winner, more so than at predicting
the loser. With the mean square errors e of the denoiser and r of the reference (the adapter off),

    inside = -beta / 2 ((e_winner - r_winner) - (e_loser - r_loser)),        loss = -log sigmoid(inside)

where beta stands for the paper's beta T omega, and 1/2 is that of the authors' code (SalesforceAIResearch/DiffusionDPO,
train.py). Where the model predicts a velocity, errors are those of the velocity, as in diffusers' train_diffusion_dpo.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from aigiqa_reward.datasets import PreferencePairs
from aigiqa_reward.finetuning.algorithms.base import Algorithm
from aigiqa_reward.finetuning.batch import Batch, Memory, Outcome, generator_of
from aigiqa_reward.finetuning.config import FinetuneConfig
from aigiqa_reward.finetuning.context import TrainingContext
from aigiqa_reward.finetuning.pairs import Contrast, PairLatents, fingerprint, own_pairs
from aigiqa_reward.sampling.families import Conditioning
from aigiqa_reward.sampling.rollout import State
from aigiqa_reward.sampling.schedulers import SEVERAL_CALLS_A_STEP, is_flow, noise_level
from aigiqa_reward.utils.checks import integer, number

EPSILON, VELOCITY, SAMPLE, FLOW = "epsilon", "v_prediction", "sample", "flow_prediction"


@dataclass(frozen=True, kw_only=True)
class Noising:
    """Noised latents are alpha x0 + sigma eps at one of T levels; level 0 .. T - 1 is a row's index into the tables.

    Attributes:
        times: (T,) what the denoiser is told of a level, as `Family.predict` takes it: int64 numbers of timesteps, or
            float32 multiples of sigma along a flow.
        alphas: (T,) float32, sqrt(alphas_cumprod); 1 - sigma along a flow.
        sigmas: (T,) float32.
        kind: what the model predicts: "epsilon" eps, "v_prediction" alpha eps - sigma x0 (Salimans & Ho 2022), "sample"
            x0, "flow_prediction" eps - x0.
        middling: whether `draw` prefers levels in the middle.
    """

    times: Tensor
    alphas: Tensor
    sigmas: Tensor
    kind: str
    middling: bool = False

    @staticmethod
    def of(scheduler: Any) -> Noising:
        """The process that a pipeline's denoiser was trained on, as its scheduler's configuration tells it.

        Variance-preserving ones have the levels of `alphas_cumprod`, however the scheduler itself scales its latents.
        Flows have sigma = s k / (T + (s - 1) k) for k = 1 .. T with the configuration's static shift s, and no shift
        where it depends on the image's size: the levels of diffusers' training scripts for SD3 and FLUX.1.

        Raises:
            ValueError: a prediction type or a scale of time that is not known here.
        """
        config, name = scheduler.config, type(scheduler).__name__
        steps = config.num_train_timesteps
        if is_flow(scheduler):
            shift = config.get("flow_shift") if config.get("use_flow_sigmas") else config.get("shift")
            shift = 1.0 if shift is None or config.get("use_dynamic_shifting") else float(shift)
            even = torch.arange(1, steps + 1, dtype=torch.float64) / steps
            sigmas = (shift * even / (1 + (shift - 1) * even)).float()
            return Noising(times=sigmas * steps, alphas=1 - sigmas, sigmas=sigmas, kind=FLOW, middling=True)
        kind = _kind(scheduler)
        if config.get("timestep_type", "discrete") != "discrete":
            raise ValueError(
                f"scheduler: {name} has timestep_type={config.timestep_type!r}; training by noised images knows "
                "'discrete' ones: another scheduler of the same pipeline may have it"
            )
        kept = scheduler.alphas_cumprod.detach().double().cpu()
        return Noising(
            times=torch.arange(steps), alphas=kept.sqrt().float(), sigmas=(1 - kept).sqrt().float(), kind=kind
        )

    @staticmethod
    def of_sampler(scheduler: Any) -> Noising:
        """The levels at which a sampler asks the denoiser, and the times that it tells it there.

        Args:
            scheduler: with its timesteps set, as of `Rollout.start`; the tables have one row a step.

        Raises:
            ValueError: a prediction type that is not known here; a sampler that asks between its levels.
        """
        name = type(scheduler).__name__
        if name in SEVERAL_CALLS_A_STEP:
            raise ValueError(
                f"scheduler: {name} asks its denoiser between its noise levels, so that its steps are no levels to "
                "train on; take timesteps='uniform', or a scheduler of one call a step (Euler, DDIM, DPM-Solver)"
            )
        kind = FLOW if is_flow(scheduler) else _kind(scheduler)
        levels = [noise_level(scheduler, step) for step in range(len(scheduler.timesteps))]
        alphas, sigmas = (torch.stack(column).detach().float().cpu() for column in zip(*levels, strict=True))
        if kind != FLOW:  # latents whose variance explodes are scaled before the denoiser sees them
            length = (alphas.square() + sigmas.square()).sqrt()
            alphas, sigmas = alphas / length, sigmas / length
        return Noising(times=scheduler.timesteps.detach().cpu(), alphas=alphas, sigmas=sigmas, kind=kind)

    def draw(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Levels (B,) int64, row i from generator i.

        Uniform (Ho et al. 2020, algorithm 1); along a flow's training the sigmoid of a standard normal before the
        shift, "lognorm(0, 1)" of Esser et al. 2024, section 3.1, the default of diffusers' script for SD3.
        """
        steps = len(self.times)
        if self.middling:
            shares = [torch.sigmoid(torch.randn((), generator=g)) for g in generators]
            return (torch.stack(shares) * steps).long().clamp(max=steps - 1)
        return torch.stack([torch.randint(steps, (), generator=g) for g in generators])

    def noised(self, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """Latents (B, ...) with noise of unit variance (B, ...) at levels (B,)."""
        alpha, sigma = self._weights(clean, levels)
        return alpha * clean + sigma * noise

    def target(self, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """What the model's output (B, ...) should be for `noised` of the same."""
        alpha, sigma = self._weights(clean, levels)
        if self.kind == EPSILON:
            return noise
        if self.kind == SAMPLE:
            return clean
        return noise - clean if self.kind == FLOW else alpha * noise - sigma * clean

    def _weights(self, like: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        shape, levels = (-1, *[1] * (like.ndim - 1)), levels.cpu()
        return self.alphas[levels].to(like).view(shape), self.sigmas[levels].to(like).view(shape)


def _kind(scheduler: Any) -> str:
    """What a model predicts that is no flow's.

    Raises:
        ValueError: what is not known here.
    """
    kind = scheduler.config.prediction_type
    if kind not in (EPSILON, VELOCITY, SAMPLE):
        raise ValueError(
            f"scheduler: {type(scheduler).__name__} has prediction_type={kind!r}; training by noised images knows "
            f"{EPSILON}, {VELOCITY}, {SAMPLE}, and flow matching"
        )
    return kind


Loss = Literal["sigmoid", "hinge", "ipo"]
Timesteps = Literal["uniform", "sampler"]

_OF_OWN_PAIRS: dict[str, Any] = {"pairs_per_prompt": 1, "guidance_scales": (), "reward_guidance": 0.0}
_OF_CANDIDATES: dict[str, Any] = {"candidates": 4, "margin": 0.0}
"""Settings without effect on given pairs, and their defaults: the first also where pairs are made on the way."""


@dataclass(frozen=True, kw_only=True)
class DPO(Algorithm):
    """Diffusion-DPO on given pairs, on pairs that it makes of the pipeline's images first, or of its own as it goes.

    Guidance is off in the loss, as in training. The loop's `kl_coeff`, 0 by default, adds to what beta does already.
    """

    name: ClassVar[str] = "dpo"
    kl_coeff: ClassVar[float] = 0.0

    pairs: PreferencePairs | None = field(default=None, repr=False)
    beta: float = field(
        default=2000.0,
        metadata={"help": "Strength of the pull towards the reference model; the paper has 2000 and 5000 (SDXL)."},
    )
    loss: Loss = field(
        default="sigmoid",
        metadata={"help": "Loss of a pair: 'sigmoid' as in the paper, 'hinge' (SLiC) or 'ipo' (Azar et al. 2024)."},
    )
    timesteps: Timesteps = field(
        default="uniform",
        metadata={"help": "Noise levels to train on: 'uniform' over the model's training, or those of the 'sampler'."},
    )
    refresh_every: int = field(
        default=0,
        metadata={"help": "Optimizer steps between samplings of new pairs from the trained model; 0 is never."},
    )
    candidates: int = field(
        default=4, metadata={"help": "Images sampled per prompt, of which the best and the worst become a pair."}
    )
    pairs_per_prompt: int = field(
        default=1, metadata={"help": "Pairs per prompt, for pairs that are sampled before the training."}
    )
    guidance_scales: tuple[float, ...] = field(
        default=(),
        metadata={"help": "Guidance scales to sample each noise at before the training, for pairs of one noise."},
    )
    reward_guidance: float = field(
        default=0.0,
        metadata={"help": "Scale of a reward guidance to sample each noise with once more before the training."},
    )
    margin: float = field(
        default=0.0, metadata={"help": "Difference of rewards that a pair must exceed to be trained on."}
    )
    latents: PairLatents | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        number("beta", self.beta, "above 0; the paper has 2000 and 5000", lambda value: 0 < value < math.inf)
        number("margin", self.margin, "of at least 0, a difference of rewards", lambda value: 0 <= value < math.inf)
        if self.loss not in get_args(Loss):
            raise ValueError(f"loss: expected one of {', '.join(get_args(Loss))}, got {self.loss!r}")
        if self.timesteps not in get_args(Timesteps):
            raise ValueError(f"timesteps: expected one of {', '.join(get_args(Timesteps))}, got {self.timesteps!r}")
        integer("refresh_every", self.refresh_every, least=0)
        integer("candidates", self.candidates, least=2)
        contrast = Contrast(guidance_scales=self.guidance_scales, reward_guidance=self.reward_guidance)
        object.__setattr__(self, "guidance_scales", contrast.guidance_scales)
        contrast.check_count(self.pairs_per_prompt, self.candidates, "candidates")
        self._refuse_what_is_unused()
        if self.pairs is not None:
            object.__setattr__(self, "latents", PairLatents(self.pairs))

    def _refuse_what_is_unused(self) -> None:
        unused = {} if self.pairs is None and not self.refresh_every else dict(_OF_OWN_PAIRS)
        if self.pairs is not None and not self.refresh_every:
            unused |= _OF_CANDIDATES
        for name, default in unused.items():
            if getattr(self, name) != default:
                text = "of pairs that are made before the training, which given pairs and refresh_every are instead of"
                raise ValueError(f"{name}: {text}; leave it out")

    @property
    def steps_per_round(self) -> int:
        """Steps until the pairs are made anew."""
        return self.refresh_every or 1

    def round_of(self, step: int) -> int:
        """On given pairs every step has rows of its own, so that all pairs are seen."""
        if self.pairs is None or not self.refresh_every or step < self.refresh_every:
            return super().round_of(step) if self.pairs is None or not self.refresh_every else step
        return self.refresh_every - 1 + step // self.refresh_every

    @property
    def examples(self) -> Sequence[str] | None:
        """The pairs' prompts."""
        return None if self.pairs is None else self.pairs.prompts

    def settings(self) -> dict[str, Any]:
        """Of the pairs a fingerprint."""
        pairs = None if self.pairs is None else fingerprint(self.pairs)
        return super().settings() | {"dpo.pairs": pairs}

    def check(self, tools: TrainingContext, prompts: Sequence[str]) -> None:
        """Refuse a scheduler that does not tell what its model was trained on, or what its sampler asks of it."""
        self.noising(first_state(tools, prompts[0]))

    def ready(
        self, tools: TrainingContext, prompts: Sequence[str], folder: Path, settings: FinetuneConfig, *, progress: bool
    ) -> DPO:
        """With pairs of the pipeline's own images, made into `folder`/pairs, where it is to learn from nothing else."""
        if self.pairs is not None or self.refresh_every:
            return self
        pairs = own_pairs(
            tools,
            prompts,
            folder,
            settings,
            n=self.candidates,
            margin=self.margin,
            pairs_per_prompt=self.pairs_per_prompt,
            guidance_scales=self.guidance_scales,
            reward_guidance=self.reward_guidance,
            progress=progress,
        )
        # From here on the pairs and their folder say where they came from.
        return replace(self, pairs=pairs, **_OF_OWN_PAIRS, **_OF_CANDIDATES)

    def noising(self, state: State) -> Noising:
        """The process whose levels are drawn."""
        return Noising.of(state.scheduler) if self.timesteps == "uniform" else Noising.of_sampler(state.scheduler)

    # ----------------------------------------------------------------------------------------- pairs

    def prepare(self, tools: TrainingContext, batches: Sequence[Batch]) -> Memory:
        """Fresh pairs for the rows of a round, where it is not one on given pairs: latents, and the mean reward."""
        if not self.refresh_every or (self.pairs is not None and batches[0].step < self.refresh_every):
            return {}
        made = [self.sampled(tools, batch) for batch in batches]
        return {f"{name}.{part}": tensor for part, named in enumerate(made) for name, tensor in named.items()}

    def sampled(self, tools: TrainingContext, batch: Batch) -> dict[str, Tensor]:
        """Best and worst of each row's candidates, `winners` and `losers` (B, ...); their mean `reward` (B,).

        Candidates that are not finite, or whose reward is not, do not count. Where the rest differ by no more than the
        margin, winner and loser are the same, whose loss has no gradient.
        """
        candidates = [self.candidate(tools, batch, place) for place in range(self.candidates)]
        latents, totals = (torch.stack(columns) for columns in zip(*candidates, strict=True))
        rows = torch.arange(len(batch), device=latents.device)
        best = torch.where(totals.isnan(), -torch.inf, totals).argmax(dim=0)
        worst = torch.where(totals.isnan(), torch.inf, totals).argmin(dim=0)
        apart = totals[best, rows] - totals[worst, rows] > self.margin  # never, where there is none but NaN
        winners = torch.where(latents.isfinite(), latents, 0)[best, rows]
        losers = torch.where(apart.view(-1, *[1] * (winners.ndim - 1)), latents[worst, rows], winners)
        mean = totals.nanmean().nan_to_num()  # stands for a row without any, so that a checkpoint can be read
        return {"winners": winners, "losers": losers, "reward": torch.where(totals.isnan(), mean, totals).mean(dim=0)}

    def candidate(self, tools: TrainingContext, batch: Batch, place: int) -> tuple[Tensor, Tensor]:
        """Latents (B, ...) of one more image of each row, in at least float32, and their rewards (B,), or NaN."""
        latents = tools.rollout.run(tools.start(batch, f"candidate {place}")).latents
        images = tools.rollout.show(latents)
        whole = images.flatten(1).isfinite().all(dim=1)
        shown = torch.where(whole.view(-1, 1, 1, 1), images, 0.5)  # a Reward refuses NaN
        total = tools.score(shown, batch.prompts).total.to(latents.device)
        at_least_single = torch.promote_types(latents.dtype, torch.float32)
        return latents.to(at_least_single), torch.where(whole & total.isfinite(), total, torch.nan)

    def clean(self, tools: TrainingContext, batch: Batch, part: int, memory: Memory) -> tuple[Tensor, Tensor]:
        """Latents (B, ...) of winners and losers."""
        if memory:
            device = tools.rollout.family.device  # where a checkpoint was read is the CPU
            return memory[f"winners.{part}"].to(device), memory[f"losers.{part}"].to(device)
        assert self.latents is not None, "without pairs there is a memory"
        winners, losers = self.latents(tools.rollout.family, batch.places)
        device = tools.rollout.family.device
        return winners.to(device), losers.to(device)

    # ----------------------------------------------------------------------------------------- the loss

    def losses(self, tools: TrainingContext, batch: Batch, part: int, memory: Memory) -> Iterator[Outcome]:
        """One loss.

        It tells `accuracy`, whether the winner gained more than the loser, ties half; `margin`, the inside of the
        equation; `kl`, the mean square of what the adapter changed in the model's output; and, where pairs were made on
        the way, the mean `reward` of the candidates.
        """
        winners, losers = self.clean(tools, batch, part, memory)
        state = first_state(tools, batch.prompts[0])
        noising = self.noising(state)
        levels, noise = self.drawn(noising, batch, winners)
        levels, noise, clean = (torch.cat(both) for both in ((levels, levels), (noise, noise), (winners, losers)))
        noised, target = noising.noised(clean, noise, levels), noising.target(clean, noise, levels)
        predict = denoiser(tools, batch, noised, noising.times[levels], state)
        output = predict(tools.checkpointed)
        with tools.reference():  # second: autocast keeps the weights that it cast, and those with a graph serve both
            own = predict(False)
        error, known, far = mean_square(output - target), mean_square(own - target), mean_square(output - own)
        better, worse = (error - known).chunk(2)
        inside = -0.5 * self.beta * (better - worse)
        far = torch.stack(far.chunk(2)).mean(dim=0)
        loss = (self.of(inside) + tools.penalty * far).mean()
        measures = {"accuracy": accuracy(inside.detach()), "margin": inside.detach(), "kl": far.detach()}
        if memory:
            measures["reward"] = memory[f"reward.{part}"]
        yield Outcome(loss=loss, measures=measures)

    def drawn(self, noising: Noising, batch: Batch, like: Tensor) -> tuple[Tensor, Tensor]:
        """Levels (B,) and noise (B, ...), which winner and loser share; new in each step, also within a round."""
        generators = [generator_of(batch.seed, "dpo", batch.step, row) for row in batch.rows]
        levels = noising.draw(generators)
        noise = torch.stack([torch.randn(like.shape[1:], generator=g) for g in generators])
        return levels, noise.to(like)

    def of(self, inside: Tensor) -> Tensor:
        """Losses (B,)."""
        if self.loss == "sigmoid":
            return -F.logsigmoid(inside)
        if self.loss == "hinge":
            return F.relu(1 - inside)
        return (inside / self.beta - 1 / (2 * self.beta)).square()


def first_state(tools: TrainingContext, prompt: str) -> State:
    """One candidate before its first step: what a sampler of these arguments starts with, and its levels."""
    return tools.rollout.start(tools.encode([prompt]), [torch.Generator("cpu").manual_seed(0)])


def denoiser(
    tools: TrainingContext, batch: Batch, noised: Tensor, times: Tensor, state: State
) -> Callable[[bool], Tensor]:
    """The denoiser on 2B noised rows, winners before losers, told of the prompts and of no negative prompts.

    Args:
        tools: the pipeline's parts.
        batch: of B rows.
        noised: latents (2B, ...).
        times: (2B,) as `Family.predict` takes them.
        state: tells the type that the denoiser takes, and where the latents' tokens lie.

    Returns:
        A function that calls it: outputs (2B, ...) in at least float32. It is told whether to keep no activations for
        the backward pass and compute them again there.
    """
    family = tools.rollout.family
    conditioning = Conditioning(positive=tools.encode(batch.prompts).positive)
    twice = conditioning[[*range(len(batch))] * 2]
    arguments = (noised.to(state.latents.dtype), times.to(noised.device), twice, state.shared)

    def predict(checkpointed: bool) -> Tensor:
        if checkpointed:
            output: Any = checkpoint(family.predict, *arguments, use_reentrant=False)
        else:
            output = family.predict(*arguments)
        return output.to(torch.promote_types(output.dtype, torch.float32))

    return predict


def accuracy(inside: Tensor) -> Tensor:
    """(B,) 1 where the winner gained more, 0 where the loser did, 1/2 for a tie."""
    return (inside > 0).to(inside) + 0.5 * (inside == 0).to(inside)


def mean_square(difference: Tensor) -> Tensor:
    """(B,) of (B, ...)."""
    return difference.square().flatten(1).mean(dim=1)
