"""`aigiqa-reward finetune`: what it leaves behind, what it takes from a YAML file, what it refuses and survives."""

from __future__ import annotations

import inspect
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from commands import ENVIRONMENT, command, interrupt, lines, run
from diffusers import DiffusionPipeline
from finetune_commands import (
    PROMPTS,
    TRAINING,
    WEIGHTS,
    assert_equal_weights,
    from_prompts,
    furnish,
    one_thread,
    refused,
    weights_of,
)

from aigiqa_reward import create_reward, load_embedded_pipeline
from aigiqa_reward.cli.finetune import OF_ALGORITHM, OF_LOOP, finetune
from aigiqa_reward.cli.finetuning_options import LossName, TimestepsName
from aigiqa_reward.finetuning import ALGORITHMS, DRaFT, FinetuneConfig
from aigiqa_reward.finetuning import finetune as finetune_in_python
from aigiqa_reward.finetuning.algorithms.dpo import Loss, Timesteps
from aigiqa_reward.finetuning.pairs import read_preference_pairs
from aigiqa_reward.utils.run_folder import reward_identity


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with one_thread():
        yield furnish(tmp_path_factory.mktemp("room"))


@pytest.fixture(scope="module")
def options(room: Path) -> list[str]:
    return [*from_prompts(room), *TRAINING]


@pytest.fixture(scope="module")
def trained(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of DRaFT, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("trained") / "lora"
    result = run("finetune", "draft", *options, "--checkpointing_steps", "1", "--output_dir", folder)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{folder}\n"
    assert re.search(r"warning: no --validation_prompts: nothing watches", result.stderr)
    assert "kept: the weights after step 2" in result.stderr
    return folder


def drawn(pipe: Any) -> torch.Tensor:
    call = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 32, "width": 32}
    return torch.from_numpy(
        pipe(PROMPTS[0], generator=torch.Generator().manual_seed(0), output_type="np", **call).images
    )


