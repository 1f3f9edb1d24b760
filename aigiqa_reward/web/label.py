"""The tab Label: choices between pairs and ratings of images, by several raters."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

import gradio

from aigiqa_reward.web.labels import Pair
from aigiqa_reward.web.page import MODEL, bar, reward_list, says_why
from aigiqa_reward.web.studio import SAMPLED, Studio

_ANSWERS = {"left": "← Left", "right": "Right →", "tie": "↑ Tie", "bad": "↓ Both bad", "undo": "Undo (u)"}
_ORDERS = ("least sure first", "random")


class _Task:
    """What a rater sees of a folder, in order; the same for all who chose alike."""

    def __init__(self, studio: Studio, mode: str, folder: str, prompt: str, reward: str, order: str) -> None:
        images = studio.images(folder, prompt)
        if mode == "ratings":
            random.Random(0).shuffle(images)
        self.table: Any = "choices" if mode == "pairs" else "ratings"
        units = (
            studio.pairs(images, order, reward) if mode == "pairs" else [Pair(text, path, "") for path, text in images]
        )
        self.units = {hashlib.sha256(repr(unit).encode()).hexdigest()[:16]: unit for unit in units}

    def next(self, studio: Studio, rater: str) -> str:
        """Return the key of the first unit that a rater has not labeled, or ""."""
        done = studio.labels.done(rater, self.table)
        return next((key for key, unit in self.units.items() if self._row(unit) not in done), "")

    def _row(self, unit: Pair) -> tuple[str, ...]:
        both = (unit.prompt, unit.first, unit.second)
        return both if self.table == "choices" else both[:2]

    def key(self, row: Sequence[str]) -> str:
        """Return the key of a labeled unit, or "" if it is not of this task."""
        return next((key for key, unit in self.units.items() if self._row(unit) == tuple(row)), "")


def swapped(rater: str, key: str) -> bool:
    """Return whether a rater sees a pair's first image on the right: by chance, and always the same."""
    return hashlib.sha256(f"{rater} {key}".encode()).digest()[0] % 2 == 1


