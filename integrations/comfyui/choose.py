"""Nodes that compare images. They take lists as a whole, so that images of several sizes can compete."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any, TypeAlias

from torch import Tensor

from aigiqa_reward import BestOfNOutput, RewardFunction, rerank
from aigiqa_reward.images import load, to_bhwc
from aigiqa_reward.report import contact_sheet
from aigiqa_reward.sampling import NothingRankedError

from .inputs import PROMPT, REWARD, grouped, image_batches, in_comfyui, logged_warnings, only
from .latents import Latent, latent_batches, latent_rows
from .reward import blocked, ready

IMAGES = (
    "IMAGE",
    {"tooltip": "A batch, or a list of images of any sizes. All compete, unless there is a prompt for each batch."},
)
COMPARED = {"reward": REWARD, "images": IMAGES, "prompt": PROMPT}
LATENT = ("LATENT", {"tooltip": "Optional: what the images were decoded from; the same rows are chosen."})
ASPECTS = ("total", "quality", "correspondence")
NONE_PASSES = ("error", "stop", "best")

_Chosen: TypeAlias = tuple[Tensor, list[Latent], float, int]
"""An image, its latent if there are any, its score, and its place among those that competed."""


class _Choosing:
    """The outputs of both nodes that choose."""

    CATEGORY = "AIGIQA"
    RETURN_TYPES = ("IMAGE", "LATENT", "FLOAT", "INT")
    RETURN_NAMES = ("images", "latent", "scores", "indices")
    OUTPUT_TOOLTIPS = (
        "The chosen images, as they came in; a list of single images where their sizes differ.",
        "The chosen rows of latent, to sample further. With the batch's seed they draw the noise that they had, if the "
        "images' sides are multiples of 16 px; with latents of 16 or more channels (SD 3, FLUX) at any size.",
        "Score of each chosen image, higher is better: the total, or the aspect that was filtered by.",
        "Place of each chosen image among those that competed, from 0.",
    )
    INPUT_IS_LIST = True
    OUTPUT_IS_LIST = (True, True, True, True)

    @staticmethod
    def outputs(chosen: list[_Chosen], *, latent_given: bool) -> tuple[Any, ...]:
        """Return the nodes' outputs for the chosen images."""
        rows, latents, scores, indices = map(list, zip(*chosen, strict=True))
        drawn = latent_batches(list(chain(*latents))) if latent_given else blocked("connect an input to latent")
        return image_batches(rows), drawn, scores, indices


