"""Messages about arguments in the wrong place, misspelt or without quotes."""

from __future__ import annotations

import contextlib
import itertools
import os
import pty
import re
import subprocess
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from commands import ENVIRONMENT, command, only_error, run
from PIL import Image

from aigiqa_reward import BestOfN, Reward, Scorer, create_reward, rerank
from aigiqa_reward.finetuning import DRaFT, FinetuneConfig, finetune
from aigiqa_reward.sampling import NoiseOptimizer, ParticleSteering, PromptScorer, RewardGuidance, RewardLogger

FEW: dict[str, Any] = {"num_inference_steps": 1, "height": 32, "width": 32}
PICTURES = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipelines.stable_diffusion()


@pytest.fixture(scope="module")
def reward() -> Reward:
    return create_reward("compact")


SWAPPED = "reward: expected a Reward, its name .*, got the pipeline StableDiffusionPipeline; swap the two"


@pytest.mark.parametrize("method", [BestOfN, PromptScorer, ParticleSteering, NoiseOptimizer, RewardLogger])
def test_pipeline_and_reward_swapped(pipe, reward, method):
    more = ("a fox",) if method is RewardLogger else ()
    with pytest.raises(TypeError, match=SWAPPED):
        method(reward, pipe, *more)
    with pytest.raises(TypeError, match=r"reward: .* got the pipeline StableDiffusionPipeline; use create_reward"):
        method(pipe, pipe, *more)
    with pytest.raises(ValueError, match=r"reward: no reward is called 'pikscore'; did you mean 'pickscore'\?"):
        method(pipe, "pikscore", *more)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe, reward: Scorer(pipe), "reward: expected .* got the pipeline"),
        (lambda pipe, reward: rerank(PICTURES, "a fox", pipe), "reward: expected .* got the pipeline"),
        (lambda pipe, reward: RewardGuidance(reward, pipe, "a fox"), SWAPPED),
        (lambda pipe, reward: finetune(reward, pipe, ["a fox"], DRaFT(), "never"), SWAPPED),
        (lambda pipe, reward: BestOfN(reward, reward), "pipe: expected a diffusers pipeline, got Reward; load one"),
        (lambda pipe, reward: BestOfN(pipe, reward)(["a", "b"]), r"got 2; .*best_of_each\(search, prompts, out\)"),  # pyright: ignore
        (lambda pipe, reward: NoiseOptimizer(pipe, reward)(["a", "b"]), "got 2; loop over them"),  # pyright: ignore
        (lambda pipe, reward: finetune(pipe, reward, ["a"], "darft", "never"), r"did you mean DRaFT\(\)\?"),  # pyright: ignore
        (lambda pipe, reward: finetune(pipe, reward, ["a"], "grpo", "never"), r"did you mean FlowGRPO\(\)\?"),  # pyright: ignore
        (lambda pipe, reward: Scorer(reward).score(PICTURES[0]), "wrap a single image in a list"),
    ],
)
def test_python_names_the_remedy(pipe, reward, call, message):
    with pytest.raises(TypeError, match=message):
        call(pipe, reward)


def test_values_out_of_range_offer_no_argument_that_the_scorer_lacks(reward):
    with pytest.raises(ValueError, match="divide 8-bit values by 255") as caught:
        Scorer(reward).score(torch.full((1, 3, 32, 32), 200.0))
    assert "validate" not in str(caught.value)


