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

from aigiqa_reward.cli._console import CommandError, cell, drawn, emit, jsonl, say
from aigiqa_reward.cli._options import argument, option, options
from aigiqa_reward.cli._pipelines import library

if TYPE_CHECKING:
    from aigiqa_reward.models.base import ModelSpec


@options("Output")
class ListOptions:
    """Form of a list."""

    format: Literal["table", "jsonl"] = option("table", "Form of the list: a table to read, or JSON Lines.")


@options("Reward")
class NamedOptions:
    """Rewards to describe or to verify."""

    names: tuple[str, ...] = argument("NAME", "Rewards to describe in full; without any, all in one table.", ())
    verify: str | None = option(
        None,
        "Published reward to verify: fetch, check and load its weights, and score two included images by it.",
        metavar="NAME",
    )
    weights: str | None = option(
        None, "Local copy of the weights to verify: the authors' file, or its folder.", metavar="PATH"
    )


@options("Inputs")
class ScenarioOptions:
    """Scenarios from a file."""

    preferences: Path | None = option(None, "JSON file of scenarios, each with the weights of its five components.")


def rewards(options: NamedOptions, output: ListOptions) -> None:
    """List the rewards: what each judges, its published accuracy, size, license and source; or verify one."""
    from aigiqa_reward import get_reward_spec, list_rewards

    if options.verify is not None:
        _verify(options.verify, options.weights)
        return
    if options.weights is not None:
        raise CommandError("is checked by --verify, which is missing", argument="weights")
    with library(name="names"):
        specs = list(map(get_reward_spec, options.names or list_rewards()))
    terminal = sys.stdout.isatty()
    if output.format == "jsonl":
        emit(jsonl({**dataclasses.asdict(spec), "source": _source(spec)} for spec in specs))
    else:
        emit(_details(specs, terminal=terminal) if options.names else _overview(specs, terminal=terminal))


def _verify(name: str, weights: str | None) -> None:
    """Print a reward's scores of the included images beside the reference, or the line to add to it."""
    from aigiqa_reward.rewards import verify

    with library(name="verify"):
        found = verify.verify(name, weights)
    emit(f"{found.file}\nsha256 {found.sha256}\n")
    table = Table("image", Column("raw", justify="right"), Column("reference", justify="right"))
    table.box, table.pad_edge = box.SIMPLE_HEAD, False
    for image, raw, expected in zip(verify.IMAGES, found.raw, found.reference or (None, None), strict=True):
        table.add_row(image, f"{raw:.6f}", "" if expected is None else f"{expected:.6f}")
    emit(drawn(table, terminal=sys.stdout.isatty()))
    if found.reference is None:
        say("note", f"no reference for these weights; if they are the published ones, add to {verify.REFERENCE}:")
        emit(f"{found.entry}\n")
    elif not found.ok:
        raise CommandError(f"{name} does not score as its reference does", status=1)


def _source(spec: ModelSpec) -> str:
    """Where the weights come from: a Hub id, or a word."""
    from aigiqa_reward.rewards.published import PUBLISHED

    source = PUBLISHED.get(spec.name)
    return source.repo if source else "embedded" if spec.embedded else spec.weights


def _overview(specs: Sequence[ModelSpec], *, terminal: bool) -> str:
    names = ("judges", "published accuracy", "gradient", "size", "license", "weights or Hub id")
    table = Table(Column("reward", no_wrap=True), *(Column(name, overflow="fold") for name in names))
    table.box, table.pad_edge = box.SIMPLE_HEAD, False
    for spec in specs:
        size = f"{spec.megabytes / 1000:.1f} GB" if spec.megabytes >= 1000 else f"{spec.megabytes:.0f} MB"
        gradient, license = "yes" if spec.differentiable else "no", spec.license
        license = license.partition(" (")[0] if spec.embedded else license
        table.add_row(spec.name, spec.judges, spec.accuracy, gradient, size, license, _source(spec))
    return drawn(table, terminal=terminal)


def _details(specs: Sequence[ModelSpec], *, terminal: bool) -> str:
    table = Table(Column("reward", no_wrap=True), Column("", no_wrap=True), Column("", overflow="fold"))
    table.box, table.show_header, table.pad_edge = box.SIMPLE_HEAD, False, False
    for spec in specs:
        size = f", {spec.megabytes:.1f} MB" if spec.megabytes else ""
        about = {
            "title": spec.title,
            "paper": spec.paper,
            "judges": spec.judges,
            "accuracy": spec.accuracy or "none published",
            "license": spec.license,
            "scale": spec.scale,
            "differentiable": f"{'yes' if spec.differentiable else 'no'}: {spec.gradient_path}",
            "needs prompt": "yes" if spec.needs_prompt else "no (without one: quality alone)",
            "source": _source(spec),
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
