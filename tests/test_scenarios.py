"""CPA-IQA's preference matrix as a file: which scenario has which row, whatever the order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aigiqa_reward.models.cpa_iqa import COMPONENTS, Preferences

ROWS = Preferences({"zebra": (0.3, -1.0, 0.5, 2.0, 0.0), "archive": (1.0, 0.0, -2.0, 0.4, 0.7)})


def test_preferences_are_read_by_name_in_any_order(tmp_path: Path) -> None:
    rows = {name: dict(zip(COMPONENTS[::-1], row[::-1], strict=True)) for name, row in list(ROWS.items())[::-1]}
    (tmp_path / "m.json").write_text(json.dumps(rows))
    read = Preferences.load(tmp_path / "m.json")
    assert read == ROWS
    assert hash(read) == hash(ROWS)
    assert read.matrix() == ROWS.matrix()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"preferences: cannot read .*m\.json' as JSON"),
        ("{", r"preferences: cannot read .*m\.json' as JSON"),
        ("[1, 2]", "preferences: expected an object of scenarios in .*, got list"),
        ("{}", "preferences: expected at least one scenario, got none"),
        ('{"poster": [1, 2, 3]}', "scenario 'poster' needs 5 finite weights"),
        ('{"poster": [1, 2, 3, 4, NaN]}', "scenario 'poster' needs 5 finite weights"),
        ('{"poster": {"global": 1}}', r"scenario 'poster' has the weights \['global'\], expected"),
        ('{"poster": ["a", 2, 3, 4, 5]}', "scenario 'poster' has weights that are not numbers"),
        ('{"poster": 7}', "scenario 'poster' has weights that are not numbers: 7"),
    ],
)
def test_files_that_hold_no_matrix_are_refused(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "m.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        Preferences.load(tmp_path / "m.json")
