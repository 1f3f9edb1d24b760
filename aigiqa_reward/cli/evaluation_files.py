"""What `evaluate` writes: tables, with published figures apart from ours, and plots."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from aigiqa_reward.cli.files import write
from aigiqa_reward.cli.inputs import CommandError
from aigiqa_reward.cli.output import emit, encoded, printable, say
from aigiqa_reward.utils.io import MAX_BYTES, read_arrays, read_json

if TYPE_CHECKING:
    import numpy as np

    from aigiqa_reward.datasets import ScoredImages
    from aigiqa_reward.evaluation import ProtocolReport

_BENCHMARKS = {
    "agiqa3k": "AGIQA-3K",
    "agiqa1k": "AGIQA-1K",
    "aigciqa2023": "AIGCIQA2023",
    "aigiqa20k": "AIGIQA-20K",
    "imagereward": "ImageReward",
    "pickapic": "Pick-a-Pic",
}
"""Names of --data, and how the benchmarks are called in tables."""

_ASPECTS = ("quality", "correspondence")


def benchmark_of(data: str) -> str | None:
    """The benchmark that NAME:PATH names; None for a table of one's own."""
    return _BENCHMARKS.get(data.partition(":")[0])


def title_of(model: str, data: str, kind: str) -> str:
    """One line: the system, the benchmark or the table's file name, and what kind of the system it is."""
    from aigiqa_reward import get_reward_spec

    name, _, path = data.partition(":")
    return printable(f"{get_reward_spec(model).title} on {_BENCHMARKS.get(name) or Path(path).name} ({kind})")


def read_predicted(file: Path, count: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What the protocol noted of a split: (M,) rows of the table, and (M,) scores by aspect.

    Args:
        file: of the protocol's folder.
        count: images of the table.

    Raises:
        CommandError: it is not there, or was altered.
    """
    try:
        arrays = read_arrays(file, most=MAX_BYTES)
        rows = arrays["rows"]
        if rows.ndim != 1 or rows.dtype.kind not in "iu" or not ((rows >= 0) & (rows < count)).all():
            raise ValueError("its rows are none of the table")
        predicted = {aspect: arrays[aspect] for aspect in _ASPECTS if aspect in arrays}
        if any(scores.shape != rows.shape or scores.dtype.kind != "f" for scores in predicted.values()):
            raise ValueError("its scores are not one an image")
    except (OSError, ValueError, KeyError) as error:
        raise _altered(file, error) from error
    return rows, predicted


def read_unreadable(file: Path) -> list[tuple[str, str]]:
    """Paths and reasons of the images that the protocol left out.

    Raises:
        CommandError: it is not there, or was altered.
    """
    try:
        return [(str(entry["path"]), str(entry["reason"])) for entry in read_json(file)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _altered(file, error) from error


def _altered(file: Path, error: Exception) -> CommandError:
    return CommandError(
        f"--report: cannot read {file} ({error}); it was not written by this command, or was altered: remove "
        "report.json beside it to measure anew, or choose another folder"
    )


def write_report(
    report: ProtocolReport,
    table: ScoredImages,
    rows: np.ndarray,
    predicted: Mapping[str, np.ndarray],
    folder: Path,
    benchmark: str | None,
    *,
    part: str,
) -> None:
    """Write table.csv, table.md and the plots to `folder`, and print the Markdown.

    Args:
        report: of the protocol.
        table: the images with their scores.
        rows: (M,) of it, those drawn.
        predicted: (M,) scores of each aspect.
        folder: of --report.
        benchmark: whose published figures to add; None for a table of one's own.
        part: which images are drawn, in words.
    """
    from aigiqa_reward.report import protocol_plot

    text = markdown(report, benchmark)
    write(folder / "table.csv", report.csv().encode())
    write(folder / "table.md", encoded(text))
    _scatter(report.title, table, rows, predicted, folder, part)
    protocol_plot(report, folder / "srcc.png")
    emit(text)
    say("note", f"in {folder}: table.md, table.csv and the plots")


def markdown(report: ProtocolReport, benchmark: str | None) -> str:
    """Our tables, how far the model is from each of the others, and below what papers printed."""
    from aigiqa_reward.evaluation import PUBLISHED, published_markdown

    parts = [report.markdown()]
    if differences := _differences(report):
        parts.append("\n".join(["**SRCC on the same test parts, model minus**", "", *differences]) + "\n")
    if any(result.benchmark == benchmark for result in PUBLISHED):
        parts.append(published_markdown(str(benchmark)))
    return "\n".join(parts)


def _differences(report: ProtocolReport) -> list[str]:
    lines, leading = [], {}
    for row in report.summary():
        model = leading.setdefault(row.task, row.predictor)  # the first of a task is the model
        if row.predictor != model:
            lines.append(f"- {row.task}, {row.predictor}: {report.difference(row.task, model, row.predictor)}")
    return lines


def _scatter(
    title: str, table: ScoredImages, rows: np.ndarray, predicted: Mapping[str, np.ndarray], folder: Path, part: str
) -> None:
    import numpy as np

    from aigiqa_reward.evaluation.metrics import MIN_ROWS
    from aigiqa_reward.report import scatter_plot

    generators = np.array(table.generators)[rows]
    for aspect in _ASPECTS:
        human = getattr(table, aspect)[rows]
        if aspect not in predicted:
            continue
        known = np.isfinite(human) & np.isfinite(predicted[aspect])
        if not known.any():
            continue
        if known.sum() < MIN_ROWS:
            say("note", f"no {aspect}.png: {known.sum()} images are too few to plot")
            continue
        scatter_plot(
            predicted[aspect][known],
            human[known],
            folder / f"{aspect}.png",
            title=f"{title}: {aspect}, {part}",
            x_label=f"predicted {aspect}",
            y_label=f"human {aspect} score",
            generators=generators[known] if len(set(generators[known])) > 1 else None,
        )
