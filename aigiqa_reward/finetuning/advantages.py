"""Advantages: the rewards of a round's images, compared with those of the same prompt, over all processes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from aigiqa_reward.finetuning.batch import Batch, Memory
from aigiqa_reward.finetuning.context import TrainingContext

Deviation = Literal["group", "batch"]

STD_FLOOR = 1e-4
"""Added to the std of rewards before dividing by it, as in Flow-GRPO's code. DDPO's 1e-6 would turn differences of
rounding into whole advantages, since our rewards are near [0, 1]."""
EQUAL = 4 * torch.finfo(torch.float32).eps
"""Relative difference up to which rewards are equal but for float32 rounding."""


def group_advantages(
    rewards: Tensor, size: int, *, deviation: Deviation = "group", limit: float = math.inf
) -> tuple[Tensor, Tensor]:
    """Subtract the mean of their group from rewards (N,), divide by a population std and clip to [-limit, limit].

    Sample i belongs to group i // size; size 1 makes all one group: DDPO without per-prompt statistics. Flow-GRPO and
    DDPO's per-prompt statistics divide by the std of the group (DDPO's code keeps statistics over several rounds). The
    std of the batch, `global_std` in Flow-GRPO's code, does not amplify differences between near equals.

    Returns:
        Advantages (N,) float64, 0 for samples without a finite reward and in degenerate groups; and (N,) whether the
        group is degenerate: equal rewards only, or fewer than two finite ones.
    """
    values = rewards.double().reshape(-1, size if size > 1 else len(rewards))
    finite = values.isfinite()
    values = torch.where(finite, values, 0.0)
    count = finite.sum(dim=1, keepdim=True)
    centered = torch.where(finite, values - values.sum(dim=1, keepdim=True) / count.clamp(min=1), 0.0)
    largest = values.abs().amax(dim=1, keepdim=True)
    degenerate = (count < 2) | (centered.abs().amax(dim=1, keepdim=True) <= EQUAL * largest)
    if deviation == "group":
        spread = (centered.square().sum(dim=1, keepdim=True) / count.clamp(min=1)).sqrt()
    else:
        spread = values[finite].std(correction=0) if bool(finite.any()) else values.new_zeros(())
    result = torch.where(degenerate, 0.0, centered / (spread + STD_FLOOR)).clamp(-limit, limit)
    return result.flatten(), degenerate.expand_as(values).flatten()


def mixed_advantages(
    context: TrainingContext, tables: Mapping[str, Tensor], size: int, *, deviation: Deviation, limit: float
) -> tuple[Tensor, Tensor]:
    """Return what `group_advantages` does; for a mixture of rewards the weighted mean of its members' advantages.

    Each member thus has its weight, whatever its scale. A mixture with a reward cap is compared by its capped total.
    """
    if context.ceiling is not None or not context.members or not bool(tables["reward"].isfinite().any()):
        return group_advantages(context.capped(tables["reward"]), size, deviation=deviation, limit=limit)
    names = [f"reward/{name}" for name in context.members]
    found = [group_advantages(tables[name], size, deviation=deviation) for name in names]
    weights = context.members.values()
    mixed = torch.stack([weight * own for weight, (own, _) in zip(weights, found, strict=True)]).sum(dim=0)
    return mixed.clamp(-limit, limit), torch.stack([degenerate for _, degenerate in found]).all(dim=0)


def compare(
    context: TrainingContext,
    batches: Sequence[Batch],
    scores: Sequence[Mapping[str, Tensor]],
    size: int,
    *,
    deviation: Deviation,
    limit: float,
) -> dict[str, Tensor]:
    """Compare this process's images with those of all processes.

    Args:
        context: processes and reward cap.
        batches: this process's batches of the round.
        scores: scores (B,) of each batch by name, "reward" among them.
        size: images per prompt, as in `group_advantages`.
        deviation: the std that divides, as in `group_advantages`.
        limit: largest advantage.

    Returns:
        For each batch, on the CPU, as "NAME/PART": advantages, degenerate, dropped (1 where the reward is not finite)
        and scores (B,). If no reward of the round is finite, the advantages are NaN.
    """
    from accelerate.utils import gather_object

    device = context.accelerator.device
    rows = torch.tensor([row for batch in batches for row in batch.rows])
    order = context.gather(rows.to(device)).cpu().argsort()
    tables = {}  # over all rows of the step
    for name in sorted(set(gather_object([name for part in scores for name in part]))):
        # A part without any finite image has a reward only.
        own = torch.cat([part.get(name, part["reward"] * math.nan).cpu() for part in scores])
        tables[name] = context.gather(own.to(device)).cpu().double()[order]
    tables = {name: table for name, table in tables.items() if name == "reward" or bool(table.isfinite().any())}
    finite = tables["reward"].isfinite()
    advantages, degenerate = mixed_advantages(context, tables, size, deviation=deviation, limit=limit)
    # If all rewards are broken, the loop stops at a loss that is NaN.
    broken = 0.0 if bool(finite.any()) else math.nan
    result = {"advantages": advantages + broken, "degenerate": degenerate, "dropped": ~finite}
    for name, table in tables.items():  # the mean in place of NaN, so that logged means are those of the others
        mean = table[table.isfinite()].mean().nan_to_num()
        result[name] = torch.where(table.isfinite(), table, mean)
    found = {}
    for name, values in result.items():
        parts = values[rows].float().split([len(batch) for batch in batches])
        found |= {f"{name}/{part}": value.clone() for part, value in enumerate(parts)}
    return found


def part_of(memory: Memory, part: int) -> dict[str, Tensor]:
    """Return what a memory keeps of one batch as "NAME/PART", by name."""
    return {name.removesuffix(f"/{part}"): value for name, value in memory.items() if name.endswith(f"/{part}")}
