"""`aigiqa-reward finetune`: what it leaves behind, what it takes from a YAML file, what it refuses and survives."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from commands import ENVIRONMENT, command, interrupt, lines, options_of, run
from diffusers import DiffusionPipeline
from finetune_commands import (
    CALL,
    PROMPTS,
    TRAINING,
    WEIGHTS,
    assert_equal_weights,
    from_prompts,
    furnish,
    refused,
    training,
    weights_of,
)

from aigiqa_reward import create_reward, load_embedded_pipeline
from aigiqa_reward.finetuning import ALGORITHMS, DRaFT, FinetuneConfig
from aigiqa_reward.finetuning import finetune as finetune_in_python
from aigiqa_reward.finetuning.pairs import read_preference_pairs
from aigiqa_reward.utils.run_folder import reward_identity


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return furnish(tmp_path_factory.mktemp("room"))


@pytest.fixture(scope="module")
def options(room: Path) -> list[str]:
    return [*from_prompts(room), *training()]


def others(room: Path, **changed: object) -> list[str]:
    return [*from_prompts(room), *training(**changed)]


@pytest.fixture(scope="module")
def trained(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of DRaFT, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("trained") / "lora"
    result = run("finetune", "draft", *options, "--checkpointing_steps", "1", "--output_dir", folder)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{folder}\n"
    assert "warning: no --validation-prompts: reward hacking is not detected" in result.stderr
    assert "kept: the weights after step 2" in result.stderr
    return folder


# --------------------------------------------------------------------------------------------- what it leaves behind


@pytest.mark.parametrize(
    ("algorithm", "model", "more"),
    [
        pytest.param("draft", "sd", ["--truncation_steps", "all"], marks=pytest.mark.slow),
        pytest.param("draft", "sd", ["--truncation-steps", "7", "--reward-ceiling", "none"], marks=pytest.mark.slow),
        pytest.param("draft", "sd", ["--low_variance", "2", "--gradient_checkpointing"], marks=pytest.mark.slow),
        (
            "refl",
            "sd",
            ["--earliest", "0.5", "--reward_ceiling", "0.9", "--ema_decay", "0.5", "--max_grad_norm", "inf"],
        ),
        ("dpo", "sd", ["--refresh_every", "1", "--candidates", "2", "--loss", "hinge"]),
        ("ddpo", "sd", ["--images_per_prompt", "2"]),
        ("grpo", "flux", ["--images-per-prompt", "2", "--clip-range", "0.001"]),
    ],
)
def test_every_algorithm_leaves_weights_that_load(
    room: Path, tmp_path: Path, algorithm: str, model: str, more: list[str]
) -> None:
    folder = tmp_path / "lora"
    result = run("finetune", algorithm, *from_prompts(room, model), *training(), *more, "--output_dir", folder)
    assert result.exit_code == 0, result.output
    assert [line["step"] for line in lines((folder / "history.jsonl").read_text())] == [1, 2]
    down = [weight for name, weight in weights_of(folder).items() if "lora_A" in name]
    assert {weight.shape[0] for weight in down} == {2}, "--rank 2"
    settings = json.loads((folder / "checkpoint-2" / "state.json").read_text())["settings"]
    assert settings["algorithm"] == algorithm
    pipe = DiffusionPipeline.from_pretrained(room / model)
    pipe.set_progress_bar_config(disable=True)
    images = []
    for load in (lambda: None, lambda: pipe.load_lora_weights(str(folder))):
        load()
        drawn = pipe(PROMPTS[0], generator=torch.Generator().manual_seed(0), output_type="np", **CALL).images
        images.append(torch.from_numpy(drawn))
    assert (images[1] - images[0]).abs().max() > 1e-4


def test_it_is_finetune_of_the_library(room: Path, trained: Path, tmp_path: Path) -> None:
    config = FinetuneConfig(**TRAINING, sampling=CALL)
    judge = create_reward("tsp_mgs", weights=room / "judge")
    pipe = DiffusionPipeline.from_pretrained(room / "sd")
    finetune_in_python(pipe, judge, PROMPTS, DRaFT(), tmp_path, config, progress=False)
    assert_equal_weights(trained, tmp_path)


def test_the_embedded_generator_and_several_rewards(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a red apple\n\n \na blue car\n")
    options = ["--pretrained-model-name-or-path", "embedded", "--prompts", tmp_path / "p.txt", "--device", "cpu"]
    options += ["--reward", "compact:3", "--reward", "mst_clipiqa", "--num-inference-steps", "1", *training()]
    result = run("finetune", "draft", *options, "--guidance-scale", "1", "--output-dir", tmp_path / "lora")
    assert result.exit_code == 0, result.output
    assert f"note: 2 blank lines of {tmp_path / 'p.txt'} left out" in result.stderr
    pipe = load_embedded_pipeline()
    pipe.load_lora_weights(str(tmp_path / "lora"))
    assert pipe.unet.peft_config


def test_validation_is_reported_before_and_after(room: Path, options: list[str], tmp_path: Path) -> None:
    more = ["--validation_prompts", room / "validation.txt", "--validation_steps", "1", "--validation_seeds", "1"]
    more += ["--holdout-reward", "mst_clipiqa", *(["--report-to", "tensorboard"] if find_spec("tensorboard") else [])]
    result = run("finetune", "draft", *options, *more, "--output_dir", tmp_path / "x")
    assert result.exit_code == 0, result.output
    history = lines((tmp_path / "x" / "history.jsonl").read_text())
    seen = {line["step"]: line["validation"] for line in history if "validation" in line}
    assert sorted(seen) == [0, 1, 2]
    kept = max(seen, key=lambda step: seen[step]["holdout"])
    assert f"kept: the weights after step {kept};" in result.stderr
    for name in ("reward", "holdout"):
        told = f"validation {name}: {seen[0][name]:.4f} before, {seen[kept][name]:.4f} with the kept weights"
        assert told in result.stderr
    assert "diversity" not in result.stderr, "one image per prompt has none"
    state = json.loads((tmp_path / "x" / "checkpoint-2" / "state.json").read_text())
    assert state["settings"]["holdout_reward"] == reward_identity(create_reward("mst_clipiqa"))
    if find_spec("tensorboard"):
        assert_logged(tmp_path / "x", history)


def assert_logged(folder: Path, history: list[dict[str, Any]]) -> None:
    """TensorBoard's files hold the numbers of the history and the pictures of the validations."""
    import numpy as np
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[int, float]] = {}
    pictures: dict[int, np.ndarray] = {}
    for file in (folder / "logs").rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
        for event in (event for tag in events.Tags()["images"] for event in events.Images(tag)):
            pictures[event.step] = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB"))
    for name in ("reward", "loss", "kl", "learning_rate", "grad_norm"):
        assert found[name] == pytest.approx({line["step"]: line[name] for line in history if name in line}, rel=1e-5)
    seen = {line["step"]: line["validation"] for line in history if "validation" in line}
    for name in ("reward", "holdout"):
        expected = {step: numbers[name] for step, numbers in seen.items()}
        assert found[f"validation/{name}"] == pytest.approx(expected, rel=1e-5)
    assert sorted(pictures) == sorted(seen)
    for step, picture in pictures.items():
        tiles = np.asarray(Image.open(folder / "validation" / "tiles" / f"step-{step:06d}.png"))
        assert np.array_equal(picture, tiles)


