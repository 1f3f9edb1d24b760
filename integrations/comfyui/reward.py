"""A reward in ComfyUI's memory management, or in torch's outside ComfyUI."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from aigiqa_reward import Reward, RewardFunction

DEVICES = ("auto", "cpu", "cuda", "mps")


class LoadedReward:
    """The value of an AIGIQA_REWARD socket: a reward, whose weights were made outside of torch.inference_mode."""

    def __init__(self, reward: Reward, device: torch.device, *, keep_loaded: bool) -> None:
        self.reward, self.device, self.keep_loaded = reward, device, keep_loaded

    @contextmanager
    def ready(self) -> Iterator[Reward]:
        """Put the reward on its device within the context; Cancel in ComfyUI raises before the next batch."""
        manager = management()
        stops = None
        try:
            if manager is not None and self.device.type != "cpu":  # let ComfyUI unload other models
                there = self.reward.device.type == self.device.type
                tensors = [] if there else [*self.reward.parameters(), *self.reward.buffers()]
                weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
                manager.free_memory(weights + manager.minimum_inference_memory(), self.device)
            self._move(self.device)
            if manager is not None:
                check = manager.throw_exception_if_processing_interrupted
                stops = self.reward.register_forward_pre_hook(lambda *_: check())
            yield self.reward
        finally:
            if stops is not None:
                stops.remove()
            if not self.keep_loaded:
                self._move(torch.device("cpu") if manager is None else manager.unet_offload_device())
                if manager is not None:
                    manager.soft_empty_cache()
                elif self.device.type == "cuda":
                    torch.cuda.empty_cache()

    def _move(self, device: torch.device) -> None:
        with torch.inference_mode(False):  # weights that move within inference mode let no gradient pass
            self.reward.to(device)


def management() -> Any:
    """Return comfy.model_management, or None outside ComfyUI."""
    try:
        from comfy import model_management
    except ModuleNotFoundError:
        return None
    return model_management


def compute_device(name: str) -> torch.device:
    """Return the device that one of `DEVICES` names; "auto" is the one that ComfyUI computes on."""
    if name not in DEVICES:
        raise ValueError(f"device: expected one of {', '.join(DEVICES)}, got {name!r}")
    present = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if name == "auto":
        if (manager := management()) is not None:
            return manager.get_torch_device()
        name = next((kind for kind, found in present.items() if found()), "cpu")
    if name in present and not present[name]():
        raise ValueError(f"device: this machine has no {name} device that torch can use; choose auto or cpu")
    return torch.device(name)


@contextmanager
def ready(reward: Any) -> Iterator[RewardFunction]:
    """Make the value of an AIGIQA_REWARD socket callable: a LoadedReward, or another node pack's RewardFunction."""
    if isinstance(reward, LoadedReward):
        with reward.ready() as loaded:
            yield loaded
    elif callable(reward):
        yield reward
    else:
        raise TypeError(
            f"reward: expected the output of Load Reward (AIGIQA), got {type(reward).__name__}; connect that node"
        )


def blocked(message: str | None) -> Any:
    """Return ComfyUI's ExecutionBlocker with a message (None stops silently); None outside ComfyUI."""
    try:
        from comfy_execution.graph_utils import ExecutionBlocker
    except ModuleNotFoundError:
        return None
    return ExecutionBlocker(message)
