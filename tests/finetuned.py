"""Tiny pipelines with an adapter that does something, rewards that are functions of pixels, and a plain sampler."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import pipelines
import torch
from accelerate import Accelerator
from pipelines import FEW_STEPS
from torch import Tensor

from aigiqa_reward.finetuning.algorithms.base import Algorithm
from aigiqa_reward.finetuning.batch import Batch, generator_of
from aigiqa_reward.finetuning.context import TrainingContext
from aigiqa_reward.finetuning.lora import LoRA
from aigiqa_reward.sampling.rollout import Rollout

PROMPTS = ("a red apple", "a blue car at night", "two green frogs")
CALL: dict[str, Any] = {**FEW_STEPS, "guidance_scale": 1.0}
GUIDED: dict[str, Any] = {**FEW_STEPS, "guidance_scale": 3.0}


def precise() -> Any:
    """Stable Diffusion in float64, paler, so that no pixel lies where a reward's input is clamped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = pipelines.stable_diffusion().to(torch.float64)
    pipe.vae.decoder.conv_out.weight.data *= 0.3
    return pipe


def warmth(images: Tensor, prompts: list[str]) -> Tensor:
    """Not linear in any pixel, of all pixels, another for each prompt."""
    assert len(images) == len(prompts)
    lengths = torch.tensor([len(prompt) / 10 for prompt in prompts], dtype=images.dtype)
    return (images[:, 0].square() - images[:, 1] * images[:, 2]).mean(dim=(1, 2)) * lengths


def stir(lora: LoRA, size: float = 0.3, seed: int = 0) -> LoRA:
    """Away from B = 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in lora.weights.values():
            weight.add_(size * torch.randn(weight.shape, generator=generator).to(weight))
    return lora


def tools_of(
    pipe: Any, reward: Any = warmth, *, double: bool = False, stirred: bool = True, call: Any = None, **options: Any
) -> TrainingContext:
    """With an adapter of rank 2; `double` has it in float64, as the pipeline then must be."""
    rollout = Rollout(pipe, **(call or CALL))
    lora = LoRA(rollout.family, rank=2)
    if double:
        for weight in lora.weights.values():
            weight.data = weight.data.double()
    if stirred:
        stir(lora)
    return TrainingContext(rollout=rollout, lora=lora, reward=reward, accelerator=Accelerator(cpu=True), **options)


def batch_of(rows: Iterable[int] = (0,), *, step: int = 0, seed: int = 0, size: int | None = None) -> Batch:
    """Rows of a step, row i with the i-th prompt."""
    rows = tuple(rows)
    places = tuple(row % len(PROMPTS) for row in rows)
    return Batch(
        prompts=tuple(PROMPTS[place] for place in places),
        places=places,
        rows=rows,
        round=step,
        step=step,
        size=len(rows) if size is None else size,
        seed=seed,
    )


def gradient(tools: TrainingContext, algorithm: Algorithm, batch: Batch) -> Tensor:
    """Of all losses of a batch, flat over the adapter's weights, by going backward through each as the loop does."""
    weights = list(tools.lora.weights.values())
    for weight in weights:
        weight.grad = None
    for outcome in algorithm.losses(tools, batch, 0, {}):
        outcome.loss.backward()
    assert all(weight.grad is not None for weight in weights), "a weight without gradient"
    return torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None])


def flat(tools: TrainingContext) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in tools.lora.weights.values()])


def put(tools: TrainingContext, values: Tensor) -> None:
    """The opposite of `flat`."""
    weights = list(tools.lora.weights.values())
    with torch.no_grad():
        for weight, part in zip(weights, values.split([w.numel() for w in weights]), strict=True):
            weight.copy_(part.view_as(weight))


# ------------------------------------------------------------------------------------------------ a second sampler


def noise_of(batch: Batch, dtype: torch.dtype = torch.float64) -> Tensor:
    """What the rows of a batch start from, by the rule that `finetuning.randomness` states."""
    generators = [generator_of(batch.seed, "noise", batch.round, row) for row in batch.rows]
    return torch.cat([torch.randn((1, 4, 16, 16), generator=generator, dtype=dtype) for generator in generators])


def sampled(pipe: Any, prompts: Iterable[str], latents: Tensor, *, scale: float, first: int = 0, last: int = 2):
    """Stable Diffusion's latents after steps `first` to `last - 1` of 2, by unet and scheduler and nothing of ours."""
    pipe.scheduler.set_timesteps(2)
    for time in pipe.scheduler.timesteps[first:last]:
        output = pipe.unet(latents, time, encoder_hidden_states=text(pipe, prompts)).sample
        if scale > 1:
            blank = pipe.unet(latents, time, encoder_hidden_states=text(pipe, [""] * len(latents))).sample
            output = blank + scale * (output - blank)
        latents = pipe.scheduler.step(output, time, latents).prev_sample
    return latents


def text(pipe: Any, prompts: Iterable[str]) -> Tensor:
    tokens = pipe.tokenizer(list(prompts), padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        return pipe.text_encoder(tokens)[0]


def decoded(pipe: Any, latents: Tensor) -> Tensor:
    return pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample / 2 + 0.5
