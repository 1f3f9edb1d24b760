"""Words in a page: what became of a candidate, and text that is not obeyed."""

from __future__ import annotations

import html
import math

from aigiqa_reward.sampling.candidates import BestOfNOutput


def state_of(output: BestOfNOutput, seed: int) -> str | None:
    """Where a candidate was pruned, in words; None where it was not."""
    if seed in output.dropped or not math.isnan(output.all_scores[output.all_seeds.index(seed)]):
        return None
    previews = output.previews.get(seed)
    return f"pruned after {previews[-1].step} of {previews[-1].steps} steps" if previews else "pruned"


def escaped(text: str) -> str:
    """Text for between tags and for within quotes: no mark-up, no control characters, no halves of characters."""
    kept = "".join(
        c if c.isprintable() or c == "\n" else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text
    )
    return html.escape(kept, quote=True)
