"""Trainings as a whole: split, interrupted, resumed, refused, in several processes, gone wrong."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pipelines
import pytest
import torch
from finetuned import CALL, PROMPTS, warmth
from huggingface_hub import RepoUrl
from huggingface_hub.utils import filter_repo_objects
from pipelines import FEW_STEPS
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path

from aigiqa_reward import create_reward
from aigiqa_reward.datasets import PreferencePairs
from aigiqa_reward.finetuning import (
    DDPO,
    DPO,
    DiffusionNFT,
    DRaFT,
    FinetuneConfig,
    FinetuneResult,
    FinetuningError,
    TrainingCallback,
    finetune,
)
from aigiqa_reward.finetuning.checkpoints import load_checkpoint
from aigiqa_reward.finetuning.lora import FILE, LoRA
from aigiqa_reward.finetuning.results import ValidationResult
from aigiqa_reward.rewards.bound import BoundReward
from aigiqa_reward.sampling.families import family_of

QUICK: dict[str, Any] = {"rank": 2, "train_batch_size": 1, "learning_rate": 1e-2, "max_train_steps": 4}
QUICK |= {"kl_coeff": 0.0, "sampling": {**CALL, "num_inference_steps": 1}}


def train(
    folder: Path, pipe: Any = None, reward: Any = warmth, algorithm: Any = None, **changes: Any
) -> FinetuneResult:
    names = ("resume_from_checkpoint", "validation_prompts", "holdout", "callbacks")
    own = {name: changes.pop(name) for name in names if name in changes}
    pipe = pipelines.stable_diffusion() if pipe is None else pipe
    prompts, algorithm = changes.pop("prompts", PROMPTS), algorithm or DRaFT()
    config = FinetuneConfig(**{**QUICK, **changes})
    return finetune(pipe, reward, prompts, algorithm, folder, config, progress=False, **own)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / FILE)


def assert_same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert first.keys() == second.keys() != set()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


@pytest.fixture(scope="module")
def after(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("plain")
    train(folder, checkpointing_steps=1, checkpoints_total_limit=None)
    return lambda step: weights(folder / f"checkpoint-{step}")


def numbers(result: FinetuneResult) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in result.history]


def image(pipe: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return pipe(prompt="a red apple", generator=generator, output_type="pt", **FEW_STEPS).images


def test_the_reward_rises(tmp_path: Path) -> None:
    settings = {"max_train_steps": 6, "train_batch_size": 2, "sampling": CALL}
    still = train(tmp_path / "still", learning_rate=1e-9, **settings)
    result = train(tmp_path / "trained", learning_rate=0.05, **settings)
    gains = [mine["reward"] - other["reward"] for mine, other in zip(result.history, still.history, strict=True)]
    assert gains[0] == 0
    assert min(gains[-3:]) > 0.002, gains
    assert all(line["loss"] == pytest.approx(-line["reward"]) for line in result.history)
    assert [line["step"] for line in result.history] == list(range(1, 7))
    written = (tmp_path / "trained" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == list(result.history)


def test_a_denoiser_that_computes_its_blocks_again_changes_nothing(tmp_path: Path) -> None:
    def how(pipe: Any) -> list[Any]:
        parts = [m for part in (pipe.unet, pipe.vae) for m in part.modules() if hasattr(m, "gradient_checkpointing")]
        return [(part.gradient_checkpointing, getattr(part, "_gradient_checkpointing_func", None)) for part in parts]

    pipe = pipelines.stable_diffusion()
    pipe.unet.enable_gradient_checkpointing()
    before = how(pipe)
    assert len({wanted for wanted, _ in before}) == 2
    same = {"algorithm": DRaFT(truncation_steps="all"), "kl_coeff": 50.0, "max_train_steps": 2, "sampling": CALL}
    train(tmp_path / "a", pipe=pipe, gradient_checkpointing=True, **same)
    assert how(pipe) == before
    train(tmp_path / "b", **same)
    for name, tensor in weights(tmp_path / "a").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "b")[name], rtol=1e-4, atol=1e-6)


def half(images: Tensor, prompts: list[str]) -> Tensor:
    return warmth(images, prompts) / 2


def stored(pipe: Any) -> LoRA:
    return LoRA(family_of(pipe, {}, need="the test"), rank=2)


def broken_from(call: int, breaking: Callable[[Tensor], Tensor]) -> Any:
    calls = [0]

    def broken(images: Tensor, prompts: list[str]) -> Tensor:
        calls[0] += 1
        scores = warmth(images, prompts)
        return breaking(scores) if calls[0] >= call else scores

    return broken


def press(scores: Tensor) -> Tensor:
    os.kill(os.getpid(), signal.SIGINT)
    return scores


def test_an_interrupted_training_ends_as_one_that_was_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"ema_decay": 0.9, "lr_scheduler": "cosine", "lr_warmup_steps": 1, "checkpointing_steps": 1}
    settings |= {"max_train_steps": 5, "algorithm": DRaFT(truncation_steps=1), "train_batch_size": 2}
    expected = train(tmp_path / "a", reward=broken_from(99, press), **settings)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b", reward=broken_from(4, press), **settings)  # a first time before the training
    assert "interrupted: stopping after this step" in caplog.text
    assert (tmp_path / "b" / "checkpoint-3").is_dir()
    assert not torch.equal(*(next(iter(weights(tmp_path / name).values())) for name in "ab"))
    found = train(tmp_path / "b", reward=broken_from(99, press), resume_from_checkpoint="latest", **settings)
    assert numbers(found) == numbers(expected)
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    last = [load_checkpoint(tmp_path / name / "checkpoint-5", stored(pipelines.stable_diffusion())) for name in "ab"]
    assert last[0].step == 5
    leaves = [dict(tree_flatten_with_path(vars(checkpoint))[0]) for checkpoint in last]
    assert leaves[0].keys() == leaves[1].keys()
    for path, mine in leaves[0].items():
        other = leaves[1][path]
        assert torch.equal(mine, other) if isinstance(mine, Tensor) else mine == other
    assert {path.name for path in (tmp_path / "b").glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-5"}
    rates = [line["learning_rate"] for line in found.history]
    assert rates[0] == 0
    assert rates[1] > rates[2] > rates[3] > rates[4] > 0
    kept = weights(tmp_path / "b")
    assert any(not torch.equal(tensor, kept[name]) for name, tensor in last[1].lora.items()), "the average is kept"
    again = train(tmp_path / "b", reward=broken_from(99, press), resume_from_checkpoint="latest", **settings)
    assert numbers(again) == numbers(expected), "there is nothing left to do"
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_a_longer_training_goes_on_with_another_split(tmp_path: Path) -> None:
    expected = train(tmp_path / "a", train_batch_size=2, max_train_steps=2)
    train(tmp_path / "b", train_batch_size=2, max_train_steps=1)
    changes = {"gradient_accumulation_steps": 2, "checkpoints_total_limit": None, "gradient_checkpointing": True}
    found = train(tmp_path / "b", max_train_steps=2, **changes, resume_from_checkpoint="latest")
    for mine, other in zip(numbers(found), numbers(expected), strict=True):
        assert mine == pytest.approx(other, rel=1e-3, abs=1e-6)


def test_weights_without_checkpoints_are_not_overwritten(tmp_path: Path) -> None:
    train(tmp_path, max_train_steps=1, checkpointing_steps=1)
    before = (tmp_path / FILE).read_bytes()
    shutil.rmtree(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match=r"^output_dir: .* has pytorch_lora_weights\.safetensors of an earlier"):
        train(tmp_path, max_train_steps=1)
    assert (tmp_path / FILE).read_bytes() == before
    train(tmp_path, max_train_steps=1, seed=1, resume_from_checkpoint="latest")
    assert (tmp_path / f"{FILE}.before").read_bytes() == before != (tmp_path / FILE).read_bytes()
    fresh = pipelines.stable_diffusion()
    fresh.load_lora_weights(tmp_path)


def test_other_settings_are_refused_and_listed(tmp_path: Path) -> None:
    pipe = pipelines.stable_diffusion()
    train(tmp_path / "c", pipe, max_train_steps=2, lr_scheduler="cosine")
    pipe.delete_adapters("reward")
    changes = {"learning_rate": 2e-2, "rank": 3, "algorithm": DRaFT(truncation_steps=2), "max_train_steps": 3}
    resumed = {"resume_from_checkpoint": "latest", "lr_scheduler": "cosine"}
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: checkpoint-2 was written with other") as raised:
        train(tmp_path / "c", pipe, prompts=PROMPTS[:2], **resumed, **changes)
    expected = ("draft.truncation_steps: 1 there, 2 now", "learning_rate: 0.01 there, 0.02 now", "rank: 2 there, 3 now")
    expected += ("prompts: '3 texts ", "max_train_steps: 2 there, 3 now")  # a cosine depends on the number of steps
    assert all(phrase in str(raised.value) for phrase in expected)
    # The pipeline can be trained again after a refusal.
    assert train(tmp_path / "new", pipe, max_train_steps=1, resume_from_checkpoint="latest").steps == 1


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_finetuning_loop as t
for name in ("one", "again"):  # a script may train twice
    t.train(Path(sys.argv[1]) / name, **t.JOINT, train_batch_size=1, gradient_accumulation_steps=2)
"""
JOINT: dict[str, Any] = {"max_train_steps": 2, "algorithm": DRaFT(truncation_steps="random"), "sampling": CALL}
JOINT |= {"validation_prompts": ["a cup", "a hat", "a pear"], "validation_seeds": 3, "holdout": half}


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_train_and_validate_as_one(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    own = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, str(script), str(tmp_path)], env=own, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    alone = train(tmp_path / "alone", **JOINT, train_batch_size=4)
    lines = [json.loads(line) for line in (tmp_path / "one" / "history.jsonl").read_text().splitlines()]
    for mine, other in zip(alone.history, lines, strict=True):
        mine, other = ({**line, **line.get("validation", {})} for line in (mine, other))
        for name in mine.keys() - {"validation", "seconds", "images_per_second"}:
            assert mine[name] == pytest.approx(other[name], rel=1e-3), name
    shown, expected = (ValidationResult.read(tmp_path / name / "validation", 0) for name in ("one", "alone"))
    assert shown.prompts == expected.prompts
    assert np.abs(shown.tiles.astype(int) - expected.tiles).max() <= 1
    checkpoints = [load_file(tmp_path / name / "checkpoint-2" / FILE) for name in ("alone", "one", "again")]
    for name, tensor in checkpoints[0].items():
        torch.testing.assert_close(checkpoints[1][name], tensor, rtol=1e-4, atol=1e-5)
    assert_same(checkpoints[1], checkpoints[2])


