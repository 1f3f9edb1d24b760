"""Work in chunks that halve themselves when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

NO_MEMORY = (
    "not even one candidate fits into memory. Sample smaller images (height=, width=), load the "
    "pipeline in half precision, call pipe.enable_model_cpu_offload() or pipe.vae.enable_tiling(), or move "
    "the reward to the CPU (reward.to('cpu'))"
)


def in_chunks(
    items: Sequence[Item], size: int, work: Callable[[Sequence[Item]], Result], pipe: Any
) -> Generator[tuple[Sequence[Item], Result], None, None]:
    """Work on neighbouring items together, and yield each chunk with what came of it.

    A chunk that runs out of memory is halved and done again, and later ones are no larger.

    Args:
        items: in order.
        size: of a chunk, at most.
        work: may be called again for the same items after a torch.OutOfMemoryError.
        pipe: whose parts are brought back to rest before the next try.

    Raises:
        torch.OutOfMemoryError: if one item alone does not fit.
    """
    while items:
        chunk = items[:size]
        try:
            result = work(chunk)
        except torch.OutOfMemoryError as error:
            if len(chunk) == 1:
                error.add_note(NO_MEMORY)
                raise
            size = len(chunk) // 2
        else:
            items = items[size:]
            yield chunk, result
            continue
        # Outside the except block, so that the error no longer holds the failed chunk's tensors.
        if hasattr(pipe, "maybe_free_model_hooks"):
            pipe.maybe_free_model_hooks()  # offloads, as the pipeline does at the end of a call
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
