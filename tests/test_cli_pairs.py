"""`aigiqa-reward pairs`: the folder that it fills, what it refuses, and DPO on it."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import command, interrupt, run
from diffusers import DiffusionPipeline
from finetune_commands import (
    PROMPTS,
    SAMPLING,
    TRAINING,
    assert_equal_weights,
    from_prompts,
    furnish,
    judged_by,
    one_thread,
    refused,
    weights_of,
)

from aigiqa_reward import create_reward
from aigiqa_reward.cli.pairs import pairs
from aigiqa_reward.finetuning import DPO, FinetuneConfig, build_preference_pairs, finetune, read_preference_pairs
from aigiqa_reward.utils.run_folder import reward_identity


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with one_thread():
        yield furnish(tmp_path_factory.mktemp("room"))


@pytest.fixture(scope="module")
def options(room: Path) -> list[str]:
    return [*from_prompts(room), "--n", "3"]


@pytest.fixture(scope="module")
def made(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "pairs"
    result = run("pairs", *options, "--output_dir", folder)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{folder}\n"
    assert result.stderr == "note: 3 pairs of 3 prompts\n"
    return folder


def stamps(folder: Path) -> dict[str, int]:
    return {image.name: image.stat().st_mtime_ns for image in (folder / "images").iterdir()}


def test_it_is_build_preference_pairs(room: Path, made: Path, tmp_path: Path) -> None:
    call = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 32, "width": 32}
    judge, pipe = create_reward("tsp_mgs", weights=room / "judge"), DiffusionPipeline.from_pretrained(room / "sd")
    theirs = build_preference_pairs(pipe, judge, PROMPTS, tmp_path, n=3, progress=False, **call)
    mine = read_preference_pairs(made)
    assert mine.prompts == theirs.prompts
    for one, other in ((mine.better, theirs.better), (mine.worse, theirs.worse)):
        assert [file.name for file in one] == [file.name for file in other]
        assert [file.read_bytes() for file in one] == [file.read_bytes() for file in other]


def test_it_goes_on_and_refuses_other_settings(options: list[str], room: Path, tmp_path: Path) -> None:
    there = ["--output_dir", tmp_path]
    (tmp_path / "few.txt").write_text(PROMPTS[0] + "\n")
    assert run("pairs", *options, "--prompts", tmp_path / "few.txt", *there).exit_code == 0
    first = stamps(tmp_path)
    assert len(first) == 3
    result = run("pairs", *options, "--pairs-per-prompt", "1", *there)
    assert result.exit_code == 0, result.output
    after = stamps(tmp_path)
    assert len(after) == 9
    assert {name: after[name] for name in first} == first, "the first prompt was finished"
    error = refused(run("pairs", *options, "--seed", "5", "--guidance_scale", "3", *there))
    assert error.startswith("error: --output_dir: ")
    assert all(text in error for text in ("seed: 0 there, 5 now", "'guidance_scale': 1.0", "'guidance_scale': 3.0"))
    assert stamps(tmp_path) == after
    error = refused(run("pairs", *options, "--margin", "0.9", *there))
    assert re.search(r"error: --margin: no prompt has two images .* more than 0.9; the greatest difference", error)
    assert run("pairs", *options, "--seed", "5", "--overwrite", *there).exit_code == 0
    assert {int(re.search(r"seed(\d+)", name)[1]) for name in stamps(tmp_path)} == {5, 6, 7}


@pytest.mark.slow
def test_dpo_on_what_it_made(room: Path, made: Path, tmp_path: Path) -> None:
    model = ["--pretrained_model_name_or_path", str(room / "sd"), *judged_by(room), *SAMPLING]
    more = ["--pairs", made, "--beta", "100", "--loss", "ipo", "--output_dir", tmp_path / "lora"]
    result = run("finetune", "dpo", *model, *TRAINING, *more)
    assert result.exit_code == 0, result.output
    settings = FinetuneConfig(
        train_batch_size=2,
        max_train_steps=2,
        learning_rate=0.01,
        rank=2,
        sampling={"num_inference_steps": 2, "guidance_scale": 1.0, "height": 32, "width": 32},
    )
    judge, pipe = create_reward("tsp_mgs", weights=room / "judge"), DiffusionPipeline.from_pretrained(room / "sd")
    algorithm = DPO(pairs=read_preference_pairs(made), beta=100.0, loss="ipo")
    finetune(pipe, judge, [], algorithm, tmp_path / "python", settings, progress=False)
    assert_equal_weights(tmp_path / "lora", tmp_path / "python")
    assert any(weight.abs().max() > 0 for name, weight in weights_of(tmp_path / "lora").items() if "lora_B" in name)
    error = refused(
        run("finetune", "dpo", *model, *TRAINING, *more, "--beta", "7", "--resume_from_checkpoint", "latest")
    )
    assert "dpo.beta: 100.0 there, 7.0 now" in error


def test_a_yaml_file_stands_for_options(room: Path, made: Path, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        f"pretrained_model_name_or_path: {room / 'sd'}\nprompts: {room / 'prompts.txt'}\nreward: tsp_mgs\n"
        f"reward_weights: {room / 'judge'}\ndevice: cpu\nnum_inference_steps: 2\nguidance_scale: 1\nheight: 32\n"
        "width: 32\nn: 7\n"
    )
    result = run("pairs", "--config", tmp_path / "a.yaml", "--n", "3", "--output-dir", tmp_path / "pairs")
    assert result.exit_code == 0, result.output
    assert stamps(tmp_path / "pairs").keys() == stamps(made).keys()
    (tmp_path / "a.yaml").write_text("rank: 3\n")
    error = refused(run("pairs", "--config", tmp_path / "a.yaml"))
    assert "no option is named 'rank'" in error


def test_prompts_that_fail_give_status_1(options: list[str], tmp_path: Path) -> None:
    more = ["--guidance_scale", "3", "--set", "guidance_rescale=text", "--output_dir", tmp_path]
    error = refused(run("pairs", *options, *more), status=1)
    assert "3 of 3 prompts failed: prompt 0 ('a red apple'): TypeError" in error


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_an_interrupted_process_keeps_what_it_has(options: list[str], tmp_path: Path) -> None:
    arguments = command("pairs", *options, "--n", "900", "--batch_size", "1", "--output_dir", tmp_path)
    status, stdout, stderr = interrupt(arguments, rb"[1-9]\d*/2700")
    assert (status, stdout) == (130, ""), stderr
    assert "Traceback" not in stderr
    assert f"interrupted: the same command goes on from what {tmp_path} holds" in re.sub(r"\x1b\[[0-9;]*m", "", stderr)
    assert 0 < len([*(tmp_path / "images").iterdir()]) < 2700


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--n", "1"], "--n"),
        (["--n", "3", "--pairs_per_prompt", "2"], "--pairs_per_prompt: expected at most n / 2 = 1, got 2"),
        (["--prompts", "none.txt"], "--prompts: cannot read none.txt"),
        (["--reward", "compct"], "--reward: no reward is called 'compct'"),
        (["--set", "seed=3"], "--set: seed is no further argument"),
        (["--set", "width=3"], "--set: width is given by --width already"),
        (["--set", "latents=1"], "latents: "),
        (["--pretrained_model_name_or_path", "embeded"], "--pretrained_model_name_or_path: .*mean embedded"),
        (["--output_dir", "file.txt"], "--output_dir: expected a folder"),
    ],
)
def test_usage_errors(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("x")
    error = refused(run("pairs", *options, *more))
    assert re.search(message, error), error
    assert not list(tmp_path.glob("**/*.png"))


def test_defaults_are_those_of_the_library() -> None:
    own, theirs = inspect.signature(pairs).parameters, inspect.signature(build_preference_pairs).parameters
    for name in ("n", "margin", "pairs_per_prompt", "seed", "batch_size"):
        assert own[name].default == theirs[name].default, name


def test_settings_note_the_reward_on_disk(room: Path, made: Path) -> None:
    noted = json.loads((made / "settings.json").read_text())["reward"]
    assert noted == reward_identity(create_reward("tsp_mgs", weights=room / "judge"))
