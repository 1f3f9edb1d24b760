"""`evaluate --weights`: a reward as it is, held against all human scores or preferences of a benchmark."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from aigiqa_reward.cli.evaluation_files import benchmark_of, title_of, write_report
from aigiqa_reward.cli.files import check_writable, write
from aigiqa_reward.cli.inputs import CommandError, Source
from aigiqa_reward.cli.notes import check_arguments, digest, noted
from aigiqa_reward.cli.options import DType
from aigiqa_reward.cli.output import Row, emit, encoded, say
from aigiqa_reward.cli.plans import read
from aigiqa_reward.cli.runs import load_reward, score_sources

if TYPE_CHECKING:
    import numpy as np

    from aigiqa_reward.datasets import PreferencePairs, ScoredImages
    from aigiqa_reward.evaluation import ProtocolReport
    from aigiqa_reward.rewards.reward import Reward

EMBEDDED = "embedded"

_BATCH = 32
_ASPECTS = ("total", "quality", "correspondence")


def evaluate_weights(
    model: str, weights: str, data: str, folder: Path, device: str | None, same_generator: str
) -> None:
    """Score everything with the weights given, and write and print how far people agree.

    Args:
        model: name of the reward.
        weights: "embedded", or a saved reward.
        data: NAME:PATH.
        folder: of the report.
        device: where to compute; None chooses.
        same_generator: prefix of the generators that are one.

    Raises:
        CommandError: one of them cannot be used.
    """
    import numpy as np

    from aigiqa_reward.datasets import ScoredImages

    chosen = None if weights == EMBEDDED else weights
    table = read(data)
    arguments = {"MODEL": model, "--weights": weights, "--data": digest(table), "--same-generator": same_generator}
    check_writable(folder, option="--report")
    check_arguments(folder, folder / "table.csv", arguments, "--report")
    reward = load_reward(model, None, None, chosen, False, None, None, None, None, device, DType.FLOAT32)
    seen = chosen is None and data.startswith("agiqa3k:")
    if seen:
        say("warning", "the embedded weights were trained on AGIQA-3K: what follows is no test of them")
    title = title_of(model, data, f"{weights} weights" if chosen is None else f"weights of {weights}")
    with noted(folder, folder / "table.csv", arguments):
        if isinstance(table, ScoredImages):
            rows = _scores(reward, [str(path) for path in table.paths], table.prompts)
            protocol = f"all images, by the weights given{', which were trained on some of them' if seen else ''}"
            report = _report(rows, table, title, protocol, same_generator)
            predicted = {aspect: _column(rows, aspect) for aspect in _ASPECTS[1:]}
            every = np.arange(len(table))
            write_report(report, table, every, predicted, folder, benchmark_of(data), part="all images")
        else:
            rows = _against_pairs(reward, table, title, folder)
    if any(row.error is not None for row in rows):
        raise typer.Exit(1)


def _scores(reward: Reward, paths: Sequence[str], prompts: Sequence[str]) -> list[Row]:
    """A row for each image; those that cannot be read are said on stderr."""
    sources = [Source(path=path, prompt=prompt) for path, prompt in zip(paths, prompts, strict=True)]
    result = score_sources(reward, sources, _BATCH)
    if isinstance(result.failure, KeyboardInterrupt):
        say("error", "interrupted: nothing is written")
        raise typer.Exit(130) from result.failure
    if result.failure is not None:
        raise result.failure
    if all(row.error is not None for row in result.rows):
        raise CommandError(f"--data: none of the {len(sources)} images could be scored", status=1)
    return result.rows


def _column(rows: Sequence[Row], aspect: str) -> np.ndarray:
    """(N,) scores of all images; NaN where there are none."""
    import numpy as np

    return np.array([getattr(row, aspect) for row in rows], dtype=np.float64)


def _report(rows: Sequence[Row], table: ScoredImages, title: str, protocol: str, same_generator: str) -> ProtocolReport:
    """What the rows are worth on the images that people scored, as one seed."""
    import numpy as np

    from aigiqa_reward.evaluation import ProtocolReport, score_split
    from aigiqa_reward.evaluation.protocol import MODEL

    scores = []
    for aspect in _ASPECTS[1:]:
        found, human = _column(rows, aspect), getattr(table, aspect)
        kept = np.flatnonzero(np.isfinite(human) & np.isfinite(found))
        if not len(kept):
            continue
        entry = score_split(
            0,
            MODEL,
            task=aspect,
            predicted=found[kept],
            target=human[kept],
            prompts=[table.prompts[row] for row in kept],
            generators=[table.generators[row] for row in kept],
            same_generator=same_generator or None,
        )
        scores.append(entry)
    return ProtocolReport(title=title, protocol=protocol, scores=tuple(scores))


def _against_pairs(reward: Reward, pairs: PreferencePairs, title: str, folder: Path) -> list[Row]:
    """Write and print in which share of the pairs the preferred image scores higher."""
    sides = [
        (str(path), prompt)
        for images in (pairs.better, pairs.worse)
        for path, prompt in zip(images, pairs.prompts, strict=True)
    ]
    distinct = list(dict.fromkeys(sides))
    rows = _scores(reward, [path for path, _ in distinct], [prompt for _, prompt in distinct])
    found = dict(zip(distinct, rows, strict=True))
    both = list(zip(sides[: len(pairs)], sides[len(pairs) :], strict=True))
    kept = [(found[a], found[b]) for a, b in both if found[a].error is None and found[b].error is None]
    if not kept:
        raise CommandError("--data: there is no pair both of whose images could be scored", status=1)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["score", "share", "ties", "pairs"])
    lines = [f"### {title}", "", "In how many of the pairs people's choice scores higher; a tie counts half.", ""]
    lines += ["| score | share | ties | pairs |", "|---|---:|---:|---:|"]
    for aspect in _ASPECTS:
        values = [(getattr(better, aspect), getattr(worse, aspect)) for better, worse in kept]
        if any(value is None for pair in values for value in pair):
            continue
        ties = sum(better == worse for better, worse in values)
        share = (sum(better > worse for better, worse in values) + ties / 2) / len(values)
        writer.writerow([aspect, share, ties, len(values)])
        lines.append(f"| {aspect} | {share:.4f} | {ties} | {len(values):,} |")
    write(folder / "table.csv", text.getvalue().encode())
    write(folder / "table.md", encoded("\n".join(lines) + "\n"))
    emit("\n".join(lines) + "\n")
    return rows
