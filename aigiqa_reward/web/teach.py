"""The tab Teach: the compact reward continues from the labels of this page."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from html import escape
from pathlib import Path
from typing import Any, Literal

import gradio

from aigiqa_reward.datasets import PreferencePairs, Split, split_rows
from aigiqa_reward.web.page import MODEL, reward_lists, says_why
from aigiqa_reward.web.studio import Studio

FEWEST = 20
"""Fewest decided choices to learn from."""


def add_tab(studio: Studio, lists: list[Any]) -> None:
    """Add the tab, which updates the lists of rewards."""
    with gradio.Tab("Teach"):
        gradio.HTML(
            "<p>Train a copy of the embedded reward on the choices made on this page. A fifth of the prompts is held "
            "out, and the agreement with the choices on them is measured before and after.</p>"
        )
        name = gradio.Textbox("mine", label="Name of the new reward", elem_id="reward-name", max_length=40)
        run = gradio.Button("Teach", variant="primary", elem_id="teach")
        status = gradio.HTML(elem_id="teach-status")

    @says_why
    def teaching(name: str) -> Iterator[Any]:
        if not re.fullmatch(r"[\w-]+", name):
            raise ValueError(f"name: expected letters, digits, _ and -, got {name!r}")
        folder = studio.taught / name
        if folder.exists():
            raise ValueError(f"name: {name} exists already; choose another one")
        pairs = studio.labels.pairs()
        if pairs is None or len(pairs) < FEWEST:
            raise ValueError(f"labels: expected at least {FEWEST} choices that prefer an image of a prompt; label more")
        studio.labels.export(studio.exported)
        command = _command(studio, folder, _mode(pairs))
        start = time.monotonic()
        training = ThreadPoolExecutor(1).submit(teach, pairs, folder)
        while not training.done():
            seconds = time.monotonic() - start
            yield {status: f"<p>Training on {len(pairs)} choices: {seconds:.0f} s.</p>{command}"}
            wait([training], timeout=2)
        updates = dict(zip(lists, reward_lists(studio, lists), strict=True))
        yield {status: training.result() + command, **updates}

    run.click(teaching, [name], [status, *lists], show_progress="minimal", **MODEL)


def _mode(pairs: PreferencePairs) -> Literal["group", "random_image"]:
    return "group" if len(set(pairs.groups)) >= 3 else "random_image"


def _command(studio: Studio, folder: Path, mode: str) -> str:
    data = f"pairs:{studio.exported}"
    command = f"aigiqa-reward train compact --init embedded --split {mode} --data {shlex.quote(data)}"
    text = escape(f"{command} --output-dir {shlex.quote(str(folder))}")
    return f"<p>The same on the command line:</p><div class='reproduce'>{text}</div>"


def teach(pairs: PreferencePairs, folder: Path) -> str:
    """Train on pairs, save the reward into a folder, and return its agreement with held-out choices in HTML."""
    from aigiqa_reward.rewards.factory import create_reward
    from aigiqa_reward.training.by_name import TrainingPlan, train_reward

    mode = _mode(pairs)
    split: Split = split_rows(pairs, mode=mode, seed=0)
    plan = TrainingPlan(name="compact", init="embedded")
    before = _measured(create_reward("compact"), pairs.subset(split.test))
    trained = train_reward(plan, pairs, split, folder, progress=False)
    after = _measured(trained.reward, pairs.subset(split.test))
    held = "other prompts" if mode == "group" else "the same prompts, since there are fewer than 3"
    return (
        f"<p id='taught'><b>{escape(folder.name)}</b> is in the lists of rewards as “taught: {escape(folder.name)}”. "
        f"Agreement with {len(split.test)} held-out choices on {held}: {before} before, {after} after.</p>"
    )


def _measured(reward: Any, pairs: PreferencePairs) -> Any:
    """Return the share of pairs whose preferred image scores higher, with its interval."""
    from aigiqa_reward.evaluation import pair_accuracy
    from aigiqa_reward.rewards.scorer import Scorer

    better, worse = (Scorer(reward).score(side, pairs.prompts).total.tolist() for side in (pairs.better, pairs.worse))
    return pair_accuracy(better, worse, pairs.groups)
