"""Interleaved timing: every candidate runs once per round; results are medians over rounds."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from tqdm import tqdm


def read_arguments(description: str | None) -> argparse.Namespace:
    """Repeats, batch, threads and device; the threads are set."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
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
    """A Markdown table of medians over the reference's."""
    print("| | ratio to ViT-B/16 |\n| --- | ---: |")
    for name, value in middle.items():
        print(f"| {name} | {value / middle[reference]:.2f} |")
