"""Checkpoints of a fine-tuning: one folder each, written as a whole or not at all, the oldest removed."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from aigiqa_reward.finetuning.algorithms.base import Algorithm
from aigiqa_reward.finetuning.batch import Schedule
from aigiqa_reward.finetuning.config import FinetuneConfig
from aigiqa_reward.finetuning.context import TrainingContext
from aigiqa_reward.finetuning.lora import FILE, LoRA
from aigiqa_reward.utils.io import read_json, write_atomically
from aigiqa_reward.utils.run_folder import digest, identity, pipeline_identity, reward_identity, to_json, write_json
from aigiqa_reward.utils.weights import WeightsError

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
"""Settings that may change when a training is resumed, as long as the batch of a step has as many rows."""


def describe(
    context: TrainingContext,
    algorithm: Algorithm,
    schedule: Schedule,
    config: FinetuneConfig,
    decisive: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what decides the result of a training, as JSON; `decisive` is what the other arguments don't contain."""
    named = {name: value for name, value in asdict(config).items() if name not in MAY_CHANGE}
    if config.lr_scheduler not in ("constant", "constant_with_warmup"):
        named["max_train_steps"] = config.max_train_steps  # the learning rate depends on it
    if algorithm.steps_per_round > 1:  # the memory of a round is stored by batch and process
        named |= {name: getattr(config, name) for name in ("train_batch_size", "gradient_accumulation_steps")}
        named["processes"] = context.accelerator.num_processes
    values = {**named, **algorithm.settings(), **decisive, "prompts": list(schedule.prompts)}
    found = {
        **pipeline_identity(context.rollout.pipe),
        "dtype": str(context.lora.denoiser.dtype),
        "reward": reward_identity(context.reward),
        "algorithm": algorithm.name,
        "batch": schedule.size,
        **{name: _short(value) for name, value in values.items()},
    }
    return json.loads(to_json(found))


def _short(value: Any) -> Any:
    """Return a setting as JSON; lists of texts by their number and digest."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return f"{len(value)} texts {digest(value)}"
    return identity(value)


_PREFIX = "checkpoint-"
_NUMBERS, _TENSORS = "state.json", "training_state.pt"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a training resumes from: steps taken, settings by `describe`, and the states of the parts."""

    step: int
    settings: Mapping[str, Any]
    monitor: Mapping[str, Any]
    lora: Mapping[str, Tensor]
    kept: Mapping[str, Tensor]  # weights of the best validation so far; empty before any
    memory: Mapping[str, Tensor]  # memory of the algorithm's round, gathered over processes
    optimization: Mapping[str, Any]
    old: Mapping[str, Tensor] = field(default_factory=dict)  # `TrainingContext.old`


def save_checkpoint(folder: Path, checkpoint: Checkpoint, lora: LoRA, *, limit: int | None) -> Path:
    """Write `checkpoint-<step>` into a folder, under another name first, and then remove the oldest beyond `limit`."""
    target = folder / f"{_PREFIX}{checkpoint.step}"
    if target.exists():
        return target  # resumed from and no step further
    for left in folder.glob(f".{_PREFIX}*.part"):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    part = folder / f".{target.name}.part"
    part.mkdir(parents=True)
    try:
        lora.write(part, checkpoint.lora)
        tensors = io.BytesIO()
        torch.save({name: getattr(checkpoint, name) for name in ("kept", "memory", "optimization", "old")}, tensors)
        write_atomically(part / _TENSORS, tensors.getvalue())
        write_json(part / _NUMBERS, {name: getattr(checkpoint, name) for name in ("step", "settings", "monitor")})
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    if limit is not None:
        for old in checkpoints_in(folder)[:-limit]:
            shutil.rmtree(old)
    return target


def load_checkpoint(path: Path, lora: LoRA) -> Checkpoint:
    """Read a checkpoint."""
    try:
        tensors = torch.load(path / _TENSORS, map_location="cpu", weights_only=True)
        return Checkpoint(**read_json(path / _NUMBERS), **tensors, lora=lora.read(path))
    except (OSError, ValueError, RuntimeError, EOFError, UnpicklingError) as error:
        # torch's own message recommends weights_only=False.
        why = f"{_TENSORS} is damaged" if isinstance(error, UnpicklingError) else str(error).removeprefix("weights: ")
        raise WeightsError(f"checkpoint: cannot read {path} ({why}); remove it to resume from another") from error


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints of a training, the earliest first."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(_PREFIX)))


def find_checkpoint(folder: Path, wanted: str | Path | None) -> Path | None:
    """Return the wanted checkpoint ("latest", a name or a path) of an output folder, or None to start anew."""
    there = checkpoints_in(folder)
    if wanted is None:
        if there:
            raise ValueError(
                f"output_dir: {folder} has {there[-1].name} of an earlier training; resume from the "
                "latest checkpoint, or choose another folder"
            )
        if (folder / FILE).exists():
            raise ValueError(f"output_dir: {folder} has {FILE} of an earlier training; choose another folder")
        return None
    if str(wanted) == "latest":
        return there[-1] if there else None
    for path in (folder / wanted, Path(wanted)):
        if not (path / _NUMBERS).is_file():
            continue
        if there and not path.samefile(there[-1]):
            raise ValueError(
                f"resume_from_checkpoint: {folder} has other checkpoints than {path}, with which it would be mixed "
                f"({', '.join(p.name for p in there)}); pass 'latest' or {there[-1].name}, or another output_dir"
            )
        return path
    names = ", ".join(path.name for path in there) or "none"
    raise ValueError(f"resume_from_checkpoint: there is no checkpoint {str(wanted)!r}; {folder} has {names}")
