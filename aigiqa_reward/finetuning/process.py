"""What a training needs of the process around it, and gives back: gradients, no autocast, and signals."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

import torch

logger = logging.getLogger(__name__)


@contextmanager
def with_gradients() -> Iterator[None]:
    """Context with gradients switched on and autocast off, whatever the caller's are; refuses torch.inference_mode."""
    if torch.is_inference_mode_enabled():
        raise ValueError("finetune: expected gradients, got torch.inference_mode(); call it outside of that block")
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        for kind in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def interruptions(rescue: Callable[[], object] = bool) -> Iterator[list[int]]:
    """Context in which the first SIGINT or SIGTERM is noted and calls `rescue`; the second raises KeyboardInterrupt."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)
        logger.warning("interrupted: stopping after this step; interrupt again to stop now")
        rescue()

    kinds = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = [(kind, signal.signal(kind, note)) for kind in kinds]
    try:
        yield noted
    finally:
        for kind, handler in before:
            signal.signal(kind, handler)
