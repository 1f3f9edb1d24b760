"""Gains of fine-tuning the embedded generator where it fails, beside best of N: reward, held-out reward and judge.

    python tests/benchmarks/finetuning.py draft draft-image nft --steps 2 --plot finetuning.png --pictures pictures.png
    python tests/benchmarks/finetuning.py draft --reward FOLDER --runs runs/other --against runs/finetuning

Without algorithms only the base is measured: one image and the best of N, picked by the reward and by the judge, among
16 images for each of 40 pairs that the generator was trained on and of 40 new ones. Each algorithm trains one LoRA per
seed by `aigiqa-reward finetune NAME --config examples/finetune_embedded/NAME.yaml` with the same number of sampling
steps; NAME-image, NAME-parameters and NAME-both with that `--sharpness_aware`, NAME-smoothed on `SmoothedReward`. The
kept weights are compared with the generator without them on the new pairs, which the training has not seen either, on
the first 8 of the 16 images from the same noise. Minutes are the median over the trainings. Results in --runs are
reused, and an interrupted training is resumed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rounds import interval, parsed, parser_of, save, shown
from tqdm import tqdm

from aigiqa_reward import Reward, SmoothedReward, create_reward, list_rewards, load_embedded_pipeline
from aigiqa_reward.finetuning import FinetuneConfig, finetune
from aigiqa_reward.finetuning.algorithms import ALGORITHMS
from aigiqa_reward.finetuning.validation import default_holdout
from aigiqa_reward.images import to_pil
from aigiqa_reward.sampling.rollout import Rollout
from aigiqa_reward.toy.judge import load_judge
from aigiqa_reward.toy.pictures import all_pairs
from aigiqa_reward.toy.world import caption
from aigiqa_reward.utils.io import write_atomically
from aigiqa_reward.utils.run_folder import RunFolder, digest, pipeline_identity, reward_identity
from aigiqa_reward.utils.weights import read_weights, write_weights

RECIPES = Path("examples/finetune_embedded")
RESULTS = ("figures/*", "*/seconds*.txt")
BASE_IMAGES, IMAGES, SIZES = 16, 8, (4, 16)
"""Images per prompt without fine-tuning and, the first of these, with it; the N of best of N."""

FIRST_SEED = 1000
"""First seed of the images; trainings and validations use others."""

COLUMNS = ("reward", "held-out reward", "judge (nats)", "right")
REWARD, NATS, RIGHT = 0, 2, 3


@dataclass(frozen=True, kw_only=True)
class Models:
    pipe: Any
    reward: Any
    holdout: Any
    judge: Any
    steps: int

    @torch.no_grad()
    def images(self, prompt: str, count: int) -> torch.Tensor:
        rollout = Rollout(self.pipe, num_inference_steps=self.steps, guidance_scale=1.0)
        generators = [torch.Generator().manual_seed(FIRST_SEED + place) for place in range(count)]
        return rollout.show(rollout.run(rollout.start(rollout.encode([prompt] * count), generators)).latents)

    @torch.no_grad()
    def values(self, prompt: str, count: int) -> torch.Tensor:
        """(count, 4): reward, held-out reward, the judge's score in nats, and whether it accepts the picture."""
        images, prompts = self.images(prompt, count), [prompt] * count
        judged = self.judge(images, prompts).total, self.judge.accepts(images, prompts).float()
        scores = self.reward(images, prompts).total, self.holdout(images, prompts).total
        return torch.stack([*scores, *judged], dim=1)


def measured(models: Models, prompts: list[str], file: Path, count: int, folder: Path | None = None) -> np.ndarray:
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


def reward_of(given: argparse.Namespace) -> Any:
    return create_reward(given.reward) if given.reward in list_rewards() else Reward.from_pretrained(given.reward)


def train_by_command(name: str, seed: int, folder: Path, given: argparse.Namespace) -> None:
    algorithm, _, variant = name.partition("-")
    words = ["finetune", algorithm, "--config", str(RECIPES / f"{algorithm}.yaml"), "--output_dir", str(folder)]
    words += ["--sharpness_aware", variant] if variant else []
    words += ["--num_inference_steps", str(given.steps), "--reward", given.reward]
    words += ["--seed", str(seed), "--resume_from_checkpoint", "latest"]
    words += ["--max_train_steps", str(given.train_steps)] if given.train_steps else []
    # The command's own output; as many threads as here.
    environment = {**os.environ, "OMP_NUM_THREADS": str(given.threads)}
    subprocess.run([sys.executable, "-m", "aigiqa_reward", *words], check=True, env=environment)


