"""Gains of fine-tuning the embedded generator by the compact reward: reward, held-out reward and independent judge.

    python tests/benchmarks/finetuning.py draft refl dpo ddpo --seeds 3 --plot finetuning.png --pictures pictures.png

Each algorithm trains one LoRA per seed by `aigiqa-reward finetune NAME --config examples/finetune_embedded/NAME.yaml`.
The kept weights are compared with the generator without them on 40 prompts of pairs that neither the generator nor the
training has seen, 8 images each from the same noise; the checkpoints give the curves, on every fourth of these prompts
and 4 images. Minutes are those of each algorithm's fastest training. Results in --runs are reused, and an interrupted
training is resumed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rounds import interval, parsed, parser_of, save, shown
from tqdm import tqdm

from aigiqa_reward import create_reward, load_embedded_pipeline
from aigiqa_reward.finetuning.checkpoints import checkpoints_in
from aigiqa_reward.finetuning.validation import default_holdout
from aigiqa_reward.images import to_pil
from aigiqa_reward.sampling.rollout import Rollout
from aigiqa_reward.toy.judge import load_judge
from aigiqa_reward.utils.io import write_atomically
from aigiqa_reward.utils.weights import read_weights, write_weights

RECIPES = Path("examples/finetune_embedded")
CALL: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": 1.0}
IMAGES, BEST_OF = 8, 4
"""Images per held-out prompt, and the N of the best-of-N that gains are compared with."""

PART, CURVE_IMAGES = 4, 4
"""Curves use every PART-th prompt and this many images of each."""

FIRST_SEED = 1000
"""First seed of the images; trainings and validations use others."""

COLUMNS = ("reward", "held-out", "judge", "right")
MARGIN = 0.03
"""Largest accepted loss in the share of right pictures."""


@dataclass(frozen=True, kw_only=True)
class Models:
    pipe: Any
    reward: Any
    holdout: Any
    judge: Any

    @torch.no_grad()
    def images(self, prompt: str, count: int) -> torch.Tensor:
        rollout = Rollout(self.pipe, **CALL)
        generators = [torch.Generator().manual_seed(FIRST_SEED + place) for place in range(count)]
        return rollout.show(rollout.run(rollout.start(rollout.encode([prompt] * count), generators)).latents)

    @torch.no_grad()
    def values(self, prompt: str, count: int) -> torch.Tensor:
        """(count, 4): reward, held-out reward, the judge's score in nats, and whether it accepts the picture."""
        images, prompts = self.images(prompt, count), [prompt] * count
        judged = self.judge(images, prompts).total, self.judge.accepts(images, prompts).float()
        scores = self.reward(images, prompts).total, self.holdout(images, prompts).total
        return torch.stack([*scores, *judged], dim=1)


def measured(models: Models, folder: Path | None, prompts: list[str], file: Path, count: int = IMAGES) -> np.ndarray:
    """(prompts, count, 4) with the adapter of a folder, or without any; kept in a file."""
    if not file.exists():
        if folder is not None:
            models.pipe.load_lora_weights(folder)
        try:
            values = [models.values(prompt, count) for prompt in tqdm(prompts, desc=file.stem, leave=False)]
        finally:
            models.pipe.unload_lora_weights()
        write_weights(file, {"values": torch.stack(values)})
    return read_weights(file)["values"].numpy()


def train(name: str, seed: int, runs: Path, threads: int) -> Path:
    """The folder of a finished training; its `seconds.txt` has the wall time of all its runs."""
    folder = runs / f"{name}-{seed}"
    done, so_far = folder / "seconds.txt", folder / "seconds-so-far.txt"
    if done.exists():
        return folder
    before = float(so_far.read_text()) if so_far.exists() else 0.0
    words = ["finetune", name, "--config", str(RECIPES / f"{name}.yaml"), "--output_dir", str(folder)]
    words += ["--seed", str(seed), "--resume_from_checkpoint", "latest"]
    started = time.perf_counter()
    try:
        # The command's own output; as many threads as here.
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run([sys.executable, "-m", "aigiqa_reward", *words], check=True, env=environment)
    finally:
        took = f"{before + time.perf_counter() - started:.0f}\n".encode()
        if folder.is_dir():
            write_atomically(so_far, took)
    write_atomically(done, took)
    return folder


def best_of(base: np.ndarray) -> np.ndarray:
    """(prompts,) what the best of BEST_OF by reward gains over one image, from the same seeds."""
    groups = base[..., 0].reshape(len(base), -1, BEST_OF)
    return (groups.max(axis=2) - groups.mean(axis=2)).mean(axis=1)


