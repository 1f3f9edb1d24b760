"""The command `demo`: best of N with the generator and the reward that come with the package, drawn in one picture."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from aigiqa_reward.cli import options
from aigiqa_reward.cli.files import candidate_rows, check_writable, png, write
from aigiqa_reward.cli.inputs import CommandError
from aigiqa_reward.cli.output import Format, emit, render, say
from aigiqa_reward.cli.runs import sample, usage_errors
from aigiqa_reward.cli.sampling_options import EMBEDDED_SAMPLING
from aigiqa_reward.toy.world import COLOR_NAMES, NOUNS, read_subject

if TYPE_CHECKING:
    from aigiqa_reward.sampling import BestOfNOutput

EXAMPLE = "a red apple on a blue background"

SHEET, RESULTS, BEST = "contact-sheet.png", "results.jsonl", "best.png"
"""The files of a demo's folder."""

_SOFTWARE = "aigiqa-reward demo"
"""Noted in a contact sheet, so that the next demo knows whether the files of a folder are its own to replace."""

_BATCH = 8
_LISTED = 5  # candidates in the table
_SHORT = 200  # characters of a prompt that is repeated on the terminal


def demo(
    prompt: options.SamplingPromptOption = EXAMPLE,
    n: options.DemoCandidatesOption = 16,
    seed: options.SeedOption = 0,
    out: options.DemoOutOption = Path("aigiqa-demo"),
    open_sheet: options.OpenOption = False,
) -> None:
    """Sample N small images of a prompt, pick the best, draw them all: offline, on the CPU, with what is built in."""
    if not prompt.strip() or prompt.encode(errors="ignore").decode() != prompt:
        raise CommandError(f"--prompt: expected a text, got {prompt!r}; try {EXAMPLE!r}")
    check_writable(out, option="--out")
    _check_own(out)
    _say_what_is_unknown(prompt)
    from aigiqa_reward import BestOfN, create_reward
    from aigiqa_reward.toy.pipeline import quiet_libraries

    with quiet_libraries():  # this command says itself what matters
        pipe = _load_pipeline(prompt)
        with usage_errors():
            search = BestOfN(pipe, create_reward("compact"), n=n, batch_size=_BATCH, top_k=n)
        output, failure = sample(search, prompt, seed, EMBEDDED_SAMPLING)
    if output is not None:
        _write(output, prompt, out)
        _tell(output, prompt, out)
    if output is not None and isinstance(failure, KeyboardInterrupt):
        say("error", f"interrupted: {len(output.all_seeds)} of {n} candidates")
        raise typer.Exit(130) from failure
    if failure is not None:
        raise failure
    if open_sheet:
        _open(out / SHEET)


# --------------------------------------------------------------------------------------------- before


def _check_own(folder: Path) -> None:
    """Refuse to replace files that no demo wrote."""
    from PIL import Image

    found = [name for name in (SHEET, RESULTS, BEST) if (folder / name).exists()]
    try:
        with Image.open(folder / SHEET) as sheet:
            own = sheet.info.get("Software") == _SOFTWARE
    except OSError:
        own = False
    if found and not own:
        raise CommandError(f"--out: {folder / found[0]} exists and is not of an earlier demo; choose another folder")


def _say_what_is_unknown(prompt: str) -> None:
    subject, colors = read_subject(prompt), ", ".join(COLOR_NAMES)
    if subject.noun is None:
        say("warning", f"the embedded generator knows nothing that this prompt names; try {EXAMPLE!r}")
        say("note", f"it knows {len(NOUNS)} things: {', '.join(NOUNS)}")
        say("note", f"on {len(COLOR_NAMES)} background colors: {colors}")
    elif subject.color is None:
        say("warning", f"the prompt names no background color that the embedded generator knows ({colors})")


def _load_pipeline(prompt: str) -> Any:
    from aigiqa_reward.toy.pipeline import load_embedded_pipeline
    from aigiqa_reward.utils.weights import WeightsError

    try:
        pipe: Any = load_embedded_pipeline()
    except (OSError, WeightsError) as error:
        raise CommandError(str(error), status=1) from error
    with usage_errors():
        length, most = len(pipe.tokenizer(prompt).input_ids), pipe.tokenizer.model_max_length
    if length > most:
        say("warning", f"the embedded generator reads the first {most} of the prompt's {length} tokens")
    return pipe


# --------------------------------------------------------------------------------------------- after


def _write(output: BestOfNOutput, prompt: str, folder: Path) -> None:
    from aigiqa_reward.report import contact_sheet

    write(folder / SHEET, png(contact_sheet(output, prompt), software=_SOFTWARE))
    write(folder / RESULTS, render(candidate_rows(output, prompt), Format.JSONL).encode())
    if output.images:
        write(folder / BEST, png(output.images[0]))
    else:
        (folder / BEST).unlink(missing_ok=True)  # of an earlier demo


def _tell(output: BestOfNOutput, prompt: str, folder: Path) -> None:
    rows = {row.key: row for row in candidate_rows(output, prompt)}
    best = [dataclasses.replace(rows[seed], key=f"seed {seed}") for seed in output.seeds[:_LISTED]]
    if best:
        emit(render(best, Format.TABLE, numbered=True, terminal=sys.stdout.isatty()))
    say("note", f"in {folder}: {SHEET} (all candidates), {RESULTS} (their scores){f', {BEST}' if best else ''}")
    if best and len(prompt) <= _SHORT:
        say("note", f"the best again, in Python: {_again(prompt, output.seeds[0])}")


def _again(prompt: str, seed: int) -> str:
    """The line of Python that makes a candidate's image again from its seed."""
    settings = ", ".join(f"{name}={value}" for name, value in EMBEDDED_SAMPLING.items())
    return (
        "import torch, aigiqa_reward; image = aigiqa_reward.load_embedded_pipeline()"
        f"({prompt!r}, {settings}, generator=torch.Generator().manual_seed({seed})).images[0]"
    )


def _open(file: Path) -> None:
    try:
        status = typer.launch(str(file.resolve()))
    except OSError:
        status = 1
    if status != 0:
        say("warning", f"cannot open {file} here; any image viewer shows it")
