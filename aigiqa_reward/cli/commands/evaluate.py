"""The command `evaluate`: agreement of a model with people on images that it was not trained on, beside controls."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from aigiqa_reward.cli._console import CommandError, Row, emit, encoded, printable, report_unreadable, say
from aigiqa_reward.cli._io import check_writable, write
from aigiqa_reward.cli._options import PROMPTS_FROM, Fields, argument, command, option, options
from aigiqa_reward.cli._pipelines import library, usable_device
from aigiqa_reward.cli.commands.evaluate_pairs import PAIRS, evaluate_pairs
from aigiqa_reward.cli.commands.score import KeptRows, score_table
from aigiqa_reward.cli.commands.train import (
    DataOptions,
    MachineOptions,
    ModelOptions,
    describe,
    digest,
    make_accelerator,
    make_plan,
    parse_split,
    plan_fields,
    read,
    recipe_fields,
)
from aigiqa_reward.utils.io import MAX_BYTES, read_arrays, read_json
from aigiqa_reward.utils.run_folder import RunFolder, reward_identity

if TYPE_CHECKING:
    import numpy as np

    from aigiqa_reward import Reward
    from aigiqa_reward.datasets import ScoredImages
    from aigiqa_reward.evaluation import ProtocolReport
    from aigiqa_reward.training.by_name import TrainingPlan
    from aigiqa_reward.training.report import ProtocolSettings

HELP = (
    "Train and test on several splits, or test given weights; run again, it resumes from the last finished seed. With "
    "--pairs, print how often rewards agree with people's choices between two images."
)

_BATCH = 32
_ASPECTS = ("quality", "correspondence")
_BENCHMARKS = {
    "agiqa3k": "AGIQA-3K",
    "agiqa1k": "AGIQA-1K",
    "aigciqa2023": "AIGCIQA2023",
    "aigiqa20k": "AIGIQA-20K",
}
"""Names of --data, and the benchmarks' names in tables."""


@options("Data")
class ScoresOptions:
    """A model and human scores."""

    model: str | None = argument(
        "MODEL", "mst_clipiqa, tsp_mgs, sc_agiqa, ma_agiqa, cpa_iqa, or compact with given weights.", None
    )
    data: str | None = option(
        None,
        "Human scores (agiqa3k, agiqa1k, aigciqa2023, aigiqa20k), or csv with the columns path, prompt, quality or "
        "correspondence, and optionally generator and group.",
        metavar="NAME:PATH",
    )
    prompts_from: Literal["embedded", "sidecar", "auto"] | None = option(
        None, "For a csv without a column prompt: " + PROMPTS_FROM[0].lower() + PROMPTS_FROM[1:]
    )


@options("Pairs")
class PairsOptions:
    """Choices of people, and rewards to compare with them."""

    pairs: tuple[str, ...] = option(
        (),
        "Choices of people: imagereward or hpdv2 (a JSON file or the folder of test.json), pickapic (parquet files), "
        "genai_bench (a folder); repeat for several.",
        metavar="NAME:PATH",
    )
    reward: tuple[str, ...] = option(
        (), "Reward for --pairs by name, folder or Hub id; repeat for several, each apart.", metavar="NAME"
    )
    format: Literal["table", "jsonl"] = option("table", "Form of the result of --pairs.")


@options("Evaluation")
class EvaluateOptions:
    """Weights, split and output of an evaluation."""

    weights: str | None = option(
        None,
        "Weights to test without training: embedded, or the folder or Hub id of a saved reward; with --pairs, a local "
        "copy of the weights of a single --reward.",
        metavar="embedded|FOLDER|ID",
    )
    split: str = option(
        "group",
        "Split: group (the images of a prompt stay together), random_image, or csv:FILE with columns name and split.",
    )
    output_dir: Path | None = option(None, "Folder for tables, plots and seeds; by default aigiqa-MODEL-report.")


def build() -> Callable[..., None]:
    """Return the command with all its options."""
    from aigiqa_reward.training.report import ProtocolSettings

    return command(
        evaluate,
        protocol=Fields(ProtocolSettings, "Evaluation", skip=("mode", "file")),
        plan=plan_fields(skip=("init", "seed")),
        recipe=recipe_fields(),
    )


