"""What `train` and `evaluate` share: from options to a plan, the data and a device, and errors on the way."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aigiqa_reward.cli.inputs import CommandError
from aigiqa_reward.cli.output import say
from aigiqa_reward.cli.runs import usable_device, usage_errors
from aigiqa_reward.utils.io import parse_json

if TYPE_CHECKING:
    from accelerate import Accelerator

    from aigiqa_reward.datasets import PreferencePairs, ScoredImages
    from aigiqa_reward.rewards.build import TowerConfig
    from aigiqa_reward.training.by_name import TrainingPlan

_OPEN_CLIP_ROLES = {
    "mst_clipiqa": ("coarse", "fine"),
    "tsp_mgs": ("clip",),
    "cpa_iqa": ("clip",),
    "ma_agiqa": ("matcher",),
}
"""Towers that an open_clip model can be; the others read more than it has."""

_LISTED = 10  # unreadable images


# --------------------------------------------------------------------------------------------- the plan


def make_plan(
    model: str,
    preset: str | None,
    init: str | None,
    towers: Sequence[str],
    settings: Sequence[str],
    seed: int,
    cache: Path | None,
    max_store_gb: float | None,
    recipe: Mapping[str, Any],
) -> TrainingPlan:
    """The training that the options describe.

    Args:
        model: its name.
        preset: None or "paper".
        init: None, "embedded", or a saved reward.
        towers: ROLE=ARCH[:WEIGHTS] each.
        settings: KEY=VALUE each.
        seed: of weights and order.
        cache: of features; None is the usual one.
        max_store_gb: None is the usual one.
        recipe: fields of it; None leaves the recipe's own, and 0 for patience is none. Any patience keeps the best
            epoch.

    Raises:
        CommandError: unknown names, or options that do not go together.
    """
    chosen = parse_settings(settings)
    with usage_errors():
        from aigiqa_reward import get_reward_spec
        from aigiqa_reward.training.by_name import TrainingPlan

        get_reward_spec(model)
        plan = TrainingPlan(
            name=model,
            preset=preset,
            towers=_towers(model, towers),
            settings=chosen,
            init=init,
            seed=seed,
        )
        given: dict[str, Any] = {name: value for name, value in recipe.items() if value is not None}
        if "patience" in given:
            given |= {"patience": given["patience"] or None, "keep": "best"}
        plan = replace(plan, recipe=replace(plan.chosen_recipe, **given))
    if cache is not None:
        plan = replace(plan, cache=cache.expanduser())
    return plan if max_store_gb is None else replace(plan, max_bytes=int(max_store_gb * 1e9))


def parse_settings(given: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE, each value as JSON or, where it is none, as a text.

    Raises:
        CommandError: another form, or a key twice.
    """
    settings: dict[str, Any] = {}
    for item in given:
        key, value = _assigned(item, "--set", "KEY=VALUE")
        if key in settings:
            raise CommandError(f"--set: got {key} twice")
        try:
            settings[key] = parse_json(value)
        except ValueError:
            settings[key] = value
    return settings


def _towers(model: str, given: Sequence[str]) -> dict[str, TowerConfig]:
    from aigiqa_reward.encoders.open_clip import OpenCLIPConfig

    towers: dict[str, TowerConfig] = {}
    for item in given:
        role, tower = _assigned(item, "--tower", "ROLE=ARCH[:WEIGHTS]")
        possible = _OPEN_CLIP_ROLES.get(model, ())
        if role not in possible:
            place = f"as {' or '.join(possible)}" if possible else "nowhere"
            raise CommandError(
                f"--tower: {model} takes an open_clip model {place}, got {role!r}; other towers are given in "
                "Python, to aigiqa_reward.benchmark.TrainingPlan"
            )
        if role in towers:
            raise CommandError(f"--tower: got {role} twice")
        if tower.startswith(("local-dir:", "hf-hub:")):
            architecture, weights = tower, ""
        else:
            architecture, _, weights = tower.partition(":")
        towers[role] = OpenCLIPConfig(architecture=architecture, pretrained=weights or None)
    return towers


def _assigned(item: str, option: str, form: str) -> tuple[str, str]:
    key, equals, value = item.partition("=")
    if not equals or not key.strip() or not value:
        raise CommandError(f"{option}: expected {form}, got {item!r}")
    return key.strip(), value


# --------------------------------------------------------------------------------------------- data and device


def read(data: str) -> ScoredImages | PreferencePairs:
    """The data that --data names.

    Raises:
        CommandError: there is no such data, or it cannot be read.
    """
    from aigiqa_reward.datasets import read_data

    try:
        with usage_errors():
            return read_data(data)
    except (ImportError, OSError) as error:
        raise CommandError(f"--data: {error}") from error


def parse_split(split: str, modes: Sequence[str]) -> tuple[str, Path | None]:
    """A way to split and, of csv:FILE, the file.

    Raises:
        CommandError: neither one of `modes` nor csv:FILE with a file.
    """
    mode, colon, file = split.partition(":")
    if (mode == "csv") != bool(file) or (colon and mode != "csv") or mode not in (*modes, "csv"):
        raise CommandError(f"--split: expected {', '.join(modes)} or csv:FILE, got {split!r}")
    path = Path(file).expanduser() if file else None
    if path is not None and not path.is_file():
        raise CommandError(f"--split: expected a CSV file with the columns name and split, found none at {path}")
    return mode, path


def make_accelerator(device: str | None, precision: str | None) -> Accelerator:
    """Accelerate's hold on device, precision and processes.

    Raises:
        CommandError: a device or precision that cannot be had here.
    """
    from accelerate import Accelerator

    if device not in (None, "cpu"):
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise CommandError(f"--device: each of several processes takes a device of its own; leave out {device!r}")
        os.environ["ACCELERATE_TORCH_DEVICE"] = usable_device(device)  # where Accelerate looks for a choice
    with usage_errors():
        accelerator = Accelerator(cpu=device == "cpu", mixed_precision=precision)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":  # Accelerate would ignore it
        raise CommandError("--mixed-precision: fp16 is not for the CPU; take bf16 or no")
    return accelerator


@contextmanager
def file_errors() -> Iterator[None]:
    """Around trainings: what the disk or the network refuses ends the command, without a traceback."""
    try:
        yield
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        text = "; ".join([f"{place}{error.strerror or error}", *getattr(error, "__notes__", [])])
        raise CommandError(text, status=1) from error


def report_unreadable(entries: Sequence[tuple[str, str]], place: Path) -> None:
    """Say which images were left out, and why; `place` lists all."""
    for path, reason in entries[:_LISTED]:
        say("error", reason if reason.startswith(f"{path}: ") else f"{path}: {reason}")
    if entries:
        rest = f"; the others are listed in {place}" if len(entries) > _LISTED else ""
        were = "1 image could not be read and was" if len(entries) == 1 else f"{len(entries)} images could not be read"
        say("error", f"{were}{'' if len(entries) == 1 else ' and were'} left out{rest}")