@pytest.mark.parametrize(
    ("breaking", "what"),
    [(lambda s: s * float("nan"), "loss"), (lambda s: s + (s - s.detach()).sqrt() * 0, "gradient")],
    ids=["loss", "gradient"],
)
def test_what_is_not_finite_stops_it(tmp_path: Path, breaking: Any, what: str, after: Any) -> None:
    pipe = pipelines.stable_diffusion()
    with pytest.raises(FinetuningError, match=f"^step 3: the {what} became NaN.*lower learning_rate.*are kept in"):
        train(tmp_path, pipe, broken_from(4, breaking))  # a first time before the training
    assert_same(weights(tmp_path), after(1 if what == "loss" else 2))
    fresh = pipelines.stable_diffusion()
    fresh.load_lora_weights(tmp_path)
    assert torch.equal(image(fresh), image(pipe))


@pytest.mark.parametrize(
    "algorithm", [DRaFT(), DDPO(images_per_prompt=2), DPO(refresh_every=1, candidates=2), DiffusionNFT()]
)
@pytest.mark.parametrize("fault", ["pixels", "reward"])
def test_what_is_not_finite_before_any_training_is_not_the_learning_rates(
    tmp_path: Path, algorithm: Any, fault: str
) -> None:
    pipe, reward = pipelines.stable_diffusion(), warmth
    if fault == "pixels":
        with torch.no_grad():
            pipe.vae.decoder.conv_out.weight.mul_(torch.inf)
    else:
        reward = broken_from(2 if algorithm.reward_gradient else 1, lambda scores: scores * float("nan"))
    with pytest.raises(FinetuningError, match=r"^step 1: ") as caught:
        train(tmp_path, pipe, reward, algorithm, train_batch_size=2, sampling=CALL)
    what = {
        "pixels": r"[24] of [24] images have NaN or infinite pixels",
        "reward": r"\.broken gave NaN .*[24] of [24] finite images",
    }
    assert re.search(what[fault], str(caught.value))
    assert "no weight was trained yet" in str(caught.value)
    assert "learning_rate" not in str(caught.value)