def evaluate(
    scores: ScoresOptions,
    pairs: PairsOptions,
    options: EvaluateOptions,
    protocol: dict[str, Any],
    model: ModelOptions,
    plan: dict[str, Any],
    recipe: dict[str, Any],
    machine: MachineOptions,
) -> None:
    """Train and test on several splits, or test given weights, or compare rewards with choices between two images."""
    from aigiqa_reward.datasets import ScoredImages

    training_options = {**vars(model), "mixed_precision": machine.mixed_precision, **protocol, **plan, **recipe}
    if pairs.pairs or pairs.reward:
        batch_size = training_options.pop("batch_size", _BATCH)
        others = {**vars(scores), **training_options, "output_dir": options.output_dir}
        _refuse(others, "pairs", "nothing is trained or written")
        evaluate_pairs(pairs.pairs, pairs.reward, options.weights, machine.device, batch_size, pairs.format)
        return
    data = _human_scores(scores)
    folder = options.output_dir or Path(f"aigiqa-{data.model}-report")
    same_generator = protocol.get("same_generator", "sd1.5")
    if options.weights is not None:
        training_options.pop("same_generator", None)
        _refuse(training_options, "weights", "nothing is trained")
        evaluate_weights(data, options.weights, folder, machine.device, same_generator)
        return
    training = make_plan(data.model, model, plan, recipe)
    mode, file = parse_split(options.split, ("group", "random_image"))
    settings = _settings(protocol, mode, file)
    table = read(data)
    assert isinstance(table, ScoredImages)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise CommandError("evaluate trains in one process; start it without torchrun or accelerate launch")
    accelerator = make_accelerator(machine)
    described = describe(training, model, table, mode, file) | {"same_generator": same_generator}
    described |= {"seeds": settings.seeds, "ablation_seeds": settings.ablation_seeds}
    _begin(folder, "report.json", described)
    towers = ", ".join(sorted(model.tower)) or ("published towers" if training.preset else "compact towers")
    found = _run(training, table, settings, folder, accelerator, title_of(data.model, data.data, towers))
    with library():
        arrays = read_arrays(folder / "seed0.npz", most=MAX_BYTES)
        unreadable = [(entry["path"], entry["reason"]) for entry in read_json(folder / "unreadable.json")]
    rows = arrays.pop("rows")
    write_report(found, table, rows, arrays, folder, _benchmark(data.data), part="test part of seed 0")
    report_unreadable(unreadable, folder / "unreadable.json")
    if unreadable:
        raise typer.Exit(1)


def _human_scores(given: ScoresOptions) -> DataOptions:
    """The model and its data; refuse choices between images, which have another measure."""
    if given.model is None or given.data is None:
        raise CommandError("expected MODEL and --data NAME:PATH, or --pairs NAME:PATH and --reward NAME")
    if given.data.partition(":")[0] in PAIRS:
        text = f"{given.data} holds choices between images; pass --pairs {given.data} --reward {given.model} instead"
        raise CommandError(text, argument="data")
    return DataOptions(model=given.model, data=given.data, prompts_from=given.prompts_from)


def _refuse(given: Mapping[str, Any], argument: str, reason: str) -> None:
    """Refuse options that have no effect beside `argument`."""
    spelled = {"model": "MODEL", "settings": "--set"}
    useless = [
        spelled.get(name, f"--{name.replace('_', '-')}") for name, value in given.items() if value not in (None, ())
    ]
    if useless:
        raise CommandError(f"{reason}; leave out {', '.join(useless)}", argument=argument)


def _settings(given: dict[str, Any], mode: Any, file: Path | None) -> ProtocolSettings:
    from aigiqa_reward.training.report import ProtocolSettings

    fewest = min(3, given.get("seeds", 3))
    with library():
        return ProtocolSettings(**{"ablation_seeds": fewest, **given}, mode=mode, file=file)


def _begin(folder: Path, started: str, settings: dict[str, Any]) -> None:
    check_writable(folder)
    with library():
        RunFolder(folder, contents=("report.json", "table.csv"), started=started).begin(settings)


def _run(
    plan: TrainingPlan, table: ScoredImages, settings: ProtocolSettings, folder: Path, accelerator: Any, title: str
) -> ProtocolReport:
    from aigiqa_reward.training.report import run_protocol

    show = sys.stderr.isatty()
    try:
        with library(folder="output_dir", name="model", towers="tower"):
            return run_protocol(plan, table, settings, folder, title=title, accelerator=accelerator, progress=show)
    except KeyboardInterrupt as error:
        raise CommandError("interrupted; the same command resumes from the last finished seed", status=130) from error


# --------------------------------------------------------------------------------------------- given weights


def evaluate_weights(data: DataOptions, weights: str, folder: Path, device: str | None, same_generator: str) -> None:
    """Score everything with given weights; write and print the agreement with people."""
    import numpy as np

    from aigiqa_reward.datasets import ScoredImages

    embedded = weights == "embedded"
    table = read(data)
    assert isinstance(table, ScoredImages)
    described = {"model": data.model, "weights": weights, "data": digest(table), "same_generator": same_generator}
    reward = _load(data.model, None if embedded else weights, device)
    _begin(folder, "table.csv", described)
    kept = KeptRows(folder / "table.csv", [described, reward_identity(reward)])
    seen = embedded and data.data.startswith("agiqa3k:")
    if seen:
        say("warning", "the embedded weights were trained on AGIQA-3K: this is no test of them")
    title = title_of(data.model, data.data, "embedded weights" if embedded else f"weights of {weights}")
    rows = score_table(reward, [str(path) for path in table.paths], table.prompts, _BATCH, kept, argument="data")
    protocol = f"all images, by the given weights{', which were trained on some of them' if seen else ''}"
    predicted = {aspect: _column(rows, aspect) for aspect in _ASPECTS}
    report = _agreement(predicted, table, title, protocol, same_generator)
    write_report(report, table, np.arange(len(table)), predicted, folder, _benchmark(data.data), part="all images")
    kept.remove()
    if any(row.error is not None for row in rows):
        raise typer.Exit(1)


