"""Cost and gain of search methods on the embedded generator, by the reward and by the independent judge.

    python tests/benchmarks/search.py --prompts 40 --split hard --plot search.png
    python tests/benchmarks/search.py --prompts 40 --split hard --steps 3

For prompts of two splits (trained pairs, held-out pairs), 4 blocks of 64 candidates each are sampled by our own loop,
and the reward scores every image, and of the first 16 of a block every preview at the steps at which `Halving` looks.
Plain and pruned best of N are computed from that table, since a survivor is the unpruned image of its seed. Zero-order
search, particles and guidance sample from the block's first seed. A denoiser call is one row through the denoiser; a
backward pass counts as two. Finished prompts are files in --runs and are not sampled again.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rounds import interval, parsed, parser_of, save, shown
from torch import Tensor
from tqdm import tqdm

from aigiqa_reward import BestOfN, SmoothedReward, create_reward, load_embedded_pipeline
from aigiqa_reward.images import load
from aigiqa_reward.sampling import Halving, ParticleSteering, RewardGuidance, ZeroOrder
from aigiqa_reward.sampling.rollout import Rollout
from aigiqa_reward.toy.judge import Judge, load_judge
from aigiqa_reward.toy.pictures import all_pairs
from aigiqa_reward.toy.world import caption
from aigiqa_reward.utils.weights import ASSETS, read_weights, sha256, write_weights

BLOCKS, CANDIDATES, PREVIEWED, BATCH = 4, 64, 16, 16
SIZES = (1, 2, 4, 8, 16, 32, 64)
SPLITS = {"easy": False, "hard": True}
"""Name, and whether its pairs of thing and color were held out from the generator's training."""

COLUMNS = ("reward", "judge", "right")
DRAWS = 2000


@dataclass(frozen=True, kw_only=True)
class Models:
    pipe: Any
    reward: Any
    judge: Judge
    steps: int

    @property
    def call(self) -> dict[str, Any]:
        return {"num_inference_steps": self.steps, "guidance_scale": 1.0}

    def values(self, images: Tensor, prompt: str) -> Tensor:
        """(B, 3): reward, the judge's score in nats, and whether it accepts the picture."""
        prompts = [prompt] * len(images)
        with torch.no_grad():
            judged = self.judge(images, prompts).total, self.judge.accepts(images, prompts).float()
            return torch.stack([self.reward(images, prompts).total, *judged], dim=1)


def looks(steps: int) -> list[int]:
    """Steps after which pruning looks at previews."""
    return [entry.step for entry in Halving().rounds(PREVIEWED, steps)]


def sample_block(models: Models, prompt: str, first: int) -> tuple[Tensor, Tensor]:
    """Previews (PREVIEWED, looks) and final values (CANDIDATES, 3) of seeds `first` and on."""
    rollout, seen = Rollout(models.pipe, **models.call), looks(models.steps)
    previews, finals = [], []
    for start in range(first, first + CANDIDATES, BATCH):
        generators = [torch.Generator().manual_seed(seed) for seed in range(start, start + BATCH)]
        columns = []
        with torch.no_grad():
            state = rollout.start(rollout.encode([prompt])[[0] * BATCH], generators)
            while not state.done:
                prediction = rollout.predict(state)
                state = rollout.advance(state, prediction.output)
                if state.step in seen and start < first + PREVIEWED:
                    shown = rollout.decode(prediction.clean).clamp(0, 1)
                    columns.append(models.reward(shown, [prompt] * BATCH).total)
            images = rollout.decode(state.latents).clamp(0, 1)
        previews += [torch.stack(columns, dim=1)] if columns else []
        finals.append(models.values(images, prompt))
    return torch.cat(previews), torch.cat(finals)


def guided(models: Models, prompt: str, seed: int, reward: Any = None, **arguments: Any) -> Any:
    with RewardGuidance(models.pipe, reward or models.reward, prompt, **arguments) as guidance:
        generator = torch.Generator().manual_seed(seed)
        return models.pipe(prompt=prompt, generator=generator, callback_on_step_end=guidance, **models.call).images[0]