def assert_it_changes_images(model: Path, folder: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    before = drawn(pipe)
    pipe.load_lora_weights(str(folder))
    assert (drawn(pipe) - before).abs().max() > 1e-4


# --------------------------------------------------------------------------------------------- what it leaves behind


@pytest.mark.parametrize(
    ("algorithm", "model", "more"),
    [
        pytest.param("draft", "sd", ["--truncation_steps", "all"], marks=pytest.mark.slow),
        pytest.param("draft", "sd", ["--truncation_steps", "random"], marks=pytest.mark.slow),
        ("draft", "sd", ["--truncation_steps", "7", "--reward_ceiling", "none"]),  # more than there are steps
        pytest.param("draft", "sd", ["--low_variance", "2", "--gradient_checkpointing"], marks=pytest.mark.slow),
        ("refl", "sd", ["--earliest", "0.5", "--reward_ceiling", "0.9", "--ema_decay", "0.5"]),
        ("dpo", "sd", ["--refresh_every", "1", "--candidates", "2", "--loss", "hinge"]),
        ("ddpo", "sd", ["--images_per_prompt", "2"]),
        ("grpo", "flux", ["--images-per-prompt", "2", "--clip-range", "0.001"]),
    ],
)
def test_every_algorithm_leaves_weights_that_load(
    room: Path, tmp_path: Path, algorithm: str, model: str, more: list[str]
) -> None:
    folder = tmp_path / "lora"
    result = run("finetune", algorithm, *from_prompts(room, model), *TRAINING, *more, "--output_dir", folder)
    assert result.exit_code == 0, result.output
    assert [line["step"] for line in lines((folder / "history.jsonl").read_text())] == [1, 2]
    down = [weight for name, weight in weights_of(folder).items() if "lora_A" in name]
    assert down
    assert {weight.shape[0] for weight in down} == {2}, "--rank 2"
    assert_it_changes_images(room / model, folder)
    settings = json.loads((folder / "checkpoint-2" / "state.json").read_text())["settings"]
    assert settings["algorithm"] == algorithm


def test_it_is_finetune_of_the_library(room: Path, trained: Path, tmp_path: Path) -> None:
    settings = FinetuneConfig(
        train_batch_size=2,
        max_train_steps=2,
        learning_rate=0.01,
        rank=2,
        sampling={"num_inference_steps": 2, "guidance_scale": 1.0, "height": 32, "width": 32},
    )
    judge = create_reward("tsp_mgs", weights=room / "judge")
    pipe = DiffusionPipeline.from_pretrained(room / "sd")
    finetune_in_python(pipe, judge, PROMPTS, DRaFT(), tmp_path, settings, progress=False)
    assert_equal_weights(trained, tmp_path)


def test_the_embedded_generator(room: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a red apple\n\n \na blue car\n")
    options = ["--pretrained-model-name-or-path", "embedded", "--prompts", tmp_path / "p.txt", "--device", "cpu"]
    options += ["--num-inference-steps", "2", "--guidance-scale", "1.0", *TRAINING, "--output-dir", tmp_path / "lora"]
    result = run("finetune", "draft", *options)
    assert result.exit_code == 0, result.output
    assert f"note: 2 blank lines of {tmp_path / 'p.txt'} left out" in result.stderr
    pipe = load_embedded_pipeline()
    pipe.load_lora_weights(str(tmp_path / "lora"))
    assert pipe.unet.peft_config
    assert weights_of(tmp_path / "lora")


def test_validation_tells_before_and_after(room: Path, options: list[str], tmp_path: Path) -> None:
    more = ["--validation_prompts", room / "validation.txt", "--validation_steps", "1", "--validation_seeds", "1"]
    result = run(
        "finetune", "draft", *options, *more, "--holdout_reward", "mst_clipiqa", "--output_dir", tmp_path / "x"
    )
    assert result.exit_code == 0, result.output
    history = lines((tmp_path / "x" / "history.jsonl").read_text())
    seen = {line["step"]: line["validation"] for line in history if "validation" in line}
    assert sorted(seen) == [0, 1, 2]
    kept = max(seen, key=lambda step: seen[step]["holdout"])
    assert f"kept: the weights after step {kept};" in result.stderr
    for name in ("reward", "holdout"):
        told = f"validation {name}: {seen[0][name]:.4f} before, {seen[kept][name]:.4f} with the kept weights"
        assert told in result.stderr
    assert "diversity" not in result.stderr, "one image a prompt has none"
    state = json.loads((tmp_path / "x" / "checkpoint-2" / "state.json").read_text())
    assert state["settings"]["holdout_reward"] == reward_identity(create_reward("mst_clipiqa"))


def test_a_loss_that_is_no_number_ends_with_status_1(options: list[str], tmp_path: Path) -> None:
    more = ["--learning_rate", "1e9", "--max_grad_norm", "1e30", "--kl_coeff", "1e30", "--output_dir", tmp_path]
    error = refused(run("finetune", "draft", *options, *more), status=1)
    assert re.search(
        r"error: step 2: the loss became NaN .* the last weights that gave a finite loss are kept in ", error
    )
    assert all(weight.isfinite().all() for weight in weights_of(tmp_path).values())


# --------------------------------------------------------------------------------------------- from a YAML file


def test_a_yaml_file_stands_for_options(room: Path, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        f"""# as the options of `trained`
pretrained_model_name_or_path: {room / "sd"}
prompts: {room / "prompts.txt"}
reward: tsp_mgs
reward-weights: "{room / "judge"}"
device: cpu
num_inference_steps: 2
guidance_scale: 1.0
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
def test_the_command_line_wins(options: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("rank: 8\ntarget_modules: [to_q, to_v]\nuse_8bit_adam: yes\n")
    config = ["--config", tmp_path / "a.yaml"]  # its rank and number of modules give way, its Adam first does not
    error = refused(run("finetune", "draft", *config, *options, "--output_dir", tmp_path / "x"))
    assert error == "error: --use_8bit_adam: needs bitsandbytes: pip install bitsandbytes"
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
        ("algorithm: draft", "no option is named 'algorithm'; see --help"),
        ("config: b.yaml", "no option is named 'config'; see --help"),
        ("settings: [eta=1]", "no option is named 'settings'"),
        ("rank: two", "a.yaml: rank: .*valid integer"),
        ("rank: 2.5", "a.yaml: rank: .*valid integer"),
        ("rank: true", "a.yaml: rank: .*valid integer"),
        ("rank: 0", "a.yaml: rank: .*1"),
        ("rank: [2, 3]", "a.yaml: rank: expected one value, got a list"),
        ("rank: {a: 3}", "a.yaml: rank: expected one value, got lines 'name: value'"),
        ("target_modules: {a: b}", "target_modules: expected a value or a list of values, got lines"),
        ("mixed_precision: half", "mixed_precision: 'half' is not one of 'no', 'bf16', 'fp16'"),
        ("gradient_checkpointing: maybe", "gradient_checkpointing: .*boolean"),
        ("max_train_steps: 2\nmax-train-steps: 3", "max-train-steps is there twice"),
        ("- rank", "expected lines 'option: value', got a list"),
        ("rank", "expected lines 'option: value', got a text"),
        ("# nothing", "expected lines 'option: value', got nothing"),
        ("rank: [2", "a.yaml is not YAML: .*line 1"),
        ("!!python/object/apply:os.getcwd []", "expected lines 'option: value', got a list"),
    ],
)
def test_a_yaml_file_that_cannot_be_used(options: list[str], tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text + "\n")
    error = refused(run("finetune", "draft", "--config", tmp_path / "a.yaml", *options, "--output_dir", tmp_path / "x"))
    assert error.startswith(f"error: --config: {tmp_path / 'a.yaml'}")
    assert re.search(message, error), error


def test_required_ones_may_stand_in_the_file_but_the_algorithm_not(room: Path, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"prompts: {room / 'prompts.txt'}\n")
    result = run("finetune", "draft", "--config", tmp_path / "a.yaml")
    assert result.exit_code == 2
    assert "--pretrained_model_name_or_path" in result.stderr
    (tmp_path / "a.yaml").write_text(f"pretrained_model_name_or_path: {room / 'nowhere'}\n")
    result = run("finetune", "--config", tmp_path / "a.yaml")
    assert result.exit_code == 2
    assert "algorithm" in result.stderr.lower()
    both = run("finetune", "draft", "--config", tmp_path / "a.yaml", "--prompts", room / "prompts.txt")
    assert re.search(r"error: --pretrained_model_name_or_path: expected a folder of a pipeline", refused(both))


# --------------------------------------------------------------------------------------------- going on


def test_resumed_is_uninterrupted(options: list[str], trained: Path, tmp_path: Path) -> None:
    there = ["--output_dir", tmp_path]
    assert run("finetune", "draft", *options, "--max_train_steps", "1", *there).exit_code == 0
    error = refused(run("finetune", "draft", *options, *there))
    assert re.search(r"error: --output_dir: .* holds checkpoint-1 .* --resume_from_checkpoint latest, or take", error)
    others = ["--rank", "3", "--kl_coeff", "0.5", "--resume_from_checkpoint", "latest"]
    error = refused(run("finetune", "draft", *options, *others, *there))
    assert error.startswith("error: --resume_from_checkpoint: checkpoint-1 was written with other settings (")
    assert all(text in error for text in ("rank: 2 there, 3 now", "kl_coeff: 0.01 there, 0.5 now"))
    error = refused(run("finetune", "refl", *options, "--resume_from_checkpoint", "checkpoint-1", *there))
    assert "algorithm: 'draft' there, 'refl' now" in error
    result = run("finetune", "draft", *options, "--resume-from-checkpoint", "latest", *there)
    assert result.exit_code == 0, result.output
    assert [line["step"] for line in lines((tmp_path / "history.jsonl").read_text())] == [1, 2]
    assert_equal_weights(trained, tmp_path)


def test_resume_of_nothing_begins(options: list[str], trained: Path, tmp_path: Path) -> None:
    result = run("finetune", "draft", *options, "--resume_from_checkpoint", "latest", "--output_dir", tmp_path)
    assert result.exit_code == 0, result.output
    assert_equal_weights(trained, tmp_path)
    error = refused(run("finetune", "draft", *options, "--resume_from_checkpoint", "nine", "--output_dir", tmp_path))
    assert re.search(r"error: --resume_from_checkpoint: there is no checkpoint 'nine'; .* holds checkpoint-2", error)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_make_pairs_and_train_as_one(room: Path, tmp_path: Path) -> None:
    options = [*from_prompts(room), *TRAINING, "--candidates", "2", "--seed", "3"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    two = ["aigiqa_reward", "finetune", "dpo", *options, "--train_batch_size", "1", "--output_dir", tmp_path / "two"]
    done = subprocess.run(
        [*torchrun, *map(str, two)], capture_output=True, text=True, timeout=600, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == f"{tmp_path / 'two'}\n"
    assert run("finetune", "dpo", *options, "--output_dir", tmp_path / "one").exit_code == 0
    one, other = (read_preference_pairs(tmp_path / name / "pairs") for name in ("one", "two"))
    assert [file.name for file in one.better] == [file.name for file in other.better]
    for name, tensor in weights_of(tmp_path / "one").items():
        torch.testing.assert_close(weights_of(tmp_path / "two")[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_an_interrupted_process_leaves_a_checkpoint(options: list[str], tmp_path: Path) -> None:
    more = ["--checkpointing_steps", "0", "--output_dir", tmp_path]
    arguments = command("finetune", "draft", *options, "--max_train_steps", "5000", *more)
    status, stdout, stderr = interrupt(arguments, rb"[1-9]\d*/5000")
    assert (status, stdout) == (130, ""), stderr
    assert "Traceback" not in stderr
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    plain = re.sub(r"\x1b\[[0-9;]*m", "", stderr)
    assert f"error: interrupted; --resume_from_checkpoint latest goes on from {checkpoint}" in plain
    assert weights_of(tmp_path).keys() == weights_of(checkpoint).keys()
    more += ["--max_train_steps", step + 1, "--resume_from_checkpoint", "latest"]
    result = run("finetune", "draft", *options, *more)
    assert result.exit_code == 0, result.output
    assert [line["step"] for line in lines((tmp_path / "history.jsonl").read_text())] == [*range(1, step + 2)]


# --------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("algorithm", "more", "message"),
    [
        ("draft", ["--clip_range", "0.1"], "--clip_range: an option of ddpo and grpo, not of draft; leave it out"),
        ("refl", ["--truncation_steps", "1"], "--truncation_steps: an option of draft, not of refl"),
        ("grpo", ["--pairs", "x"], "--pairs: an option of dpo, not of grpo"),
        ("dpo", ["--candidates", "2", "--pairs_per_prompt", "2"], "--pairs_per_prompt: expected at most .* = 1, got 2"),
        ("dpo", ["--pairs", "x"], "--prompts: expected a file of prompts or --pairs, .* got both"),
        ("draft", ["--prompts", "none.txt"], "--prompts: cannot read none.txt: No such file"),
        ("draft", ["--prompts", "blank.txt"], "--prompts: blank.txt holds no prompt"),
        ("draft", ["--validation_prompts", "none.txt"], "--validation_prompts: cannot read none.txt"),
        ("draft", ["--holdout_reward", "tsp_mgs"], "--holdout_reward: .*--validation_prompts, which is missing"),
        ("draft", ["--reward_ceiling", "high"], "--reward_ceiling: expected a number, auto or none, got 'high'"),
        ("draft", ["--reward_ceiling", "nan"], "--reward_ceiling: expected a number"),
        ("draft", ["--truncation_steps", "foo"], "--truncation_steps: .*'all' or 'random', got 'foo'"),
        ("draft", ["--truncation_steps", "0"], "--truncation_steps: "),
        ("draft", ["--low_variance", "2", "--truncation_steps", "3"], "--low_variance: .*needs --truncation_steps 1,"),
        ("refl", ["--earliest", "1"], "--earliest: expected a number in .*, a share"),
        ("ddpo", ["--clip_range", "2"], "--clip_range: expected a number in"),
        ("ddpo", ["--images_per_prompt", "3"], "--train_batch_size: .* a multiple of the 3 images of a prompt"),
        ("grpo", [], "--pretrained_model_name_or_path: .*StableDiffusionPipeline.*`aigiqa-reward finetune ddpo`"),
        ("draft", ["--target_modules", "to_x"], "--target_modules: no layer .* named 'to_x'; its layers end in .*to_q"),
        ("draft", ["--lr_scheduler", "sine"], "--lr_scheduler: expected one of constant"),
        ("draft", ["--learning_rate", "0"], "--learning_rate: expected a number above 0"),
        ("draft", ["--mixed_precision", "fp16"], "--mixed_precision: fp16 is not for the CPU"),
        ("draft", ["--report_to", "board"], "--report_to: expected one of .*tensorboard.*, got 'board'"),
        ("draft", ["--reward_weights", "nowhere"], "--reward_weights: "),
        ("draft", ["--reward", "compct"], "--reward: no reward is called 'compct'"),
        ("draft", ["--pretrained_model_name_or_path", "embeded"], "--pretrained_model_name_or_path: .*mean embedded"),
        ("draft", ["--pretrained_model_name_or_path", "broken"], "--pretrained_model_name_or_path: cannot load"),
        ("draft", ["--output_dir", "blank.txt"], "--output_dir: expected a folder, got the file blank.txt"),
        ("draft", ["--set", "height=64"], "--set: height is given by --height already"),
        ("draft", ["--set", "prompt=x"], "--set: prompt is no further argument of the pipeline"),
        ("draft", ["--set", "foo=1"], "foo: .*does not serve that argument"),
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
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    error = refused(run("finetune", algorithm, *options, "--output_dir", "out", *more))
    assert re.search(message, error), error
    assert not list(tmp_path.glob(f"**/{WEIGHTS}"))


def test_prompts_are_needed(room: Path, tmp_path: Path) -> None:
    model = ["--pretrained_model_name_or_path", str(room / "sd"), "--output_dir", str(tmp_path)]
    assert "--prompts: expected a file of prompts, got none" in refused(run("finetune", "draft", *model))
    assert "prompts or --pairs" in refused(run("finetune", "dpo", *model))


# --------------------------------------------------------------------------------------------- trackers


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="reads TensorBoard's files")
def test_tensorboard_is_told_what_the_history_holds(room: Path, options: list[str], tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = ["--validation_prompts", room / "validation.txt", "--validation_seeds", "1", "--report_to", "tensorboard"]
    result = run("finetune", "draft", *options, *more, "--output_dir", tmp_path)
    assert result.exit_code == 0, result.output
    found: dict[str, dict[int, float]] = {}
    pictures: dict[int, np.ndarray] = {}
    for file in (tmp_path / "logs").rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
        for tag in events.Tags()["images"]:
            assert tag == "validation/images"
            for event in events.Images(tag):
                pictures[event.step] = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB"))
    history = lines((tmp_path / "history.jsonl").read_text())
    for name in ("reward", "loss", "kl", "learning_rate", "grad_norm"):
        assert found[name] == pytest.approx({line["step"]: line[name] for line in history if name in line}, rel=1e-5)
    seen = {line["step"]: line["validation"] for line in history if "validation" in line}
    for name in ("reward", "holdout"):
        expected = {step: numbers[name] for step, numbers in seen.items()}
        assert found[f"validation/{name}"] == pytest.approx(expected, rel=1e-5)
    assert sorted(pictures) == [0, 2]
    for step, picture in pictures.items():
        tiles = np.asarray(Image.open(tmp_path / "validation" / "tiles" / f"step-{step:06d}.png"))
        assert np.array_equal(picture, tiles)
        assert picture.std() > 0


def test_a_tracker_that_is_not_installed(options: list[str], tmp_path: Path) -> None:
    absent = next(name for name in ("wandb", "swanlab", *LOGGER_TYPE_TO_CLASS) if find_spec(name) is None)
    error = refused(run("finetune", "draft", *options, "--report_to", absent, "--output_dir", tmp_path))
    assert f"--report_to: {absent} is not installed: pip install {absent.replace('_', '-')}" in error


def test_without_tensorboard_it_says_what_brings_it(options: list[str], tmp_path: Path) -> None:
    """In a process that cannot find it."""
    hide = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('tensorboard', 'tensorboardX'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import importlib.util\n"
        "there = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, package=None: (\n"
        "    None if name.partition('.')[0] in ('tensorboard', 'tensorboardX') else there(name, package))\n"
        "from aigiqa_reward.cli import app\n"
        "app()\n"
    )
    arguments = ["finetune", "draft", *options, "--report_to", "tensorboard", "--output_dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", hide, *arguments], capture_output=True, text=True, timeout=300, env=ENVIRONMENT
    )
    assert done.returncode == 2, done.stderr
    remedy = 'pip install "aigiqa-reward[finetune]"'
    assert done.stderr == f"error: --report_to: tensorboard is not installed: {remedy}\n"


# --------------------------------------------------------------------------------------------- the options


def test_defaults_are_those_of_the_library() -> None:
    own = {name: parameter.default for name, parameter in inspect.signature(finetune).parameters.items()}
    theirs = FinetuneConfig()
    for name in OF_LOOP:
        assert own[name] == getattr(theirs, name), name
    assert own["mixed_precision"] is None, "so that the library's own default holds, which accelerate's launcher sets"
    assert own["reward_ceiling"] == theirs.reward_ceiling
    assert own["target_modules"] is theirs.target_modules is None
    rest = {field.name for field in fields(FinetuneConfig)} - {*OF_LOOP}
    assert rest == {"mixed_precision", "reward_ceiling", "target_modules", "sampling", "weight_decay"}, (
        "a setting without an option"
    )
    launched = inspect.signature(finetune_in_python).parameters
    assert own["holdout_reward"] == launched["holdout"].default
    for name in ("resume_from_checkpoint", "report_to"):
        assert own[name] is launched[name].default is None
    for name in {name for names in OF_ALGORITHM.values() for name in names}:
        assert own[name] is None, "so that the algorithm's own default holds"


def test_options_of_algorithms_are_their_settings() -> None:
    assert OF_ALGORITHM.keys() == ALGORITHMS.keys()
    for name, algorithm in ALGORITHMS.items():
        assert {*OF_ALGORITHM[name]} <= {field.name for field in fields(algorithm)}
    assert {loss.value for loss in LossName} == {*get_args(Loss)}
    assert {timesteps.value for timesteps in TimestepsName} == {*get_args(Timesteps)}


def test_no_clipping_can_be_said(options: list[str], tmp_path: Path) -> None:
    result = run("finetune", "draft", *options, "--max_grad_norm", "inf", "--output_dir", tmp_path)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "checkpoint-2" / "state.json").read_text())["settings"]["max_grad_norm"] == math.inf


def test_help_is_quick_and_names_all_options() -> None:
    heavy = "{'torch', 'numpy', 'diffusers', 'transformers', 'PIL', 'yaml', 'accelerate'}"
    show = "import sys, aigiqa_reward.cli as cli; cli.app(['finetune', '--help'], standalone_mode=False)"
    check = f"{show}; assert not {heavy} & set(sys.modules)"
    wide = ENVIRONMENT | {"COLUMNS": "300", "NO_COLOR": "1"}
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60, env=wide)
    assert done.returncode == 0, done.stderr
    names = {*inspect.signature(finetune).parameters} - {"algorithm", "settings"}
    for name in (*names, "set"):
        assert f"--{name}" in done.stdout
        if name in OF_LOOP:
            assert f"--{name.replace('_', '-')}" in done.stdout


# --------------------------------------------------------------------------------------------- several processes


@pytest.mark.slow
def test_two_processes_train_as_one(room: Path, trained: Path, tmp_path: Path) -> None:
    options = [*from_prompts(room), *TRAINING, "--train_batch_size", "1", "--output_dir", str(tmp_path)]
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    done = subprocess.run(
        [*start, "-m", "aigiqa_reward", "finetune", "draft", *options],
        capture_output=True,
        text=True,
        timeout=900,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}\n"
    assert done.stderr.count("no --validation_prompts") == 1
    one, two = weights_of(trained), weights_of(tmp_path)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)  # Adam enlarges what rounding does
    told = [lines((folder / "history.jsonl").read_text()) for folder in (trained, tmp_path)]
    for mine, other in zip(*told, strict=True):  # whose scale Adam would hide
        assert [mine[name] for name in ("loss", "grad_norm")] == pytest.approx(
            [other[name] for name in ("loss", "grad_norm")], rel=1e-4
        )