def test_layers_that_the_denoiser_does_not_use_are_named(tmp_path: Path) -> None:
    pipe = pipelines.stable_diffusion()
    attention: Any = next(module for module in pipe.unet.modules() if hasattr(module, "to_q"))
    attention.other = torch.nn.ModuleDict({"to_q": torch.nn.Linear(32, 32)})
    with pytest.warns(UserWarning, match=r"^target_modules: .* not use 1 of .*attn1\.other\.to_q; leave") as caught:
        train(tmp_path / "a", pipe, max_train_steps=2)
    assert len([warning for warning in caught if "target_modules" in str(warning.message)]) == 1, "once"
    pipe.delete_adapters("reward")
    with pytest.raises(ValueError, match=r"^target_modules: the denoiser uses none of the adapted layers"):
        train(tmp_path / "b", pipe, target_modules=("other.to_q",))


@pytest.mark.parametrize(
    "within", ["step", "round", *(pytest.param(each, marks=pytest.mark.slow) for each in ("old policy", "validation"))]
)
def test_a_signal_writes_the_last_whole_step_at_once(tmp_path: Path, within: str) -> None:
    """Whoever sends a SIGTERM may kill the process before the step it is in, or the validation, has ended."""
    settings: dict[str, Any] = {"max_train_steps": 4, "train_batch_size": 2, "sampling": CALL}
    if within == "validation":
        settings |= {"validation_prompts": ["a fox", "a cat"], "holdout": half, "ema_decay": 0.5}
        settings |= {"validation_seeds": 1, "validation_steps": 2}
    elif within == "old policy":
        settings["algorithm"] = DiffusionNFT(images_per_prompt=2, old_decay_slope=0.5)
    else:
        settings["algorithm"] = DDPO(images_per_prompt=2, updates_per_round=2 if within == "round" else 1)
    done = 1 if within == "round" else 2
    stopped, killed = tmp_path / "stopped", tmp_path / "killed"

    def stop(*_: Any) -> None:
        if stopped.exists() and (stopped / "history.jsonl").read_text().count('"loss"') == done and not killed.exists():
            os.kill(os.getpid(), signal.SIGTERM)
            shutil.copytree(stopped, killed)  # what a kill at this place leaves

    pipe = pipelines.stable_diffusion()
    expected = train(tmp_path / "whole", **settings)
    pipe.unet.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, pipe, **settings)
    assert [path.name for path in killed.glob("checkpoint-*")] == [f"checkpoint-{done}"]
    found = train(killed, resume_from_checkpoint="latest", **settings)
    order = [[(line["step"], "validation" in line) for line in run.history] for run in (expected, found)]
    assert order[0] == order[1]
    assert_same(weights(tmp_path / "whole"), weights(killed))


