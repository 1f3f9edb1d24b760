"""Searches over our own loop, for BestOfN: successive halving on previews, and zero-order search among noises."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor

from aigiqa_reward import images as pixels
from aigiqa_reward.rewards.ranking import Halving, ZeroOrder, rank
from aigiqa_reward.sampling.candidates import Picture, Preview, PromptedReward, Tally, judge, scores_of, why_dropped
from aigiqa_reward.sampling.pipeline_utils import in_chunks
from aigiqa_reward.sampling.rollout import Rollout, State


class Search:
    """Candidates of one prompt on our own loop, each by its seed.

    Args:
        rollout: of the pipeline and the arguments of its call.
        prompt: that the pipeline is given.
        reward: bound to its own prompt.
        batch_size: candidates at once.
        tally: takes in what becomes of them.
    """

    def __init__(self, rollout: Rollout, prompt: str, reward: PromptedReward, batch_size: int, tally: Tally) -> None:
        self.rollout = rollout
        self.reward = reward
        self.batch_size = batch_size
        self.tally = tally
        self._conditioning = rollout.encode([prompt])
        self._held: dict[int, State] = {}
        tally.calls = 0

    def start(self, seeds: Sequence[int], noise: Tensor | None = None) -> State:
        """Candidates at their beginning.

        Args:
            seeds: (B,) of their generators.
            noise: (B, ...) initial latents instead of those that the seeds give.
        """
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        return self.rollout.start(self._conditioning[[0] * len(seeds)], generators, noise)

    def gather(self, seeds: Sequence[int]) -> State:
        """Candidates where they were left, or at their beginning.

        Their generators are copies, so that a chunk that runs out of memory, wherever it does, draws the same again.
        """
        if not all(seed in self._held for seed in seeds):
            return self.start(seeds)
        state = State.cat([self._held[seed] for seed in seeds])
        generators = tuple(_copy(generator) for generator in state.generators)
        return replace(state, conditioning=self._conditioning[[0] * len(seeds)], generators=generators)

    def leave(self, seeds: Sequence[int], state: State) -> None:
        """Leave candidates where they are now. What they share is held once."""
        left = {seed: replace(state[[row]], conditioning=self._conditioning) for row, seed in enumerate(seeds)}
        self._held.update(left)

    def forget(self, seeds: Iterable[int]) -> None:
        """Let go of candidates."""
        for seed in seeds:
            self._held.pop(seed, None)

    def go(self, state: State, until: int) -> tuple[State, Tensor]:
        """Take candidates to a step; also the clean latents that the last prediction stood for, at no further call."""
        clean = state.latents
        with torch.no_grad():
            while state.step < until:
                prediction = self.rollout.predict(state)
                state, clean = self.rollout.advance(state, prediction.output), prediction.clean
        return state, clean

    def count(self, calls: int) -> None:
        """Note that so many rows went through the denoiser."""
        assert self.tally.calls is not None, "set by __init__"
        self.tally.calls += calls

    def finish(self, seeds: Sequence[int], state: State, noise: Tensor | None = None) -> None:
        """Take candidates to their end, score them and add them to the tally, with their noise where it is given."""
        images = self.rollout.show(self.go(state, state.steps)[0].latents, final=True)
        reasons, output = judge(images, self.rollout.family.flagged(images), self.reward)
        passed = None if noise is None else self.rollout.family.as_passed(noise, state.scheduler).cpu()

        def picture(row: int) -> Picture:
            image = pixels.to_pil(images[row : row + 1].cpu())[0]
            return Picture(image=image, noise=None if passed is None else passed[row : row + 1].clone())

        self.tally.add(seeds, reasons, output, picture)
        self.count(len(seeds) * (state.steps - state.step))
        self.forget(seeds)


def _copy(generator: torch.Generator) -> torch.Generator:
    return torch.Generator(generator.device).set_state(generator.get_state())


def halve(search: Search, seeds: Sequence[int], plan: Halving, least: int) -> Generator[None, None, None]:
    """Take all candidates some of the way, keep those whose previews the reward likes best, and so on to the end.

    The safety checker sees final images only, and a last decoding may overflow. Where fewer than `least` are ranked at
    the end, those that were pruned last go on in their place, best previews first. Yields after each chunk.

    Args:
        search: over a fresh tally.
        seeds: (N,) of the candidates.
        plan: when to prune and by how much.
        least: candidates to be ranked at the end.
    """
    pipe, alive = search.rollout.pipe, list(seeds)
    steps = search.start(alive[:1]).steps

    def look(chunk: Sequence[int], until: int) -> None:
        before = search.gather(chunk)
        state, clean = search.go(before, until)
        reasons, output = judge(search.rollout.show(clean), [False] * len(chunk), search.reward)
        judged = scores_of(output, reasons)
        search.leave(chunk, state)  # only now: what fails until here is done again from where it began
        search.count(len(chunk) * (until - before.step))
        for seed, reason, scores in zip(chunk, reasons, judged, strict=True):
            why = why_dropped(scores.total, reason)
            if why is not None:
                search.tally.leave(seed, why)
                search.forget([seed])
            else:
                totals[seed] = scores.total
                search.tally.preview(seed, Preview(step=until, steps=steps, **asdict(scores)))

    waiting: list[list[int]] = []
    for pruning in plan.rounds(len(alive), steps, least):
        totals: dict[int, float] = {}
        for _ in in_chunks(alive, search.batch_size, lambda chunk, at=pruning.step: look(chunk, at), pipe):
            yield
        ranked = [seed for seed in alive if seed in totals]
        order = [ranked[place] for place in rank(totals[seed] for seed in ranked)]
        alive, pruned = sorted(order[: pruning.survivors], key=alive.index), order[pruning.survivors :]
        for seed in pruned:
            search.tally.leave(seed)
        waiting += [pruned] if pruned else []
    found = 0
    while True:
        for _ in in_chunks(alive, search.batch_size, lambda chunk: search.finish(chunk, search.gather(chunk)), pipe):
            yield
        found += sum(not math.isnan(search.tally.total(seed)) for seed in alive)
        if found >= least or not waiting:
            return
        alive, rest = waiting[-1][: least - found], waiting.pop()[least - found :]
        waiting += [rest] if rest else []


def climb(search: Search, seeds: Sequence[int], plan: ZeroOrder) -> Generator[None, None, None]:
    """Search among noises near the best one so far; yields after each chunk. See `ZeroOrder`.

    Args:
        search: over a fresh tally.
        seeds: (N,) of the candidates' generators, from which their fresh noise comes.
        plan: how many a round, how far.
    """
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
            search.finish(chunk, state, state.latents)

        chunk = list(seeds[first : first + plan.neighbors])
        for _ in in_chunks(chunk, search.batch_size, sample, search.rollout.pipe):
            yield
        for seed, noise in noises.items():
            total = search.tally.total(seed)
            if total > best:
                best, pivot = total, noise
