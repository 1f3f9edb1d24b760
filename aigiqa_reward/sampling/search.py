"""Searches over our own sampling loop, for BestOfN: successive halving on previews, and zero-order search on noises."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from aigiqa_reward.rewards.bound import BoundReward
from aigiqa_reward.rewards.ranking import rank
from aigiqa_reward.sampling.candidates import Picture, Tally, judge
from aigiqa_reward.sampling.pipeline_utils import in_chunks
from aigiqa_reward.sampling.rollout import Rollout, State
from aigiqa_reward.utils.checks import integer


class Round(NamedTuple):
    """One pruning: after `step` steps the best `survivors` are kept."""

    step: int
    survivors: int


@dataclass(frozen=True, kw_only=True)
class Halving:
    """Successive halving (Karnin et al. 2013; Jamieson & Talwalkar 2016) over the steps of a sampler.

    The defaults were selected on the embedded generator, on prompts apart from those of the published figures: early
    previews rank candidates poorly, so five gentle rounds lose less than three that halve, for the same denoiser calls.

    Attributes:
        at: increasing fractions of the steps, in (0, 1), after which previews are scored.
        keep: fraction of the candidates that is kept each time, in (0, 1).

    Example:
        >>> from aigiqa_reward.sampling import Halving
        >>> plan = Halving(at=(0.25, 0.5), keep=0.5)  # BestOfN(..., pruning=plan)
        >>> [(pruning.step, pruning.survivors) for pruning in plan.rounds(n=16, steps=20)]
        [(5, 8), (10, 4)]
        >>> plan.calls(n=16, steps=20)  # of 320 without pruning
        160
    """

    at: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7)
    keep: float = 0.65

    def __post_init__(self) -> None:
        if not self.at or any(not 0 < share < 1 for share in self.at) or list(self.at) != sorted(set(self.at)):
            raise ValueError(f"at: expected growing shares of the steps within (0, 1), got {self.at!r}")
        if not 0 < self.keep < 1:
            raise ValueError(f"keep: expected a share in (0, 1), got {self.keep!r}; a half is usual")

    def rounds(self, n: int, steps: int, least: int = 1) -> list[Round]:
        """Return the rounds that prune `n` candidates to at least `least`, by increasing steps.

        Fractions that round to the same step become one round, which prunes as many as all of them together.
        """
        found: dict[int, int] = {}
        alive = n
        for share in self.at:
            step = max(1, round(share * steps))
            left = max(least, math.ceil(alive * self.keep))
            if step < steps and left < alive:
                found[step] = alive = left
        return [Round(*item) for item in found.items()]

    def calls(self, n: int, steps: int, least: int = 1) -> int:
        """Return the denoiser calls of the whole search, one per candidate and step."""
        walk = [Round(0, n), *self.rounds(n, steps, least), Round(steps, 0)]
        return sum(a.survivors * (b.step - a.step) for a, b in itertools.pairwise(walk))


@dataclass(frozen=True, kw_only=True)
class ZeroOrder:
    """Zero-order search among noises (Ma et al. 2025, Inference-Time Scaling for Diffusion Models, section 3).

    The first `neighbors` candidates are independent. Then, repeatedly, the best noise so far is the pivot p, and each
    of the next `neighbors` candidates starts from sqrt(1 - radius^2) p + radius e with fresh noise e, which is again
    Gaussian.

    Attributes:
        neighbors: candidates per round, at least 1.
        radius: in (0, 1]; 1 is random search.

    Example:
        >>> from aigiqa_reward.sampling import ZeroOrder
        >>> ZeroOrder(neighbors=4, radius=0.5).radius  # BestOfN(..., search=ZeroOrder(...))
        0.5
    """

    neighbors: int = 4
    radius: float = 0.5

    def __post_init__(self) -> None:
        integer("neighbors", self.neighbors, least=1)
        if not 0 < self.radius <= 1:
            raise ValueError(f"radius: expected a number in (0, 1], got {self.radius!r}; 1 is random search")


class Search:
    """Candidates of one prompt in our own sampling loop, by their seeds; `text` is the reward's prompt."""

    def __init__(
        self, rollout: Rollout, prompt: str, reward: BoundReward, text: str, batch_size: int, tally: Tally
    ) -> None:
        self.rollout, self.reward, self.text = rollout, reward, text
        self.batch_size, self.tally = batch_size, tally
        self._conditioning = rollout.encode([prompt])
        self._held: dict[int, State] = {}
        tally.calls = 0

    def start(self, seeds: Sequence[int]) -> State:
        """Return candidates (B,) at their beginning."""
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        return self.rollout.start(self._conditioning[[0] * len(seeds)], generators)

    def gather(self, seeds: Sequence[int]) -> State:
        """Return candidates where they were left, or at their beginning, with copies of their generators.

        A chunk that runs out of memory thus draws the same noise when it is repeated.
        """
        if not all(seed in self._held for seed in seeds):
            return self.start(seeds)
        state = State.cat([self._held[seed] for seed in seeds])
        generators = tuple(torch.Generator(g.device).set_state(g.get_state()) for g in state.generators)
        return replace(state, conditioning=self._conditioning[[0] * len(seeds)], generators=generators)

    def leave(self, seeds: Sequence[int], state: State) -> None:
        """Keep candidates where they are now; what they share is kept once."""
        self._held |= {seed: replace(state[[row]], conditioning=self._conditioning) for row, seed in enumerate(seeds)}

    def advance(self, state: State, until: int) -> tuple[State, Tensor]:
        """Take candidates to a step; also return the clean latents (B, ...) of the last prediction."""
        clean = state.latents
        with torch.no_grad():
            while state.step < until:
                prediction = self.rollout.predict(state)
                state, clean = self.rollout.advance(state, prediction.output), prediction.clean
        return state, clean

    def count(self, calls: int) -> None:
        """Add denoiser calls."""
        self.tally.calls = (self.tally.calls or 0) + calls

    def preview(self, seeds: Sequence[int], until: int) -> dict[int, float]:
        """Take candidates to a step, score the images predicted there, and return the totals of those not dropped."""
        before = self.gather(seeds)
        state, clean = self.advance(before, until)
        candidates = judge(self.rollout.show(clean), [False] * len(seeds), self.reward, self.text)
        self.leave(seeds, state)  # last: a chunk that fails before this is repeated from where it began
        self.count(len(seeds) * (until - before.step))
        totals = {}
        for seed, candidate in zip(seeds, candidates, strict=True):
            if candidate.dropped is not None:
                self.tally.leave(seed, candidate.dropped)
                self._held.pop(seed)
            else:
                totals[seed] = candidate.total
                self.tally.preview(seed, candidate.preview(until, state.steps))
        return totals

    def finish(self, seeds: Sequence[int], state: State, noise: Tensor | None = None, *, seeded: bool = True) -> None:
        """Take candidates to their end, score them and add them to the tally, with their noise where it is given."""
        images = self.rollout.show(self.advance(state, state.steps)[0].latents, final=True)
        candidates = judge(images, self.rollout.family.flagged(images), self.reward, self.text)
        passed = None if noise is None else self.rollout.family.as_passed(noise, state.scheduler).cpu()
        self.tally.add(seeds, candidates, lambda row: Picture.of(images, row, passed, seeded=seeded))
        self.count(len(seeds) * (state.steps - state.step))
        for seed in seeds:
            self._held.pop(seed, None)


