"""The Ray cluster: joining or starting one, and how its CPUs and GPUs are shared."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from aigiqa_reward.utils.checks import how_to_install
from aigiqa_reward.utils.memory import keep_memory

TASK = 0.25
"""Share of a CPU that a task of reading or decoding reserves; a worker on CPUs leaves two such shares."""

RETRIES = 2
"""How often a task or worker that was killed is tried again."""


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Actors with one reward, or one pipeline and reward, each.

    Attributes:
        count: number of actors.
        resources: what Ray reserves for each.
        decoding: CPUs that Ray reserves for a task of decoding.
        threads: threads that each computes with; None leaves that to torch.
        folder: folder of the command, in which relative paths start.
    """

    count: int
    resources: dict[str, float]
    decoding: float
    threads: int | None
    folder: str = field(default_factory=os.getcwd)

    def enter(self) -> None:
        """Make the calling process one of the workers."""
        import torch

        with suppress(OSError):  # a node that lacks the folder; paths may be absolute
            os.chdir(self.folder)
        keep_memory()
        if self.threads is not None:
            torch.set_num_threads(self.threads)


@contextmanager
def keeping_sigterm() -> Iterator[None]:
    """Restore the handler of SIGTERM: `ray.init` replaces it by one that ends the process, `ray.shutdown` drops it."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextmanager
def joined_cluster() -> Iterator[Any]:
    """Join the cluster at RAY_ADDRESS, or start one on this machine and stop it afterwards; yield the module ray."""
    os.environ.setdefault("RAY_task_oom_retries", str(RETRIES))  # else tasks killed for their memory never end
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(f"engine: 'ray' needs the package ray[data]; {how_to_install('ray')}") from error
    ours, address = not ray.is_initialized(), os.environ.get("RAY_ADDRESS")
    if ours:
        started: dict[str, Any] = {} if address else {"include_dashboard": False}
        try:
            with keeping_sigterm():
                ray.init(log_to_driver=False, logging_level=logging.ERROR, **started)
        except Exception as error:  # Ray raises this class itself
            wanted = f"join the Ray cluster at RAY_ADDRESS={address}" if address else "start Ray on this machine"
            raise ValueError(f"engine: cannot {wanted}: {error}") from error
    try:
        yield ray
    finally:
        if ours:
            with keeping_sigterm():
                ray.shutdown()


def share(ray: Any, device: str | None, cpus_per_worker: int) -> Workers:
    """Return one worker per GPU or, on "cpu" or where there are none, per `cpus_per_worker` CPUs of a node.

    On CPUs each worker leaves half a CPU to reading and decoding, so that these always have a slot.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    if gpus and device != "cpu":
        return Workers(count=gpus, resources={"num_gpus": 1, "num_cpus": 0}, decoding=1, threads=None)
    most = int(max(node.get("CPU", 0) for node in nodes))
    if cpus_per_worker > most:
        raise ValueError(
            f"cpus_per_worker: expected at most {most}, the CPUs of the largest node, got {cpus_per_worker}"
        )
    count = sum(int(node.get("CPU", 0)) // cpus_per_worker for node in nodes)
    return Workers(
        count=count, resources={"num_cpus": cpus_per_worker - 2 * TASK}, decoding=TASK, threads=cpus_per_worker
    )
