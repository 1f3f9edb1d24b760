"""`evaluate --pairs`: how often rewards agree with people's choices between two images of a prompt."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich import box
from rich.table import Table

from aigiqa_reward.cli._console import CommandError, cell, drawn, emit, jsonl
from aigiqa_reward.cli._options import OneRewardOptions
from aigiqa_reward.cli._pipelines import library, load_rewards
from aigiqa_reward.cli.commands.score import KeptRows, score_table

if TYPE_CHECKING:
    from aigiqa_reward import Reward
    from aigiqa_reward.datasets import PreferencePairs

PAIRS = {
    "imagereward": "ImageReward",
    "hpdv2": "HPDv2",
    "pickapic": "Pick-a-Pic",
    "genai_bench": "GenAI-Bench",
    "pairs": "pairs",
}
"""Names of --pairs, and the benchmarks' names in the table of rewards."""

_ABOUT = (
    "Accuracy: share of the pairs in which people's choice scores higher; where both images score the same, half a "
    "pair.\nPairs of which people prefer neither are left out. Interval: 95 %, bootstrap over prompts.\n"
)


def evaluate_pairs(
    sources: Sequence[str], rewards: Sequence[str], weights: str | None, device: str | None, batch_size: int, form: str
) -> None:
    """Print the accuracy of each reward on each benchmark; rewards are loaded one after another."""
    if not sources or not rewards:
        argument, missing = ("pairs", "--reward NAME") if sources else ("reward", "--pairs NAME:PATH")
        raise CommandError(f"needs {missing} as well", argument=argument)
    if weights is not None and len(rewards) > 1:
        raise CommandError("belongs to one reward; measure each with its weights apart", argument="weights")
    tables = {source: _read(source) for source in sources}
    records = []
    try:
        for name in rewards:
            options = OneRewardOptions(reward=(name,), weights=weights)
            reward = next(iter(load_rewards(options, device).values()))[0]
            for source, table in tables.items():
                found = _measure(reward, table, batch_size)
                records.append({"data": source, "reward": name, **found, "published": _known(name, source)})
                if form == "jsonl":
                    emit(jsonl(records[-1:]))
    finally:  # what is known is printed, whatever ended the others
        if form == "table" and records:
            emit(_table(records))
    if any(record["left_out"] for record in records):
        raise typer.Exit(1)


def _read(source: str) -> PreferencePairs:
    from aigiqa_reward.datasets import PreferencePairs, read_data

    name, _, path = source.partition(":")
    if name not in PAIRS:
        forms = ", ".join(f"{known}:PATH" for known in PAIRS)
        raise CommandError(f"expected one of {forms}, got {source!r}", argument="pairs")
    test = Path(path).expanduser() / "test.json"
    if name == "imagereward" and test.is_file():  # a folder stands for train.json where rewards are trained
        source = f"{name}:{test}"
    with library(source="pairs", folder="pairs", path="pairs", images="pairs"):
        table = read_data(source)
    assert isinstance(table, PreferencePairs)
    return table


def _measure(reward: Reward, table: PreferencePairs, batch_size: int) -> dict[str, Any]:
    """Score each image once with each of its prompts, and compare the pairs both of whose images have scores."""
    from aigiqa_reward.evaluation import pair_accuracy

    sides = [
        [(str(path), text) for path, text in zip(s, table.prompts, strict=True)] for s in (table.better, table.worse)
    ]
    images = list(dict.fromkeys(image for pair in zip(*sides, strict=True) for image in pair))  # a prompt's together
    paths, prompts = zip(*images, strict=True)
    rows = score_table(reward, paths, prompts, batch_size, KeptRows(None, None), argument="pairs")
    totals = {image: row.total for image, row in zip(images, rows, strict=True)}
    kept = [(totals[a], totals[b], a[1]) for a, b in zip(*sides, strict=True) if None not in (totals[a], totals[b])]
    if not kept:
        raise CommandError("there is no pair both of whose images could be scored", argument="pairs", status=1)
    better, worse, groups = zip(*kept, strict=True)
    found = pair_accuracy(better, worse, groups)
    return {
        "accuracy": found.estimate,
        "low": found.low,
        "high": found.high,
        "pairs": len(kept),
        "prompts": len(set(groups)),
        "ties": sum(a == b for a, b in zip(better, worse, strict=True)),
        "left_out": len(table) - len(kept),
    }


def _known(name: str, source: str) -> str | None:
    """The published accuracy of a reward on a benchmark, with its part."""
    from aigiqa_reward import get_reward_spec, list_rewards

    accuracy = get_reward_spec(name).accuracy if name in list_rewards() else ""
    found = re.search(rf"\b{PAIRS[source.partition(':')[0]]} ([^,;]*%)", accuracy)
    return found and found[1]


def _table(records: Sequence[Mapping[str, Any]]) -> str:
    counts = ("pairs", "prompts", "ties", *(("left_out",) if any(record["left_out"] for record in records) else ()))
    table = Table("benchmark", "reward", "accuracy", "95 % interval", *counts, "published", box=box.SIMPLE_HEAD)
    for record in records:
        interval = f"{record['low']:.4f} to {record['high']:.4f}"
        named = [PAIRS[record["data"].partition(":")[0]], record["reward"], record["accuracy"], interval]
        table.add_row(*map(cell, [*named, *(f"{record[name]:,}" for name in counts), record["published"]]))
    return f"{drawn(table, terminal=sys.stdout.isatty())}\n{_ABOUT}"