def train_smoothed(name: str, seed: int, folder: Path, given: argparse.Namespace) -> None:
    """Train by a recipe on the smoothed reward, which only Python offers."""
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    settings = {field.name: recipe[field.name] for field in fields(FinetuneConfig) if field.name in recipe}
    settings["max_train_steps"] = given.train_steps or settings["max_train_steps"]
    sampling = {"num_inference_steps": given.steps, "guidance_scale": recipe["guidance_scale"]}
    config = FinetuneConfig(**settings, seed=seed, sampling=sampling)
    prompts, watched = (Path(recipe[key]).read_text().splitlines() for key in ("prompts", "validation_prompts"))
    options: dict[str, Any] = {"validation_prompts": watched, "resume_from_checkpoint": "latest"}
    pipe, reward = load_embedded_pipeline(), SmoothedReward(reward_of(given))
    finetune(pipe, reward, prompts, ALGORITHMS[name](), folder, config, **options)


def train(name: str, seed: int, given: argparse.Namespace) -> Path:
    """The folder of a finished training; its `seconds.txt` has the wall time of all its runs."""
    folder = given.runs / f"{name}-{seed}"
    done, so_far = folder / "seconds.txt", folder / "seconds-so-far.txt"
    if done.exists():
        return folder
    before = float(so_far.read_text()) if so_far.exists() else 0.0
    started = time.perf_counter()
    try:
        if name.endswith("-smoothed"):
            train_smoothed(name.removesuffix("-smoothed"), seed, folder, given)
        else:
            train_by_command(name, seed, folder, given)
    finally:
        took = f"{before + time.perf_counter() - started:.0f}\n".encode()
        if folder.is_dir():
            write_atomically(so_far, took)
    write_atomically(done, took)
    return folder


def best_of(base: np.ndarray, n: int, by_judge: bool = False) -> np.ndarray:
    """(prompts, 4) gain over one image of the best of n by the reward, or by the judge: right ones first, then nats."""
    groups = base.reshape(len(base), -1, n, len(COLUMNS))
    key = 1e3 * groups[..., RIGHT] + groups[..., NATS] if by_judge else groups[..., REWARD]
    winners = np.take_along_axis(groups, key.argmax(axis=2)[..., None, None], axis=2)
    return winners.mean(axis=(1, 2)) - base.mean(axis=1)


def table(rows: dict[str, list[str]], columns: tuple[str, ...]) -> str:
    head = f"| | {' | '.join(columns)} |\n| --- |{' ---: |' * len(columns)}\n"
    return head + "\n".join(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()) + "\n"


def all_shown(values: np.ndarray) -> list[str]:
    return [shown(interval(values[..., place])) for place in range(len(COLUMNS))]


def base_report(base: np.ndarray) -> str:
    rows = {"one image": [cell.replace("+", "") for cell in all_shown(base.mean(axis=1))]}
    for n in SIZES:
        rows[f"best of {n} by reward"] = all_shown(best_of(base, n))
        rows[f"best of {n} by judge"] = all_shown(best_of(base, n, by_judge=True))
    return table(rows, COLUMNS)


def report(base: np.ndarray, tuned: dict[str, np.ndarray], minutes: dict[str, float]) -> str:
    rows, gain = {}, best_of(base, SIZES[0])
    for name, values in tuned.items():
        change = (values - base[:, :IMAGES]).mean(axis=2)
        parts = [shown(interval(change[..., k], gain[:, k])).replace("+", "") for k in (REWARD, RIGHT)]
        rows[name] = [*all_shown(change), *parts, f"{minutes[name]:.1f}"]
    parts = tuple(f"{COLUMNS[k]}, as a part of best of {SIZES[0]}" for k in (REWARD, RIGHT))
    return table(rows, (*COLUMNS, *parts, "minutes"))


