"""Running the command line, in this process or in another."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer import Context
from typer.main import get_command
from typer.testing import CliRunner, Result

from aigiqa_reward.cli import app

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(*arguments: object, cwd: Path = Path()) -> Result:
    with contextlib.chdir(cwd):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def options_of(*names: str) -> dict[str, Any]:
    """The options of a command by spelling."""
    group: Any = get_command(app)
    context = Context(group)
    for name in names:
        group = group.get_command(context, name)
    return {spelling: each for each in group.get_params(context) for spelling in (*each.opts, *each.secondary_opts)}


def only_error(result: Result) -> str:
    """The message of a usage error: the one thing that was printed."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr), result.stderr
    return result.stderr


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "aigiqa_reward", *map(str, arguments)]


@contextlib.contextmanager
def opening(interrupted_at: int, number: int) -> Iterator[list[Any]]:
    """Count the images that are opened; at one of them, the signal comes."""
    opened, places, before = Image.open, [], signal.getsignal(number)

    def count(place: Any, *arguments: Any, **options: Any) -> Any:
        if len(places) == interrupted_at:
            assert signal.getsignal(number) is not signal.SIG_DFL, "the tests would end here"
            signal.raise_signal(number)
        places.append(place)
        return opened(place, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "open", count)
        try:
            yield places
        finally:
            signal.signal(number, before)
