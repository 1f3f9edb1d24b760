"""The state of a training between epochs: tensors in one file, its settings and numbers as JSON beside it."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aigiqa_reward.models.base import TrainedModel
from aigiqa_reward.training.recipes import Recipe
from aigiqa_reward.training.tasks import ScoreTask, Task
from aigiqa_reward.utils.io import write_atomically
from aigiqa_reward.utils.run_folder import RunFolder, write_json
from aigiqa_reward.utils.weights import WeightsError

NUMBERS = ("epoch", "best_epoch", "best", "history")
"""Entries of a training's state that state.json shows beside the settings."""

_STATE = "state.pt"


def save_checkpoint(folder: Path, state: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Write the state of a training, with the numbers of `NUMBERS`; state.json has its settings and these numbers."""
    data = io.BytesIO()
    torch.save(dict(state), data)
    write_json(folder / "state.json", {**settings, **{name: state[name] for name in NUMBERS}})
    write_atomically(folder / _STATE, data.getvalue())


def load_checkpoint(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the state of a training, on the CPU; None if there is none, an error if its settings were others."""
    run = RunFolder(folder, argument="folder", file="state.json", contents=(_STATE,), started=_STATE)
    run.check(settings, ignore=NUMBERS)
    file = folder / _STATE
    if not file.exists():
        return None
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what zipfile and its unpickler do
        message = f"checkpoint: {file} is damaged ({type(error).__name__}); remove it to start again"
        raise WeightsError(message) from error


def trained_state(module: nn.Module, *, towers: bool) -> dict[str, Tensor]:
    """Copy the state that a training changes: the head's, or the whole model's if the towers are trained too."""
    state = module.state_dict()
    return {name: t.detach().clone() for name, t in state.items() if towers or name.startswith("head.")}


def settings_of(
    model: TrainedModel, task: Task, train: np.ndarray, validation: np.ndarray, recipe: Recipe, seed: int
) -> dict[str, Any]:
    """Return the settings that decide a training's result, as JSON values."""
    examples = hashlib.sha256(json.dumps(task.prompts).encode())
    for part in (train, validation):
        examples.update(task.rows(part).astype(np.int64).tobytes())
        if isinstance(task, ScoreTask):
            examples.update(task.targets[part].tobytes())
    settings = {
        **vars(recipe),
        "seed": seed,
        "examples": examples.hexdigest(),
        "model": model.name,
        **{f"model.{name}": value for name, value in model.describe().items()},
    }
    return json.loads(json.dumps(settings))
