"""Measure the embedded generator, and what best of N gains on it, by the independent judge.

    python examples/train_generator/evaluate.py --samples 512
    python examples/train_generator/evaluate.py --prompts 40

The first counts how often one sample is right. The second samples 4 blocks of 64 candidates for each prompt of two
splits and picks the best of 1, 4, 16 and 64 by the compact reward, at random, and by the judge itself (an oracle: the
largest possible gain). Finished prompts are files in --runs and are not sampled again.
"""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from aigiqa_reward import BestOfN, create_reward, load_embedded_pipeline
from aigiqa_reward.toy.judge import load_judge
from aigiqa_reward.toy.pictures import all_pairs
from aigiqa_reward.toy.world import caption
from aigiqa_reward.utils.weights import ASSETS, read_weights, sha256, write_weights

BLOCKS, CANDIDATES = 4, 64
SIZES = (1, 4, 16, 64)
BATCH = 32
DRAWS = 2000


@dataclass(frozen=True, kw_only=True)
class Split:
    """Prompts of one kind, and how they are sampled."""

    held_out: bool
    steps: int
    guidance: float


SPLITS = {
    "easy": Split(held_out=False, steps=3, guidance=1.0),
    "hard": Split(held_out=True, steps=2, guidance=1.0),
}


class Recorder:
    """A reward function that returns the reward's total and records scores of reward and judge for every candidate."""

    def __init__(self) -> None:
        self.reward = create_reward("compact")
        self.judge = load_judge()
        self.rows: list[Tensor] = []

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        total = self.reward(images, prompts).total
        verdict, right = self.judge(images, prompts), self.judge.accepts(images, prompts)
        self.rows.append(torch.stack([total, verdict.total, -verdict.quality, right.float()], dim=1))
        return total


def sample_prompt(pipe: object, prompt: str, split: Split) -> Tensor:
    """(BLOCKS, CANDIDATES, 4): of each the reward, and the judge's score, degradation and whether it is right."""
    recorder = Recorder()
    best = BestOfN(pipe, recorder, n=BLOCKS * CANDIDATES, batch_size=BATCH, progress=False)
    best(prompt, seed=0, num_inference_steps=split.steps, guidance_scale=split.guidance)
    return torch.cat(recorder.rows).unflatten(0, (BLOCKS, CANDIDATES))


def version() -> str:
    """Of what the candidates depend on: a short hash of the weights of generator, reward and judge."""
    files = sorted(
        file for part in ("generator", "compact", "judge") for file in (ASSETS / part).rglob("*.safetensors")
    )
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()[:8]


def sample_all(count: int, runs: Path) -> dict[str, np.ndarray]:
    """(count, BLOCKS, CANDIDATES, 4) of each split."""
    pipe, current = load_embedded_pipeline(), version()
    rng = np.random.default_rng(0)
    tables: dict[str, list[Tensor]] = {name: [] for name in SPLITS}
    chosen = {name: rng.permutation(all_pairs(held_out=split.held_out)) for name, split in SPLITS.items()}
    for number in tqdm(range(count), desc="prompts", unit="prompt of each split"):
        for name, split in SPLITS.items():
            settings = f"{name}_{split.steps}_{split.guidance}_{current}"
            file = runs / f"{settings}_{number:03d}.safetensors"
            if not file.exists():
                prompt = caption(*chosen[name][number].tolist())
                write_weights(file, {"candidates": sample_prompt(pipe, prompt, split)})
            tables[name].append(read_weights(file)["candidates"])
    return {name: torch.stack(rows).numpy() for name, rows in tables.items()}


def picked(table: np.ndarray, size: int, selector: str) -> np.ndarray:
    """(prompts, 4): means over all disjoint groups of `size` candidates of what the selector picks there."""
    groups = table.reshape(len(table), -1, size, table.shape[-1])
    if selector == "random":
        return groups.mean(axis=(1, 2))  # its expectation
    key = groups[..., 0] if selector == "reward" else groups[..., 1] + 1000 * groups[..., 3]  # the right ones first
    best = key.argmax(axis=2)
    return np.take_along_axis(groups, best[..., None, None], axis=2)[:, :, 0].mean(axis=1)


def interval(values: np.ndarray) -> str:
    """Mean over prompts with the 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    draws = values[rng.integers(len(values), size=(DRAWS, len(values)))].mean(axis=1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def share(gained: np.ndarray, possible: np.ndarray) -> str:
    """Of the gain that is possible, over all prompts, with the 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    rows = rng.integers(len(gained), size=(DRAWS, len(gained)))
    low, high = np.quantile(gained[rows].sum(axis=1) / possible[rows].sum(axis=1).clip(1e-9), (0.025, 0.975))
    return f"{gained.sum() / possible.sum():.2f} [{low:.2f}, {high:.2f}]"


def report(tables: dict[str, np.ndarray]) -> str:
    """The table in Markdown."""
    lines = [
        "| split | best of | picked by | reward | judge: score (nats) | judge: degradation | judge: right | gain |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, table in tables.items():
        for size in SIZES:
            chance, oracle = (picked(table, size, selector)[:, 3] for selector in ("random", "oracle"))
            for selector in ("random", "reward", "oracle") if size > 1 else ("random",):
                values = picked(table, size, selector)
                gain = "–"
                if selector == "reward":
                    gain = share(values[:, 3] - chance, oracle - chance)
                row = " | ".join(interval(values[:, column]) for column in range(4))
                who = "one sample" if size == 1 else selector
                lines.append(f"| {name} | {size} | {who} | {row} | {gain} |")
    return "\n".join(lines)


def print_samples(count: int) -> None:
    """How often one sample of a trained pair is right, at 20 steps and guidance 3."""
    pipe, judge = load_embedded_pipeline(), load_judge()
    rng = np.random.default_rng(1)
    pairs = rng.permutation(all_pairs(held_out=False))
    prompts = [caption(*pairs[i % len(pairs)].tolist()) for i in range(count)]
    right = []
    for start in tqdm(range(0, count, BATCH), desc="samples", unit=f"{BATCH} pictures"):
        part = prompts[start : start + BATCH]
        generators = [torch.Generator("cpu").manual_seed(start + i) for i in range(len(part))]
        images = pipe(part, generator=generators, num_inference_steps=20, guidance_scale=3.0, output_type="pt").images
        right.append(torch.stack(judge.recognizes(images, part), dim=1))
    noun, color = torch.cat(right).float().mean(dim=0).tolist()
    print(f"one sample of {count} prompts of trained pairs, 20 steps, guidance 3: noun {noun:.3f}, color {color:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, help="sample so many prompts once each and count what is right")
    parser.add_argument("--prompts", type=int, help="of each split, for the table of best of N; at most 64")
    parser.add_argument("--runs", type=Path, default=Path("runs/best_of_n"), help="folder for finished prompts")
    arguments = parser.parse_args()
    if not arguments.samples and not arguments.prompts:
        parser.error("expected --samples or --prompts")
    if arguments.prompts and not 1 <= arguments.prompts <= len(all_pairs(held_out=True)):
        parser.error(f"--prompts: expected 1 to {len(all_pairs(held_out=True))}, got {arguments.prompts}")
    if arguments.samples:
        print_samples(arguments.samples)
    if arguments.prompts:
        print(report(sample_all(arguments.prompts, arguments.runs)))


if __name__ == "__main__":
    main()