def test_a_loss_that_is_no_number_ends_with_status_1(room: Path, tmp_path: Path) -> None:
    more = ["--max_grad_norm", "1e30", "--kl_coeff", "1e30", "--output_dir", tmp_path]
    error = refused(run("finetune", "draft", *others(room, learning_rate=1e9), *more), status=1)
    assert re.search(r"error: step 2: the loss became NaN .* are (kept|saved) in ", error), error
    assert all(weight.isfinite().all() for weight in weights_of(tmp_path).values())


# --------------------------------------------------------------------------------------------- from a YAML file


def test_a_yaml_file_gives_options(room: Path, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        f"""# as the options of `trained`
pretrained_model_name_or_path: {room / "sd"}
prompts: {room / "prompts.txt"}
reward: "{room / "judge"}"
device: cpu
num_inference_steps: 2
guidance-scale: 1.0
set: [height=32, width=32]
train_batch_size: 2
max_train_steps: 2
learning_rate: 1e-2
rank: 2
lora_alpha: ~
mixed_precision: no
output_dir: {tmp_path / "lora"}
"""
    )
    result = run("finetune", "draft", "--config", tmp_path / "a.yaml")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'lora'}\n"
    assert_equal_weights(trained, tmp_path / "lora")


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="the error needs it to be missing")
def test_the_command_line_takes_precedence(options: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("rank: 8\ntarget_modules: [to_q, to_v]\nuse_8bit_adam: yes\n")
    config = ["--config", tmp_path / "a.yaml"]
    error = refused(run("finetune", "draft", *config, *options, "--output_dir", tmp_path / "x"))
    assert error.startswith("error: --use-8bit-adam: needs bitsandbytes")
    more = ["--no-use-8bit-adam", "--target-modules", "to_k", "--output-dir", tmp_path / "lora"]
    result = run("finetune", "draft", *config, *options, *more)
    assert result.exit_code == 0, result.output
    found = weights_of(tmp_path / "lora")
    assert {weight.shape[0] for name, weight in found.items() if "lora_A" in name} == {2}
    assert {re.search(r"to_\w+", name)[0] for name in found} == {"to_k"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rnk: 2", "no option is named 'rnk'; did you mean rank?"),
        ("config: b.yaml", "no option is named 'config'; see --help"),
        ("rank: two", "a.yaml: rank: .*valid integer"),
        ("rank: true", "a.yaml: rank: .*valid integer"),
        ("rank: [2, 3]", "a.yaml: rank: expected one value, got a list"),
        ("rank: {a: 3}", "a.yaml: rank: expected a value or a list of values"),
        ("mixed_precision: half", "mixed_precision: 'half' is not one of 'no', 'bf16', 'fp16'"),
        ("max_train_steps: 2\nmax-train-steps: 3", "max-train-steps is given twice"),
        ("- rank", "expected lines 'option: value', got list"),
        ("# nothing", "expected lines 'option: value', got NoneType"),
        ("rank: [2", "a.yaml is not YAML: .*line 1"),
        ("!!python/object/apply:os.getcwd []", "expected lines 'option: value', got list"),
    ],
)
def test_a_yaml_file_that_cannot_be_used(options: list[str], tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text + "\n")
    error = refused(run("finetune", "draft", "--config", tmp_path / "a.yaml", *options, "--output_dir", tmp_path / "x"))
    assert error.startswith(f"error: --config: {tmp_path / 'a.yaml'}")
    assert re.search(message, error), error


