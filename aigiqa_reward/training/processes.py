"""What several processes of one training must have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from accelerate import Accelerator


def accelerator_for(model: nn.Module, given: Accelerator | None) -> Accelerator:
    """The one given, or one for the model's device; some weights may go unused in a step of some process."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    accelerator: Any = given or Accelerator(cpu=next(model.parameters()).device.type == "cpu")
    if accelerator.ddp_handler is None:
        accelerator.ddp_handler = DistributedDataParallelKwargs()
    accelerator.ddp_handler.find_unused_parameters = True
    return accelerator


def agreed(accelerator: Accelerator, value: float) -> float:
    """The main process's value: what others computed may differ in the last bits, and with it who stops when."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0] if accelerator.num_processes > 1 else value


def mean_over_processes(accelerator: Accelerator, value: float) -> float:
    """The mean of a number that each process has one of."""
    if accelerator.num_processes == 1:
        return value
    reduced: Any = accelerator.reduce(torch.tensor(value, dtype=torch.float64, device=accelerator.device), "mean")
    return float(reduced)
