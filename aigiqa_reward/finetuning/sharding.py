"""Frozen weights of a denoiser that does not fit on one GPU, sharded over the processes (FSDP2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


def shard_denoiser(pipe: DiffusionPipeline) -> None:
    """Shard the weights of a pipeline's denoiser over all processes, before `finetune` and before `pipe.to(device)`.

    Each process holds 1 / N of them on its device, and gathers those of one block while it runs. The LoRA weights,
    which `finetune` adds, are whole in every process. Every process must then call the denoiser equally often.

    Accelerate's own FSDP shards the LoRA weights too, needs GPUs, and wraps model and optimizer together; this is
    torch's `fully_shard` on the denoiser alone.

    Args:
        pipe: a pipeline, best on the CPU: its weights move to this process's device block by block. Run every process
            by `torchrun --nproc_per_node N` or `accelerate launch` without `--use_fsdp`.

    Raises:
        ValueError: if there is one process only, or the denoiser is quantized.

    Example:
        >>> from aigiqa_reward import load_embedded_pipeline
        >>> from aigiqa_reward.finetuning import shard_denoiser
        >>> shard_denoiser(load_embedded_pipeline())
        Traceback (most recent call last):
            ...
        ValueError: fsdp: expected several processes, got one; start them by torchrun --nproc_per_node N
    """
    from accelerate import PartialState
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from aigiqa_reward.sampling.families import family_of

    state = PartialState(cpu=not torch.cuda.is_available())
    device: Any = state.device
    if state.num_processes == 1:
        raise ValueError("fsdp: expected several processes, got one; start them by torchrun --nproc_per_node N")
    denoiser: Any = family_of(pipe, need="shard_denoiser").denoiser.requires_grad_(False)
    if any(not weight.is_floating_point() for weight in denoiser.parameters()):
        raise ValueError("fsdp: expected a denoiser that is not quantized; load it without, in bfloat16")
    mesh = init_device_mesh(device.type, (state.num_processes,))
    for child in denoiser.children():
        for block in child if isinstance(child, nn.ModuleList) else ():
            fully_shard(block, mesh=mesh)
    fully_shard(denoiser, mesh=mesh)


def is_sharded(denoiser: nn.Module) -> bool:
    """Return whether a denoiser is sharded, so that all processes must call it equally often."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(denoiser, FSDPModule)
