"""Results as papers printed them, apart from ours because they split the benchmarks in other ways; Markdown tables."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass

TASKS = ("quality", "correspondence")
"""The two human scores, in the order of every table."""


def number(value: float) -> str:
    """Format a number with three decimals; a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:.3f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> list[str]:
    """Return the lines of a table; all but the first `words` columns hold numbers and are aligned to the right."""
    ruler = ["---"] * words + ["---:"] * (len(header) - words)
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    return ["| " + " | ".join(cells) + " |" for cells in (header, ruler, *escaped)]


@dataclass(frozen=True)
class PublishedResult:
    """One row of a paper's table, as printed; `protocol` is the kind of split, and the paper if it is another's."""

    benchmark: str
    task: str
    method: str
    srcc: float
    plcc: float
    protocol: str


_SC = "images at random 80/20; the best epoch on the test part"
_MA = "images at random 70/10/20; all test prompts also occur in training"
_BY_MA = f"retrained by the authors of MA-AGIQA: {_MA}"
_BY_PROMPT = "IPCE's splits: 80/20 by prompt"
_BY_IMAGE = "IPCE's splits: 80/20 by image"
_BY_TSP = "printed by the authors of TSP-MGS, who do not state its split"
_MIXED = f"14,000 images, whose one score mixes quality and correspondence; {_MA}"

PUBLISHED: tuple[PublishedResult, ...] = tuple(
    PublishedResult(*row)
    for row in (
        ("AGIQA-3K", "quality", "SC-AGIQA", 0.9070, 0.9361, _SC),
        ("AGIQA-3K", "quality", "MA-AGIQA", 0.8939, 0.9273, _MA),
        ("AGIQA-3K", "quality", "TSP-MGS", 0.8901, 0.9270, _BY_PROMPT),
        ("AGIQA-3K", "quality", "IPCE", 0.8841, 0.9246, _BY_PROMPT),
        ("AGIQA-3K", "quality", "MANIQA", 0.8618, 0.9115, _BY_MA),
        ("AGIQA-3K", "correspondence", "TSP-MGS", 0.7734, 0.8773, _BY_PROMPT),
        ("AGIQA-3K", "correspondence", "IPCE", 0.7697, 0.8725, _BY_PROMPT),
        ("AGIQA-3K", "correspondence", "StairReward", 0.7472, 0.8529, _BY_TSP),
        ("AGIQA-3K", "correspondence", "PickScore", 0.7320, 0.7791, _BY_TSP),
        ("AGIQA-3K", "correspondence", "ImageReward", 0.7298, 0.7862, _BY_TSP),
        ("AGIQA-3K", "correspondence", "HPS", 0.6623, 0.7008, _BY_TSP),
        ("AGIQA-3K", "correspondence", "CLIP", 0.5972, 0.6839, _BY_TSP),
        ("AGIQA-1K", "quality", "SC-AGIQA", 0.9051, 0.9558, _SC),
        ("AGIQA-1K", "quality", "TSP-MGS", 0.8567, 0.8846, _BY_IMAGE),
        ("AIGCIQA2023", "quality", "SC-AGIQA", 0.9113, 0.9158, _SC),
        ("AIGIQA-20K", "quality", "MA-AGIQA", 0.8644, 0.9050, _MIXED),
    )
)
"""Figures of SC-AGIQA, MA-AGIQA, TSP-MGS and, from their tables, of others; best first within a benchmark and task."""


def published_markdown(benchmark: str) -> str:
    """Return what papers printed for one benchmark, as Markdown tables.

    Example:
        >>> from aigiqa_reward.evaluation import published_markdown
        >>> "| SRCC |" in published_markdown("AGIQA-3K")
        True
    """
    rows = [row for row in PUBLISHED if row.benchmark == benchmark]
    if not rows:
        names = list(dict.fromkeys(row.benchmark for row in PUBLISHED))
        close = difflib.get_close_matches(str(benchmark).upper(), names, n=1, cutoff=0.5)
        meant = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"benchmark: nothing published for {benchmark!r}{meant} There is: {', '.join(names)}")
    lines = [f"### {benchmark}: as published, with other splits"]
    for task in TASKS:
        cells = [[row.method, row.protocol, f"{row.srcc:.4f}", f"{row.plcc:.4f}"] for row in rows if row.task == task]
        if cells:
            table = markdown_table(("method", "protocol", "SRCC", "PLCC"), cells, words=2)
            lines += ["", f"**{task.capitalize()}, as published**", "", *table]
    return "\n".join(lines) + "\n"
