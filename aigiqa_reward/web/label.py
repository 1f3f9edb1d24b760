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

    @property
    def rows(self) -> set[tuple[str, ...]]:
        """What the labels of all units are found by."""
        return {self._row(unit) for unit in self.units.values()}

    def key(self, row: Sequence[str]) -> str:
        """Return the key of a labeled unit, or "" if it is not of this task."""
        return next((key for key, unit in self.units.items() if self._row(unit) == tuple(row)), "")


def swapped(rater: str, key: str) -> bool:
    """Return whether a rater sees a pair's first image on the right: by chance, and always the same."""
    return hashlib.sha256(f"{rater} {key}".encode()).digest()[0] % 2 == 1


def add_tab(studio: Studio, page: Any, kept: Any) -> list[Any]:
    """Add the tab, and return its lists of rewards; `kept`, outside of all tabs, survives a reload."""
    with gradio.Tab("Label"):
        return [_LabelTab(studio, page, kept).reward]


class _LabelTab:
    """Components of the tab, and what they do; a setting is rater, mode, folder, prompt, reward and order."""

    def __init__(self, studio: Studio, page: Any, kept: Any) -> None:
        self.studio = studio
        self.tasks: dict[tuple[str, ...], _Task] = {}
        self.kept = kept
        self.add_setup()
        self.status = gradio.HTML(elem_id="label-status")
        self.shown = gradio.Textbox(visible="hidden")  # what the browser shows, not what the server believes
        self.add_answers()
        self.add_ratings()
        self.add_samples()
        with gradio.Row():
            export = gradio.Button("Export labels", elem_id="export")
            exported = gradio.File(visible=False, label="Labels")
        self.views = [self.status, self.shown, self.pair_view, self.rating_view, self.pair_answers]
        self.views += [*self.sides, self.image, self.match]
        self.start.click(
            self.starting, self.setting, [self.kept, self.setup, *self.views], show_progress_on=self.status, **MODEL
        )
        page.load(self.resuming, [self.kept], [*self.setting, self.setup, *self.views], show_progress="hidden")
        quick: dict[str, Any] = {"outputs": self.views, "show_progress": "hidden", "trigger_mode": "multiple"}
        for name in ("left", "right", "tie", "bad"):
            self.answers[name].click(self.answering(name), [self.kept, self.shown], **quick)
        gradio.on([self.answers["undo"].click, self.undo_rating.click], self.undoing, [self.kept], **quick)
        self.save.click(self.rating, [self.kept, self.shown, self.quality, self.match], **quick)
        export.click(self.exporting, None, [exported])

    # ------------------------------------------------------------------------------------------ layout

    def add_setup(self) -> None:
        folders = list(self.studio.folders)
        narrow: dict[str, Any] = {"min_width": 120}
        with gradio.Accordion("What to label", open=True) as self.setup:
            with gradio.Row():
                rater = gradio.Textbox(label="Your name", elem_id="rater", max_length=80, **narrow)
                mode = gradio.Radio(["pairs", "ratings"], value="pairs", label="Label", **narrow)
                folder = gradio.Dropdown(folders, value=folders[0], label="Folder", **narrow)
            with gradio.Row():
                prompt = gradio.Textbox(label="Prompt of images without one", **narrow)
                self.reward = reward_list(self.studio)
                order = gradio.Radio(list(_ORDERS), value=_ORDERS[0], label="Order", **narrow)
            self.start = gradio.Button("Start", variant="primary", elem_id="start")
        self.setting = [rater, mode, folder, prompt, self.reward, order]

    def add_answers(self) -> None:
        plain: dict[str, Any] = {"show_label": False, "buttons": [], "interactive": False, "height": 380}
        with gradio.Column(visible=False, elem_id="pair") as self.pair_view, gradio.Row():
            self.sides = [gradio.Image(elem_id=f"side-{side}", min_width=150, **plain) for side in ("left", "right")]
        with gradio.Row(visible=False, elem_id="answers") as self.pair_answers:
            self.answers = {
                name: gradio.Button(text, elem_id=f"answer-{name}", min_width=90) for name, text in _ANSWERS.items()
            }

    def add_ratings(self) -> None:
        with gradio.Column(visible=False) as self.rating_view:
            self.image = gradio.Image(show_label=False, buttons=[], interactive=False, height=380)
            self.quality = gradio.Slider(1, 5, value=3, step=0.5, label="Quality", elem_id="quality")
            self.match = gradio.Slider(1, 5, value=3, step=0.5, label="Correspondence to the prompt", elem_id="match")
            with gradio.Row():
                self.save = gradio.Button("Save", variant="primary", elem_id="save")
                self.undo_rating = gradio.Button("Undo")

    def add_samples(self) -> None:
        with gradio.Accordion("Sample new images to label", open=False):
            prompts = gradio.Textbox(label="Prompts, one per line", lines=3, elem_id="sample-prompts")
            with gradio.Row():
                count = gradio.Slider(2, 8, value=2, step=1, label="Images per prompt")
                steps = gradio.Slider(1, 100, value=self.studio.sampling[0], step=1, label="Steps")
                scale = gradio.Slider(1, 20, value=self.studio.sampling[1], label="Guidance scale")
                seed = gradio.Number(0, precision=0, minimum=0, label="First seed")
            sample, sampled = gradio.Button("Sample", elem_id="sample"), gradio.HTML()
        sample.click(self.sampling, [prompts, count, steps, scale, seed], [sampled], **MODEL)

    # ------------------------------------------------------------------------------------------ handlers

    def task_of(self, setting: Sequence[str]) -> _Task:
        key = tuple(setting[1:])
        if key not in self.tasks:
            self.tasks[key] = _Task(self.studio, *key)
        return self.tasks[key]

    def next(self, setting: Sequence[str]) -> dict[Any, Any]:
        return self.view(setting, self.task_of(setting).next(self.studio, setting[0]))

    def view(self, setting: Sequence[str], key: str) -> dict[Any, Any]:
        """Return what shows a unit, or that there is none left."""
        who, how, task = setting[0], setting[1], self.task_of(setting)
        done = len(self.studio.labels.done(who, task.table) & task.rows)
        text = _status(self.studio, setting, len(task.units), done)
        pairs = how == "pairs"
        places = {self.pair_view: pairs and key, self.pair_answers: pairs, self.rating_view: not pairs and key}
        views: dict[Any, Any] = {place: gradio.update(visible=bool(seen)) for place, seen in places.items()}
        if not key:
            done_text = "<p><b>Everything in this folder is labeled.</b></p>"
            return {self.status: done_text + text, self.shown: "", **views}
        unit = task.units[key]
        heading = f"<p><b>{escape(unit.prompt) or 'Which image is better?'}</b></p>"
        both = (unit.second, unit.first) if swapped(who, key) else (unit.first, unit.second)
        if pairs:
            views |= zip(self.sides, both, strict=True)
        else:
            views |= {self.image: unit.first, self.match: gradio.update(visible=bool(unit.prompt))}
        return {self.status: heading + text, self.shown: key, **views}

    @says_why
    def starting(self, *setting: str) -> Iterator[Any]:
        rater, mode, folder, prompt, reward, order = setting
        if not rater.strip():
            raise ValueError("Your name: expected a text, which separates the labels of several raters")
        if mode == "pairs" and order == _ORDERS[0]:
            images = self.studio.images(folder, prompt)
            for found in self.studio.score(reward, images):
                yield {self.status: bar(len(found), len(images), f"{reward}: scored")}
        self.tasks.pop(tuple(setting[1:]), None)  # files may have come
        yield {self.kept: list(setting), self.setup: gradio.update(open=False), **self.next(setting)}

    @says_why
    def resuming(self, setting: list[str] | None) -> Iterator[Any]:
        if not setting or setting[2] not in self.studio.folders or setting[4] not in self.studio.reward_names:
            yield {self.setup: gradio.update(open=True)}
            return
        fields = dict(zip(self.setting, setting, strict=True))
        yield {**fields, self.setup: gradio.update(open=False), **self.next(setting)}

    def answering(self, name: str) -> Any:
        @says_why
        def answer(setting: list[str], key: str) -> Iterator[Any]:
            if unit := self.task_of(setting).units.get(key):
                left = "second" if swapped(setting[0], key) else "first"
                choice: Any = {"left": left, "right": "second" if left == "first" else "first"}.get(name, name)
                self.studio.labels.choose(setting[0], unit, choice)
            yield self.next(setting)

        return answer

    @says_why
    def rating(self, setting: list[str], key: str, quality: float, match: float) -> Iterator[Any]:
        if unit := self.task_of(setting).units.get(key):
            self.studio.labels.rate(setting[0], unit.prompt, unit.first, quality, match if unit.prompt else None)
        yield self.next(setting)

    @says_why
    def undoing(self, setting: list[str]) -> Iterator[Any]:
        task = self.task_of(setting)
        removed = self.studio.labels.undo(setting[0], task.table)
        key = task.key(removed) if removed else ""
        yield self.view(setting, key) if key else self.next(setting)

    @says_why
    def sampling(self, prompts: str, count: int, steps: int, scale: float, seed: int) -> Iterator[Any]:
        texts = [line.strip() for line in prompts.splitlines() if line.strip()]
        if not texts:
            raise ValueError("Prompts: expected at least one line, got none")
        settings = {"num_inference_steps": int(steps), "guidance_scale": scale}
        total = len(texts) * int(count)
        for done in self.studio.sample(texts, int(count), int(seed), **settings):
            yield bar(done, total, "sampled")
        yield f"<p>{total} images are in the folder “{SAMPLED}”; select it above and start.</p>"

    @says_why
    def exporting(self) -> Iterator[Any]:
        files = self.studio.labels.export(self.studio.exported)
        if not files:
            raise ValueError("labels: there are none to export yet")
        yield gradio.update(value=[str(file) for file in files], visible=True)


def _status(studio: Studio, setting: Sequence[str], total: int, done: int) -> str:
    """Return the progress, the raters, and their agreement with each other and with the reward."""
    raters = ", ".join(f"{escape(name)} {c + r}" for name, (c, r) in studio.labels.counts().items())
    agreed, compared = studio.agreement(setting[4])
    alphas = [f"{name} {a:.2f}" for name, a in studio.labels.alphas().items() if not math.isnan(a)]
    parts = [f"labels by rater: {raters}"] if raters else []
    parts += [f"agreement between raters (alpha): {', '.join(alphas)}"] if alphas else []
    parts += [f"{escape(setting[4])} agrees with {agreed} of {compared} choices"] if compared else []
    return bar(done, total, f"{setting[0]}: labeled") + f"<p id='agreement'>{' · '.join(parts)}</p>"
