"""Checkpoints of a fine-tuning: whole or not there, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import signal
import time
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from finetuned import stir

from aigiqa_reward.finetuning.checkpoints import (
    Checkpoint,
    checkpoints_in,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from aigiqa_reward.finetuning.lora import FILE, LoRA
from aigiqa_reward.sampling.families import family_of
from aigiqa_reward.utils.weights import WeightsError

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def lora() -> LoRA:
    return stir(LoRA(family_of(pipelines.stable_diffusion(), {}, need="the test"), rank=2, targets=("to_q",)))


def save(folder: Path, lora: LoRA, step: int, limit: int | None = 2, state: Any = None) -> Path:
    checkpoint = Checkpoint(
        step=step,
        settings={"rank": 2, "rate": 1 / 3},
        monitor={"best_step": None},
        lora={name: torch.full_like(tensor, step) for name, tensor in lora.state().items()},
        kept={},
        memory={"advantages/0": torch.tensor([[0.5, -0.5]]), "steps": torch.tensor([[1, 2]])},
        optimization={"optimizer": state or {}, "ema": None},
    )
    return save_checkpoint(folder, checkpoint, lora, limit=limit)


def test_all_of_it_comes_back(lora: LoRA, tmp_path: Path) -> None:
    state = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}}}
    found = load_checkpoint(save(tmp_path, lora, 12, state=state), lora)
    assert (found.step, found.settings, found.monitor) == (12, {"rank": 2, "rate": 1 / 3}, {"best_step": None})
    assert all(bool((tensor == 12).all()) for tensor in found.lora.values())
    assert found.lora.keys() == lora.state().keys()
    assert torch.equal(found.memory["steps"], torch.tensor([[1, 2]]))
    assert found.kept == {}
    moments = found.optimization["optimizer"]["state"][0]
    assert all(torch.equal(value, moments[name]) for name, value in state["state"][0].items())


@pytest.mark.parametrize(("limit", "kept"), [(1, [10]), (2, [9, 10]), (None, [1, 3, 9, 10])])
def test_the_newest_are_kept(lora: LoRA, tmp_path: Path, limit: int | None, kept: list[int]) -> None:
    (tmp_path / "checkpoint-notes").mkdir()
    for step in (1, 3, 9, 10):
        save(tmp_path, lora, step, limit)
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-10"
    assert [path.name for path in checkpoints_in(tmp_path)] == [f"checkpoint-{step}" for step in kept]
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{s}" for s in kept} | {"checkpoint-notes"}


def test_the_wanted_one_is_found(lora: LoRA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, other = tmp_path / "run", tmp_path / "other"
    other.mkdir()
    for step in (3, 5):
        save(folder, lora, step)
    last = folder / "checkpoint-5"
    monkeypatch.chdir(tmp_path)
    for wanted in ("latest", "checkpoint-5", last, str(last), Path("run/checkpoint-5")):
        found = find_checkpoint(folder, wanted)
        assert found is not None
        assert found.samefile(last)
    assert find_checkpoint(other, None) is None
    assert find_checkpoint(other, "latest") is None
    assert find_checkpoint(other, folder / "checkpoint-3") == folder / "checkpoint-3", "into another folder"
    with pytest.raises(
        ValueError, match=r"^output_dir: .* has checkpoint-5 of an earlier training; resume from the latest"
    ):
        find_checkpoint(folder, None)
    with pytest.raises(ValueError, match=r"no checkpoint 'checkpoint-4'; .* has checkpoint-3, checkpoint-5"):
        find_checkpoint(folder, "checkpoint-4")
    for earlier in ("checkpoint-3", folder / "checkpoint-3", Path("run/checkpoint-3")):
        with pytest.raises(ValueError, match=r"has other checkpoints .*checkpoint-5.*or another output_dir"):
            find_checkpoint(folder, earlier)
    save(other, lora, 1)
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: .*has other checkpoints"):
        find_checkpoint(other, last)


@pytest.mark.parametrize("file", ["training_state.pt", "state.json", FILE])
def test_a_damaged_one_is_named(lora: LoRA, tmp_path: Path, file: str) -> None:
    path = save(tmp_path, lora, 4)
    (path / file).write_bytes(b'{"half')
    with pytest.raises(WeightsError, match=r"^checkpoint: cannot read .*checkpoint-4 \(.*remove it to resume"):
        load_checkpoint(path, lora)


def save_on_and_on(folder: Path, lora: LoRA, first: int, said: Any) -> None:
    for step in range(first, first + 10_000):
        save(folder, lora, step)
        said.send(step)


def killed(folder: Path, lora: LoRA, first: int, delay: float) -> int:
    said, saying = FORK.Pipe(duplex=False)
    process = FORK.Process(target=save_on_and_on, args=(folder, lora, first, saying))
    process.start()
    saying.close()
    steps = [said.recv()]
    time.sleep(delay)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with contextlib.suppress(EOFError):
        while said.poll():
            steps.append(said.recv())
    return max(steps)


@pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_sudden_end_loses_nothing_that_was_saved(times: int, lora: LoRA, tmp_path: Path) -> None:
    folder, rng, step, interrupted = tmp_path / "run", random.Random(0), 0, 0
    for _ in range(times):
        said = killed(folder, lora, step + 1, rng.uniform(0, 0.3))
        interrupted += any(path.name.endswith(".part") for path in folder.iterdir())
        path = find_checkpoint(folder, "latest")
        assert path is not None
        found = load_checkpoint(path, lora)
        assert all(bool((tensor == found.step).all()) for tensor in found.lora.values())
        step = found.step
        assert said <= step <= said + 1
    assert interrupted or times < 20, "no end came in the middle of writing"
    save(folder, lora, step + 1)
    names = {f"checkpoint-{step}", f"checkpoint-{step + 1}"}
    assert {path.name for path in folder.iterdir()} == names, "what was left half done is cleared away"
