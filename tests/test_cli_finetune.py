"""`aigiqa-reward finetune`: what it writes, what it takes from a YAML file, what it refuses."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from commands import ENVIRONMENT, lines, options_of, run
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
from aigiqa_reward.cli.commands.finetune import Pace
from aigiqa_reward.finetuning import ALGORITHMS, DRaFT, FinetuneConfig
from aigiqa_reward.finetuning import finetune as finetune_in_python
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
    folder = tmp_path_factory.mktemp("trained") / "lora"
    result = run("finetune", "draft", *options, "--checkpointing_steps", "1", "--output_dir", folder)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{folder}\n"
    assert "warning: no --validation-prompts: reward hacking is not detected" in result.stderr
    assert "note: training; " in result.stderr
    assert "kept: the weights after step 2" in result.stderr
    return folder


@pytest.mark.parametrize(
    ("algorithm", "model", "more"),
    [
        pytest.param("draft", "sd", "--truncation-steps 7 --reward-ceiling none", marks=pytest.mark.slow),
        pytest.param("draft", "sd", "--low_variance 2 --gradient_checkpointing", marks=pytest.mark.slow),
        ("refl", "sd", "--earliest 0.5 --reward_ceiling 0.9 --ema_decay 0.5 --max_grad_norm inf"),
        ("dpo", "sd", "--refresh_every 1 --candidates 2 --loss hinge"),
        pytest.param("ddpo", "sd", "--images_per_prompt 2", marks=pytest.mark.slow),
        ("grpo", "flux", "--images-per-prompt 2 --clip-range 0.001"),
    ],
)
def test_every_algorithm_leaves_weights_that_load(room, tmp_path, algorithm, model, more):
    arguments = [*from_prompts(room, model), *training(), *more.split(), "--output_dir", tmp_path]
    result = run("finetune", algorithm, *arguments)
    assert result.exit_code == 0, result.output
    assert [line["step"] for line in lines((tmp_path / "history.jsonl").read_text())] == [1, 2]
    assert {weight.shape[0] for name, weight in weights_of(tmp_path).items() if "lora_A" in name} == {2}, "--rank 2"
    settings = json.loads((tmp_path / "checkpoint-2" / "state.json").read_text())["settings"]
    assert settings["algorithm"] == algorithm
    pipe = DiffusionPipeline.from_pretrained(room / model)
    pipe.set_progress_bar_config(disable=True)
    before = pipe(PROMPTS[0], generator=torch.Generator().manual_seed(0), output_type="np", **CALL).images
    pipe.load_lora_weights(str(tmp_path))
    after = pipe(PROMPTS[0], generator=torch.Generator().manual_seed(0), output_type="np", **CALL).images
    assert abs(after - before).max() > 1e-4


def test_it_is_finetune_of_the_library(room, trained, tmp_path):
    config, judge = FinetuneConfig(**TRAINING, sampling=CALL), create_reward("tsp_mgs", weights=room / "judge")
    pipe = DiffusionPipeline.from_pretrained(room / "sd")
    finetune_in_python(pipe, judge, PROMPTS, DRaFT(), tmp_path, config, progress=False)
    assert_equal_weights(trained, tmp_path)


def test_the_embedded_generator_and_several_rewards(tmp_path):
    (tmp_path / "p.txt").write_text("a red apple\n\n \na blue car\n")
    options = ["--pretrained-model-name-or-path", "embedded", "--prompts", tmp_path / "p.txt", "--device", "cpu"]
    options += ["--reward", "compact:3", "--reward", "mst_clipiqa", "--num-inference-steps", "1", "--guidance-scale", 1]
    result = run("finetune", "draft", *options, *training(max_train_steps=1), "--output-dir", tmp_path / "lora")
    assert result.exit_code == 0, result.output
    assert f"note: 2 blank lines of {tmp_path / 'p.txt'} left out" in result.stderr
    pipe = load_embedded_pipeline()
    pipe.load_lora_weights(str(tmp_path / "lora"))
    assert pipe.unet.peft_config


def test_validation_is_reported_before_and_after(room, options, tmp_path):
    more = ["--validation_prompts", room / "validation.txt", "--validation_steps", "1", "--validation_seeds", "1"]
    more += ["--holdout-reward", "mst_clipiqa", *(["--report-to", "tensorboard"] if find_spec("tensorboard") else [])]
    result = run("finetune", "draft", *options, *more, "--output_dir", tmp_path)
    assert result.exit_code == 0, result.output
    history = lines((tmp_path / "history.jsonl").read_text())
    seen = {line["step"]: line["validation"] for line in history if "validation" in line}
    assert sorted(seen) == [0, 1, 2]
    kept = max(seen, key=lambda step: seen[step]["holdout"])
    assert f"kept: the weights after step {kept};" in result.stderr
    for name in ("reward", "holdout"):
        reported = f"validation {name}: {seen[0][name]:.4f} before, {seen[kept][name]:.4f} with the kept weights"
        assert reported in result.stderr
    assert "diversity" not in result.stderr, "one image per prompt has none"
    state = json.loads((tmp_path / "checkpoint-2" / "state.json").read_text())
    assert state["settings"]["holdout_reward"] == reward_identity(create_reward("mst_clipiqa"))
    if find_spec("tensorboard"):
        assert_logged(tmp_path, history)


def assert_logged(folder: Path, history: list[dict[str, Any]]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[int, float]] = {}
    pictures = set()
    for file in (folder / "logs").rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
        pictures |= {event.step for tag in events.Tags()["images"] for event in events.Images(tag)}
    for name in ("reward", "loss", "kl", "learning_rate", "grad_norm"):
        assert found[name] == pytest.approx({line["step"]: line[name] for line in history if name in line}, rel=1e-5)
    seen = {line["step"]: line["validation"] for line in history if "validation" in line}
    for name in ("reward", "holdout"):
        expected = {step: numbers[name] for step, numbers in seen.items()}
        assert found[f"validation/{name}"] == pytest.approx(expected, rel=1e-5)
    assert pictures == seen.keys()


def test_a_loss_that_is_no_number_ends_with_status_1(room, tmp_path):
    more = ["--max_grad_norm", "1e30", "--kl_coeff", "1e30", "--output_dir", tmp_path]
    error = refused(run("finetune", "draft", *others(room, learning_rate=1e9), *more), status=1)
    assert re.search(r"error: step 2: the loss became NaN .* are (kept|saved) in ", error), error
    assert all(weight.isfinite().all() for weight in weights_of(tmp_path).values())


def test_a_yaml_file_gives_options(room, trained, tmp_path):
    (tmp_path / "a.yaml").write_text(
        f"# as the options of `trained`\npretrained_model_name_or_path: {room / 'sd'}\n"
        f'prompts: {room / "prompts.txt"}\nreward: "{room / "judge"}"\ndevice: cpu\nnum_inference_steps: 2\n'
        "guidance-scale: 1.0\nset: [height=32, width=32]\ntrain_batch_size: 2\nmax_train_steps: 2\n"
        f"learning_rate: 1e-2\nrank: 2\nlora_alpha: ~\nmixed_precision: no\noutput_dir: {tmp_path / 'lora'}\n"
    )
    result = run("finetune", "draft", "--config", tmp_path / "a.yaml")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'lora'}\n"), result.output
    assert_equal_weights(trained, tmp_path / "lora")


def test_the_command_line_takes_precedence(room, tmp_path):
    (tmp_path / "a.yaml").write_text("rank: 8\ntarget_modules: [to_q, to_v]\nuse_8bit_adam: yes\n")
    arguments = ["--config", tmp_path / "a.yaml", *others(room, max_train_steps=1), "--output_dir", tmp_path / "lora"]
    if find_spec("bitsandbytes") is None:
        error = refused(run("finetune", "draft", *arguments))
        assert error.startswith("error: --use-8bit-adam: needs bitsandbytes")
    result = run("finetune", "draft", *arguments, "--no-use-8bit-adam", "--target-modules", "to_k")
    assert result.exit_code == 0, result.output
    found = weights_of(tmp_path / "lora")
    assert {weight.shape[0] for name, weight in found.items() if "lora_A" in name} == {2}
    assert {re.search(r"to_\w+", name)[0] for name in found} == {"to_k"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rnk: 2", "no option is named 'rnk'; did you mean rank?"),
        ("rank: true", "a.yaml: rank: .*valid integer"),
        ("rank: {a: 3}", "a.yaml: rank: expected a value or a list of values"),
        ("mixed_precision: half", "mixed_precision: 'half' is not one of 'no', 'bf16', 'fp16'"),
        ("max_train_steps: 2\nmax-train-steps: 3", "max-train-steps is given twice"),
        ("rank: 2\nseed: 1\nrank: 3", "rank is given twice"),
        ("# nothing", "expected lines 'option: value', got NoneType"),
        ("rank: [2", "a.yaml is not YAML: .*line 1"),
        ("!!python/object/apply:os.getcwd []", "expected lines 'option: value', got list"),
    ],
)
def test_a_yaml_file_that_cannot_be_used(options, tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text + "\n")
    error = refused(run("finetune", "draft", "--config", tmp_path / "a.yaml", *options, "--output_dir", tmp_path / "x"))
    assert error.startswith(f"error: --config: {tmp_path / 'a.yaml'}")
    assert re.search(message, error), error


def test_required_options_may_be_in_the_file(room, tmp_path):
    (tmp_path / "a.yaml").write_text(f"prompts: {room / 'prompts.txt'}\n")
    assert "--model" in refused(run("finetune", "draft", "--config", tmp_path / "a.yaml"))
    (tmp_path / "a.yaml").write_text(f"model: {room / 'nowhere'}\n")
    both = run("finetune", "draft", "--config", tmp_path / "a.yaml", "--prompts", room / "prompts.txt")
    assert "error: --model: expected a folder of a pipeline" in refused(both)


def test_an_interrupted_training_resumes_as_if_it_had_not_been(room, options, trained, tmp_path, monkeypatch):
    backward, count = Accelerator.backward, iter(range(100))

    def interrupted(*arguments: Any, **named: Any) -> Any:
        if next(count) == 0:
            signal.raise_signal(signal.SIGINT)
        return backward(*arguments, **named)

    monkeypatch.setattr(Accelerator, "backward", interrupted)
    there = ["--checkpointing_steps", "0", "--output_dir", tmp_path]
    latest = [*there, "--resume-from-checkpoint", "latest"]
    result = run("finetune", "draft", *options, *latest)
    assert (result.exit_code, result.stdout) == (130, "")
    saved = tmp_path / "checkpoint-1"
    assert f"error: interrupted; --resume-from-checkpoint latest resumes from {saved}" in result.stderr
    assert weights_of(tmp_path).keys() == weights_of(saved).keys()
    error = refused(run("finetune", "draft", *options, *there))
    assert re.search(r"error: --output-dir: .*checkpoint-1 .*; resume from the latest checkpoint,", error), error
    error = refused(run("finetune", "draft", *others(room, rank=3), *latest, "--kl_coeff", "0.5"))
    assert error.startswith("error: --resume-from-checkpoint: ")
    assert all(text in error for text in ("rank: 2 there, 3 now", "kl_coeff: 0.01 there, 0.5 now"))
    error = refused(run("finetune", "refl", *options, *latest))
    assert "algorithm: 'draft' there, 'refl' now" in error
    result = run("finetune", "draft", *options, *latest)
    assert result.exit_code == 0, result.output
    assert [line["step"] for line in lines((tmp_path / "history.jsonl").read_text())] == [1, 2]
    assert_equal_weights(trained, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_train_as_one(room, trained, tmp_path):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    words += ["aigiqa_reward", "finetune", "draft", *others(room, train_batch_size=1), "--output-dir", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900, env=ENVIRONMENT)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}\n"), done.stderr[-3000:]
    assert done.stderr.count("no --validation-prompts") == 1
    torch.testing.assert_close(weights_of(tmp_path), weights_of(trained), rtol=1e-4, atol=1e-5)
    one, two = (lines((folder / "history.jsonl").read_text()) for folder in (trained, tmp_path))
    for name in ("loss", "grad_norm"):  # whose scale Adam would hide
        assert [row[name] for row in one] == pytest.approx([row[name] for row in two], rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("draft --clip_range 0.1", "--clip_range: no such option"),
        ("dpo --candidates 2 --pairs_per_prompt 2", "--pairs-per-prompt: expected at most .* = 1, got 2"),
        ("dpo --pairs x", "--pairs: have their own prompts"),
        ("draft --validation_prompts none.txt", "--validation-prompts: cannot read none.txt"),
        ("draft --holdout_reward tsp_mgs", "--holdout-reward: .*--validation-prompts, which is missing"),
        ("draft --reward_ceiling high", "'--reward-ceiling': expected a number, or auto or none, got 'high'"),
        ("draft --low_variance 2 --truncation_steps 3", "--low-variance: .*needs --truncation-steps 1,"),
        ("refl --earliest 1", "--earliest: expected a number in .*, a share"),
        ("ddpo --images_per_prompt 3", "--train-batch-size: "),
        ("grpo", "--model: .*StableDiffusionPipeline.*`aigiqa-reward finetune ddpo`"),
        ("draft --target_modules to_x", "--target-modules: .* named 'to_x'; "),
        ("draft --mixed_precision fp16", "--mixed-precision: fp16 is not for the CPU"),
        ("draft --report_to board", "--report-to: expected one of .*tensorboard.*, got 'board'"),
        ("draft --pretrained_model_name_or_path x", "--model: given twice"),
        ("draft --resume-from-checkpoint nine", "'nine'"),
        ("draft --set foo=1", "foo: "),
    ],
)
def test_usage_errors(options, tmp_path, arguments, message):
    algorithm, *more = arguments.split()
    error = refused(run("finetune", algorithm, *options, "--output_dir", "out", *more, cwd=tmp_path))
    assert re.search(message, error), error
    assert not list(tmp_path.glob(f"**/{WEIGHTS}"))


def test_trackers_that_are_not_installed(options, tmp_path, monkeypatch):
    from accelerate import tracking

    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [])
    for name, package in (("wandb", "wandb"), ("tensorboard", '".[finetune]"')):
        assert name in LOGGER_TYPE_TO_CLASS
        error = refused(run("finetune", "draft", *options, "--report_to", name, "--output_dir", tmp_path))
        assert f"--report-to: {name} is not installed" in error
        assert f"pip install {package}" in error


@pytest.mark.parametrize("name", ["learning_rate", "kl_coeff"])
def test_the_help_states_the_defaults_of_the_algorithms(name):
    text = options_of("finetune", "ddpo")[f"--{name.replace('_', '-')}"].help
    stated = {float(number) for number in re.findall(r"\d[\d.]*(?:e-\d+)?", text)}
    assert stated == {getattr(kind, name) for kind in ALGORITHMS.values()}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_options_are_the_fields_of_the_dataclasses(name):
    found = options_of("finetune", name)
    other = {each.name for kind in ALGORITHMS.values() for each in fields(kind)}
    for each in (*fields(FinetuneConfig), *fields(ALGORITHMS[name])):
        if "help" in each.metadata and each.name != "sampling":
            option = found[f"--{each.name.replace('_', '-')}"]
            assert option.help == each.metadata["help"]
            assert each.name in ("mixed_precision", "guidance_scales") or option.default == each.default
            other.discard(each.name)
    own = {"--pairs", "--reward-guidance", "--margin"} if name == "dpo" else set()
    assert not {f"--{each.replace('_', '-')}" for each in other} & found.keys() - own


def test_without_a_terminal_the_time_left_is_printed_after_five_steps_and_every_half_minute(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    pace = Pace(100)
    for step in range(1, 21):
        clock[0] += 6.0
        pace.on_step_end(step, {"reward": 0.5, "loss": 1.0})
    found = capsys.readouterr().err.splitlines()
    assert found == [
        f"note: step {n} of 100, reward 0.5000, about {math.ceil((100 - n) / 10)} minutes left" for n in (5, 10, 15, 20)
    ]
