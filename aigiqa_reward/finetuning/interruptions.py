"""Signals that stop a training: the first ends it after the current step, the second at once."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)


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
