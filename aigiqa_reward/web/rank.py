"""The tab Rank: images best first, bars per aspect, heat maps, and two rewards side by side."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, fields, replace
from html import escape
from pathlib import Path
from typing import Any

import gradio

from aigiqa_reward.utils.io import csv_text
from aigiqa_reward.web.page import MODEL, bar, number, reward_list, says_why
from aigiqa_reward.web.studio import IMAGES, MOST_IMAGES, PROMPTS, Score, Studio, with_prompt

_ASPECTS = ("total", "quality", "correspondence")
_SHOWN = 20  # disagreements


def add_tab(studio: Studio) -> list[Any]:
    """Add the tab, and return its lists of rewards."""
    with gradio.Tab("Rank"):
        tab = _RankTab(studio)
    return [tab.first, tab.second]


class _RankTab:
    """Components of the tab, and what they do."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        with gradio.Row():
            with gradio.Column():
                several: dict[str, Any] = {"file_count": "multiple", "file_types": ["image"]}
                files = gradio.File(label="Images", height=120, elem_id="files", **several)
                whole = gradio.UploadButton("All images of a folder", file_count="directory", size="sm")
                folder = gradio.Dropdown(["none", *studio.folders], value="none", label="or folder", min_width=120)
            with gradio.Column():
                prompt = gradio.Textbox(label="Prompt (none: quality alone)", lines=2, elem_id="rank-prompt")
                source = gradio.Dropdown(list(PROMPTS), value=PROMPTS[0], label="Prompts from", min_width=120)
                with gradio.Row():
                    self.first = reward_list(studio)
                    self.second = reward_list(studio, "Second reward", second=True)
                run = gradio.Button("Rank", variant="primary", elem_id="rank")
        self.status = gradio.HTML(elem_id="rank-status")
        self.shown = gradio.State([])
        with gradio.Row():
            self.best = gradio.Gallery(columns=3, label="Best first", elem_id="ranked", buttons=[])
            self.other = gradio.Gallery(columns=3, visible=False, buttons=[])
            self.heat = gradio.Image(label="Heat map", visible=False, buttons=[], height=380, elem_id="heat")
        self.table = gradio.HTML(elem_id="rank-table")
        with gradio.Row():
            self.downloads = [gradio.DownloadButton(f"Download {kind}", visible=False) for kind in ("CSV", "JSONL")]
        outputs = [self.status, self.shown, self.best, self.other, self.heat, self.table, *self.downloads]
        inputs = [files, folder, prompt, self.first, self.second, source]
        whole.upload(_only_images, whole, files)
        run.click(self.ranking, inputs, outputs, show_progress_on=self.status, **MODEL)
        self.best.select(self.heating, [self.shown], [self.heat], **MODEL)

    @says_why
    def ranking(
        self, files: Sequence[str] | None, folder: str, prompt: str, first: str, second: str, source: str
    ) -> Iterator[Any]:
        paths = [*(files or ()), *([] if folder == "none" else self.studio.files(folder))]
        if not paths:
            raise ValueError(f"images: expected some, ending in {', '.join(IMAGES)}, got none; drop files, or a folder")
        if len(paths) > MOST_IMAGES:
            raise ValueError(f"images: expected at most {MOST_IMAGES}, got {len(paths)}; use aigiqa-reward rank")
        known = [with_prompt(path, prompt, source) for path in paths]
        failed, raw = [each for each in known if each.error], {each.path: each.raw_prompt for each in known}
        images = [(each.path, each.prompt) for each in known if each.error is None]
        ranked: dict[str, list[Score]] = {}
        for name in dict.fromkeys(name for name in (first, second) if name != "none"):
            for found in self.studio.score(name, images):
                scores = [replace(each, raw_prompt=raw[each.path]) for each in found]
                ranked[name] = sorted([*scores, *failed], key=_order)
                yield {self.status: bar(len(found), len(images), f"{name}: scored")}
        both = len(ranked) > 1
        files_of = zip(self.downloads, _written(ranked[first]), strict=True)
        label = f"{first}: best first; click for a heat map"
        yield {
            self.status: _failures(ranked[first]),
            self.shown: [first, ranked[first]],
            self.best: gradio.update(value=_gallery(ranked[first]), label=label),
            self.other: gradio.update(visible=both, value=_gallery(ranked.get(second, [])), label=second),
            self.heat: gradio.update(visible=False),
            self.table: _bars(ranked[first]) + (_disagreements(ranked) if both else ""),
            **{button: gradio.update(value=file, visible=True) for button, file in files_of},
        }

    @says_why
    def heating(self, shown: list[Any], event: gradio.SelectData) -> Iterator[Any]:
        name, scores = shown
        score = [score for score in scores if score.error is None][event.index]
        yield gradio.update(value=_heat(self.studio, name, score), visible=True)