def test_whatever_is_raised_nothing_is_lost(tmp_path: Path, after: Any) -> None:
    def fails(scores: Tensor) -> Tensor:
        raise RuntimeError("the server is away")

    pipe = pipelines.stable_diffusion()
    with pytest.raises(RuntimeError, match="the server is away") as caught:
        train(tmp_path / "a", pipe, broken_from(4, fails))
    (note,) = caught.value.__notes__
    assert note.startswith("after step 2 of the training, whose weights are kept in ")
    assert note.endswith("; resume from checkpoint-2 to continue")
    assert_same(weights(tmp_path / "a"), after(2))
    train(tmp_path / "a", pipe, broken_from(99, fails), resume_from_checkpoint="latest")
    assert_same(weights(tmp_path / "a"), after(4))
    with pytest.raises(ValueError, match="max_train_steps: expected at least the 4 steps of checkpoint-4, got 2"):
        train(tmp_path / "a", reward=broken_from(99, fails), max_train_steps=2, resume_from_checkpoint="latest")


def train_onto_a_full_disk(folder: Path) -> None:
    train(folder, max_train_steps=1, checkpointing_steps=1)
    size = max(file.stat().st_size for file in (folder / "checkpoint-1").iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
    message = r"^step 2: cannot write to .* \(File too large\); checkpoint-1 is complete: .*, and resume from it$"
    with pytest.raises(FinetuningError, match=message):
        train(folder, max_train_steps=2, checkpointing_steps=1, resume_from_checkpoint="latest")
    sys.exit(3)


def test_a_full_disk_ends_a_training_and_leaves_its_last_checkpoint(tmp_path: Path, after: Any) -> None:
    process = multiprocessing.get_context("fork").Process(target=train_onto_a_full_disk, args=(tmp_path / "a",))
    process.start()
    process.join()
    assert process.exitcode == 3
    assert [path.name for path in tmp_path.glob("a/*checkpoint-*")] == ["checkpoint-1"]
    assert not list(tmp_path.glob("a/**/.*"))
    train(tmp_path / "a", max_train_steps=2, resume_from_checkpoint="latest")
    assert_same(weights(tmp_path / "a"), after(2))


PAIRS = PreferencePairs(prompts=("a cat",), better=(Path("a.png"),), worse=(Path("b.png"),))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prompts": []}, ValueError, "^train_data: expected texts, got none"),
        ({"prompts": ["a", " "]}, ValueError, "^train_data: expected texts, got a blank one at index 1"),
        ({"prompts": "a cat"}, TypeError, "^train_data: expected a list of texts, got str"),
        ({"prompts": ["a", 3]}, TypeError, r"^train_data: expected texts, got int \(3\)"),
        ({"prompts": PAIRS}, TypeError, "^train_data: expected a list of prompts for DRaFT, got preference pairs"),
        ({"algorithm": DRaFT}, TypeError, "^algorithm: .* got the class DRaFT"),
    ],
)
def test_bad_arguments_are_refused_before_the_pipeline_is_touched(
    changes: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        train(tmp_path, object(), **changes)


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    pipe = pipelines.stable_diffusion()
    for changes, error, message in [
        ({"target_modules": ("to_z",)}, ValueError, "^target_modules: no layer of UNet2DConditionModel .*'to_z'"),
        ({"sampling": {"num_inference_step": 1}}, ValueError, "num_inference_step"),
        ({"reward": lambda images, prompts: warmth(images.detach(), prompts)}, ValueError, "^reward: .*FlowGRPO"),
        ({"reward": None}, TypeError, "^reward: expected a Reward, its name or a function"),
        ({"reward": create_reward("compact"), "prompts": ["a cat", "\u200b"]}, ValueError, "^train_data: .*u200b"),
    ]:
        with pytest.raises(error, match=message):
            train(tmp_path, pipe, **changes)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^output_dir: expected a folder, got the file"):
        train(tmp_path / "file", pipe)
    with pytest.raises(TypeError, match=r"^config: expected FinetuneConfig, got dict"):
        finetune(pipe, warmth, PROMPTS, DRaFT(), tmp_path, {"rank": 2})  # pyright: ignore[reportArgumentType]
    pipe.unet.half()
    with pytest.raises(ValueError, match=r"^pipe: its denoiser is in float16, .*bfloat16.*mixed_precision='fp16'"):
        train(tmp_path, pipe)


class Recorder(TrainingCallback):
    def __init__(self, stop_at: int = -1) -> None:
        self.stop_at = stop_at
        self.steps: list[tuple[int, Mapping[str, float]]] = []
        self.validations: list[tuple[int, float]] = []

    def on_step_end(self, step: int, numbers: Mapping[str, float]) -> bool:
        self.steps.append((step, numbers))
        return step == self.stop_at

    def on_validation(self, step: int, result: Any) -> None:
        self.validations.append((step, result.summary()["holdout"]))


@pytest.mark.parametrize("algorithm", [DRaFT(), DDPO(images_per_prompt=2)])
def test_images_above_the_ceiling_are_warned_of(tmp_path: Path, algorithm: Any) -> None:
    settings = {"train_batch_size": 4, "max_train_steps": 1, "sampling": {**CALL, "num_inference_steps": 2}}

    def shares(ceiling: float) -> list[float]:
        history = train(tmp_path / str(ceiling), algorithm=algorithm, reward_ceiling=ceiling, **settings).history
        return [line["above_ceiling"] for line in history]

    with pytest.warns(UserWarning, match="reward_ceiling: 100% of the images of the first step score above -9 and"):
        assert shares(-9.0) == [1.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert shares(9.0) == [0.0]


def test_callbacks_see_the_history_and_can_stop(tmp_path: Path) -> None:
    watch = {"validation_prompts": ["a cup", "a hat"], "holdout": half, "validation_seeds": 1, "validation_steps": 2}
    idle, stopping = Recorder(), Recorder(stop_at=2)
    result = train(tmp_path, callbacks=[idle, stopping], **watch)
    assert (result.steps, result.stopped) == (2, "step 2: Recorder.on_step_end returned True")
    assert (tmp_path / "checkpoint-2").is_dir()
    lines = [line for line in result.history if "validation" not in line]
    assert [step for step, _ in idle.steps] == [1, 2]
    for line, (_, seen) in zip(lines, idle.steps, strict=True):
        assert seen.items() <= line.items()
        assert {"loss", "reward", "grad_norm"} <= seen.keys()
    watched = [(line["step"], line["validation"]["holdout"]) for line in result.history if "validation" in line]
    assert idle.validations == stopping.validations == watched
    again = train(tmp_path, resume_from_checkpoint="latest", **watch)
    assert (again.steps, again.stopped) == (4, None), "a callback's stop is not the training's"


def test_the_weights_are_uploaded_and_a_failed_upload_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []

    def upload_folder(*, repo_id: str, folder_path: Path, ignore_patterns: list[str], **options: Any) -> None:
        if repo_id == "me/full":
            raise OSError("no space")
        files = [str(f.relative_to(folder_path)) for f in folder_path.rglob("*")]
        sent.append((repo_id, set(filter_repo_objects(files, ignore_patterns=ignore_patterns))))

    create = "create_repo", lambda name, **options: RepoUrl(f"https://huggingface.co/me/{name}")
    monkeypatch.setattr(huggingface_hub, *create)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    train(tmp_path / "mine", max_train_steps=1, push_to_hub=True)
    ((name, files),) = sent
    assert name == "me/mine"
    assert {FILE, "history.jsonl"} <= files
    assert not [file for file in files if "checkpoint-1/" in file]
    with pytest.raises(FinetuningError, match=r"^push_to_hub: the upload to me/full failed .*are safe in"):
        train(tmp_path / "b", max_train_steps=1, push_to_hub=True, hub_model_id="full")
    assert_same(weights(tmp_path / "b"), weights(tmp_path / "mine"))


@pytest.mark.slow
def test_a_compiled_denoiser_is_trained_alike(tmp_path: Path, after: Any) -> None:
    pipe = pipelines.stable_diffusion()
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    train(tmp_path / "compiled", pipe, max_train_steps=2)
    assert_same(weights(tmp_path / "compiled"), after(2))


def test_the_launchers_accumulation_does_not_change_a_training(
    tmp_path: Path, after: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    train(tmp_path / "launched", max_train_steps=1)
    assert_same(weights(tmp_path / "launched"), after(1))


def test_a_process_may_train_in_one_precision_and_then_in_another(tmp_path: Path, after: Any) -> None:
    for precision in ("bf16", "no"):
        train(tmp_path / precision, mixed_precision=precision, max_train_steps=1)
    narrow = weights(tmp_path / "bf16")
    assert {tensor.dtype for tensor in narrow.values()} == {torch.float32}
    assert_same(weights(tmp_path / "no"), after(1))
    assert any(not torch.equal(tensor, narrow[name]) for name, tensor in after(1).items())


def test_encoded_prompts_of_another_kind_are_not_passed_to_the_reward() -> None:
    class Own(torch.nn.Module):
        def encode_prompts(self, prompts: list[str]) -> Tensor:
            return torch.zeros(len(prompts), 3)

        def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
            return warmth(images, prompts)

    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(BoundReward(Own())(images, ["a cat", "a"]).total, warmth(images, ["a cat", "a"]))