def _load(name: str, weights: str | None, device: str | None) -> Reward:
    """The model with the embedded weights, or with those of a saved reward, which must be of that model."""
    from aigiqa_reward import create_reward

    with library(name="model"):
        return create_reward(name, weights=weights, device=usable_device(device))


def _column(rows: Sequence[Row], aspect: str) -> np.ndarray:
    """(N,) scores of all images; NaN where there are none."""
    import numpy as np

    return np.array([getattr(row, aspect) for row in rows], dtype=np.float64)


def _agreement(
    predicted: Mapping[str, np.ndarray], table: ScoredImages, title: str, protocol: str, same_generator: str
) -> ProtocolReport:
    """The agreement of predictions with the human scores, as one seed."""
    import numpy as np

    from aigiqa_reward.evaluation import ProtocolReport, score_split
    from aigiqa_reward.evaluation.protocol import MODEL

    scores = []
    for aspect, found in predicted.items():
        human = getattr(table, aspect)
        kept = np.flatnonzero(np.isfinite(human) & np.isfinite(found))
        if len(kept):
            prompts, generators = ([column[row] for row in kept] for column in (table.prompts, table.generators))
            whole = {"task": aspect, "predicted": found[kept], "target": human[kept]}
            named = {"prompts": prompts, "generators": generators, "same_generator": same_generator or None}
            scores.append(score_split(0, MODEL, **whole, **named))
    return ProtocolReport(title=title, protocol=protocol, scores=tuple(scores))


# --------------------------------------------------------------------------------------------- tables and plots


def _benchmark(data: str) -> str | None:
    """The benchmark that NAME:PATH names; None for another table."""
    return _BENCHMARKS.get(data.partition(":")[0])


def title_of(model: str, data: str, kind: str) -> str:
    """Return one line: the system, the benchmark or the table's file name, and the kind of weights."""
    from aigiqa_reward import get_reward_spec

    name = _benchmark(data) or Path(data.partition(":")[2]).name
    return printable(f"{get_reward_spec(model).title} on {name} ({kind})")


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
    """Write table.csv, table.md and plots of some `rows` (M,) of the table and scores (M,) by aspect; print table.md.

    Published figures of the benchmark are added if there is one; `part` is the name of the rows in the plots.
    """
    from aigiqa_reward.evaluation import PUBLISHED, published_markdown
    from aigiqa_reward.report import protocol_plot

    parts = [report.markdown()]
    if differences := _differences(report):
        parts.append("\n".join(["**SRCC on the same test parts, model minus**", "", *differences]) + "\n")
    if any(result.benchmark == benchmark for result in PUBLISHED):
        parts.append(published_markdown(str(benchmark)))
    text = "\n".join(parts)
    emit(text, saved=True)
    write(folder / "table.csv", report.csv().encode())
    write(folder / "table.md", encoded(text))
    for aspect in _ASPECTS:
        if aspect in predicted:
            _scatter(aspect, report.title, table, rows, predicted[aspect], folder, part)
    protocol_plot(report, folder / "srcc.png")
    say("note", f"in {folder}: table.md, table.csv and the plots")


def _differences(report: ProtocolReport) -> list[str]:
    lines, leading = [], {}
    for row in report.summary():
        model = leading.setdefault(row.task, row.predictor)  # the first of a task is the model
        if row.predictor != model:
            lines.append(f"- {row.task}, {row.predictor}: {report.difference(row.task, model, row.predictor)}")
    return lines


def _scatter(
    aspect: str, title: str, table: ScoredImages, rows: np.ndarray, predicted: np.ndarray, folder: Path, part: str
) -> None:
    import numpy as np

    from aigiqa_reward.evaluation.metrics import MIN_ROWS
    from aigiqa_reward.report import scatter_plot

    generators, human = np.array(table.generators)[rows], getattr(table, aspect)[rows]
    known = np.isfinite(human) & np.isfinite(predicted)
    if known.sum() < MIN_ROWS:
        if known.any():
            say("note", f"no {aspect}.png: {known.sum()} images are too few to plot")
        return
    scatter_plot(
        predicted[known],
        human[known],
        folder / f"{aspect}.png",
        title=f"{title}: {aspect}, {part}",
        x_label=f"predicted {aspect}",
        y_label=f"human {aspect} score",
        generators=generators[known] if len(set(generators[known])) > 1 else None,
    )
