"""The command `aigiqa-reward`: each subcommand is a few lines over the public API.

Results go to stdout or a file, messages and progress to stderr. Exit status: 0 success, 1 some inputs could not be read
or scored, 2 wrong usage, 130 interrupted, also by SIGTERM. Commands import torch and diffusers when they need them, so
that help is quick.
"""

from __future__ import annotations

import warnings
from typing import Annotated, Any

import typer

from aigiqa_reward import __version__
from aigiqa_reward.cli._console import CommandError, first_process, prepare_process, say
from aigiqa_reward.cli._options import Command, Group, command, lazy, with_nearest
from aigiqa_reward.cli.commands import best_of_n, demo, evaluate, finetune, rewards, score, train, web

_STATUS = "Exit status: 0 success, 1 some inputs could not be read or scored, 2 wrong usage, 130 interrupted."
_UsageError: Any = typer.BadParameter.__base__  # parent of every error in a command line's grammar


class _Commands(Group):
    """Ends a command with one line on stderr and an exit status, where its user can act on what went wrong."""

    def invoke(self, ctx: Any) -> Any:
        """Run the subcommand; a bug keeps its traceback."""
        prepare_process()
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except CommandError as error:
            if error.status == 1 or first_process():
                say("error", error)
            raise typer.Exit(error.status) from error
        except _UsageError as error:
            say("error", with_nearest(error.format_message()))
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            say("error", "interrupted")
            raise typer.Exit(130) from error


def _show_warning(message: Warning | str, category: type[Warning], *_place: object) -> None:
    if issubclass(category, UserWarning) and first_process():  # the others are for developers
        say("warning", message)


app = typer.Typer(
    cls=_Commands,
    help="Score, rank and sample AI-generated images by perceptual quality and correspondence to the prompt.",
    epilog=_STATUS,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"aigiqa-reward {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar="", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    del version


for _run in (
    score.score,
    score.rank,
    best_of_n.best_of_n,
    best_of_n.pairs,
    demo.demo,
    rewards.rewards,
    rewards.scenarios,
    web.web,
):
    app.command(cls=Command)(command(_run))
for _name, _run in {"train": train, "evaluate": evaluate}.items():
    app.command(_name, cls=lazy(_run.build), help=_run.HELP)(lambda: None)
app.add_typer(finetune.app, name="finetune")