def test_required_options_may_be_in_the_file(room: Path, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"prompts: {room / 'prompts.txt'}\n")
    assert "--model" in refused(run("finetune", "draft", "--config", tmp_path / "a.yaml"))
    (tmp_path / "a.yaml").write_text(f"model: {room / 'nowhere'}\n")
    both = run("finetune", "draft", "--config", tmp_path / "a.yaml", "--prompts", room / "prompts.txt")
    assert "error: --model: expected a folder of a pipeline" in refused(both)


# --------------------------------------------------------------------------------------------- resuming


def test_resumed_is_uninterrupted(room: Path, options: list[str], trained: Path, tmp_path: Path) -> None:
    there = ["--output_dir", tmp_path, "--resume-from-checkpoint"]
    assert run("finetune", "draft", *others(room, max_train_steps=1), *there, "latest").exit_code == 0
    error = refused(run("finetune", "draft", *options, *there[:2]))
    assert re.search(r"error: --(output-dir|resume-from-checkpoint): .*checkpoint-1", error), error
    error = refused(run("finetune", "draft", *others(room, rank=3), *there, "latest", "--kl_coeff", "0.5"))
    assert error.startswith("error: --resume-from-checkpoint: ")
    assert all(text in error for text in ("rank: 2 there, 3 now", "kl_coeff: 0.01 there, 0.5 now"))
    error = refused(run("finetune", "refl", *options, *there, "checkpoint-1"))
    assert "algorithm: 'draft' there, 'refl' now" in error
    assert "'nine'" in refused(run("finetune", "draft", *options, *there, "nine"))
    result = run("finetune", "draft", *options, *there, "latest")
    assert result.exit_code == 0, result.output
    assert [line["step"] for line in lines((tmp_path / "history.jsonl").read_text())] == [1, 2]
    assert_equal_weights(trained, tmp_path)


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    words = [*start, "aigiqa_reward", "finetune", *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_make_pairs_and_train_as_one(room: Path, tmp_path: Path) -> None:
    more = ["--candidates", "2", "--seed", "3", "--output_dir"]
    done = torchrun("dpo", *others(room, train_batch_size=1), *more, tmp_path / "two")
    assert done.stdout == f"{tmp_path / 'two'}\n"
    assert run("finetune", "dpo", *others(room), *more, tmp_path / "one").exit_code == 0
    one, other = (read_preference_pairs(tmp_path / name / "pairs") for name in ("one", "two"))
    assert [file.name for file in one.better] == [file.name for file in other.better]
    for name, tensor in weights_of(tmp_path / "one").items():
        torch.testing.assert_close(weights_of(tmp_path / "two")[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_train_as_one(room: Path, trained: Path, tmp_path: Path) -> None:
    done = torchrun("draft", *others(room, train_batch_size=1), "--output-dir", tmp_path)
    assert done.stdout == f"{tmp_path}\n"
    assert done.stderr.count("no --validation-prompts") == 1
    one, two = weights_of(trained), weights_of(tmp_path)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)  # Adam enlarges what rounding does
    told = [lines((folder / "history.jsonl").read_text()) for folder in (trained, tmp_path)]
    for mine, other in zip(*told, strict=True):  # whose scale Adam would hide
        names = ("loss", "grad_norm")
        assert [mine[name] for name in names] == pytest.approx([other[name] for name in names], rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_an_interrupted_process_leaves_a_checkpoint(room: Path, tmp_path: Path) -> None:
    more = ["--checkpointing_steps", "0", "--output_dir", str(tmp_path)]
    arguments = command("finetune", "draft", *others(room, max_train_steps=5000), *more)
    status, stdout, stderr = interrupt(arguments, rb"[1-9]\d*/5000")
    assert (status, stdout) == (130, ""), stderr
    assert "Traceback" not in stderr
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    plain = re.sub(r"\x1b\[[0-9;]*m", "", stderr)
    assert f"error: interrupted; --resume-from-checkpoint latest resumes from {checkpoint}" in plain
    assert weights_of(tmp_path).keys() == weights_of(checkpoint).keys()
    more += ["--resume_from_checkpoint", "latest"]
    result = run("finetune", "draft", *others(room, max_train_steps=step + 1), *more)
    assert result.exit_code == 0, result.output
    assert [line["step"] for line in lines((tmp_path / "history.jsonl").read_text())] == [*range(1, step + 2)]


# --------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("algorithm", "more", "message"),
    [
        ("draft", ["--clip_range", "0.1"], "No such option: --clip[-_]range"),
        ("dpo", ["--candidates", "2", "--pairs_per_prompt", "2"], "--pairs-per-prompt: expected at most .* = 1, got 2"),
        ("dpo", ["--pairs", "x"], "--pairs: have their own prompts"),
        ("draft", ["--validation_prompts", "none.txt"], "--validation-prompts: cannot read none.txt"),
        ("draft", ["--holdout_reward", "tsp_mgs"], "--holdout-reward: .*--validation-prompts, which is missing"),
        ("draft", ["--reward_ceiling", "high"], "'--reward-ceiling': expected a number, or auto or none, got 'high'"),
        ("draft", ["--truncation_steps", "foo"], "'--truncation-steps': expected a number, or all or random, got"),
        ("draft", ["--truncation_steps", "0"], "--truncation-steps: "),
        ("draft", ["--low_variance", "2", "--truncation_steps", "3"], "--low-variance: .*needs truncation_steps=1,"),
        ("refl", ["--earliest", "1"], "--earliest: expected a number in .*, a share"),
        ("ddpo", ["--clip_range", "2"], "--clip-range: expected a number in"),
        ("ddpo", ["--images_per_prompt", "3"], "--train-batch-size: "),
        ("grpo", [], "--model: .*StableDiffusionPipeline.*`aigiqa-reward finetune ddpo`"),
        ("draft", ["--target_modules", "to_x"], "--target-modules: .* named 'to_x'; "),
        ("draft", ["--lr_scheduler", "sine"], "'--lr-scheduler'"),
        ("draft", ["--mixed_precision", "fp16"], "--mixed-precision: fp16 is not for the CPU"),
        ("draft", ["--report_to", "board"], "--report-to: expected one of .*tensorboard.*, got 'board'"),
        ("draft", ["--model", "x"], "--model: given twice"),
        ("draft", ["--pretrained_model_name_or_path", "x"], "--model: given twice"),
        ("draft", ["--set", "height=64"], "--set: height is given by --height already"),
        ("draft", ["--set", "prompt=x"], "--set: prompt is not a further argument of the pipeline"),
        ("draft", ["--set", "foo=1"], "foo: "),
    ],
)
def test_usage_errors(
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    algorithm: str,
    more: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    error = refused(run("finetune", algorithm, *options, "--output_dir", "out", *more))
    assert re.search(message, error), error
    assert not list(tmp_path.glob(f"**/{WEIGHTS}"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, "--prompt, --prompts: expected one of them, got none"),
        ({"prompts": "none.txt"}, "--prompts: cannot read none.txt: No such file"),
        ({"prompts": "blank.txt"}, "--prompts: blank.txt holds no prompt"),
        ({"prompt": "x", "reward": "nowhere/x/y"}, "--reward: expected a folder"),
        ({"prompt": "x", "reward": "compct"}, "--reward: no reward is called 'compct'"),
        ({"prompt": "x", "model": "embeded"}, "--model: .*mean embedded"),
        ({"prompt": "x", "model": "broken"}, "--model: cannot load"),
        ({"prompt": "x", "output-dir": "blank.txt"}, "--output-dir: expected a folder, got the file blank.txt"),
        ({"prompt": "x", "learning-rate": "0"}, "--learning-rate: expected a number above 0"),
    ],
)
def test_wrong_names(
    room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    given = {"model": room / "sd", "device": "cpu"} | changed
    error = refused(run("finetune", "draft", *(part for name, value in given.items() for part in (f"--{name}", value))))
    assert re.search(message, error), error


def test_trackers_that_are_not_installed(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import tracking

    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [])
    for name, package in (("wandb", "wandb"), ("tensorboard", '"aigiqa-reward[finetune]"')):
        assert name in LOGGER_TYPE_TO_CLASS
        error = refused(run("finetune", "draft", *options, "--report_to", name, "--output_dir", tmp_path))
        assert f"--report-to: {name} is not installed" in error
        assert f"pip install {package}" in error


# --------------------------------------------------------------------------------------------- the options


@pytest.mark.parametrize("name", ALGORITHMS)
def test_options_are_the_fields_of_the_dataclasses(name: str) -> None:
    """Of the chosen algorithm and of FinetuneConfig, with their defaults and help; none of other algorithms."""
    found = options_of("finetune", name)
    other = {each.name for kind in ALGORITHMS.values() for each in fields(kind)}
    for kind in (FinetuneConfig, ALGORITHMS[name]):
        for each in fields(kind):
            if "help" in each.metadata and each.name != "sampling":
                option = found[f"--{each.name.replace('_', '-')}"]
                assert option.help == each.metadata["help"]
                if each.name not in ("mixed_precision", "guidance_scales"):
                    assert option.default == each.default
                other.discard(each.name)
    own = {"--pairs", "--reward-guidance", "--margin"} if name == "dpo" else set()
    assert not {f"--{each.replace('_', '-')}" for each in other} & found.keys() - own
