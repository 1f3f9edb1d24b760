"""The tab Runs: what trainings, searches and evaluations have written, also while they run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any

import gradio

from aigiqa_reward.utils.io import MAX_BYTES, read_regular
from aigiqa_reward.utils.run_folder import read_jsonl
from aigiqa_reward.web.page import number, says_why, title
from aigiqa_reward.web.studio import Studio

_SIGNS = {"history.jsonl": "fine-tuning", "results.jsonl": "best of n", "report.json": "evaluation"}
_PICTURES = ("*.png", "contact-sheets/*.png")
_MOST, _EVERY = 60, 3.0  # pictures, and seconds between two looks


def add_tab(studio: Studio) -> None:
    """Add the tab."""
    with gradio.Tab("Runs") as tab:
        with gradio.Row():
            run = gradio.Dropdown(_runs(studio), value=None, label="Run", elem_id="run")
            live = gradio.Checkbox(False, label="Follow while it runs", elem_id="live")
        about = gradio.HTML(elem_id="run-about")
        curves = gradio.Image(visible=False, show_label=False, buttons=[], elem_id="curves")
        step = gradio.Slider(0, 1, value=0, step=1, visible=False, label="Validation", elem_id="validation-step")
        grid = gradio.Image(visible=False, show_label=False, height=380, buttons=[], elem_id="grid")
        pictures = gradio.Gallery(columns=2, label="Pictures", buttons=[], elem_id="pictures")
        timer = gradio.Timer(_EVERY, active=False)
    seen = gradio.State(None)

    @says_why
    def showing(name: str | None, place: int, before: Any, again: bool = False) -> Iterator[Any]:
        folder = dict(_found(studio)).get(name or "")
        if folder is None:
            yield {about: ""}
            return
        files = _pictures(folder)
        grids = sorted(folder.glob("validation/step-*.png"))
        history = folder / "history.jsonl"
        state = [[str(file), file.stat().st_mtime] for file in [*files, *grids, history] if file.is_file()]
        if again and state == before:
            yield {seen: state}
            return
        place = len(grids) - 1 if place >= len(grids) - 2 else place
        yield {
            seen: state,
            about: _about(folder),
            curves: gradio.update(value=_curves(history), visible=history.is_file()),
            step: gradio.update(maximum=max(1, len(grids) - 1), value=max(0, place), visible=len(grids) > 1),
            grid: gradio.update(value=str(grids[place]) if grids else None, visible=bool(grids)),
            pictures: gradio.update(value=[(str(file), title(str(file))) for file in files], visible=bool(files)),
        }

    def at_step(name: str, place: int) -> Any:
        grids = sorted(dict(_found(studio))[name].glob("validation/step-*.png"))
        return gradio.update(value=str(grids[min(int(place), len(grids) - 1)]))

    def chosen(name: str) -> Iterator[Any]:
        yield from showing(name, 10**9, None)

    def following(name: str, place: int, before: Any) -> Iterator[Any]:
        yield from showing(name, place, before, again=True)

    outputs = [seen, about, curves, step, grid, pictures]
    tab.select(lambda: gradio.update(choices=_runs(studio)), outputs=[run], show_progress="hidden")
    run.input(chosen, [run], outputs)
    live.change(lambda on: gradio.Timer(active=on), [live], [timer], show_progress="hidden")
    timer.tick(following, [run, step, seen], outputs, show_progress="hidden")
    step.input(at_step, [run, step], [grid], show_progress="hidden", trigger_mode="always_last")


def _found(studio: Studio) -> Iterator[tuple[str, Path]]:
    """Yield name and folder of each run in the folders, and one folder deep within them."""
    for named, folder in studio.folders.items():
        below = sorted(Path(entry) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
        for place in (folder, *below):
            if any((place / sign).is_file() for sign in _SIGNS):
                yield named if place == folder else f"{named}/{place.name}", place


def _runs(studio: Studio) -> list[str]:
    return [name for name, _ in _found(studio)]


def _pictures(folder: Path) -> list[Path]:
    found = (file for pattern in _PICTURES for file in sorted(folder.glob(pattern)))
    return [file for file in found if file.name != "curves.png"][:_MOST]


def _about(folder: Path) -> str:
    """Return what kind of a run it is, and its last figures."""
    kind = next(kind for sign, kind in _SIGNS.items() if (folder / sign).is_file())
    text = f"<p><b>{escape(str(folder))}</b>: {kind}</p>"
    with suppress(OSError, ValueError):
        if (folder / "history.jsonl").is_file():
            last = _lines(folder / "history.jsonl")[-1]
            shown = {**last, **last.get("validation", {})}
            figures = [
                f"{escape(k)} {number(v) if isinstance(v, float) else v}"
                for k, v in shown.items()
                if isinstance(v, int | float)
            ]
            text += f"<p>{' · '.join(figures)}</p>"
        elif (folder / "results.jsonl").is_file():
            lines = [line for line in _lines(folder / "results.jsonl") if line.get("rank") == 1]
            cells = "".join(
                f"<tr><td>{escape(str(r.get('prompt')))}</td><td>{escape(str(r.get('seed')))}</td><td>{number(r.get('total'))}</td></tr>"
                for r in lines[:_MOST]
            )
            text += f"<table class='bars'><tr><th>prompt</th><th>seed</th><th>total</th></tr>{cells}</table>"
    return text


def _lines(file: Path) -> list[dict[str, Any]]:
    return read_jsonl(read_regular(file, most=MAX_BYTES))


def _curves(history: Path) -> Any:
    """Draw the curves of a training so far; None before its first step."""
    from PIL import Image

    from aigiqa_reward.report.curves import draw_curves

    with suppress(OSError, ValueError), tempfile.TemporaryDirectory() as folder:
        return Image.open(draw_curves(_lines(history), None, Path(folder) / "curves.png")).copy()
    return None
