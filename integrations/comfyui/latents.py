"""Rows of LATENT dictionaries, with what belongs to a row: its noise mask, and its place in the noise of its seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Latent = dict[str, Any]


def latent_rows(latents: Sequence[Any]) -> list[Latent]:
    """Each row of LATENTs as a LATENT of its own, one after the other.

    `noise_mask` is cut likewise, repeated as samplers do where it has fewer rows. `batch_index`, by which samplers draw
    the noise of a row, is its place in its batch unless given. By it ComfyUI draws a seed's noise row by row. Without
    it the batch's noise was drawn at once, which is the same where a row has a multiple of 16 numbers: torch fills
    normal numbers 16 at a time. All else is passed on.

    Raises:
        TypeError: not LATENTs.
        ValueError: a `batch_index` of another length than the batch.
    """
    rows: list[Latent] = []
    for latent in latents:
        samples = latent.get("samples") if isinstance(latent, dict) else None
        if not isinstance(samples, Tensor):
            got = type(latent).__name__ if samples is None else f"samples of {type(samples).__name__}"
            raise TypeError(f"latent: expected a LATENT with a tensor of samples, got {got}; connect a LATENT")
        places = latent.get("batch_index")
        if places is None:
            places = range(len(samples))
        if len(places) != len(samples):
            raise ValueError(
                f"latent: expected a batch_index with a place for each of its {len(samples)} rows, got {len(places)}; "
                "the node that gave this LATENT changed its rows alone: connect the one before it, or none"
            )
        for place in range(len(samples)):
            row = latent | {"samples": samples[place : place + 1], "batch_index": [places[place]]}
            if isinstance(mask := latent.get("noise_mask"), Tensor):
                part = place % len(mask)
                row["noise_mask"] = mask[part : part + 1]
            rows.append(row)
    return rows


def latent_batches(rows: Sequence[Latent]) -> list[Latent]:
    """Rows as one LATENT where shapes and entries allow it, else as a list of single ones; copies, no views."""
    masks = {mask.shape if isinstance(mask := row.get("noise_mask"), Tensor) else None for row in rows}
    alike = len({row["samples"].shape for row in rows}) == len(masks) == len({frozenset(row) for row in rows}) == 1
    return [_joined(rows)] if alike else [_joined([row]) for row in rows]


def _joined(rows: Sequence[Latent]) -> Latent:
    joined = rows[0] | {
        "samples": torch.cat([row["samples"] for row in rows]),
        "batch_index": [index for row in rows for index in row["batch_index"]],
    }
    if isinstance(rows[0].get("noise_mask"), Tensor):
        joined["noise_mask"] = torch.cat([row["noise_mask"] for row in rows])
    return joined
