"""The command `scenarios`: what each scenario of cpa_iqa weighs an image's components by."""

from __future__ import annotations

import math
import sys
from typing import Annotated

import typer

from aigiqa_reward.cli import options
from aigiqa_reward.cli.inputs import CommandError
from aigiqa_reward.cli.output import ListFormat, emit, render_scenarios, say


def scenarios(
    preferences: options.PreferencesOption = None,
    form: Annotated[ListFormat, typer.Option("--format", help="A table to read, or JSON Lines.")] = ListFormat.TABLE,
) -> None:
    """List cpa_iqa's scenarios and the weights of the five components in each, as shares of 1."""
    from aigiqa_reward.models.cpa_iqa import COMPONENTS, UNIFORM, Preferences

    try:
        matrix = UNIFORM if preferences is None else Preferences.load(preferences)
    except ValueError as error:
        raise CommandError(f"--preferences: {str(error).removeprefix('preferences: ')}") from error
    rows: dict[str, dict[str, float]] = {
        name: dict(zip(COMPONENTS, _shares(weights), strict=True)) for name, weights in matrix.items()
    }
    emit(render_scenarios(rows, form, terminal=sys.stdout.isatty()))
    if preferences is None:
        say(
            "note",
            "these are the shipped ones: uniform, and calibrated on nobody's preferences; --preferences reads yours",
        )


def _shares(weights: tuple[float, ...]) -> list[float]:
    """The softmax that the model takes of a row."""
    highest = max(weights)
    parts = [math.exp(weight - highest) for weight in weights]
    return [part / sum(parts) for part in parts]