def report(base: np.ndarray, tuned: dict[str, np.ndarray], seconds: dict[str, float]) -> str:
    gain = best_of(base)
    means = ", ".join(f"{name} {base[..., place].mean():.3f}" for place, name in enumerate(COLUMNS))
    lines = [f"Without fine-tuning: {means}; best of {BEST_OF} gains {gain.mean():.3f} of reward.", ""]
    lines += [f"| | reward | as a part of best of {BEST_OF} | held-out reward | judge (nats) | right | minutes |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    bars = []
    for name, values in tuned.items():
        change = (values - base).mean(axis=2)
        found = [interval(change[..., place]) for place in range(len(COLUMNS))]
        part = interval(change[..., 0], gain)
        cells = [shown(found[0]), shown(part).replace("+", ""), *map(shown, found[1:])]
        lines.append(f"| {name} | {' | '.join(cells)} | {seconds[name] / 60:.1f} |")
        held = "holds" if found[3][1] > -MARGIN else "is not shown to hold"
        bars.append(
            f"{name}, {len(values)} trainings: {part[0]:.0%} of best of {BEST_OF}'s gain, at least {part[1]:.0%}; the "
            f"share of right pictures {held} by {MARGIN}."
        )
    return "\n".join([*lines, "", *bars])


def clock(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    times = {line["step"]: line["seconds"] for line in lines}
    before = max(0.0, float((folder / "seconds.txt").read_text()) - max(times.values()))  # loading, and making pairs
    return {0: before} | {step: before + seconds for step, seconds in times.items() if step}


def curve(
    models: Models, folder: Path, times: dict[int, float], prompts: list[str], base: np.ndarray, figures: Path
) -> list[tuple[float, np.ndarray]]:
    """Seconds, as `times` has them, and mean change (4,) of all columns at each checkpoint, on a part of the images."""
    start = base[::PART, :CURVE_IMAGES]
    points = [(times[0], np.zeros(len(COLUMNS)))]
    for path in checkpoints_in(folder):
        step = int(path.name.rpartition("-")[2])
        file = figures / f"curve-{folder.name}-{step}.safetensors"
        values = measured(models, path, prompts[::PART], file, CURVE_IMAGES)
        points.append((times[step], (values - start).mean(axis=(0, 1))))
    return points


def plot(curves: dict[str, list[list[tuple[float, np.ndarray]]]], gain: float, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    titles = ("reward (trained on)", "held-out reward", "judge: score (nats)")
    for axis, place, title in zip(figure.subplots(1, 3), range(3), titles, strict=True):
        for number, (name, trainings) in enumerate(curves.items()):
            for seed, points in enumerate(trainings):
                minutes, changes = [t / 60 for t, _ in points], [change[place] for _, change in points]
                label = name if seed == 0 else None
                axis.plot(minutes, changes, "o-", color=f"C{number}", label=label, markersize=3, alpha=0.8)
        if place == 0:
            axis.axhline(gain, linestyle="--", color="gray", label=f"best of {BEST_OF}")
        axis.set(xlabel="minutes of training", ylabel="change", title=title)
        axis.axhline(0, color="black", linewidth=0.5)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    save(figure, path)


def pictures(models: Models, folders: dict[str, Path], prompts: list[str], path: Path, side: int = 128) -> None:
    from PIL import Image

    rows = []
    for folder in (None, *folders.values()):
        if folder is not None:
            models.pipe.load_lora_weights(folder)
        rows.append(torch.cat([models.images(prompt, 1) for prompt in prompts[:8]], dim=3))
        models.pipe.unload_lora_weights()
    sheet = to_pil(torch.cat(rows, dim=2))[0]
    scale = side / rows[0].shape[2]
    save(sheet.resize((round(sheet.width * scale), round(sheet.height * scale)), Image.Resampling.LANCZOS), path)
    print(f"{path}: rows without fine-tuning, then {', '.join(folders)}; columns {'; '.join(prompts[:8])}")


def main() -> None:
    parser = parser_of(__doc__, threads=1)
    parser.add_argument("algorithms", nargs="+", choices=("draft", "refl", "dpo", "ddpo"))
    parser.add_argument("--seeds", type=int, default=3, help="trainings per algorithm")
    parser.add_argument("--runs", type=Path, default=Path("runs/finetuning"), help="folder of results")
    parser.add_argument("--plot", type=Path, help="PNG of the curves of all trainings")
    parser.add_argument("--pictures", type=Path, help="PNG of images before and after, seed 0")
    arguments = parsed(parser)
    prompts = (RECIPES / "held-out.txt").read_text().splitlines()
    reward = create_reward("compact")
    models = Models(pipe=load_embedded_pipeline(), reward=reward, holdout=default_holdout(reward), judge=load_judge())
    figures = arguments.runs / "figures"
    base = measured(models, None, prompts, figures / "base.safetensors")
    tuned, seconds, curves, first = {}, {}, {}, {}
    for name in arguments.algorithms:
        folders = [train(name, seed, arguments.runs, arguments.threads) for seed in range(arguments.seeds)]
        tuned[name] = np.stack([measured(models, f, prompts, figures / f"{f.name}.safetensors") for f in folders])
        # What else the machine did slowed the others; one that ended early is no measure.
        times = min(map(clock, folders), key=lambda times: (-max(times), times[max(times)]))
        seconds[name] = times[max(times)]
        first[name] = folders[0]
        print(report(base, tuned, seconds), flush=True)
        if arguments.plot:
            curves[name] = [curve(models, folder, times, prompts, base, figures) for folder in folders]
            plot(curves, float(best_of(base).mean()), arguments.plot)
    if arguments.pictures:
        pictures(models, first, prompts, arguments.pictures)


if __name__ == "__main__":
    main()
