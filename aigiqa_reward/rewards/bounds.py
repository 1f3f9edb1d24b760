"""How much a description may have built: a config.json of somebody else may ask for a tower of any size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

SPARE = 2**25
"""Numbers that a model may hold beside its weights, such as masks and grids: chosen here; 128 MiB as float32."""

_SQUARE = (torch.ops.aten.eye.default, torch.ops.aten.eye.m)


class TooLarge(Exception):
    """More numbers were asked for than allowed."""


class _Count(TorchDispatchMode):
    def __init__(self, most: int) -> None:
        super().__init__()
        self.left = most

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Run an operation unless it makes a tensor larger than what is left."""
        given = args[0] if args else None
        size = 0
        if isinstance(given, list | tuple | torch.Size) and all(isinstance(side, int) for side in given):
            size = torch.Size(given).numel()  # empty, zeros, ones, full, randn, ...
        elif func in _SQUARE:
            size = int(args[0]) * int(args[-1])
        elif isinstance(given, int | float) and not isinstance(given, bool):  # arange and linspace
            size = int(max(abs(value) for value in args if isinstance(value, int | float)))
        elif func is torch.ops.aten.clone.default:
            size = args[0].numel()
        if size > self.left:
            raise TooLarge
        self.left -= size
        return func(*args, **(kwargs or {}))


@contextmanager
def bounded(most: int) -> Iterator[None]:
    """Within, tensors of at most `most` numbers in all are made; counted before they are.

    Raises:
        TooLarge: more were asked for.
    """
    with _Count(most + SPARE):
        yield
