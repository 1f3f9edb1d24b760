"""The state of a training between epochs, as safetensors and JSON in one folder that is replaced as a whole."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aigiqa_reward.models.base import TrainedModel
from aigiqa_reward.training.tasks import ScoreTask, Task
from aigiqa_reward.utils.io import read_json, write_atomically
from aigiqa_reward.utils.weights import WeightsError, read_weights, write_weights

_OPTIMIZER = "optimizer."


def save_checkpoint(
    folder: Path,
    *,
    model: Mapping[str, Tensor],
    average: Mapping[str, Tensor],
    best: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
) -> None:
    """Write weights, their average, the best weights, the optimizer's moments and the numbers of a training.

    The folder is written beside its name first and then takes its place, so that an interruption leaves the former one:
    under its name, or under one from which `find_checkpoint` brings it back.
    """
    fresh, former = folder.with_name(f".{folder.name}.part"), _former(folder)
    shutil.rmtree(fresh, ignore_errors=True)  # of an interrupted call
    fresh.mkdir(parents=True)
    try:
        write_weights(fresh / "model.safetensors", model)
        write_weights(fresh / "average.safetensors", average)
        write_weights(fresh / "best.safetensors", best)
        write_weights(fresh / "optimizer.safetensors", moments_of(optimizer))
        write_atomically(fresh / "state.json", json.dumps(dict(state), indent=2).encode())
        if folder.exists():
            shutil.rmtree(former, ignore_errors=True)
            folder.rename(former)
        fresh.rename(folder)
        shutil.rmtree(former, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def find_checkpoint(folder: Path) -> bool:
    """Whether there is a checkpoint; puts the former one back where a call was interrupted between two renamings."""
    if not folder.is_dir() and _former(folder).is_dir():
        _former(folder).rename(folder)
    return folder.is_dir()


def _former(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.former")


def load_checkpoint(
    folder: Path, optimizer: torch.optim.Optimizer, settings: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Weights, their average, best weights and numbers of a training; the moments go into the optimizer.

    Raises:
        WeightsError: the folder is not whole.
        ValueError: it was written with other settings than these.
    """
    try:
        state = read_json(folder / "state.json")
    except (OSError, ValueError) as error:
        raise WeightsError(f"checkpoint: {folder} is not whole ({error}); remove it to start again") from error
    if not isinstance(state, dict):
        raise WeightsError(f"checkpoint: {folder} is not whole (state.json holds no object); remove it to start again")
    if other := [name for name, value in settings.items() if state.get(name) != value]:
        raise ValueError(
            f"folder: the checkpoint {folder} was written with another {' and '.join(other)}; take another folder, or "
            "remove the checkpoint"
        )
    restore_moments(optimizer, read_weights(folder / "optimizer.safetensors"), source=str(folder))
    weights, average, best = (read_weights(folder / f"{part}.safetensors") for part in ("model", "average", "best"))
    return weights, average, best, state


def moments_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimizer remembers of its parameters, as named tensors; plain numbers as int64 or float64 ones.

    Optimizers of 8 bits keep a mapping of tensors within, of which some are shared by all parameters.
    """
    moments: dict[str, Tensor] = {}
    for number, entry in optimizer.state_dict()["state"].items():
        for name, value in entry.items():
            within = value if isinstance(value, Mapping) else {"": value}
            for inner, held in within.items():
                path = f"{_OPTIMIZER}{number}.{name}{'.' if inner else ''}{inner}"
                moments[path] = (held.clone() if inner else held) if isinstance(held, Tensor) else _as_tensor(held)
    return moments


def restore_moments(optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor], *, source: str) -> None:
    """Give an optimizer of the same parameters what `moments_of` told; its settings stay its own.

    Raises:
        WeightsError: they are of other parameters; names `source`.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries: dict[int, dict[str, Any]] = {}
    for path, tensor in moments.items():
        number, _, rest = path.removeprefix(_OPTIMIZER).partition(".")
        name, _, inner = rest.partition(".")
        fits = number.isdecimal() and int(number) < len(parameters) and name
        if not fits or (not inner and tensor.shape not in ((), parameters[int(number)].shape)):
            raise WeightsError(
                f"checkpoint: {source} holds the optimizer's {path!r} of shape {tuple(tensor.shape)}, which fits no "
                "parameter; remove it to start again"
            )
        a_number = tensor.ndim == 0 and tensor.dtype in (torch.int64, torch.float64)
        held = tensor.item() if a_number else tensor
        entry = entries.setdefault(int(number), {})
        if inner:
            entry.setdefault(name, {})[inner] = held
        else:
            entry[name] = held
    known = optimizer.state_dict()
    optimizer.load_state_dict({"state": entries, "param_groups": known["param_groups"]})


def _as_tensor(value: Any) -> Tensor:
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)


def trained_state(module: nn.Module, *, towers: bool) -> dict[str, Tensor]:
    """What a training changes: the head's state, or the whole model's where the towers are trained too."""
    state = module.state_dict()
    return {name: t.detach().clone() for name, t in state.items() if towers or name.startswith("head.")}


def settings_of(
    model: TrainedModel,
    task: Task,
    train: np.ndarray,
    validation: np.ndarray,
    recipe: Mapping[str, Any],
    seed: int,
) -> dict[str, Any]:
    """What a checkpoint must have been written with to be gone on from, as JSON gives it back."""
    examples = hashlib.sha256(json.dumps(task.prompts).encode())
    for part in (train, validation):
        examples.update(task.rows(part).astype(np.int64).tobytes())
        if isinstance(task, ScoreTask):
            examples.update(task.targets[part].tobytes())
    settings = {
        "recipe": dict(recipe),
        "seed": seed,
        "examples": examples.hexdigest(),
        "model": {"name": model.name, **model.describe()},
    }
    return json.loads(json.dumps(settings))