def searches(models: Models) -> dict[str, tuple[int, Callable[[str, int], Any]]]:
    """Of each search its denoiser calls, and what samples its image for a prompt and a seed."""
    pipe, reward, steps = models.pipe, models.reward, models.steps
    smoothed = SmoothedReward(reward)

    def zero_order(prompt: str, seed: int) -> Any:
        return BestOfN(pipe, reward, n=16, search="zero_order", progress=False)(
            prompt, seed=seed, **models.call
        ).images[0]

    def particles(prompt: str, seed: int) -> Any:
        steering = ParticleSteering(pipe, reward, particles=8, every=2, progress=False)
        return steering(prompt, seed=seed, **models.call).images[0]

    return {
        "zero-order search, 16": (16 * steps, zero_order),
        "particles, 8": (8 * steps, particles),
        "guidance at the clean image": (steps, partial(guided, models)),
        "guidance, smoothed reward": (steps, partial(guided, models, reward=smoothed)),
        "guidance, sharpness-aware": (steps, partial(guided, models, image_radius=0.4 / 255)),
        "guidance through the denoiser": (
            steps + (steps - 1) * 3,
            partial(guided, models, through_denoiser=True, **models.call),
        ),
    }


def sample_prompt(models: Models, prompt: str) -> dict[str, Tensor]:
    """Previews (BLOCKS, PREVIEWED, looks), finals (BLOCKS, CANDIDATES, 3), and of each search (BLOCKS, 3)."""
    blocks = [sample_block(models, prompt, block * CANDIDATES) for block in range(BLOCKS)]
    found = {"previews": torch.stack([b[0] for b in blocks]), "finals": torch.stack([b[1] for b in blocks])}
    for name, (_, sample) in searches(models).items():
        images = torch.stack([load(sample(prompt, block * CANDIDATES)) for block in range(BLOCKS)])
        found[name] = models.values(images, prompt)
    return found


def version(call: dict[str, Any]) -> str:
    """A short hash of what the figures depend on: the settings, and the weights of generator, reward and judge."""
    parts = ("generator", "towers", "compact", "judge")
    files = sorted(f for part in parts for f in (ASSETS / part).rglob("*.safetensors"))
    defaults = [str(inspect.signature(kind)) for kind in (Halving, ZeroOrder, ParticleSteering, RewardGuidance)]
    settings = json.dumps([call, defaults, BLOCKS, CANDIDATES, PREVIEWED])
    return hashlib.sha256((settings + "".join(map(sha256, files))).encode()).hexdigest()[:8]


def sample_all(models: Models, count: int, runs: Path, only: str | None) -> dict[str, dict[str, np.ndarray]]:
    tables: dict[str, dict[str, np.ndarray]] = {}
    known = version(models.call)
    for split, held_out in SPLITS.items():
        if only not in (None, split):
            continue
        pairs = np.random.default_rng(0).permutation(all_pairs(held_out=held_out))[:count]
        found = []
        for number, pair in enumerate(tqdm(pairs, desc=split, unit="prompt")):
            file = runs / f"{split}_{known}_{number:03d}.safetensors"
            if not file.exists():
                write_weights(file, sample_prompt(models, caption(*pair.tolist())))
            found.append(read_weights(file))
        tables[split] = {name: torch.stack([entry[name] for entry in found]).numpy() for name in found[0]}
    return tables


def best_of(finals: np.ndarray, n: int, steps: int, previews: np.ndarray | None = None) -> np.ndarray:
    """(prompts, 3) values of the winners, mean over blocks and groups of `n` candidates; pruned where previews come."""
    finals = finals.reshape(len(finals), -1, n, len(COLUMNS))
    alive = np.ones(finals.shape[:3], dtype=bool)
    if previews is not None:
        previews = previews.reshape(*alive.shape, len(looks(steps)))
        for entry in Halving().rounds(n, steps):
            scores = np.where(alive, previews[..., looks(steps).index(entry.step)], -np.inf)
            places = np.argsort(np.argsort(-scores, axis=2, kind="stable"), axis=2, kind="stable")
            alive &= places < entry.survivors
    best = np.where(alive, finals[..., 0], -np.inf).argmax(axis=2)
    return np.take_along_axis(finals, best[..., None, None], axis=2)[:, :, 0].mean(axis=1)