def halve(search: Search, seeds: Sequence[int], plan: Halving, least: int) -> Generator[None, None, None]:
    """Take candidates from round to round, keeping those with the best previews; yield after each chunk.

    If fewer than `least` can be ranked at the end, those that were pruned last continue in their place, best first.
    """
    pipe, size, alive = search.rollout.pipe, search.batch_size, list(seeds)
    waiting: list[list[int]] = []
    for pruning in plan.rounds(len(alive), search.start(alive[:1]).steps, least):
        totals: dict[int, float] = {}
        for _, found in in_chunks(alive, size, lambda chunk, step=pruning.step: search.preview(chunk, step), pipe):
            totals |= found
            yield
        ranked = [seed for seed in alive if seed in totals]
        order = [ranked[place] for place in rank(totals[seed] for seed in ranked)]
        alive, pruned = sorted(order[: pruning.survivors], key=alive.index), order[pruning.survivors :]
        for seed in pruned:
            search.tally.leave(seed)
        waiting += [pruned] if pruned else []
    while True:
        for _ in in_chunks(alive, size, lambda chunk: search.finish(chunk, search.gather(chunk)), pipe):
            yield
        least -= sum(not math.isnan(search.tally.total(seed)) for seed in alive)
        if least <= 0 or not waiting:
            return
        last = waiting.pop()
        alive, rest = last[:least], last[least:]
        waiting += [rest] if rest else []


def climb(search: Search, seeds: Sequence[int], plan: ZeroOrder) -> Generator[None, None, None]:
    """Search among noises near the best one so far, with fresh noise from the seeds; yield after each chunk."""
    pivot: Tensor | None = None
    best = -math.inf
    for first in range(0, len(seeds), plan.neighbors):
        noises: dict[int, Tensor] = {}

        def sample(chunk: Sequence[int], near: Tensor | None = pivot, noises: dict[int, Tensor] = noises) -> None:
            state = search.start(chunk)
            if near is not None:
                mixed = math.sqrt(1 - plan.radius**2) * near + plan.radius * state.latents
                state = replace(state, latents=mixed.to(state.latents.dtype))
            noises.update({seed: state.latents[row : row + 1] for row, seed in enumerate(chunk)})
            search.finish(chunk, state, state.latents, seeded=near is None)

        chunk = list(seeds[first : first + plan.neighbors])
        for _ in in_chunks(chunk, search.batch_size, sample, search.rollout.pipe):
            yield
        for seed, noise in noises.items():
            if (total := search.tally.total(seed)) > best:
                best, pivot = total, noise