def add_tab(studio: Studio, page: Any) -> list[Any]:
    """Add the tab, and return its lists of rewards."""
    tasks: dict[tuple[str, ...], _Task] = {}
    with gradio.Tab("Label"):
        kept = gradio.BrowserState(None, storage_key="aigiqa-reward-label", secret="aigiqa-reward")
        with gradio.Accordion("What to label", open=True) as setup:
            with gradio.Row():
                rater = gradio.Textbox(label="Your name", elem_id="rater", min_width=120, max_length=80)
                mode = gradio.Radio(["pairs", "ratings"], value="pairs", label="Label", min_width=120)
                folder = gradio.Dropdown(
                    [*studio.folders], value=next(iter(studio.folders)), label="Folder", min_width=120
                )
            with gradio.Row():
                prompt = gradio.Textbox(label="Prompt of images without a text file", min_width=120)
                reward = reward_list(studio)
                order = gradio.Radio(list(_ORDERS), value=_ORDERS[0], label="Order", min_width=120)
            start = gradio.Button("Start", variant="primary", elem_id="start")
        status = gradio.HTML(elem_id="label-status")
        shown = gradio.Textbox(visible="hidden")  # what the browser shows, not what the server believes
        with gradio.Column(visible=False, elem_id="pair") as pair_view, gradio.Row():
            sides = [
                gradio.Image(
                    show_label=False, buttons=[], interactive=False, height=380, elem_id=f"side-{side}", min_width=150
                )
                for side in ("left", "right")
            ]
        with gradio.Row(visible=False, elem_id="answers") as pair_answers:
            answers = {
                name: gradio.Button(text, elem_id=f"answer-{name}", min_width=90) for name, text in _ANSWERS.items()
            }
        with gradio.Column(visible=False) as rating_view:
            image = gradio.Image(show_label=False, buttons=[], interactive=False, height=380)
            quality = gradio.Slider(1, 5, value=3, step=0.5, label="Quality", elem_id="quality")
            match = gradio.Slider(1, 5, value=3, step=0.5, label="Correspondence to the prompt", elem_id="match")
            with gradio.Row():
                save, undo_rating = gradio.Button("Save", variant="primary", elem_id="save"), gradio.Button("Undo")
        with gradio.Accordion("Sample new images to label", open=False):
            prompts = gradio.Textbox(label="Prompts, one per line", lines=3, elem_id="sample-prompts")
            with gradio.Row():
                count = gradio.Slider(2, 8, value=2, step=1, label="Images per prompt")
                steps = gradio.Slider(1, 100, value=studio.sampling[0], step=1, label="Steps")
                scale = gradio.Slider(1, 20, value=studio.sampling[1], label="Guidance scale")
                seed = gradio.Number(0, precision=0, minimum=0, label="First seed")
            sample, sampled = gradio.Button("Sample", elem_id="sample"), gradio.HTML()
        with gradio.Row():
            export, exported = (
                gradio.Button("Export labels", elem_id="export"),
                gradio.File(visible=False, label="Labels"),
            )

    def task_of(setting: Sequence[str]) -> _Task:
        key = tuple(setting[1:])
        if key not in tasks:
            tasks[key] = _Task(studio, *key)
        return tasks[key]

    def view(setting: Sequence[str], key: str, note: str = "") -> dict[Any, Any]:
        """Return what shows a unit, or that there is none left."""
        who, how, task = setting[0], setting[1], task_of(setting)
        text = _status(studio, setting, len(task.units), len(studio.labels.done(who, task.table) & _rows(task))) + note
        places = {pair_view: how == "pairs" and key, pair_answers: how == "pairs", rating_view: how != "pairs" and key}
        views = {place: gradio.update(visible=bool(seen)) for place, seen in places.items()}
        if not key:
            return {status: "<p><b>Everything in this folder is labeled.</b></p>" + text, shown: "", **views}
        unit = task.units[key]
        heading = f"<p><b>{escape(unit.prompt) or 'Which image is better?'}</b></p>"
        both = (unit.second, unit.first) if swapped(who, key) else (unit.first, unit.second)
        if how == "pairs":
            views |= zip(sides, both, strict=True)
        else:
            views |= {image: unit.first, match: gradio.update(visible=bool(unit.prompt))}
        return {status: heading + text, shown: key, **views}

    @says_why
    def starting(*setting: str) -> Iterator[Any]:
        if not setting[0].strip():
            raise ValueError("Your name: expected a text, so that labels of several raters can be told apart")
        _, how, folder, prompt, reward, order = setting
        if how == "pairs" and order == _ORDERS[0]:
            images = studio.images(folder, prompt)
            for found in studio.score(reward, images):
                yield {status: bar(len(found), len(images), f"{reward}: scored")}
        tasks.pop(tuple(setting[1:]), None)  # files may have come
        yield {
            kept: list(setting),
            setup: gradio.update(open=False),
            **view(setting, task_of(setting).next(studio, setting[0])),
        }

    @says_why
    def resuming(setting: list[str] | None) -> Iterator[Any]:
        if not setting or setting[2] not in studio.folders or setting[4] not in studio.reward_names:
            yield {setup: gradio.update(open=True)}
            return
        fields = dict(zip((rater, mode, folder, prompt, reward, order), setting, strict=True))
        yield {**fields, setup: gradio.update(open=False), **view(setting, task_of(setting).next(studio, setting[0]))}

    def answering(name: str) -> Any:
        @says_why
        def answer(setting: list[str], key: str) -> Iterator[Any]:
            task = task_of(setting)
            if unit := task.units.get(key):
                left = "second" if swapped(setting[0], key) else "first"
                choice: Any = {"left": left, "right": "second" if left == "first" else "first"}.get(name, name)
                studio.labels.choose(setting[0], unit, choice)
            yield view(setting, task.next(studio, setting[0]))

        return answer

    @says_why
    def rating(setting: list[str], key: str, quality: float, match: float) -> Iterator[Any]:
        task = task_of(setting)
        if unit := task.units.get(key):
            studio.labels.rate(setting[0], unit.prompt, unit.first, quality, match if unit.prompt else None)
        yield view(setting, task.next(studio, setting[0]))

    @says_why
    def undoing(setting: list[str]) -> Iterator[Any]:
        task = task_of(setting)
        removed = studio.labels.undo(setting[0], task.table)
        yield view(
            setting,
            (task.key(removed) if removed else "") or task.next(studio, setting[0]),
            "" if removed else "<p>Nothing to undo.</p>",
        )

    @says_why
    def sampling(prompts: str, count: int, steps: int, scale: float, seed: int) -> Iterator[Any]:
        texts = [line.strip() for line in prompts.splitlines() if line.strip()]
        if not texts:
            raise ValueError("Prompts: expected at least one line, got none")
        settings = {"num_inference_steps": steps, "guidance_scale": scale}
        for done in studio.sample(texts, int(count), int(seed), **settings):
            yield bar(done, len(texts) * int(count), "sampled")
        yield f"<p>{len(texts) * int(count)} images are in the folder “{SAMPLED}”; select it above and start.</p>"

    @says_why
    def exporting() -> Iterator[Any]:
        files = studio.labels.export(studio.output_dir / "labels")
        if not files:
            raise ValueError("labels: there are none to export yet")
        yield gradio.update(value=[str(file) for file in files], visible=True)

    setting = [rater, mode, folder, prompt, reward, order]
    views = [status, shown, pair_view, rating_view, pair_answers, *sides, image, match]
    start.click(starting, setting, [kept, setup, *views], show_progress_on=status, **MODEL)
    page.load(resuming, [kept], [*setting, setup, *views], show_progress="hidden")
    for name in ("left", "right", "tie", "bad"):
        answers[name].click(answering(name), [kept, shown], views, show_progress="hidden", concurrency_limit=16)
    gradio.on([answers["undo"].click, undo_rating.click], undoing, [kept], views, show_progress="hidden")
    save.click(rating, [kept, shown, quality, match], views, show_progress="hidden")
    sample.click(sampling, [prompts, count, steps, scale, seed], [sampled], **MODEL)
    export.click(exporting, None, [exported])
    return [reward]


def _rows(task: _Task) -> set[tuple[str, ...]]:
    return {task._row(unit) for unit in task.units.values()}


def _status(studio: Studio, setting: Sequence[str], total: int, done: int) -> str:
    """Return the progress, the raters, and their agreement with each other and with the reward."""
    raters = ", ".join(f"{escape(name)} {c + r}" for name, (c, r) in studio.labels.counts().items())
    agreed, compared = studio.agreement(setting[4])
    alphas = [f"{name} {a:.2f}" for name, a in studio.labels.alphas().items() if not math.isnan(a)]
    parts = [f"labels by rater: {raters}"] if raters else []
    parts += [f"agreement between raters (alpha): {', '.join(alphas)}"] if alphas else []
    parts += [f"{escape(setting[4])} agrees with {agreed} of {compared} choices"] if compared else []
    return bar(done, total, f"{setting[0]}: labeled") + f"<p id='agreement'>{' · '.join(parts)}</p>"
