"""The command `demo`: best of N with the generator and the reward in the package, drawn in one picture."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from aigiqa_reward.cli._console import CommandError, Row, emit, progress, render, say
from aigiqa_reward.cli._io import check_writable, checked_prompt, png, write
from aigiqa_reward.cli._options import option, options
from aigiqa_reward.cli._pipelines import (
    EMBEDDED,
    EMBEDDED_SAMPLING,
    EXAMPLE,
    library,
    load_pipeline,
    loading,
    report_unknown,
)
from aigiqa_reward.cli.commands.score import scored
from aigiqa_reward.utils.run_folder import RunFolder

if TYPE_CHECKING:
    from aigiqa_reward import BestOfN, BestOfNOutput

SAMPLING = EMBEDDED_SAMPLING | {"guidance_scale": 1.0}
"""Without guidance images of one prompt differ more, and some fail."""

SHEET, RESULTS, BEST = "contact-sheet.png", "results.jsonl", "best.png"
"""The files of a demo's folder."""

_BATCH = 8
_LISTED = 5  # candidates in the table
_SHORT = 200  # characters of a prompt that is repeated on the terminal


@options("Options")
class DemoOptions:
    """What to sample, and where to draw it."""

    prompt: str = option(EXAMPLE, "Prompt to sample images of.", metavar="TEXT")
    n: int = option(16, "Number of candidates.", "--n", min=1, max=1000)
    seed: int = option(
        0, "Seed of the first candidate; candidate i has the seed plus i.", min=0, max=2**32 - 1
    )  # torch's CPU generator uses 32 bits
    output_dir: Path = option(
        Path("aigiqa-demo"), f"Folder for {SHEET}, {RESULTS} and {BEST}; those of an earlier demo are replaced."
    )
    open: bool = option(False, "Open the contact sheet in the system's viewer.")


def demo(options: DemoOptions) -> None:
    """Sample images of a prompt, one of 64 emoji on one of 8 colors, pick the best and draw all of them; offline."""
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # before torch: threads that spin for long take the time of others
    prompt, n, seed = checked_prompt(options.prompt), options.n, options.seed
    check_writable(options.output_dir)
    folder = RunFolder(options.output_dir, contents=(SHEET, RESULTS, BEST))

    def keep(output: BestOfNOutput) -> None:
        with library():
            folder.begin({"command": "demo", "prompt": prompt, "n": n, "seed": seed}, overwrite=True)
        _write(output, prompt, folder.path)

    with progress("best of n", n) as show:  # from the start: loading takes seconds
        search = _load(folder, prompt, n)
        output, failure = _sample(search, prompt, seed, show, keep)
    if output is not None:
        keep(output)
        _report(output, prompt, folder.path)
    if output is not None and isinstance(failure, KeyboardInterrupt):
        raise CommandError(f"interrupted: {len(output.all_seeds)} of {n} candidates", status=130) from failure
    if failure is not None:
        raise failure
    if options.open:
        _open(folder.path / SHEET)


@loading()
def _load(folder: RunFolder, prompt: str, n: int) -> BestOfN:
    with library():
        folder.settings()  # refuses a folder that no demo wrote
    report_unknown([prompt])
    from aigiqa_reward import BestOfN, create_reward
    from aigiqa_reward.toy.pipeline import quiet_libraries

    with quiet_libraries():
        pipe: Any = load_pipeline(EMBEDDED, "cpu", "float32")
        _report_cut(pipe, prompt)
        return BestOfN(pipe, create_reward("compact"), n=n, batch_size=_BATCH, top_k=n)


def _report_cut(pipe: Any, prompt: str) -> None:
    length, most = len(pipe.tokenizer(prompt).input_ids), pipe.tokenizer.model_max_length
    if length > most:
        say("warning", f"the embedded generator reads the first {most} of the prompt's {length} tokens")


def _sample(
    search: BestOfN, prompt: str, seed: int, show: Callable[[int], None], keep: Callable[[BestOfNOutput], None]
) -> tuple[BestOfNOutput | None, CommandError | KeyboardInterrupt | None]:
    """The last output that was reached, and what ended the sampling early; keeps the first one while others follow."""
    from aigiqa_reward.sampling import NothingRankedError
    from aigiqa_reward.toy.pipeline import quiet_libraries

    output = None
    try:
        with quiet_libraries(), library():
            for output in search.stream(prompt, seed, **SAMPLING):
                show(len(output.all_seeds))
                if len(output.all_seeds) <= _BATCH < search.n:
                    keep(output)
    except (CommandError, KeyboardInterrupt) as error:
        return output, error
    except NothingRankedError as error:
        return error.output, CommandError(str(error), status=1)
    return output, None


# --------------------------------------------------------------------------------------------- after


def _candidates(output: BestOfNOutput, prompt: str) -> list[Row]:
    """All candidates in their order, by seed; those that were dropped have an error."""
    return [
        Row(key=seed, prompt=prompt, error=output.dropped[seed])
        if seed in output.dropped
        else scored(seed, prompt, total, quality, correspondence)
        for seed, total, quality, correspondence in output.all_rows()
    ]


def _write(output: BestOfNOutput, prompt: str, folder: Path) -> None:
    from aigiqa_reward.images import metadata
    from aigiqa_reward.report import contact_sheet

    write(folder / SHEET, png(contact_sheet(output, prompt)))
    write(folder / RESULTS, render(_candidates(output, prompt), "jsonl").encode())
    if output.images:
        best = metadata.png(output.images[0], prompt, seed=output.seeds[0], call=SAMPLING)
        write(folder / BEST, best)


def _report(output: BestOfNOutput, prompt: str, folder: Path) -> None:
    from aigiqa_reward import get_reward_spec

    rows = {row.key: row for row in _candidates(output, prompt)}
    best = [dataclasses.replace(rows[seed], key=f"seed {seed}") for seed in output.winners[:_LISTED]]
    if best:
        emit(render(best, "table", numbered=True, terminal=sys.stdout.isatty()), saved=True)
        say("note", get_reward_spec("compact").meaning)
    say("note", f"in {folder}: {SHEET} (all candidates), {RESULTS} (their scores){f', {BEST}' if best else ''}")
    if best and len(prompt) <= _SHORT:
        settings = ", ".join(f"{name}={value}" for name, value in SAMPLING.items())
        again = (
            "import torch, aigiqa_reward; image = aigiqa_reward.load_embedded_pipeline()"
            f"({prompt!r}, {settings}, generator=torch.Generator().manual_seed({output.winners[0]})).images[0]"
        )
        say("note", f"the best again, in Python: {again}")


def _open(file: Path) -> None:
    try:
        status = typer.launch(str(file.resolve()))
    except OSError:
        status = 1
    if status != 0:
        say("warning", f"cannot open {file} here; any image viewer shows it")
