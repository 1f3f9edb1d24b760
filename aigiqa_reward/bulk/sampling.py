"""Run `best_of_each` or `build_preference_pairs` in all workers of a Ray cluster, each for its share of the prompts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aigiqa_reward.bulk.cluster import Workers

_LOOK = 1.0  # seconds between calls of `watch`


class _Gate:
    """An actor: opens once the first worker has prepared the folder of its `number`-th run."""

    def __init__(self) -> None:
        self.number, self.changed = 0, asyncio.Condition()

    async def open(self, number: int) -> None:
        async with self.changed:
            self.number = max(self.number, number)
            self.changed.notify_all()

    async def passed(self, number: int) -> None:
        async with self.changed:
            await self.changed.wait_for(lambda: self.number >= number)


@dataclass
class Processes:
    """What `best_of_each` needs of accelerate's PartialState, with workers of Ray as processes."""

    process_index: int
    num_processes: int
    ray: Any
    gate: Any
    runs: int = 0

    @property
    def is_main_process(self) -> bool:
        """Whether this is the first worker."""
        return self.process_index == 0

    def wait_for_everyone(self) -> None:
        """Wait until the first worker is here."""
        self.runs += 1
        method = self.gate.open if self.is_main_process else self.gate.passed
        self.ray.get(method.remote(self.runs))


class _Worker:
    def run(self, share: Callable[[Processes], Any], index: int, workers: Workers, gate: Any) -> Any:
        import ray

        workers.enter()
        return share(Processes(index, workers.count, ray, gate))


def run_shares(ray: Any, workers: Workers, share: Callable[[Processes], Any], watch: Callable[[], object]) -> list[Any]:
    """Call `share` in every worker, and `watch` here about once per second; return what the workers returned.

    The first error of a worker, or its end, ends all of them; what they had finished is in the folder that all nodes
    share. None starts again beside the others, since the first one prepares the folder.
    """
    gate = ray.remote(_Gate).options(num_cpus=0).remote()
    kind = ray.remote(_Worker).options(**workers.resources)
    actors = [kind.remote() for _ in range(workers.count)]
    running = calls = [actor.run.remote(share, index, workers, gate) for index, actor in enumerate(actors)]
    try:
        while running:
            ended, running = ray.wait(running, timeout=_LOOK)
            ray.get(ended)
            watch()
        return ray.get(calls)
    finally:
        for actor in (*actors, gate):
            ray.kill(actor)