def methods(table: dict[str, np.ndarray], calls: dict[str, int], steps: int) -> dict[str, tuple[int, np.ndarray]]:
    """Of each method its calls, and what it wins over one sample, (prompts, 3)."""
    finals, one = table["finals"], table["finals"].mean(axis=(1, 2))
    found = {f"best of {n}": (n * steps, best_of(finals, n, steps) - one) for n in SIZES}
    for n in [size for size in SIZES if 2 < size <= PREVIEWED]:  # of two, none is pruned
        gain = best_of(finals[:, :, :PREVIEWED], n, steps, table["previews"]) - one
        found[f"pruned best of {n}"] = (Halving().calls(n, steps), gain)
    return found | {name: (cost, table[name].mean(axis=1) - one) for name, cost in calls.items()}


def report(tables: dict[str, dict[str, np.ndarray]], calls: dict[str, int], steps: int) -> str:
    lines = []
    for split, table in tables.items():
        one = table["finals"].mean(axis=(0, 1, 2))
        base = ", ".join(f"{name} {value:.3f}" for name, value in zip(COLUMNS, one, strict=True))
        lines += [f"**{split}**, {len(table['finals'])} prompts; one sample: {base}", ""]
        lines += ["| search | calls | gain in reward | gain in the judge's score (nats) | gain in right |"]
        lines += ["| --- | ---: | ---: | ---: | ---: |"]
        found = methods(table, calls, steps)
        for name, (cost, gain) in found.items():
            lines.append(
                f"| {name} | {cost} | {' | '.join(shown(interval(gain[:, k], draws=DRAWS)) for k in range(3))} |"
            )
        same = table["finals"][:, :, :PREVIEWED]
        full = best_of(same, PREVIEWED, steps) - table["finals"].mean(axis=(1, 2))
        cost, pruned = found[f"pruned best of {PREVIEWED}"]
        share = shown(interval(pruned[:, 0], full[:, 0], DRAWS)).replace("+", "")
        text = f"Pruned best of {PREVIEWED} keeps {share} of the gain in reward of the same {PREVIEWED} candidates"
        lines += ["", f"{text}, at {cost / (PREVIEWED * steps):.2f} of their denoiser calls.", ""]
    return "\n".join(lines)


def plot(tables: dict[str, dict[str, np.ndarray]], calls: dict[str, int], steps: int, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6 * len(tables)), layout="constrained")
    axes = figure.subplots(len(tables), 2, squeeze=False)
    for row, (split, table) in zip(axes, tables.items(), strict=True):
        found = methods(table, calls, steps)
        for axis, column, label in zip(row, (0, 2), ("gain in reward", "gain in right pictures"), strict=True):
            for prefix, style in (("best of", "o-"), ("pruned best of", "s-")):
                points = [(cost, gain[:, column].mean()) for n, (cost, gain) in found.items() if n.startswith(prefix)]
                axis.plot(*zip(*points, strict=True), style, label=f"{prefix} N", markersize=4)
            for name in calls:
                cost, gain = found[name]
                axis.plot(cost, gain[:, column].mean(), "D", label=name, markersize=6)
            axis.set(xscale="log", xlabel="denoiser calls", ylabel=label, title=f"{split} prompts")
            axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    save(figure, path)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--prompts", type=int, default=40, help="of each split")
    parser.add_argument("--steps", type=int, default=10, help="sampling steps; with 2 or 3 the generator often fails")
    parser.add_argument("--runs", type=Path, default=Path("runs/search"), help="folder for finished prompts")
    parser.add_argument("--split", choices=list(SPLITS), help="one split alone")
    parser.add_argument("--plot", type=Path, help="PNG of gains against calls")
    arguments = parsed(parser)
    parts: dict[str, Any] = {"reward": create_reward("compact"), "judge": load_judge()}
    models = Models(pipe=load_embedded_pipeline(), steps=arguments.steps, **parts)
    tables = sample_all(models, arguments.prompts, arguments.runs, arguments.split)
    calls = {name: cost for name, (cost, _) in searches(models).items()}
    print(report(tables, calls, arguments.steps))
    if arguments.plot:
        plot(tables, calls, arguments.steps, arguments.plot)


if __name__ == "__main__":
    main()
