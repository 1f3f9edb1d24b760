"""Where a reward computes and where it rests: by ComfyUI's memory management where there is one, else by torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from aigiqa_reward import Reward

DEVICES = ("auto", "cpu", "cuda", "mps")


class LoadedReward:
    """What an AIGIQA_REWARD socket carries: a reward, and where it goes between uses.

    Args:
        reward: with weights that were made outside of torch.inference_mode.
        device: where it computes.
        keep_loaded: leave it there after use, instead of moving it to ComfyUI's offload device.
    """

    def __init__(self, reward: Reward, device: torch.device, *, keep_loaded: bool) -> None:
        self.reward = reward
        self.device = device
        self.keep_loaded = keep_loaded

    @contextmanager
    def ready(self) -> Iterator[Reward]:
        """The reward on its device, for as long as the context lasts; Cancel in ComfyUI ends it before a next batch."""
        manager = management()
        stops = None
        try:
            self._make_room(manager)
            with torch.inference_mode(False):  # weights that move within inference mode would let no gradient pass
                self.reward.to(self.device)
            if manager is not None:
                check = manager.throw_exception_if_processing_interrupted
                stops = self.reward.register_forward_pre_hook(lambda *_: check())
            yield self.reward
        finally:
            if stops is not None:
                stops.remove()
            if not self.keep_loaded:
                self._rest(manager)

    def _make_room(self, manager: Any) -> None:
        """Let ComfyUI unload other models, if it has to, for the weights and what ComfyUI itself allows for working."""
        if manager is None or self.device.type == "cpu":
            return
        there = self.reward.device.type == self.device.type
        tensors = [] if there else [*self.reward.parameters(), *self.reward.buffers()]
        weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        manager.free_memory(weights + manager.minimum_inference_memory(), self.device)

    def _rest(self, manager: Any) -> None:
        with torch.inference_mode(False):
            self.reward.to(torch.device("cpu") if manager is None else manager.unet_offload_device())
        if manager is not None:
            manager.soft_empty_cache()
        elif self.device.type == "cuda":
            torch.cuda.empty_cache()


def management() -> Any:
    """ComfyUI's comfy.model_management, or None outside ComfyUI."""
    try:
        from comfy import model_management
    except ModuleNotFoundError:
        return None
    return model_management


def compute_device(name: str) -> torch.device:
    """The device of a loader's choice.

    Args:
        name: one of `DEVICES`; "auto" is the one that ComfyUI computes on.

    Raises:
        ValueError: an unknown one, or one that is not there.
    """
    if name not in DEVICES:
        raise ValueError(f"device: expected one of {', '.join(DEVICES)}, got {name!r}")
    present = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if name == "auto":
        manager = management()
        if manager is not None:
            return manager.get_torch_device()
        name = next((kind for kind, found in present.items() if found()), "cpu")
    if name in present and not present[name]():
        raise ValueError(f"device: this machine has no {name} device that torch can use; choose auto or cpu")
    return torch.device(name)


@contextmanager
def ready(reward: Any) -> Iterator[Any]:
    """What an AIGIQA_REWARD socket brought, ready to be called.

    Args:
        reward: a LoadedReward, or any other RewardFunction that a node pack may hand over, used as it is.

    Raises:
        TypeError: neither of them.
    """
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
    """What an output gives that has nothing to give: ComfyUI stops whatever hangs on it, and shows the message.

    Args:
        message: shown to the user; None stops silently.

    Returns:
        ComfyUI's ExecutionBlocker; None outside ComfyUI.
    """
    try:
        from comfy_execution.graph_utils import ExecutionBlocker
    except ModuleNotFoundError:
        return None
    return ExecutionBlocker(message)
