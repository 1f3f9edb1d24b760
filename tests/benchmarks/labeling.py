"""How much a reward learns from 200 choices: the judge of the emoji world labels pairs of the embedded generator.

Both images of a pair are sampled from one prompt in 2 steps; pairs whose images the judge scores alike (below the
median difference) are left out. The labels go through the page's store and its export. Active choice (least sure first)
and random choice take 200 of the same pool; the held-out choices are of other prompts.

    python tests/benchmarks/labeling.py --output labeling.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from aigiqa_reward import Scorer, create_reward
from aigiqa_reward.datasets import PreferencePairs, read_data
from aigiqa_reward.evaluation import bootstrap_interval, pair_accuracy
from aigiqa_reward.images import load
from aigiqa_reward.images.metadata import find_prompt
from aigiqa_reward.toy.judge import load_judge
from aigiqa_reward.toy.world import COLOR_NAMES, NOUNS, caption
from aigiqa_reward.training.by_name import TrainingPlan, train_reward, whole_split
from aigiqa_reward.web import Studio
from aigiqa_reward.web.labels import Labels, Pair

HELD_OUT, CHOICES = 400, 200
ORDERS = ("least sure first", "random")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "aigiqa-labeling")
    parser.add_argument("--pairs-per-prompt", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, help="by default the recipe's")
    parser.add_argument("--epochs", type=int, help="by default the recipe's")
    options = parser.parse_args()
    studio = Studio([], options.folder / "studio")
    prompts = [caption(noun, color) for noun in range(len(NOUNS)) for color in range(len(COLOR_NAMES))]
    prompts = [prompts[place] for place in np.random.default_rng(0).permutation(len(prompts))]
    images = sampled(studio, prompts, 2 * options.pairs_per_prompt)
    total = judged(images)
    seeds = sorted({int(Path(path).stem.partition("_")[2]) for path, _ in images})
    found = {(prompt, int(Path(path).stem.partition("_")[2])): path for path, prompt in images}
    pairs = [
        Pair(prompt, *sorted((found[prompt, a], found[prompt, b])))
        for prompt in prompts
        for a, b in zip(seeds[::2], seeds[1::2], strict=True)
    ]
    gaps = np.array([abs(total[pair.first] - total[pair.second]) for pair in pairs])
    clear = [pair for pair, gap in zip(pairs, gaps, strict=True) if gap > np.median(gaps)]
    cut = next(i for i in range(len(prompts)) if sum(p.prompt in set(prompts[:i]) for p in clear) >= HELD_OUT)
    held = [pair for pair in clear if pair.prompt in set(prompts[:cut])][:HELD_OUT]
    pool = [pair for pair in clear if pair.prompt in set(prompts[cut:])]
    for _ in tqdm(studio.score("compact", [(p, pair.prompt) for pair in pool for p in (pair.first, pair.second)])):
        pass
    before = won(create_reward("compact"), as_pairs(held, total))
    needed = min(0.08, (1 - before.mean()) / 2)  # 8 points, or half of the remaining disagreement
    figures = {"held_out": len(held), "pool": len(pool), "before": float(before.mean()), "needed": float(needed)}
    for order in ORDERS:
        trained = teach(options, choose(studio, pool, order), total)
        after = won(trained, as_pairs(held, total))
        groups = [pair.prompt for pair in held]
        gain = bootstrap_interval(lambda rows, _, after=after: float((after - before)[rows].mean()), groups)
        figures[order] = {"after": float(after.mean()), "gain": gain.estimate, "low": gain.low, "high": gain.high}
        figures[order]["reached"] = bool(gain.estimate >= needed and gain.low > 0)
        print(order, figures[order])
    options.output.write_text(json.dumps(figures, indent=2), encoding="utf-8")
    print(json.dumps(figures, indent=2))


def sampled(studio: Studio, prompts: list[str], per_prompt: int) -> list[tuple[str, str]]:
    """Sample the images of prompts that lack some; return path and prompt of all."""
    counts = Counter(prompt for _, prompt in _listed(studio))
    missing = [prompt for prompt in prompts if counts[prompt] < per_prompt]
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0}
    for _ in tqdm(studio.sample(missing, per_prompt, 0, **settings), total=len(missing) * per_prompt):
        pass
    return _listed(studio)


def _listed(studio: Studio) -> list[tuple[str, str]]:
    return [(str(file), find_prompt(file, "embedded").text) for file in sorted(studio.samples.glob("*.png"))]


def judged(images: list[tuple[str, str]]) -> dict[str, float]:
    judge = load_judge()
    with torch.inference_mode():
        return {path: judge(load(path)[None], [prompt]).total.item() for path, prompt in tqdm(images)}


def choose(studio: Studio, pool: list[Pair], order: str) -> list[Pair]:
    """Return the first choices that the page would ask for."""
    if order == "random":
        return [pool[place] for place in np.random.default_rng(1).permutation(len(pool))[:CHOICES]]
    return sorted(pool, key=lambda pair: studio._sureness("compact", pair))[:CHOICES]


def as_pairs(pairs: list[Pair], total: dict[str, float]) -> PreferencePairs:
    sides = [sorted((pair.first, pair.second), key=lambda path: -total[path]) for pair in pairs]
    better, worse = (tuple(map(Path, side)) for side in zip(*sides, strict=True))
    return PreferencePairs(prompts=tuple(pair.prompt for pair in pairs), better=better, worse=worse)


def teach(options: argparse.Namespace, chosen: list[Pair], total: dict[str, float]) -> torch.nn.Module:
    """Label as a rater, export, read and train, as the page and the command line do."""
    with tempfile.TemporaryDirectory() as folder:
        labels = Labels(Path(folder) / "labels.sqlite3")
        for pair in chosen:
            labels.choose("judge", pair, "first" if total[pair.first] > total[pair.second] else "second")
        labels.export(Path(folder))
        data = read_data(f"pairs:{folder}")
    plan = TrainingPlan(name="compact", init="embedded", cache=options.folder / "features")
    given = {"learning_rate": options.learning_rate, "epochs": options.epochs}
    plan = replace(plan, recipe=replace(plan.chosen_recipe, **{k: v for k, v in given.items() if v is not None}))
    return train_reward(plan, data, whole_split(data), None).reward


def won(reward: torch.nn.Module, pairs: PreferencePairs) -> np.ndarray:
    """Return (N,) whether the preferred image scores higher."""
    better, worse = (Scorer(reward).score(side, pairs.prompts).total.numpy() for side in (pairs.better, pairs.worse))
    print(pair_accuracy(better, worse, pairs.groups))
    return (better > worse) + 0.5 * (better == worse)


if __name__ == "__main__":
    main()
