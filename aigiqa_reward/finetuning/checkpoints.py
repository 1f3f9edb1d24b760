"""Checkpoints of a fine-tuning: one folder each, there as a whole or not at all, the oldest removed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aigiqa_reward.finetuning.algorithms.base import Algorithm
from aigiqa_reward.finetuning.batch import Schedule
from aigiqa_reward.finetuning.config import FinetuneConfig
from aigiqa_reward.finetuning.context import TrainingContext
from aigiqa_reward.finetuning.lora import FILE, LoRA
from aigiqa_reward.training.checkpoints import moments_of, restore_moments
from aigiqa_reward.utils.io import read_json, write_atomically
from aigiqa_reward.utils.run_folder import digest, identity, pipeline_identity, reward_identity
from aigiqa_reward.utils.weights import WeightsError, read_weights, write_weights

MAY_CHANGE = (
    "max_train_steps",
    "train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "push_to_hub",
    "hub_model_id",
)
"""Settings that a training may go on with otherwise, as long as a step's whole batch has as many rows."""


def describe(
    tools: TrainingContext,
    algorithm: Algorithm,
    schedule: Schedule,
    settings: FinetuneConfig,
    decisive: Mapping[str, Any],
) -> dict[str, Any]:
    """Settings by name, as JSON gives them back.

    Args:
        tools: pipeline and reward.
        algorithm: with its own settings.
        schedule: the prompts.
        settings: of the loop.
        decisive: what there is beside all these.
    """
    named = {name: value for name, value in asdict(settings).items() if name not in MAY_CHANGE}
    if settings.lr_scheduler not in ("constant", "constant_with_warmup"):
        named["max_train_steps"] = settings.max_train_steps  # the learning rate depends on it
    if algorithm.steps_per_round > 1:  # what a round remembers lies in the parts of its batch
        named |= {name: getattr(settings, name) for name in ("train_batch_size", "gradient_accumulation_steps")}
        named["processes"] = tools.accelerator.num_processes
    pipe = tools.rollout.pipe
    values = {**named, **algorithm.settings(), **decisive, "prompts": list(schedule.prompts)}
    found = {
        **pipeline_identity(pipe),
        "dtype": str(tools.lora.denoiser.dtype),
        "reward": reward_identity(tools.reward),
        "algorithm": algorithm.name,
        "batch": schedule.size,
        **{name: _short(value) for name, value in values.items()},
    }
    return json.loads(json.dumps(found))


def _short(value: Any) -> Any:
    """A setting as JSON; of texts how many and their digest."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return f"{len(value)} texts {digest(value)}"
    return identity(value)


_PREFIX = "checkpoint-"
_PARTS = {"average": "average.safetensors", "kept": "kept.safetensors", "memory": "memory.safetensors"}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a training goes on from.

    Attributes:
        step: steps of the optimizer that were taken.
        lora: weights, by the names of `LoRA.state`.
        average: their moving average, by their names in the denoiser; empty without one.
        kept: weights of the best validation so far; empty before any.
        memory: of the algorithm's round.
        numbers: everything else, as JSON has it.
    """

    step: int
    lora: Mapping[str, Tensor]
    average: Mapping[str, Tensor]
    kept: Mapping[str, Tensor]
    memory: Mapping[str, Tensor]
    numbers: Mapping[str, Any]


def save_checkpoint(
    folder: Path, checkpoint: Checkpoint, lora: LoRA, optimizer: torch.optim.Optimizer, *, limit: int | None
) -> Path:
    """Write `checkpoint-<step>` into a folder, and then remove the oldest ones beyond `limit`.

    It is written under another name first, so that an interruption at any moment leaves every former checkpoint whole.
    """
    target = folder / f"{_PREFIX}{checkpoint.step}"
    if target.exists():
        return target  # gone on from and not a step further
    for left in folder.glob(f".{_PREFIX}*.part"):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    part = folder / f".{target.name}.part"
    part.mkdir(parents=True)
    try:
        lora.write(part, checkpoint.lora)
        write_weights(part / "optimizer.safetensors", moments_of(optimizer))
        for name, file in _PARTS.items():
            write_weights(part / file, getattr(checkpoint, name))
        numbers = {"step": checkpoint.step, **checkpoint.numbers}
        write_atomically(part / "state.json", json.dumps(numbers, indent=2).encode())
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    if limit is not None:
        for old in checkpoints_in(folder)[:-limit]:
            shutil.rmtree(old)
    return target


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a training, the earliest first."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(_PREFIX)))


def find_checkpoint(folder: Path, wanted: str | Path | None) -> Path | None:
    """The checkpoint to go on from: none, the latest ("latest"; None if there is none), or the one named.

    Raises:
        ValueError: there is no checkpoint of that name, or there are later ones or those of another training, which
            going on would mix up; or none is wanted, and the folder holds some, or weights.
    """
    there = checkpoints_in(folder)
    if wanted is None:
        if there:
            raise ValueError(
                f"output_dir: {folder} holds {there[-1].name} of an earlier training; go on with "
                "resume_from_checkpoint='latest', or take another folder"
            )
        if (folder / FILE).exists():
            raise ValueError(
                f"output_dir: {folder} holds {FILE} of an earlier training, without its checkpoints; take another "
                "folder, or remove the file"
            )
        return None
    if str(wanted) == "latest":
        return there[-1] if there else None
    for path in (folder / wanted, Path(wanted)):
        if not (path / "state.json").is_file():
            continue
        if there and not path.samefile(there[-1]):
            raise ValueError(
                f"resume_from_checkpoint: {folder} holds other checkpoints than {path} that going on from it would mix "
                f"up ({', '.join(p.name for p in there)}); pass 'latest' or {there[-1].name}, or another output_dir"
            )
        return path
    names = ", ".join(path.name for path in there) or "none"
    raise ValueError(f"resume_from_checkpoint: there is no checkpoint {str(wanted)!r}; {folder} holds {names}")


def set_aside(folder: Path) -> None:
    """Keep under another name the weights of a training that has no checkpoint and is begun anew."""
    if not checkpoints_in(folder) and (folder / FILE).exists():
        (folder / FILE).replace(folder / f"{FILE}.before")


def load_checkpoint(
    path: Path, optimizer: torch.optim.Optimizer, check: Callable[[Mapping[str, Any]], None] = lambda numbers: None
) -> Checkpoint:
    """Read a checkpoint; the moments go into the optimizer.

    Args:
        path: its folder.
        optimizer: of the same weights.
        check: is told the numbers before anything is restored, and raises where they are of another training.

    Raises:
        WeightsError: it is not whole.
    """
    try:
        numbers = read_json(path / "state.json")
    except (OSError, ValueError) as error:
        raise WeightsError(f"checkpoint: {path} is not whole ({error}); remove it to go on from another") from error
    if not isinstance(numbers, dict) or not isinstance(numbers.get("step"), int):
        raise WeightsError(
            f"checkpoint: {path} is not whole (state.json tells no step); remove it to go on from another"
        )
    check(numbers)
    try:
        moments, lora = read_weights(path / "optimizer.safetensors"), read_weights(path / FILE)
        parts = {name: read_weights(path / file) for name, file in _PARTS.items()}
    except WeightsError as error:
        why = str(error).removeprefix("weights: ")
        raise WeightsError(f"checkpoint: {path} is not whole ({why}); remove it to go on from another") from error
    restore_moments(optimizer, moments, source=str(path))
    return Checkpoint(step=numbers.pop("step"), lora=lora, numbers=numbers, **parts)
