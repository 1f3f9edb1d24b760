"""The page: its tabs, its look, and what they share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio

from aigiqa_reward.web.studio import Studio

MODEL: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
"""Of events that compute: one at a time, so that results cannot mix; the page shows the place in the queue."""

_CSS = """
.bars { border-collapse: collapse; width: 100%; font-size: 0.9em }
.bars td, .bars th { padding: 2px 8px; text-align: left; overflow-wrap: anywhere }
.bar { background: linear-gradient(#0072b2, #0072b2) no-repeat 0 100% / var(--share) 3px; min-width: 4em }
#pair img, #heat img, #best img, #grid img { width: 100%; height: 100%; object-fit: contain }
.done { height: 6px; background: #e4e6ea } .done div { height: 6px; background: #0072b2 }
.reproduce { white-space: pre-wrap; overflow-wrap: anywhere; font-family: monospace; font-size: 0.85em }
@media (max-width: 600px) {
  #answers button { min-width: 40% !important }
  #side-left, #side-right { height: 45vw !important }
}
"""

_KEYS = """<script>
document.addEventListener("keydown", event => {
  if (/INPUT|TEXTAREA|SELECT/.test(event.target.tagName) || event.ctrlKey || event.metaKey || event.altKey) return;
  const name = {ArrowLeft: "left", ArrowRight: "right", ArrowUp: "tie", ArrowDown: "bad", u: "undo"}[event.key];
  const button = name && document.querySelector("#answer-" + name);
  if (event.repeat || !button || !button.offsetParent) return;
  event.preventDefault();
  button.click();
});
</script>"""


def appearance() -> dict[str, Any]:
    """Look and keys, with fonts of the reader's machine."""
    fonts: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    return {"theme": gradio.Theme(primary_hue="blue", **fonts), "css": _CSS, "head": _KEYS}


def build_page(studio: Studio) -> Any:
    """Build the page of a studio, a `gradio.Blocks`."""
    from aigiqa_reward.web import generate, label, rank, runs, teach  # they use what is below

    with gradio.Blocks(title="aigiqa-reward", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        kept = gradio.BrowserState(None, storage_key="aigiqa-reward-label", secret="aigiqa-reward")
        with gradio.Tabs():
            rewards = [*rank.add_tab(studio), *generate.add_tab(studio), *label.add_tab(studio, page, kept)]
            teach.add_tab(studio, rewards)
            runs.add_tab(studio)
        page.load(lambda: reward_lists(studio, rewards), outputs=rewards, show_progress="hidden")
    page.queue(max_size=100, default_concurrency_limit=16, api_open=False)
    return page


def reward_lists(studio: Studio, lists: list[Any]) -> Any:
    """Return updates of lists of rewards, in which one may have been taught."""
    names = studio.reward_names
    return [gradio.update(choices=[*(["none"] if each.elem_id == "second" else []), *names]) for each in lists]


def reward_list(studio: Studio, label: str = "Reward", *, second: bool = False) -> Any:
    """Add a list of rewards."""
    names = ["none", *studio.reward_names] if second else studio.reward_names
    return gradio.Dropdown(names, value=names[0], label=label, elem_id="second" if second else None, min_width=120)


def says_why(run: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """Show what a handler refuses, as text, in place of "Error"."""

    @functools.wraps(run)
    def wrapped(*args: Any, **named: Any) -> Iterator[Any]:
        try:
            yield from run(*args, **named)
        except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
            raise gradio.Error(escape(str(error)), print_exception=False) from error

    return wrapped


def bar(done: int, total: int, text: str) -> str:
    """Return a progress bar in HTML."""
    share = 100 * done / max(1, total)
    return f"<p>{escape(text)} {done} of {total}</p><div class='done'><div style='width: {share:.0f}%'></div></div>"


def title(path: str) -> str:
    """Return the name of a file with its folder's."""
    return "/".join(Path(path).parts[-2:])


def number(value: float | None) -> str:
    """Return a score as text."""
    return "–" if value is None else f"{value:.3f}"
