"""What the tests of `finetune` and `pairs` run on: a small pipeline and a small reward on disk, prompts in a file."""

from __future__ import annotations

import re
from pathlib import Path

import pipelines
import torch
from clip_models import write_tiny_clip
from safetensors.torch import load_file
from typer.testing import Result

from aigiqa_reward import create_reward
from aigiqa_reward.encoders.open_clip import OpenCLIPConfig

WEIGHTS = "pytorch_lora_weights.safetensors"
PROMPTS = ["a red apple", "a blue car", "a penguin"]
CALL = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 32, "width": 32}
SAMPLING = ["--num_inference_steps", "2", "--guidance-scale", "1.0", "--height", "32", "--width", "32"]
TRAINING = {"train_batch_size": 2, "max_train_steps": 2, "learning_rate": 0.01, "rank": 2}


def furnish(folder: Path) -> Path:
    """A folder with the pipelines `sd` and `flux`, the reward `judge`, `prompts.txt` and `validation.txt`."""
    pipelines.stable_diffusion().save_pretrained(folder / "sd")
    pipelines.flux().save_pretrained(folder / "flux")
    clip = f"local-dir:{write_tiny_clip(folder / 'clip', seed=0)}"
    create_reward("tsp_mgs", encoder=OpenCLIPConfig(architecture=clip)).save_pretrained(folder / "judge")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (folder / "validation.txt").write_text("a cat\na dog\n")
    return folder


def training(**others: object) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in (TRAINING | others).items()]


def sampled(room: Path, model: str = "sd") -> list[str]:
    """Options that name a pipeline, and the reward that judges its images."""
    return ["--model", str(room / model), "--reward", str(room / "judge"), "--device", "cpu", *SAMPLING]


def from_prompts(room: Path, model: str = "sd") -> list[str]:
    return [*sampled(room, model), "--prompts", str(room / "prompts.txt")]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def assert_equal_weights(one: Path, other: Path) -> None:
    first, second = weights_of(one), weights_of(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def refused(result: Result, status: int = 2) -> str:
    """The error of a command that did nothing; notes and warnings may come before it."""
    assert (result.exit_code, result.stdout) == (status, ""), result.output
    assert re.fullmatch(r"((note|warning): [^\n]+\n)*error: [^\n]+\n", result.stderr), result.stderr
    return result.stderr.splitlines()[-1]
