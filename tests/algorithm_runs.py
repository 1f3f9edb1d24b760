"""Runs fine-tuning algorithms by hand: a context on a tiny pipeline with a moved adapter, batches, gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pipelines
import torch
from accelerate import Accelerator
from finetuned import CALL as PLAIN
from finetuned import PROMPTS, stir, warmth
from PIL import Image
from pipelines import FEW_STEPS
from torch import Tensor

from aigiqa_reward.datasets import PreferencePairs
from aigiqa_reward.finetuning.algorithms.base import Algorithm
from aigiqa_reward.finetuning.batch import Batch, Outcome
from aigiqa_reward.finetuning.context import TrainingContext
from aigiqa_reward.finetuning.lora import LoRA
from aigiqa_reward.sampling.rollout import Rollout

GUIDED: dict[str, Any] = {**FEW_STEPS, "guidance_scale": 3.0}


def precise() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = pipelines.stable_diffusion().to(torch.float64)
    pipe.vae.decoder.conv_out.weight.data *= 0.3
    return pipe


def context_of(
    pipe: Any, reward: Any = warmth, *, moved: float = 0.3, rank: int = 2, call: Any = PLAIN, **options: Any
) -> TrainingContext:
    rollout = Rollout(pipe, **call)
    lora = LoRA(rollout.family, rank=rank)
    for weight in lora.weights.values():
        weight.data = weight.data.to(pipe.dtype)
    stir(lora, moved)
    return TrainingContext(rollout=rollout, lora=lora, reward=reward, accelerator=Accelerator(cpu=True), **options)


def changed(context: TrainingContext, **options: Any) -> TrainingContext:
    kept = {name: getattr(context, name) for name in ("rollout", "lora", "reward", "accelerator")}
    return TrainingContext(**{**kept, **options})


def batch_of(
    rows: Iterable[int] = (0,), *, group: int = 1, round: int = 0, step: int | None = None, size: int = 0, seed: int = 0
) -> Batch:
    rows, step = tuple(rows), round if step is None else step
    places = tuple(row // group % len(PROMPTS) for row in rows)
    prompts, size = tuple(PROMPTS[place] for place in places), size or len(rows)
    return Batch(prompts=prompts, places=places, rows=rows, round=round, step=step, size=size, seed=seed)


def batches(*parts: Sequence[int], **more: Any) -> list[Batch]:
    return [batch_of(rows, size=sum(map(len, parts)), **more) for rows in parts]


def run_backward(
    algorithm: Algorithm, context: TrainingContext, parts: Sequence[Batch], memory: Mapping[str, Tensor] | None = None
) -> list[list[Outcome]]:
    with torch.no_grad():
        memory = algorithm.prepare(context, parts) if memory is None else memory
    outcomes: list[list[Outcome]] = [[] for _ in parts]
    for part, batch in enumerate(parts):
        for outcome in algorithm.losses(context, batch, part, memory):
            (outcome.loss * len(batch) / batch.size).backward()
            outcomes[part].append(outcome)
    return outcomes


def take_gradient(context: TrainingContext) -> Tensor:
    weights = [*context.lora.weights.values()]
    found = [torch.zeros_like(w).flatten() if w.grad is None else w.grad.flatten() for w in weights]
    for weight in weights:
        weight.grad = None
    return torch.cat(found)


def gradient(
    context: TrainingContext, algorithm: Algorithm, *parts: Batch, memory: Mapping[str, Tensor] | None = None
) -> Tensor:
    take_gradient(context)
    run_backward(algorithm, context, parts, memory)
    return take_gradient(context)


def loss_of(
    algorithm: Algorithm, context: TrainingContext, parts: Sequence[Batch], memory: Mapping[str, Tensor]
) -> float:
    return sum(
        float(outcome.loss.detach()) * len(batch) / batch.size
        for part, batch in enumerate(parts)
        for outcome in algorithm.losses(context, batch, part, memory)
    )


def flat(context: TrainingContext) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in context.lora.weights.values()])


def put(context: TrainingContext, values: Tensor) -> None:
    torch.nn.utils.vector_to_parameters(values, context.lora.weights.values())


def slope(context: TrainingContext, loss: Callable[[], float], direction: Tensor, small: float = 1e-4) -> float:
    start, values = flat(context), []
    for sign in (1, -1):
        put(context, start + sign * small * direction)
        values.append(loss())
    put(context, start)
    return (values[0] - values[1]) / (2 * small)


def directions(context: TrainingContext, count: int = 2) -> list[Tensor]:
    like = flat(context)
    return [torch.randn(like.shape, generator=torch.Generator().manual_seed(s), dtype=like.dtype) for s in range(count)]


def write_pairs(folder: Path, count: int = 3) -> PreferencePairs:
    generator = torch.Generator().manual_seed(0)
    files: dict[str, list[Path]] = {"better": [], "worse": []}
    for name, found in files.items():
        for place in range(count):
            image = torch.randint(256, (4, 4, 3), generator=generator, dtype=torch.uint8)
            found.append(folder / f"{name} {place}.png")
            Image.fromarray(image.numpy()).resize((32, 32)).save(found[-1])
    prompts = tuple(PROMPTS[place % len(PROMPTS)] for place in range(count))
    return PreferencePairs(prompts=prompts, better=tuple(files["better"]), worse=tuple(files["worse"]))
