"""Rows of LATENT dictionaries, each with its noise mask and its place in the noise of the batch's seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Latent = dict[str, Any]


def latent_rows(latents: Sequence[Any]) -> list[Latent]:
    """Split LATENTs into single rows, with their rows of `noise_mask`, which is repeated as samplers do.

    `batch_index` becomes the row's place in its batch unless given: by it ComfyUI draws a seed's noise row by row,
    which equals the batch's noise where a row has a multiple of 16 numbers, since torch draws them 16 at a time.
    """
    rows: list[Latent] = []
    for latent in latents:
        samples = latent.get("samples") if isinstance(latent, dict) else None
        if not isinstance(samples, Tensor):
            got = type(latent).__name__ if samples is None else f"samples of {type(samples).__name__}"
            raise TypeError(f"latent: expected a LATENT with a tensor of samples, got {got}; connect a LATENT")
        if (places := latent.get("batch_index")) is None:
            places = range(len(samples))
        if len(places) != len(samples):
            raise ValueError(
                f"latent: expected a batch_index with a place for each of its {len(samples)} rows, got {len(places)}; "
                "the node that made this LATENT changed its rows alone: connect the one before it, or none"
            )
        mask = latent.get("noise_mask")
        for place in range(len(samples)):
            row = latent | {"samples": samples[place : place + 1], "batch_index": [places[place]]}
            if isinstance(mask, Tensor):
                row["noise_mask"] = mask[place % len(mask)][None]
            rows.append(row)
    return rows


def latent_batches(rows: Sequence[Latent]) -> list[Latent]:
    """Join rows into one LATENT where shapes and entries agree, else into a list of single ones; copies, no views."""
    masks = {mask.shape if isinstance(mask := row.get("noise_mask"), Tensor) else None for row in rows}
    alike = len({row["samples"].shape for row in rows}) == len(masks) == len({frozenset(row) for row in rows}) == 1
    joined = []
    for group in [rows] if alike else [[row] for row in rows]:
        tensors = ("samples", "noise_mask") if isinstance(group[0].get("noise_mask"), Tensor) else ("samples",)
        together = {name: torch.cat([row[name] for row in group]) for name in tensors}
        joined.append(group[0] | together | {"batch_index": [row["batch_index"][0] for row in group]})
    return joined
