"""Memory of a process that computes on the CPU."""

from __future__ import annotations

import ctypes
import platform

_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # names in malloc.h: M_MMAP_MAX, M_TRIM_THRESHOLD


def keep_memory() -> None:
    """Let glibc keep freed memory for the next operation instead of returning it; elsewhere do nothing.

    Otherwise torch spends a third of its time on a CPU with pages that come and go. For processes that are ours alone.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
