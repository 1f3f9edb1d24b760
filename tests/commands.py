"""Running the command line: in this process, or as another one that can be interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from typer import Context
from typer.main import get_command
from typer.testing import CliRunner, Result

from aigiqa_reward.cli import app

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"}


def interruptible() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


def interrupt(arguments: list[str], moved: bytes = rb"[1-9]\d*/\d+") -> tuple[int, str, str]:
    """Start a command with a terminal on stderr and send SIGINT once its bar has moved: its status, stdout, stderr."""
    import termios  # where there are pseudo-terminals

    terminal, end = os.openpty()
    termios.tcsetwinsize(end, (40, 200))  # without a size tqdm draws no bar
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=end, env=ENVIRONMENT, preexec_fn=interruptible)
    os.close(end)
    shown = b""
    while not re.search(moved, shown):
        shown += os.read(terminal, 4096)
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=120)
    os.set_blocking(terminal, False)
    with contextlib.suppress(OSError):  # read to its end
        while part := os.read(terminal, 4096):
            shown += part
    os.close(terminal)
    return process.returncode, stdout.decode(), re.sub(r"\x1b\[[0-9;]*m", "", shown.decode(errors="replace"))
