"""What decides the outcome of a training, so that a checkpoint of another one is recognised."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from aigiqa_reward.finetuning.algorithm import Algorithm
from aigiqa_reward.finetuning.schedule import Schedule
from aigiqa_reward.finetuning.settings import FinetuneSettings
from aigiqa_reward.finetuning.tools import Tools
from aigiqa_reward.sampling.run_settings import (
    described,
    digest,
    pipeline_name,
    reward_name,
    scheduler_name,
    weights_digest,
)

MAY_CHANGE = (
    "max_train_steps",
    "train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "checkpointing_steps",
    "checkpoints_total_limit",
)
"""Settings that a training may go on with otherwise, as long as a step's whole batch has as many rows."""


def describe(
    tools: Tools, algorithm: Algorithm, schedule: Schedule, settings: FinetuneSettings, decisive: Mapping[str, Any]
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
        "pipeline": pipeline_name(pipe),
        "dtype": str(tools.lora.denoiser.dtype),
        "scheduler": scheduler_name(pipe),
        "reward": reward_identity(tools.reward),
        "algorithm": algorithm.name,
        "batch": schedule.size,
        **{name: _short(value) for name, value in values.items()},
    }
    return json.loads(json.dumps(found))


def reward_identity(reward: Any) -> str:
    """A reward's name, and of a module what tells its weights from others."""
    return f"{reward_name(reward)} {weights_digest(reward) or ''}".strip()


def _short(value: Any) -> Any:
    """A setting as JSON; of texts how many and their digest."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return f"{len(value)} texts {digest(value)}"
    return described(value)
