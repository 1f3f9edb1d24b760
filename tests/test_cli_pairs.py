"""`aigiqa-reward pairs`: the folder that it fills, what it refuses, and DPO on it."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest
from commands import options_of, run
from diffusers import DiffusionPipeline
from finetune_commands import (
    CALL,
    PROMPTS,
    TRAINING,
    assert_equal_weights,
    from_prompts,
    furnish,
    refused,
    sampled,
    training,
    weights_of,
)
from typer.testing import Result

from aigiqa_reward import create_reward
from aigiqa_reward.finetuning import DPO, FinetuneConfig, build_preference_pairs, finetune, read_preference_pairs
from aigiqa_reward.utils.run_folder import reward_identity


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return furnish(tmp_path_factory.mktemp("room"))


@pytest.fixture(scope="module")
def made(room: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "pairs"
    result = run("pairs", *from_prompts(room), "--n", "3", "--output_dir", folder)
    assert result.exit_code == 0, result.output
    assert (result.stdout, result.stderr) == (f"{folder}\n", "note: 3 pairs of 3 prompts\n")
    return folder


def stamps(folder: Path) -> dict[str, int]:
    return {image.name: image.stat().st_mtime_ns for image in (folder / "images").iterdir()}


def guided(words: list[str]) -> list[str]:
    return ["3" if word == "1.0" else word for word in words]


def test_it_is_build_preference_pairs(room, made, tmp_path):
    judge, pipe = create_reward("tsp_mgs", weights=room / "judge"), DiffusionPipeline.from_pretrained(room / "sd")
    theirs = build_preference_pairs(pipe, judge, PROMPTS, tmp_path, n=3, progress=False, **CALL)
    mine = read_preference_pairs(made)
    assert mine.prompts == theirs.prompts
    for one, other in ((mine.better, theirs.better), (mine.worse, theirs.worse)):
        assert [(file.name, file.read_bytes()) for file in one] == [(file.name, file.read_bytes()) for file in other]
    assert reward_identity(judge) in json.dumps(json.loads((made / "settings.json").read_text()))
    own, defaults = options_of("pairs"), inspect.signature(build_preference_pairs).parameters
    for name in ("n", "margin", "pairs_per_prompt", "seed", "batch_size", "reward_guidance"):
        assert own[f"--{name.replace('_', '-')}"].default == defaults[name].default, name


def test_it_resumes_and_refuses_other_settings(room, tmp_path):
    def fill(prompts: Path = room / "prompts.txt", *more: str, call: list[str] | None = None) -> Result:
        return run("pairs", *(call or sampled(room)), "--prompts", prompts, "--n", "2", *more, "--output_dir", tmp_path)

    (tmp_path / "few.txt").write_text(PROMPTS[0] + "\n")
    assert fill(tmp_path / "few.txt").exit_code == 0
    first = stamps(tmp_path)
    assert len(first) == 2
    result = fill()
    assert result.exit_code == 0, result.output
    after = stamps(tmp_path)
    assert len(after) == 6
    assert {name: after[name] for name in first} == first, "the first prompt was finished"
    error = refused(fill(room / "prompts.txt", "--seed", "5", call=guided(sampled(room))))
    assert error.startswith("error: --output-dir: ")
    assert all(text in error for text in ("seed: 0 there, 5 now", "'guidance_scale': 1.0", "'guidance_scale': 3.0"))
    error = refused(fill(room / "prompts.txt", "--margin", "0.9"))
    assert re.search(r"error: --margin: no prompt has two images .* more than 0.9; the greatest difference", error)
    assert stamps(tmp_path) == after
    assert fill(tmp_path / "few.txt", "--seed", "5", "--overwrite").exit_code == 0
    assert {int(re.search(r"seed(\d+)", name)[1]) for name in stamps(tmp_path)} == {5, 6}


@pytest.mark.slow
def test_dpo_on_what_it_made(room, made, tmp_path):
    more = [*sampled(room), *training(), "--pairs", made, "--loss", "ipo", "--output_dir", tmp_path / "lora"]
    result = run("finetune", "dpo", *more, "--beta", "100")
    assert result.exit_code == 0, result.output
    judge, pipe = create_reward("tsp_mgs", weights=room / "judge"), DiffusionPipeline.from_pretrained(room / "sd")
    config, algorithm = FinetuneConfig(**TRAINING, sampling=CALL), DPO(beta=100.0, loss="ipo")
    finetune(pipe, judge, read_preference_pairs(made), algorithm, tmp_path / "python", config, progress=False)
    assert_equal_weights(tmp_path / "lora", tmp_path / "python")
    assert any(weight.abs().max() > 0 for name, weight in weights_of(tmp_path / "lora").items() if "lora_B" in name)
    resumed = run("finetune", "dpo", *more, "--beta", "7", "--resume-from-checkpoint", "latest")
    assert "dpo.beta: 100.0 there, 7.0 now" in refused(resumed)


def test_prompts_that_fail_give_status_1(room, tmp_path):
    more = ["--n", "2", "--set", "guidance_rescale=text", "--output_dir", tmp_path]
    error = refused(run("pairs", *guided(from_prompts(room)), *more), status=1)
    assert "3 of 3 prompts failed: prompt 0 ('a red apple'): TypeError" in error


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--n 1", "'--n'"),
        ("--n 3 --pairs_per_prompt 2", "--pairs-per-prompt: expected at most n / 2 = 1, got 2"),
        ("--set latents=1", "latents: "),
        ("--guidance-scales 1 --guidance-scales 4", "guidance-scales: pass one of them"),
        ("--output_dir file.txt", "--output-dir: expected a folder"),
    ],
)
def test_usage_errors(room, tmp_path, more, message):
    (tmp_path / "file.txt").write_text("x")
    error = refused(run("pairs", *from_prompts(room), *more.split(), cwd=tmp_path))
    assert re.search(message, error), error
    assert not list(tmp_path.glob("**/*.png"))