def difference(tuned: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> str:
    change = {name: (values - others[name]).mean(axis=2) for name, values in tuned.items()}
    rows = {name: [shown(interval(values[..., k])) for k in (NATS, RIGHT)] for name, values in change.items()}
    return table(rows, (COLUMNS[NATS], COLUMNS[RIGHT]))


def plot(base: np.ndarray, tuned: dict[str, np.ndarray], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    for place, axis in enumerate(figure.subplots(1, len(COLUMNS))):
        for name, values in tuned.items():
            mean, *ends = interval((values - base[:, :IMAGES]).mean(axis=2)[..., place])
            axis.errorbar(name, mean, np.abs(np.array(ends)[:, None] - mean), fmt="o", color="C0", capsize=4)
        for n, style in zip(SIZES, ("--", ":"), strict=True):
            axis.axhline(best_of(base, n)[:, place].mean(), linestyle=style, color="gray", label=f"best of {n}")
        axis.set(ylabel="change", title=COLUMNS[place])
        axis.axhline(0, color="black", linewidth=0.5)
    figure.axes[0].legend(fontsize=8)
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
    parser.add_argument("algorithms", nargs="*", help="such as draft or draft-image; none for the base alone")
    parser.add_argument("--seeds", type=int, default=3, help="trainings per algorithm")
    parser.add_argument("--steps", type=int, default=2, help="sampling steps; with 2 or 3 the generator often fails")
    parser.add_argument("--train-steps", type=int, help="training steps, by default the recipe's; in other --runs")
    parser.add_argument("--reward", default="compact", help="reward to train on, by name or folder")
    parser.add_argument("--runs", type=Path, default=Path("runs/finetuning"), help="folder of results")
    parser.add_argument("--against", type=Path, help="other folder of results, to compare the trainings with")
    parser.add_argument("--plot", type=Path, help="PNG of the changes, beside best of N")
    parser.add_argument("--pictures", type=Path, help="PNG of images before and after, seed 0")
    given = parsed(parser)
    reward = reward_of(given)
    parts: dict[str, Any] = {"reward": reward, "holdout": default_holdout(reward), "judge": load_judge()}
    models = Models(pipe=load_embedded_pipeline(), steps=given.steps, **parts)
    generator, others, figures = digest(pipeline_identity(models.pipe)), {}, given.runs / "figures"
    settings = {"steps": given.steps, "generator": generator, "reward": reward_identity(reward)}
    settings |= {"train_steps": given.train_steps} if given.train_steps else {}
    RunFolder(given.runs, argument="--runs", contents=RESULTS).begin(settings)
    if given.against:
        RunFolder(given.against, argument="--against", contents=RESULTS).check(settings, ignore={"reward"})
        for name in given.algorithms:
            files = [given.against / "figures" / f"{name}-{seed}.safetensors" for seed in range(given.seeds)]
            others[name] = np.stack([read_weights(file)["values"].numpy() for file in files])
    prompts = (RECIPES / "held-out.txt").read_text().splitlines()
    pairs = np.random.default_rng(0).permutation(all_pairs(held_out=False))[: len(prompts)]
    trained = [caption(*pair) for pair in pairs.tolist()]
    easy = measured(models, trained, figures / "base-trained.safetensors", BASE_IMAGES)
    base = measured(models, prompts, figures / "base-new.safetensors", BASE_IMAGES)
    print(f"{given.steps} steps; of best of N the gain over one image. Trained pairs:\n\n{base_report(easy)}")
    print(f"New pairs:\n\n{base_report(base)}", flush=True)
    tuned, minutes = {}, {}
    for name in given.algorithms:
        folders = [train(name, seed, given) for seed in range(given.seeds)]
        values = [measured(models, prompts, figures / f"{f.name}.safetensors", IMAGES, f) for f in folders]
        tuned[name] = np.stack(values)
        minutes[name] = float(np.median([float((f / "seconds.txt").read_text()) for f in folders])) / 60
        print(report(base, tuned, minutes), flush=True)
        if given.plot:
            plot(base, tuned, given.plot)
    if given.against and tuned:
        print(f"Difference to {given.against}\n\n{difference(tuned, others)}")
    if given.pictures:
        pictures(models, {name: given.runs / f"{name}-0" for name in tuned}, prompts, given.pictures)


if __name__ == "__main__":
    main()
