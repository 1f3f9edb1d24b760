"""Why candidates are dropped: images that cannot be scored, scores that rank nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

NON_FINITE = "NaN or infinite pixels"
FLAGGED = "flagged by the pipeline's safety checker"


def reasons_to_drop(images: Tensor, flagged: Sequence[Any]) -> list[str | None]:
    """Why images (B, 3, H, W) cannot be scored, or None."""
    finite = torch.isfinite(images).flatten(1).all(dim=1).tolist()
    return [FLAGGED if flag else None if fine else NON_FINITE for flag, fine in zip(flagged, finite, strict=True)]


def why_dropped(total: float, reason: str | None = None) -> str | None:
    """Why a candidate of this total is dropped, or None; `reason` if there is one already.

    Infinity ranks nothing: it would win by an overflow, or lose to all whatever else the reward saw.
    """
    if reason is not None or math.isfinite(total):
        return reason
    return f"the reward gave {'NaN' if math.isnan(total) else total}"
