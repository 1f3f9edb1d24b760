"""The command `aigiqa-reward`: each subcommand is a few lines over the public API.

Results go to stdout or a file, messages and progress to stderr. Exit status: 0 all well, 1 some inputs could not be
read or scored, 2 wrong usage, 130 interrupted. Commands import torch and diffusers when they need them, so help is
quick.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from aigiqa_reward import __version__
from aigiqa_reward.cli import options
from aigiqa_reward.cli.best_of_n import best_of_n
from aigiqa_reward.cli.demo import demo
from aigiqa_reward.cli.evaluate import evaluate
from aigiqa_reward.cli.files import RANKING, check_folder, check_output, copy_ranked, write
from aigiqa_reward.cli.finetune import finetune
from aigiqa_reward.cli.inputs import CommandError, attach_prompts, find_images
from aigiqa_reward.cli.options import DType
from aigiqa_reward.cli.output import Format, ListFormat, Row, emit, encoded, render, render_specs, say
from aigiqa_reward.cli.pairs import pairs
from aigiqa_reward.cli.runs import first_process, load_reward, score_sources
from aigiqa_reward.cli.scenarios import scenarios
from aigiqa_reward.cli.train import train

_FIRST = first_process()
"""Of several processes (torchrun), the first says for all what is wrong with a command and what to be warned of."""

_UsageError: Any = typer.BadParameter.__base__  # parent of every error in a command line's grammar


class _Commands(TyperGroup):
    """Ends a command with one line on stderr and an exit status where its user can act on what went wrong."""

    def invoke(self, ctx: Any) -> Any:
        """Run the subcommand; a bug keeps its traceback."""
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except CommandError as error:
            if error.status != 2 or _FIRST:
                say("error", error)
            raise typer.Exit(error.status) from error
        except _UsageError as error:
            say("error", error.format_message())
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            say("error", "interrupted")
            raise typer.Exit(130) from error


app = typer.Typer(
    cls=_Commands,
    help="Score, rank and sample AI-generated images by perceptual quality and correspondence to the prompt.",
    epilog="Exit status: 0 all well, 1 some inputs could not be read or scored, 2 wrong usage, 130 interrupted.",
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
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del version


# --------------------------------------------------------------------------------------------- commands


@app.command()
def score(
    images: options.ImagesArgument,
    prompt: options.PromptOption = None,
    prompts_file: options.PromptsFileOption = None,
    recursive: options.RecursiveOption = False,
    reward: options.RewardOption = "compact",
    encoder: options.EncoderOption = None,
    encoder_weights: options.EncoderWeightsOption = None,
    weights: options.WeightsOption = None,
    zero_shot: options.ZeroShotOption = False,
    scenario: options.ScenarioOption = None,
    preferences: options.PreferencesOption = None,
    quality_weight: options.QualityWeightOption = None,
    correspondence_weight: options.CorrespondenceWeightOption = None,
    device: options.DeviceOption = None,
    dtype: options.DTypeOption = DType.FLOAT32,
    batch_size: options.BatchSizeOption = 32,
    form: options.FormatOption = Format.TABLE,
    output: options.OutputOption = None,
) -> None:
    """Score images, in the order given."""
    check_output(output)
    sources = attach_prompts(find_images(images, recursive=recursive), prompt, prompts_file)
    chosen = (reward, encoder, encoder_weights, weights, zero_shot, scenario, preferences)
    judge = load_reward(*chosen, quality_weight, correspondence_weight, device, dtype)
    result = score_sources(judge, sources, batch_size)
    _print(result.rows, form, output)
    result.conclude(len(sources))


@app.command()
def rank(
    images: options.ImagesArgument,
    prompt: options.PromptOption = None,
    prompts_file: options.PromptsFileOption = None,
    recursive: options.RecursiveOption = False,
    reward: options.RewardOption = "compact",
    encoder: options.EncoderOption = None,
    encoder_weights: options.EncoderWeightsOption = None,
    weights: options.WeightsOption = None,
    zero_shot: options.ZeroShotOption = False,
    scenario: options.ScenarioOption = None,
    preferences: options.PreferencesOption = None,
    quality_weight: options.QualityWeightOption = None,
    correspondence_weight: options.CorrespondenceWeightOption = None,
    device: options.DeviceOption = None,
    dtype: options.DTypeOption = DType.FLOAT32,
    batch_size: options.BatchSizeOption = 32,
    top_k: options.TopKOption = None,
    copy_to: options.CopyToOption = None,
    overwrite: options.OverwriteOption = False,
    form: options.FormatOption = Format.TABLE,
    output: options.OutputOption = None,
) -> None:
    """Score images and list the best first; those that could not be scored come last."""
    from aigiqa_reward.rewards.ranking import rank as best_first

    check_output(output)
    check_folder(copy_to, RANKING, option="--copy-to", overwrite=overwrite)
    paths = find_images(images, recursive=recursive)
    sources = attach_prompts(paths, prompt, prompts_file)
    chosen = (reward, encoder, encoder_weights, weights, zero_shot, scenario, preferences)
    judge = load_reward(*chosen, quality_weight, correspondence_weight, device, dtype)
    result = score_sources(judge, sources, batch_size)
    order = best_first(math.nan if row.total is None else row.total for row in result.rows)
    ranked = [result.rows[place] for place in order]
    rows = [row for row in ranked if row.error is None][:top_k] + [row for row in ranked if row.error is not None]
    _print(rows, form, output, numbered=True)
    if copy_to is not None and result.failure is None:  # a part of a ranking is no ranking
        copy_ranked(rows, copy_to, originals=paths, overwrite=overwrite)
    result.conclude(len(sources))


@app.command()
def rewards(
    form: Annotated[ListFormat, typer.Option("--format", help="A table to read, or JSON Lines.")] = ListFormat.TABLE,
) -> None:
    """List the rewards: paper, license, scale, gradients, prompts, input size, weights."""
    from aigiqa_reward import get_reward_spec, list_rewards

    emit(render_specs([get_reward_spec(name) for name in list_rewards()], form, terminal=sys.stdout.isatty()))


for _command in (demo, best_of_n, finetune, pairs, scenarios, train, evaluate):
    app.command()(_command)


def _show_warning(message: Warning | str, category: type[Warning], *_place: object) -> None:
    if issubclass(category, UserWarning) and _FIRST:  # the others are for developers
        say("warning", message)


def _print(rows: Sequence[Row], form: Format, file: Path | None, *, numbered: bool = False) -> None:
    if not rows:  # interrupted before the first one
        return
    text = render(rows, form, numbered=numbered, terminal=file is None and sys.stdout.isatty())
    if file is None:
        emit(text)
    else:
        write(file, encoded(text))