class SelectBest(_Choosing):
    """Select Best Images (AIGIQA)."""

    DESCRIPTION = (
        "Ranks images by a reward and passes on the best of them, best first, with their latents. Images with NaN "
        "pixels are left out, with a warning in the console; that is an error where none is left."
    )
    FUNCTION = "select"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Declare the inputs."""
        tooltip = "How many to pass on, best first; fewer where there are fewer. 0: all, ranked."
        top_k = ("INT", {"default": 1, "min": 0, "max": 4096, "tooltip": tooltip})
        return {"required": COMPARED | {"top_k": top_k}, "optional": {"latent": LATENT}}

    def select(
        self, reward: list[Any], images: list[Any], prompt: list[str], top_k: list[int], latent: list[Any] | None = None
    ) -> tuple[Any, ...]:
        """Rank and keep the best; every input is a list."""
        count = only("top_k", top_k)
        chosen, faults = [], []
        with ready(only("reward", reward)) as judge:
            for rows, text, latents in _contests(images, prompt, latent):
                output, fault = _ranked(rows, text, judge, min(count, len(rows)) or len(rows))
                faults += fault
                pairs = zip(output.seeds, output.scores, strict=True)
                chosen += [(rows[index], latents[index : index + 1], score, index) for index, score in pairs]
        if not chosen:
            raise ValueError(f"images: {'; '.join(faults)}")
        return self.outputs(chosen, latent_given=latent is not None)


class Filter(_Choosing):
    """Filter Images by Score (AIGIQA)."""

    DESCRIPTION = (
        "Passes on the images that score at least a threshold, in their order, with their latents. if_none decides "
        "what happens when none does: an error that names the best score, a silent stop of what follows, or the best "
        "image."
    )
    FUNCTION = "filter"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Declare the inputs."""
        least = "Least score that passes. 1 is the best score that people gave; most good images lie below."
        otherwise = (
            "Where no image passes. error: the run fails and says by how much. stop: what follows does not run, the "
            "rest does. best: the best image passes; where none can be scored the run fails."
        )
        choices = {
            "threshold": ("FLOAT", {"default": 0.5, "min": -10.0, "max": 10.0, "step": 0.01, "tooltip": least}),
            "aspect": (list(ASPECTS), {"default": "total", "tooltip": "Which score is compared to the threshold."}),
            "if_none": (list(NONE_PASSES), {"default": "error", "tooltip": otherwise}),
        }
        return {"required": COMPARED | choices, "optional": {"latent": LATENT}}

    def filter(
        self,
        reward: list[Any],
        images: list[Any],
        prompt: list[str],
        threshold: list[float],
        aspect: list[str],
        if_none: list[str],
        latent: list[Any] | None = None,
    ) -> tuple[Any, ...]:
        """Keep the images that score enough; every input is a list."""
        least, by, otherwise = only("threshold", threshold), only("aspect", aspect), only("if_none", if_none)
        chosen, faults, best = [], [], None
        with ready(only("reward", reward)) as judge:
            for rows, text, latents in _contests(images, prompt, latent):
                output, fault = _ranked(rows, text, judge, 1)
                faults += fault
                scores = getattr(output, {"total": "all_scores"}.get(by, f"all_{by}"))
                if output.seeds and scores is None:
                    what, remedy = ("a prompt and ", "fill in prompt, or ") if by == "correspondence" else ("", "")
                    raise ValueError(f"aspect: {by} needs {what}a reward that gives it; {remedy}choose total")
                for index, score in enumerate(scores if output.seeds else []):
                    found = rows[index], latents[index : index + 1], score, index
                    if score >= least:  # never true of NaN, which dropped images have
                        chosen.append(found)
                    if not math.isnan(score) and (best is None or score > best[2]):
                        best = found
        if not chosen:
            if otherwise == "stop":
                return tuple(blocked(None) for _ in self.RETURN_TYPES)
            if best is None:
                raise ValueError(f"images: {'; '.join(faults) or f'the reward gave NaN as {by} of each'}")
            if otherwise == "error":
                raise ValueError(
                    f"threshold: no image passes: the best {by} is {best[2]:.3f}, below {least:.3f}; lower the "
                    "threshold, make more images, or choose another if_none"
                )
            chosen.append(best)
        return self.outputs(chosen, latent_given=latent is not None)


class ContactSheet:
    """Contact Sheet (AIGIQA)."""

    CATEGORY = "AIGIQA"
    DESCRIPTION = (
        "Draws all images with their scores in one picture, the best one in a frame. An image that cannot be scored "
        "is a tile with the reason. The images are scored again."
    )
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("sheet",)
    OUTPUT_TOOLTIPS = ("One picture per prompt, for Preview Image or Save Image.",)
    INPUT_IS_LIST = True
    OUTPUT_IS_LIST = (True,)
    FUNCTION = "draw"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Declare the inputs."""
        return {"required": COMPARED}

    def draw(self, reward: list[Any], images: list[Any], prompt: list[str]) -> tuple[list[Tensor]]:
        """Score and draw; every input is a list."""
        with ready(only("reward", reward)) as judge:
            outputs = [(_ranked(rows, text, judge, len(rows))[0], text) for rows, text in grouped(images, prompt)]
        return ([to_bhwc(load(contact_sheet(output, text or ""))[None]) for output, text in outputs],)


def _contests(
    images: list[Any], prompts: list[Any], latents: list[Any] | None
) -> Iterator[tuple[list[Tensor], str | None, list[Latent]]]:
    """Yield the groups of images that compete, each with its prompt and the images' latents if there are any."""
    groups = grouped(images, prompts)
    every, count = latent_rows(latents or []), sum(len(rows) for rows, _ in groups)
    if latents is not None and len(every) != count:
        raise ValueError(
            f"latent: expected a row for each of the {count} images, got {len(every)}; connect the LATENT that these "
            "images were decoded from, or none (a video's LATENT is one row for all its frames)"
        )
    start = 0
    for rows, text in groups:
        yield rows, text, every[start : start + len(rows)]
        start += len(rows)


def _ranked(
    rows: list[Tensor], text: str | None, reward: RewardFunction, top_k: int
) -> tuple[BestOfNOutput, list[str]]:
    """Rank images, and collect why there is no ranking where no image could be scored; logged in every run."""
    faults = []
    with logged_warnings():
        try:
            output = rerank(rows, text, reward, top_k=top_k)
        except NothingRankedError as error:
            output, faults = error.output, [in_comfyui(str(error))]
            logging.warning("AIGIQA: %s", faults[0])
    dropped = {index: in_comfyui(reason) for index, reason in output.dropped.items()}
    return replace(output, dropped=dropped), faults