def test_a_name_works_where_a_reward_belongs(pipe, reward, tmp_path):
    assert Scorer("compact").score(PICTURES).total.equal(Scorer(reward).score(PICTURES).total)
    assert rerank(PICTURES, "a fox", "compact").scores == rerank(PICTURES, "a fox", reward).scores
    assert BestOfN(pipe, "compact", n=1, progress=False)("a fox", **FEW).images
    config = FinetuneConfig(max_train_steps=1, train_batch_size=1, rank=1, sampling=FEW)
    finetune(pipe, "compact", ["a fox"], DRaFT(), tmp_path, config, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", ".", "--prompt", "a", "tray", "of", "sushi"], '--prompt: .* needs quotes: "a tray of sushi"'),
        (["score", "--prompt=a", "tray", "--reward", "compact"], '--prompt: .* needs quotes: "a tray"'),
        (["demo", "--prompt", "a", "penguin"], '--prompt: .* needs quotes: "a penguin"'),
        (["best-of-n", "--model", "embedded", "a", "red apple"], 'got a text; pass --prompt "a red apple"'),
        (["demo", "a red apple", "--n", "2"], 'got a text; pass --prompt "a red apple"'),
        (["finetune", "draft", "a fox"], 'got a text; pass --prompt "a fox"'),
        (["score", ".", "--format", "jason"], r"--format.*'jason' is not one of .*did you mean jsonl\?"),
        (["finetune", "draft", "--mixed-precision", "fp61"], r"did you mean fp16\?"),
        (["best-of-n", "--negative-prompt", "no", "text"], '--negative-prompt: .* needs quotes: "no text"'),
        (["score", ".", "--propmt", "x"], r"--propmt: no such option; did you mean --prompt\?"),
        (["rank", ".", "--topk", "3"], r"--topk: no such option; did you mean --top-k\?"),
        (["finetune", "draft", "--max-steps", "3"], r"--max-steps: no such option; did you mean --max-train-steps\?"),
        (["finetune", "dratf"], "dratf.*[Dd]id you mean 'draft'"),
        (["score", "IMAGE", "--reward", "pikscore"], r"--reward: no reward is called .* did you mean 'pickscore'\?"),
        (["train", "mst_clipqa", "--data", "agiqa3k:."], r"did you mean 'mst_clipiqa'\?"),
    ],
)
def test_the_shell_names_the_remedy(tmp_path, arguments, message):
    PICTURES[0].save(tmp_path / "IMAGE.png")
    given = ["IMAGE.png" if word == "IMAGE" else word for word in arguments]
    assert re.search(message, only_error(run(*given, cwd=tmp_path)))


def test_arguments_of_python_in_messages_are_options_in_the_shell(monkeypatch, tmp_path):
    def run_out(*_, **__):
        error = torch.OutOfMemoryError("CUDA out of memory.")
        error.add_note("lower train_batch_size= or use gradient_checkpointing=True")
        raise error

    monkeypatch.setattr("aigiqa_reward.finetuning.finetune", run_out)
    given = [
        "finetune",
        "draft",
        "--model",
        "embedded",
        "--prompt",
        "a fox",
        "--output-dir",
        tmp_path,
        "--device",
        "cpu",
    ]
    message = run(*given).stderr
    assert "out of memory (CUDA out of memory.); lower --train-batch-size or use --gradient-checkpointing" in message


def test_no_memory_for_a_candidate_names_options(monkeypatch, tmp_path):
    def run_out(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("diffusers.UNet2DConditionModel.forward", run_out)
    message = run("best-of-n", "--model", "embedded", "--prompt", "a penguin", "--output-dir", tmp_path / "o").stderr
    assert "lower --height and --width" in message and "pipe." not in message


def test_missing_files_are_reported_before_a_reward_is_loaded(tmp_path):
    for name in ("score", "rank"):
        result = run(name, "nope.png", "--reward", "no-such-reward", "--format", "jsonl", cwd=tmp_path)
        assert result.exit_code == 1 and result.stderr == "error: nope.png: no such file\n"


def test_a_prompt_of_one_word_may_come_before_files(tmp_path):
    PICTURES[0].save(tmp_path / "fox.png")
    for arguments in (["fox.png"], [tmp_path]):
        assert run("score", "--prompt", "fox", *arguments, cwd=tmp_path).exit_code == 0


def test_no_match_lies_where_the_commands_say(reward):
    files = sorted((Path(__file__).parents[1] / "examples" / "images").glob("*.jpg"))
    things = ("red fox", "lighthouse", "blue car", "mountain lake", "wooden chair", "portrait of an old man")
    others = [f"a {thing}" for _, thing in zip(files, itertools.cycle(things), strict=False)]
    found = Scorer(reward).score([str(file) for file in files], others).correspondence
    assert found is not None and float(found.median()) < reward.spec.no_match  # the match was trained on these images
    assert "compare images of one prompt only" in reward.spec.meaning
    assert f"half get a correspondence below {reward.spec.no_match:g}" in reward.spec.meaning


@pytest.mark.parametrize("names", [(), ("score",), ("finetune",), ("finetune", "draft")])
def test_flags_show_no_type(names):
    assert "<bool>" not in run(*names, "--help").stdout


def test_a_bad_file_is_reported_once_in_a_terminal(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    own, other = pty.openpty()
    score, text = command("score", tmp_path / "bad.png", "--device", "cpu"), b""
    subprocess.run(score, stdout=other, stderr=other, env=ENVIRONMENT | {"COLUMNS": "250"}, check=False)
    os.close(other)
    with contextlib.suppress(OSError):  # the end of a terminal
        while part := os.read(own, 65536):
            text += part
    assert text.count(b"not an image") == 1
