"""The training loop of the quality tower and of the match: AdamW, one cycle, EMA, checkpoints, exact resuming."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from aigiqa_reward.utils.io import write_atomically

CHECKPOINT_EVERY = 50
"""Steps; one to three minutes."""

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings that both trainings have.

    Attributes:
        steps: optimizer steps.
        learning_rate: highest learning rate of the cycle.
        weight_decay: of AdamW.
        warmup: share of the steps in which the learning rate rises.
        clip: maximum gradient norm.
        ema: largest decay of the moving average of the weights.
        seed: random seed; that of a step is (seed, step).
    """

    steps: int
    learning_rate: float
    weight_decay: float
    warmup: float
    clip: float
    ema: float
    seed: int = 0


def fit(
    model: Module,
    loss_of: Callable[[Module, np.random.Generator], Tensor],
    *,
    settings: Settings,
    checkpoint: Path,
    sources: Mapping[str, Any],
    start: Callable[[Module], None],
    slower: Mapping[str, float] | None = None,
    position: int = 0,
) -> Module:
    """Train `model` in place, or resume from its checkpoint, and return the EMA of its weights.

    Args:
        model: the model; parameters with gradients are trained.
        loss_of: the loss of one step; torch's global generator is seeded for it as well.
        settings: of this training.
        checkpoint: file of the state.
        sources: what is trained on; a checkpoint of others is refused.
        start: prepares a fresh model, whose buffers a checkpoint restores.
        slower: factors of the learning rate, by the beginning of a parameter's name.
        position: line of the progress bar.
    """
    described = asdict(settings) | dict(sources)
    state = _read(checkpoint, described)
    if state is None:
        start(model)
    average = copy.deepcopy(model).eval()
    groups = _groups(model, settings, slower or {})
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in groups], total_steps=settings.steps, pct_start=settings.warmup
    )
    parts = {"model": model, "average": average, "optimizer": optimizer, "schedule": schedule}
    done = 0 if state is None else state["step"]
    for name, part in parts.items() if state is not None else ():
        part.load_state_dict(state[name])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    bar = tqdm(total=settings.steps, initial=done, desc=checkpoint.stem, unit="step", position=position)
    running = None
    for step in range(done, settings.steps):
        rng = np.random.default_rng([settings.seed, step])
        torch.manual_seed(int(rng.integers(2**62)))  # of dropout, in a process that only trains
        loss = loss_of(model, rng)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, settings.clip)
        optimizer.step()
        schedule.step()
        _follow(average, model, min(settings.ema, (step + 1) / (step + 10)))
        running = loss.item() if running is None else 0.96 * running + 0.04 * loss.item()
        bar.set_postfix(loss=f"{running:.3f}", refresh=False)
        bar.update()
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == settings.steps:
            _write(checkpoint, parts, described, step + 1)
    bar.close()
    return average


def _groups(model: nn.Module, settings: Settings, slower: Mapping[str, float]) -> list[dict[str, Any]]:
    """Trained parameters, by learning rate."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = next((factor for start, factor in slower.items() if name.startswith(start)), 1.0)
            groups.setdefault(factor, []).append(parameter)
    return [{"params": found, "lr": settings.learning_rate * factor} for factor, found in groups.items()]


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)


def _write(checkpoint: Path, parts: Mapping[str, Any], described: Mapping[str, Any], step: int) -> None:
    data = io.BytesIO()
    states = {name: part.state_dict() for name, part in parts.items()}
    torch.save({**states, "step": step, "described": dict(described)}, data)
    write_atomically(checkpoint, data.getvalue())


def _read(checkpoint: Path, described: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state of a training with these settings; None if there is none."""
    if not checkpoint.exists():
        return None
    state = torch.load(checkpoint, weights_only=True)
    if other := [name for name, value in described.items() if state["described"].get(name) != value]:
        raise ValueError(
            f"runs: {checkpoint} belongs to a training with another {', '.join(other)}; use another folder for --runs, "
            "or remove this file to start again"
        )
    return state
