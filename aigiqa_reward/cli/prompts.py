"""Prompts to sample from: given one by one, or in a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from aigiqa_reward.cli.inputs import CommandError, read_text
from aigiqa_reward.cli.output import say
from aigiqa_reward.cli.runs import first_process
from aigiqa_reward.utils.io import parse_json


def gather_prompts(given: Sequence[str] | None, file: Path | None) -> list[str]:
    """The prompts of --prompt or of --prompts.

    Raises:
        CommandError: none, both kinds, a blank one, or a file that cannot be used.
    """
    if bool(given) == (file is not None):
        got = "both" if given else "none"
        raise CommandError(f"--prompt, --prompts: expected one of them, got {got}")
    if file is None:
        assert given, "checked above"
        for text in given:
            if not text.strip() or text.encode(errors="ignore").decode() != text:
                raise CommandError(f"--prompt: expected a text, got {text!r}")
        return list(given)
    return read_prompts(file, "--prompts")


def read_prompts(file: Path, option: str) -> list[str]:
    """The prompts of a file: one a line, or of JSON Lines.

    Raises:
        CommandError: a file that cannot be used, or without prompts.
    """
    as_json = file.suffix.lower() in (".jsonl", ".ndjson")
    found = list(_from_json(file, option)) if as_json else read_text(file, option).removesuffix("\n").split("\n")
    prompts = [text.strip() for text in found if text.strip()]
    if not prompts:
        raise CommandError(f"{option}: {file} holds no prompt; write one a line")
    blank = len(found) - len(prompts)
    if blank and first_process():
        say("note", f"{blank} blank {'line' if blank == 1 else 'lines'} of {file} left out")
    return prompts


def _from_json(file: Path, option: str) -> Iterator[str]:
    for number, line in enumerate(read_text(file, option).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row: Any = parse_json(line)
        except ValueError as error:
            raise CommandError(f"{option}: {file}, line {number}: not JSON ({error})") from error
        text = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(text, str) or text.encode(errors="ignore").decode() != text:
            raise CommandError(f'{option}: {file}, line {number}: expected {{"prompt": "..."}}, got {line[:80]}')
        yield text
