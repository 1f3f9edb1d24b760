"""CPA-IQA's preference matrix: what each scenario of use asks of an image."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping

from aigiqa_reward.reading import read_json

COMPONENTS = ("global", "local", "implicit", "distortion", "low_level")
"""Columns of the matrix: three tiers of alignment, absence of distortions, low-level fidelity."""


class Preferences(Mapping[str, tuple[float, ...]]):
    """Weights of the five components for each scenario, before a softmax over the components.

    Rows are numbered in alphabetical order, so that trained ones still fit when the mapping was written in another.

    Raises:
        ValueError: no scenario, another number of weights than components, or weights that are not finite.

    Example:
        >>> from aigiqa_reward import create_reward
        >>> from aigiqa_reward.models.scenarios import Preferences
        >>> sharp = {"global": 0, "local": 0, "implicit": 0, "distortion": 1, "low_level": 1}
        >>> preferences = Preferences({"poster": sharp})
        >>> create_reward("cpa_iqa", preferences=preferences, scenario="poster").name
        'cpa_iqa'
    """

    def __init__(self, rows: Mapping[str, Mapping[str, float] | tuple[float, ...] | list[float]]) -> None:
        self._rows = {str(name): self._checked(str(name), row) for name, row in rows.items()}
        if not self._rows:
            raise ValueError("preferences: expected at least one scenario, got none")

    @staticmethod
    def _checked(name: str, row: Mapping[str, float] | tuple[float, ...] | list[float]) -> tuple[float, ...]:
        if isinstance(row, Mapping):
            if set(row) != set(COMPONENTS):
                raise ValueError(f"preferences: scenario {name!r} has the weights {sorted(row)}, expected {COMPONENTS}")
            row = [row[component] for component in COMPONENTS]
        try:
            values = tuple(float(value) for value in row)
        except (TypeError, ValueError) as error:
            raise ValueError(f"preferences: scenario {name!r} has weights that are not numbers: {row!r}") from error
        if len(values) != len(COMPONENTS) or not all(map(math.isfinite, values)):
            raise ValueError(
                f"preferences: scenario {name!r} needs {len(COMPONENTS)} finite weights, for {', '.join(COMPONENTS)}, "
                f"got {values}"
            )
        return values

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Preferences:
        """Read a JSON file: {"scenario": {"global": 0, "local": 0, "implicit": 0, "distortion": 1, "low_level": 1}}.

        Raises:
            ValueError: no such file, not JSON, or not a matrix.
        """
        try:
            rows = read_json(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"preferences: cannot read {os.fspath(path)!r} as JSON ({error})") from error
        if not isinstance(rows, dict):
            raise ValueError(
                f"preferences: expected an object of scenarios in {os.fspath(path)!r}, got {type(rows).__name__}"
            )
        try:
            return cls(rows)
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{error}; in {os.fspath(path)!r}") from error

    def row(self, scenario: str) -> int:
        """The row of a scenario.

        Raises:
            ValueError: there is none of that name; lists those there are.
        """
        if scenario not in self._rows:
            raise ValueError(f"scenario: there is none called {scenario!r}; there are {', '.join(self._rows)}")
        return sorted(self._rows).index(scenario)

    def matrix(self) -> list[list[float]]:
        """Scenarios x components, as `row` numbers them."""
        return [list(self._rows[scenario]) for scenario in sorted(self._rows)]

    def __getitem__(self, scenario: str) -> tuple[float, ...]:
        """The weights of one scenario."""
        return self._rows[scenario]

    def __iter__(self) -> Iterator[str]:
        """The scenarios, in their order."""
        return iter(self._rows)

    def __len__(self) -> int:
        """How many scenarios."""
        return len(self._rows)

    def __hash__(self) -> int:
        """By content, so that a frozen configuration can hold it."""
        return hash(frozenset(self._rows.items()))

    def __eq__(self, other: object) -> bool:
        """By content."""
        return isinstance(other, Mapping) and dict(self) == dict(other)


UNIFORM = Preferences(
    {
        name: (0.0,) * len(COMPONENTS)
        for name in ("general", "photograph", "illustration", "product", "cultural_heritage", "poster")
    }
)
"""What ships: every scenario weighs all components alike. Nothing here was calibrated on people's preferences for a
scenario; load your own matrix with `Preferences.load`, or change a row."""
