"""What a fine-tuning came to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """What a fine-tuning came to. The pipeline holds the kept adapter.

    Attributes:
        folder: with `pytorch_lora_weights.safetensors`, the kept adapter.
        steps: of the optimiser that were taken.
        kept_step: after which the kept weights stood: the best validation's by the held-out reward, else the last.
        stopped: why it ended before its time; None if it did not.
        history: lines of `history.jsonl`.
    """

    folder: Path
    steps: int
    kept_step: int
    stopped: str | None
    history: Sequence[Mapping[str, Any]]
