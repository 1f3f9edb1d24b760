"""The tab Generate: candidates as they are made, with the running best, until they are all there or it is stopped."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from html import escape
from typing import TYPE_CHECKING, Any

import gradio

from aigiqa_reward.report.sheet import number_word
from aigiqa_reward.web.page import MODEL, bar, number, reward_list, says_why
from aigiqa_reward.web.studio import Studio

if TYPE_CHECKING:
    from aigiqa_reward.sampling.best_of_n import BestOfNOutput

_STEERING = ("none", "particles", "reward guidance")
_BATCH = 2  # candidates between two pictures of the state
_GUIDANCE = 20.0  # scale of RewardGuidance


def add_tab(studio: Studio) -> list[Any]:
    """Add the tab, and return its lists of rewards."""
    with gradio.Tab("Generate"):
        return [_GenerateTab(studio).reward]


class _GenerateTab:
    """Components of the tab, and what they do; `stops` has a flag per session."""

    def __init__(self, studio: Studio) -> None:
        self.studio, self.stops = studio, dict[str, threading.Event]()
        with gradio.Row():
            with gradio.Column():
                prompt = gradio.Textbox(label="Prompt", lines=2, elem_id="prompt")
                self.reward = reward_list(studio)
                with gradio.Row():
                    run = gradio.Button("Generate", variant="primary", elem_id="generate")
                    stop = gradio.Button("Stop", elem_id="stop")
            with gradio.Column():
                with gradio.Row():
                    n = gradio.Slider(1, 64, value=8, step=1, label="Candidates", elem_id="candidates")
                    steps = gradio.Slider(1, 100, value=studio.sampling[0], step=1, label="Steps")
                with gradio.Row():
                    scale = gradio.Slider(1, 20, value=studio.sampling[1], label="Guidance scale")
                    seed = gradio.Number(0, precision=0, minimum=0, label="First seed")
                with gradio.Row():
                    pruning = gradio.Radio(["none", "halving"], value="none", label="Pruning")
                    steering = gradio.Radio(list(_STEERING), value="none", label="Steering")
        self.status = gradio.HTML(elem_id="generate-status")
        with gradio.Row():
            still: dict[str, Any] = {"format": "png", "interactive": False}
            self.best = gradio.Image(label="Best so far", height=380, elem_id="best", buttons=["download"], **still)
            self.made = gradio.Gallery(label="Best first", columns=4, elem_id="made", buttons=[], **still)
        self.again = gradio.HTML(elem_id="again")
        self.curve = gradio.Plot(label="Reward of the best one's previews", visible=False)
        inputs = [prompt, n, steps, scale, seed, pruning, steering, self.reward]
        outputs = [self.status, self.best, self.made, self.again, self.curve]
        run.click(self.generating, inputs, outputs, show_progress_on=self.status, **MODEL)
        stop.click(self.stopping, None, [self.status], show_progress="hidden")

    def stopping(self, request: gradio.Request) -> str:
        if event := self.stops.get(str(request.session_hash)):
            event.set()
        return "<p>Stopping after the candidates in progress.</p>"

    @says_why
    def generating(
        self, prompt: str, n: int, steps: int, scale: float, seed: int, pruning: str, steering: str, name: str,
        request: gradio.Request,
    ) -> Iterator[Any]:  # fmt: skip
        stopped = self.stops[str(request.session_hash)] = threading.Event()
        hidden = gradio.update(visible=False)
        yield {
            self.status: "<p>Loading the models.</p>",
            self.curve: hidden,
            self.made: [],
            self.best: None,
            self.again: "",
        }
        n, settings = int(n), {"num_inference_steps": int(steps), "guidance_scale": scale}
        output: Any = None
        for output in _outputs(self.studio, name, prompt, n, int(seed), pruning, steering, settings):
            views: dict[Any, Any] = {self.status: bar(len(output.all_seeds), n, "candidates:")}
            if output.images:
                views |= {self.best: output.images[0], self.made: _gallery(output)}
            yield views
            if stopped.is_set():
                break
        if not output.images:
            raise ValueError("no candidate could be scored")
        ended = "Stopped after" if stopped.is_set() else "Made"
        text = f"<p>{ended} {len(output.all_seeds)} of {n} candidates.</p>"
        yield {self.status: text, self.again: _again(prompt, output, steering, settings)}
        if steering == "none" and not stopped.is_set():
            drawn = _curve(self.studio, name, prompt, output.winners[0], settings)
            yield {self.curve: gradio.update(value=drawn, visible=drawn is not None)}


def _outputs(
    studio: Studio, name: str, prompt: str, n: int, seed: int, pruning: str, steering: str, settings: dict[str, Any]
) -> Iterator[BestOfNOutput]:
    """Yield the output so far after each chunk of candidates; with particles, at the end only."""
    from aigiqa_reward.sampling import ParticleSteering, RewardGuidance
    from aigiqa_reward.sampling.best_of_n import BestOfN

    pipe, reward = studio.pipe(), studio.reward(name)
    if steering != "none" and pruning != "none":
        raise ValueError("steering, pruning: choose one of them")
    if steering == "particles":
        yield ParticleSteering(pipe, reward, particles=max(2, n), top_k=max(2, n), progress=False)(
            prompt, seed=seed, **settings
        )
        return
    with ExitStack() as stack:
        if steering == "reward guidance":
            guidance = stack.enter_context(RewardGuidance(pipe, reward, prompt, scale=_GUIDANCE))
            settings = {**settings, "callback_on_step_end": guidance}
        how: Any = None if pruning == "none" else pruning
        search = BestOfN(pipe, reward, n=n, batch_size=_BATCH, top_k=1 if how else n, pruning=how, progress=False)
        yield from search.stream(prompt, seed, **settings)


def _gallery(output: BestOfNOutput) -> list[tuple[Any, str]]:
    scored = zip(output.images, output.winners, output.scores, strict=True)
    return [(image, f"{number_word(output)} {place}  {number(score)}") for image, place, score in scored]


def _again(prompt: str, output: BestOfNOutput, steering: str, settings: dict[str, Any]) -> str:
    """Return how to make the best image again."""
    best = f"<p>Best: {number_word(output)} {output.winners[0]}, {number(output.scores[0])}.</p>"
    if steering != "none":
        return f"{best}<p>The same settings and first seed make it again; its seed alone does not.</p>"
    given = "".join(f", {name}={value!r}" for name, value in settings.items())
    call = f'pipe({prompt!r}, generator=torch.Generator("cpu").manual_seed({output.seeds[0]}){given})'
    return f"{best}<div class='reproduce' id='call'>{escape(call)}</div>"


def _curve(studio: Studio, name: str, prompt: str, seed: int, settings: dict[str, Any]) -> Any:
    """Sample the best image once more and plot the reward of its previews; None where steps cannot be observed."""
    import torch

    from aigiqa_reward.report import line_plot
    from aigiqa_reward.sampling import RewardLogger

    pipe: Any = studio.pipe()
    try:
        with RewardLogger(pipe, studio.reward(name), prompt) as logger:
            generator = torch.Generator("cpu").manual_seed(seed)
            pipe(prompt, generator=generator, callback_on_step_end=logger, **settings)
    except (ValueError, TypeError):
        return None
    return line_plot([entry.step for entry in logger.history], [e.total[0] for e in logger.history], "step", name)
