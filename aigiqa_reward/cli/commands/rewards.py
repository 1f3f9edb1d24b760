"""The commands `rewards` and `scenarios`."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich import box
from rich.table import Column, Table
from rich.text import Text

from aigiqa_reward.cli._console import cell, drawn, emit, jsonl, say
from aigiqa_reward.cli._options import option, options
from aigiqa_reward.cli._pipelines import library

if TYPE_CHECKING:
    from aigiqa_reward.models.base import ModelSpec


@options("Output")
class ListOptions:
    """Form of a list."""

    format: Literal["table", "jsonl"] = option("table", "Form of the list: a table to read, or JSON Lines.")


@options("Inputs")
class ScenarioOptions:
    """Scenarios from a file."""

    preferences: Path | None = option(None, "JSON file of scenarios, each with the weights of its five components.")


def rewards(output: ListOptions) -> None:
    """List each reward's name, paper, license, score range, input size, weights and whether it is differentiable."""
    from aigiqa_reward import get_reward_spec, list_rewards

    specs = list(map(get_reward_spec, list_rewards()))
    if output.format == "jsonl":
        emit(jsonl(map(dataclasses.asdict, specs)))
    else:
        emit(_specs_table(specs, terminal=sys.stdout.isatty()))


def _specs_table(specs: Sequence[ModelSpec], *, terminal: bool) -> str:
    table = Table(Column("reward", no_wrap=True), Column("", no_wrap=True), Column("", overflow="fold"))
    table.box, table.show_header, table.pad_edge = box.SIMPLE_HEAD, False, False
    for spec in specs:
        size = f", {spec.megabytes:.1f} MB" if spec.megabytes else ""
        about = {
            "title": spec.title,
            "paper": spec.paper,
            "license": spec.license,
            "scale": spec.scale,
            "differentiable": f"{'yes' if spec.differentiable else 'no'}: {spec.gradient_path}",
            "needs prompt": "yes" if spec.needs_prompt else "no (without one: quality alone)",
            "input size": spec.input_size,
            "weights": f"{spec.weights}{size}",
        }
        for i, (name, value) in enumerate(about.items()):
            table.add_row(Text(spec.name if i == 0 else "", style="bold"), Text(name), Text(value))
        table.add_section()
    return drawn(table, terminal=terminal)


def scenarios(options: ScenarioOptions, output: ListOptions) -> None:
    """List cpa_iqa's scenarios with their weights of the five components, as shares of 1."""
    from aigiqa_reward.models.cpa_iqa import COMPONENTS, UNIFORM, Preferences

    with library():
        matrix = UNIFORM if options.preferences is None else Preferences.load(options.preferences)
    rows: dict[str, dict[str, float]] = {
        name: dict(zip(map(str, COMPONENTS), _shares(weights), strict=True)) for name, weights in matrix.items()
    }
    if output.format == "jsonl":
        emit(jsonl({"scenario": name, **weights} for name, weights in rows.items()))
    else:
        emit(_scenarios_table(rows, terminal=sys.stdout.isatty()))
    if options.preferences is None:
        say("note", "these have uniform weights, not fitted to human preferences; --preferences reads yours")


def _scenarios_table(rows: Mapping[str, Mapping[str, float]], *, terminal: bool) -> str:
    components = list(next(iter(rows.values())))
    table = Table(Column("scenario"), *(Column(name, justify="right") for name in components))
    table.box, table.pad_edge = box.SIMPLE_HEAD, False
    for name, weights in rows.items():
        table.add_row(cell(name), *map(cell, weights.values()))
    return drawn(table, terminal=terminal)


def _shares(weights: Sequence[float]) -> list[float]:
    """The softmax of a row, which the model takes."""
    highest = max(weights)
    parts = [math.exp(weight - highest) for weight in weights]
    return [part / sum(parts) for part in parts]
