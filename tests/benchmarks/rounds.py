"""What benchmarks share: arguments, interleaved timing, bootstrap intervals, figures."""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from aigiqa_reward.utils.io import write_atomically


def parser_of(description: str | None, threads: int | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=threads, help="threads of torch")
    return parser


def timing_parser(description: str | None, repeats: int = 7, batch: int = 8) -> argparse.ArgumentParser:
    parser = parser_of(description)
    parser.add_argument("--repeats", type=int, default=repeats, help="timed rounds")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    return arguments


@torch.no_grad()
def medians(runs: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Seconds of each contestant, median over the rounds after a first one that warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in tqdm(range(repeats + 1), desc="rounds"):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def print_ratios(middle: Mapping[str, float], reference: str) -> None:
    print("| | ratio to ViT-B/16 |\n| --- | ---: |")
    for name, value in middle.items():
        print(f"| {name} | {value / middle[reference]:.2f} |")


def interval(values: np.ndarray, reference: np.ndarray | None = None, draws: int = 10_000) -> tuple[float, ...]:
    """Mean of values (prompts,) or (seeds, prompts), and its 95 % bootstrap interval over both.

    With a reference (prompts,), the mean relative to the reference's mean over the same prompts.
    """
    rng, table = np.random.default_rng(0), np.atleast_2d(values)
    (seeds, prompts), whole = table.shape, np.ones(table.shape[1]) if reference is None else reference
    s = rng.integers(seeds, size=(draws, seeds)) if values.ndim == 2 else np.zeros((draws, 1), dtype=int)
    p = rng.integers(prompts, size=(draws, prompts))
    means = table[s[:, :, None], p[:, None]].mean(axis=(1, 2)) / whole[p].mean(axis=1)
    return float(table.mean() / whole.mean()), *map(float, np.quantile(means, (0.025, 0.975)))


def shown(values: tuple[float, ...]) -> str:
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*values)


def save(picture: Any, path: Path) -> None:
    data = io.BytesIO()
    more = {"dpi": 110} if hasattr(picture, "savefig") else {}
    getattr(picture, "savefig", getattr(picture, "save", None))(data, format="png", **more)
    write_atomically(path, data.getvalue())
