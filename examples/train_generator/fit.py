"""The training loop of generator, autoencoder and judge: EMA, checkpoints, resuming."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from aigiqa_reward.utils.io import write_atomically

CHECKPOINT_EVERY = 250
"""Steps; about two minutes on two cores."""


def fit(
    module: nn.Module,
    loss_of: Callable[[nn.Module, torch.Generator], Tensor],
    *,
    steps: int,
    learning_rate: float,
    ema: float,
    checkpoint: Path,
) -> nn.Module:
    """Train `module` in place on `loss_of(module, generator)`; returns the moving average of its weights.

    The seed of each step is its number, so that an interrupted run is resumed exactly.
    """
    optimizer = torch.optim.AdamW(module.parameters(), learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.05)
    average = torch.optim.swa_utils.AveragedModel(
        module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(ema), use_buffers=True
    )
    parts = {"module": module, "optimizer": optimizer, "schedule": schedule, "average": average}
    done = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["steps"] != steps:
            raise SystemExit(
                f"{checkpoint} is of a run of {state['steps']} steps, not {steps}; use a new --runs folder"
            )
        done = state["done"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    bar = tqdm(total=steps, initial=done, desc=checkpoint.stem, unit="step")
    for step in range(done, steps):
        loss = loss_of(module, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(module)
        bar.update()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
            buffer = io.BytesIO()
            torch.save(
                {name: part.state_dict() for name, part in parts.items()} | {"done": step + 1, "steps": steps}, buffer
            )
            write_atomically(checkpoint, buffer.getvalue())
    return average.module.eval()
