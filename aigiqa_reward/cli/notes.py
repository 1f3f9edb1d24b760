"""A note in a folder of what its training was asked for, so that another one does not go on from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aigiqa_reward.cli.files import write
from aigiqa_reward.cli.inputs import CommandError
from aigiqa_reward.utils.io import read_json

if TYPE_CHECKING:
    from aigiqa_reward.datasets import PreferencePairs, ScoredImages
    from aigiqa_reward.training.by_name import TrainingPlan

ARGUMENTS = "arguments.json"
"""The note of what a folder's training was asked for."""

RECIPE_OPTIONS = (
    "epochs",
    "batch_size",
    "learning_rate",
    "weight_decay",
    "loss",
    "rank_weight",
    "mismatch_weight",
    "patience",
    "train_towers",
)
"""Fields of a recipe that have an option."""


def describe_plan(
    plan: TrainingPlan, towers: Sequence[str], table: ScoredImages | PreferencePairs, split: str, file: Path | None
) -> dict[str, Any]:
    """What decides the outcome of a training, by argument, as JSON."""
    contents = None if file is None else hashlib.sha256(file.read_bytes()).hexdigest()
    arguments: dict[str, Any] = {
        "MODEL": plan.name,
        "--data": digest(table),
        "--split": [split, contents],
        "--seed": plan.seed,
        "--preset": plan.preset,
        "--init": plan.init,
        "--tower": sorted(towers),
        "--set": plan.settings,
    }
    for name, value in asdict(plan.chosen_recipe).items():
        arguments[f"--{name.replace('_', '-')}" if name in RECIPE_OPTIONS else f"{name} of the recipe"] = value
    return json.loads(json.dumps(arguments, default=str))


def digest(table: ScoredImages | PreferencePairs) -> str:
    """A hash of what people said of which images, wherever these lie."""
    from aigiqa_reward.datasets import ScoredImages

    found = hashlib.sha256()
    columns: tuple[Any, ...]
    if isinstance(table, ScoredImages):
        found.update(table.quality.tobytes() + table.correspondence.tobytes())
        columns = (table.names, table.prompts, table.groups)
    else:
        columns = ([path.name for path in table.better], [path.name for path in table.worse], table.prompts)
    found.update(json.dumps(columns).encode())
    return found.hexdigest()


def check_arguments(folder: Path, started: Path, arguments: Mapping[str, Any], option: str) -> None:
    """Refuse a folder in which another training has begun, or that holds a reward of another origin.

    Args:
        folder: of --out or --report.
        started: a file or folder in it that a training leaves as soon as there is anything to go on from.
        arguments: of `describe_plan`.
        option: which option named the folder.

    Raises:
        CommandError: it does; says what differs.
    """
    note = folder / ARGUMENTS
    try:
        earlier = read_json(note) if note.exists() else None
    except (OSError, ValueError) as error:
        raise CommandError(f"{option}: cannot read {note} ({error}); choose another folder") from error
    if earlier is not None and not isinstance(earlier, dict):
        raise CommandError(f"{option}: {note} holds no arguments; choose another folder")
    if earlier is None and (started.exists() or (folder / "model.safetensors").exists()):
        raise CommandError(f"{option}: {folder} holds something that this command did not write; choose another folder")
    if earlier is None or not started.exists():
        return
    names = [*earlier, *(name for name in arguments if name not in earlier)]
    other = [name for name in names if earlier.get(name) != arguments.get(name)]
    if other:
        raise CommandError(
            f"{option}: {folder} was begun with another {', '.join(other)}; give the same, or choose another folder"
        )


@contextmanager
def noted(folder: Path, started: Path, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Note the arguments of a training while it runs, and for good as soon as there is anything to go on from."""
    present = folder.is_dir()
    write(folder / ARGUMENTS, json.dumps(arguments, indent=2).encode())
    try:
        yield
    finally:
        if not started.exists():
            (folder / ARGUMENTS).unlink(missing_ok=True)
            if not present and not any(folder.iterdir()):
                folder.rmdir()
