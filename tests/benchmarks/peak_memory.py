"""Memory of tensors where nobody counts it: on the CPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """Most bytes that live at once of the tensors made within this context, each storage counted once.

    Attributes:
        most: so far. What an operation takes for itself and gives back before it ends is not in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bound = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            known = StorageWeakRef(storage)
            if known.cdata not in self.live and known.cdata not in given:  # a view of a weight is not made here
                self.live[known.cdata] = (known, storage.nbytes())
                self.bound += storage.nbytes()
        if self.bound > self.most:
            self.live = {key: (ref, size) for key, (ref, size) in self.live.items() if not ref.expired()}
            self.bound = sum(size for _, size in self.live.values())
            self.most = max(self.most, self.bound)
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
