"""Runs a policy gradient by hand: tools on a tiny pipeline with an adapter that does something, batches, gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from aigiqa_reward.finetuning.algorithms.policy_gradient import PolicyGradient
from aigiqa_reward.finetuning.batch import Batch, Outcome
from aigiqa_reward.finetuning.context import TrainingContext
from aigiqa_reward.finetuning.lora import LoRA
from aigiqa_reward.sampling.rollout import Rollout

PROMPTS = ("a cat on a mat", "a red apple")


def red(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """(B,) mean of the red channel, without a gradient."""
    assert len(images) == len(prompts)
    return images[:, 0].mean(dim=(1, 2)).detach()


def tools_of(
    pipe: Any,
    *,
    reward: Any = red,
    penalty: float = 0.0,
    moved: float = 0.1,
    dtype: torch.dtype = torch.float32,
    checkpointed: bool = False,
    ceiling: float | None = None,
    **sampling: Any,
) -> TrainingContext:
    """Of a pipeline whose adapter's B is normal with deviation `moved`."""
    if dtype != torch.float32:
        pipe.to(dtype)
    rollout = Rollout(pipe, **sampling)
    lora = LoRA(rollout.family, rank=2)
    generator = torch.Generator().manual_seed(11)
    for name, weight in lora.weights.items():
        weight.data = weight.data.to(dtype)
        if "lora_B" in name and moved:
            weight.data = moved * torch.randn(weight.shape, generator=generator, dtype=dtype)
    return TrainingContext(
        rollout=rollout,
        lora=lora,
        reward=reward,
        accelerator=Accelerator(cpu=True),
        checkpointed=checkpointed,
        penalty=penalty,
        ceiling=ceiling,
    )


def batches(
    *parts: Sequence[int], group: int, round: int = 0, step: int | None = None, prompts: Sequence[str] = PROMPTS
) -> list[Batch]:
    """Parts of one process with these rows; group i has prompt i."""
    size = sum(len(rows) for rows in parts)
    places = [[row // group % len(prompts) for row in rows] for rows in parts]
    return [
        Batch(
            prompts=tuple(prompts[place] for place in own),
            places=tuple(own),
            rows=tuple(rows),
            round=round,
            step=round if step is None else step,
            size=size,
            seed=5,
        )
        for rows, own in zip(parts, places, strict=True)
    ]


def went_backward(
    algorithm: PolicyGradient, tools: TrainingContext, parts: Sequence[Batch], memory: Mapping[str, Tensor]
) -> list[list[Outcome]]:
    """The outcomes of each part, after each went backward as the loop does it."""
    outcomes = []
    for part, batch in enumerate(parts):
        found = []
        for outcome in algorithm.losses(tools, batch, part, memory):
            (outcome.loss * len(batch) / batch.size).backward()
            found.append(outcome)
        outcomes.append(found)
    return outcomes


def gradients(tools: TrainingContext) -> dict[str, Tensor]:
    """Of all weights, which are then without."""
    found = {}
    for name, weight in tools.lora.weights.items():
        found[name] = torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
        weight.grad = None
    return found


def size_of(found: Mapping[str, Tensor]) -> float:
    """Length of a gradient."""
    return float(torch.stack([value.double().square().sum() for value in found.values()]).sum().sqrt())


def trained(
    algorithm: PolicyGradient, tools: TrainingContext, *, rounds: int, rows: int, learning_rate: float
) -> list[float]:
    """Train by hand; the samples' mean reward of each round."""
    optimizer = torch.optim.AdamW(tools.lora.weights.values(), lr=learning_rate)
    rewards, step = [], 0
    for turn in range(rounds):
        memory = {}
        for update in range(algorithm.steps_per_round):
            parts = batches(range(rows), group=algorithm.images_per_prompt, round=turn, step=step)
            if not update:
                memory = algorithm.prepare(tools, parts)
                rewards.append(float(memory["reward/0"].mean()))
            optimizer.zero_grad()
            went_backward(algorithm, tools, parts, memory)
            optimizer.step()
            step += 1
    return rewards


@torch.no_grad()
def shown(tools: TrainingContext, count: int) -> Tensor:
    """(count,) rewards of what the pipeline makes of seeds that training has not seen, by its own scheduler."""
    prompts = [PROMPTS[place % len(PROMPTS)] for place in range(count)]
    generators = [torch.Generator().manual_seed(90_000 + place) for place in range(count)]
    rollout = tools.rollout
    state = rollout.run(rollout.start(tools.encode(prompts), generators))
    return tools.score(rollout.show(state.latents), prompts).total