def _order(score: Score) -> tuple[bool, float]:
    return score.total is None, -(score.total or 0.0)


def _gallery(scores: Sequence[Score]) -> list[tuple[str, str]]:
    known = (score for score in scores if score.error is None)
    return [(s.path, f"{place}. {Path(s.path).name}  {number(s.total)}") for place, s in enumerate(known, start=1)]


def _failures(scores: Sequence[Score]) -> str:
    failed = [score for score in scores if score.error is not None]
    lines = "".join(f"<li>{escape(Path(s.path).name)}: {escape(s.error or '')}</li>" for s in failed[:_SHOWN])
    return f"<p>{len(scores) - len(failed)} images scored</p>" + (f"<ul>{lines}</ul>" if failed else "")


def _bars(scores: Sequence[Score]) -> str:
    """Return a table of scores, each with a bar between the lowest and the highest, or 0 and 1."""
    known = [score for score in scores if score.error is None]
    values = [v for s in known for name in _ASPECTS if (v := getattr(s, name)) is not None]
    low, high = min([0.0, *values]), max([1.0, *values])
    rows = []
    for place, score in enumerate(known, start=1):
        cells = ""
        for name in _ASPECTS:
            value = getattr(score, name)
            share = 0.0 if value is None else 100 * (value - low) / (high - low)
            cells += f"<td class='bar' style='--share: {share:.1f}%'>{number(value)}</td>"
        rows.append(f"<tr><td>{place}</td><td>{escape(Path(score.path).name)}</td>{cells}</tr>")
    heads = "".join(f"<th>{name}</th>" for name in ("", "image", *_ASPECTS))
    return f"<table class='bars'><tr>{heads}</tr>{''.join(rows)}</table>"


def _disagreements(ranked: dict[str, list[Score]]) -> str:
    """Return the images whose places differ most."""
    (a, first), (b, second) = ranked.items()
    places = [{s.path: place for place, s in enumerate(scores, start=1)} for scores in (first, second)]
    both = sorted(places[0], key=lambda path: -abs(places[0][path] - places[1][path]))
    rows = [
        f"<tr><td>{escape(Path(path).name)}</td><td>{places[0][path]}</td><td>{places[1][path]}</td></tr>"
        for path in both[:_SHOWN]
        if places[0][path] != places[1][path]
    ]
    heads = f"<th>largest disagreements</th><th>place by {escape(a)}</th><th>place by {escape(b)}</th>"
    return f"<table class='bars' id='disagreements'><tr>{heads}</tr>{''.join(rows)}</table>"


def _heat(studio: Studio, name: str, score: Score) -> Any:
    from aigiqa_reward import images as pixels
    from aigiqa_reward.report import draw_heat_maps, heat_maps

    image = pixels.load(score.path)[None]
    heat = heat_maps(studio.reward(name), image, score.prompt or None)
    return (draw_heat_maps(image, heat)[0].permute(1, 2, 0).numpy() * 255).round().astype("uint8")


def _only_images(paths: Sequence[str]) -> list[str]:
    return [path for path in paths if path.lower().endswith(IMAGES)]


def _written(scores: Sequence[Score]) -> tuple[str, str]:
    """Write CSV and JSON Lines into a new folder."""
    folder = Path(tempfile.mkdtemp(prefix="aigiqa-"))
    rows = [[field.name for field in fields(Score)], *(astuple(score) for score in scores)]
    (folder / "ranking.csv").write_text(csv_text(rows), encoding="utf-8")
    lines = "".join(f"{json.dumps(asdict(score))}\n" for score in scores)
    (folder / "ranking.jsonl").write_text(lines, encoding="utf-8")
    return str(folder / "ranking.csv"), str(folder / "ranking.jsonl")
