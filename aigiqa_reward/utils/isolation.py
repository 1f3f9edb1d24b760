"""Computing as in a fresh process, whatever the caller has set for his own: autocast, default device and dtype."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import torch

_AUTOCAST = ("cpu", "cuda", "xpu", "mps", "hpu")
_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def without_autocast() -> Iterator[None]:
    """Compute in the dtypes of the tensors, also where the caller is within torch.autocast."""
    with ExitStack() as stack:
        for kind in _AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def isolated() -> Iterator[None]:
    """Compute without autocast and without the caller's default device, which would also choose other kernels."""
    elsewhere = torch.get_default_device().type != "cpu"
    with without_autocast(), torch._C.DisableTorchFunction() if elsewhere else nullcontext():
        yield


@contextmanager
def building() -> Iterator[None]:
    """Build modules on the CPU in float32, with gradients allowed, and leave the global random state as it was.

    The default dtype and the random state belong to all threads, so that one thread builds at a time.
    """
    with _ONE_AT_A_TIME, without_autocast(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with torch.inference_mode(False):
                yield
        finally:
            torch.set_default_dtype(before)


def check_gradients_allowed(needed_by: str) -> None:
    """Refuse torch.inference_mode, within which `torch.enable_grad` has no effect."""
    if torch.is_inference_mode_enabled():
        raise ValueError(f"{needed_by}: torch.inference_mode() forbids gradients; call it outside of that block")
