"""Nodes that hold images against each other. They take lists whole, so that images of several sizes can compete."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from aigiqa_reward import BestOfNOutput, rerank
from aigiqa_reward.images import load, to_bhwc
from aigiqa_reward.report import contact_sheet
from aigiqa_reward.sampling import NothingRankedError

from .arguments import PROMPT, REWARD, grouped, image_batches, in_comfyui, logged_warnings, only
from .latents import Latent, latent_batches, latent_rows
from .memory import blocked, ready

IMAGES = (
    "IMAGE",
    {"tooltip": "A batch, or a list of images of any sizes. All compete, unless there is a prompt for each batch."},
)
LATENT = ("LATENT", {"tooltip": "Optional: what the images were decoded from; the same rows are chosen."})
ASPECTS = ("total", "quality", "correspondence")
NONE_PASSES = ("error", "stop", "best")

_OUTPUTS = (
    "The chosen images, as they came in; a list of single images where their sizes differ.",
    "The chosen rows of latent, to sample on. With the batch's seed they draw the noise that they had, if the images' "
    "sides are multiples of 16 px; with latents of 16 or more channels (SD 3, FLUX) at any size.",
    "Total of each chosen image, higher is better.",
    "Place of each chosen image among those that competed, from 0.",
)


@dataclass
class _Chosen:
    """What leaves the node, one entry an image."""

    images: list[Tensor] = field(default_factory=list)
    latents: list[Latent] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)

    def outputs(self, *, latent_given: bool) -> tuple[Any, Any, Any, Any]:
        latents = latent_batches(self.latents) if latent_given else blocked("connect an input to latent to use this")
        return image_batches(self.images), latents, self.scores, self.indices


class SelectBest:
    """Select Best Images (AIGIQA)."""

    CATEGORY = "AIGIQA"
    DESCRIPTION = (
        "Ranks images by a reward and passes on the best of them, best first, with their latents. Images with NaN "
        "pixels are left out, with a warning in the console; where no other image is left, that is an error."
    )
    RETURN_TYPES = ("IMAGE", "LATENT", "FLOAT", "INT")
    RETURN_NAMES = ("images", "latent", "scores", "indices")
    OUTPUT_TOOLTIPS = _OUTPUTS
    INPUT_IS_LIST = True
    OUTPUT_IS_LIST = (True, True, True, True)
    FUNCTION = "select"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Inputs, as ComfyUI asks for them."""
        top_k = {
            "default": 1,
            "min": 0,
            "max": 4096,
            "tooltip": "How many to pass on, best first; fewer where there are fewer. 0: all, ranked.",
        }
        return {
            "required": {"reward": REWARD, "images": IMAGES, "prompt": PROMPT, "top_k": ("INT", top_k)},
            "optional": {"latent": LATENT},
        }

    def select(
        self,
        reward: Sequence[Any],
        images: Sequence[Any],
        prompt: Sequence[str],
        top_k: Sequence[int],
        latent: Sequence[Any] | None = None,
    ) -> tuple[Any, Any, Any, Any]:
        """Rank and keep; every input is a list, as INPUT_IS_LIST has it.

        Raises:
            TypeError, ValueError: inputs that do not fit, such as latents and images of different numbers.
                Or no image could be ranked.
        """
        count = only("top_k", top_k)
        if count < 0:
            raise ValueError(f"top_k: expected a number of at least 0, got {count}; 0 ranks all")
        chosen, faults = _Chosen(), []
        with ready(only("reward", reward)) as judge:
            for rows, text, latents in _contests(images, prompt, latent):
                output, fault = _ranked(rows, text, judge, min(count, len(rows)) or len(rows))
                faults += fault
                for index, score in zip(output.seeds, output.scores, strict=True):
                    _keep(chosen, rows, latents, index, score)
        if not chosen.images:
            raise ValueError(f"images: {'; '.join(faults)}")
        return chosen.outputs(latent_given=latent is not None)


class Filter:
    """Filter Images by Score (AIGIQA)."""

    CATEGORY = "AIGIQA"
    DESCRIPTION = (
        "Passes on the images that score at least a threshold, in their order, with their latents. What happens when "
        "none does is chosen by if_none: an error that names the best score, a silent stop of what follows, or the "
        "best image."
    )
    RETURN_TYPES = ("IMAGE", "LATENT", "FLOAT", "INT")
    RETURN_NAMES = ("images", "latent", "scores", "indices")
    OUTPUT_TOOLTIPS = (*_OUTPUTS[:2], "Score of each chosen image in the aspect, higher is better.", _OUTPUTS[3])
    INPUT_IS_LIST = True
    OUTPUT_IS_LIST = (True, True, True, True)
    FUNCTION = "filter"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Inputs, as ComfyUI asks for them."""
        threshold = {
            "default": 0.5,
            "min": -10.0,
            "max": 10.0,
            "step": 0.01,
            "tooltip": "Least score that passes. 1 is the best score that people gave; most good images lie below.",
        }
        return {
            "required": {
                "reward": REWARD,
                "images": IMAGES,
                "prompt": PROMPT,
                "threshold": ("FLOAT", threshold),
                "aspect": (list(ASPECTS), {"default": "total", "tooltip": "Which score is held against it."}),
                "if_none": (
                    list(NONE_PASSES),
                    {
                        "default": "error",
                        "tooltip": "Where no image passes. error: the run fails and says by how much. stop: what "
                        "follows does not run, the rest does. best: the best image passes; where none can be scored "
                        "the run fails.",
                    },
                ),
            },
            "optional": {"latent": LATENT},
        }

    def filter(
        self,
        reward: Sequence[Any],
        images: Sequence[Any],
        prompt: Sequence[str],
        threshold: Sequence[float],
        aspect: Sequence[str],
        if_none: Sequence[str],
        latent: Sequence[Any] | None = None,
    ) -> tuple[Any, Any, Any, Any]:
        """Keep what scores enough; every input is a list, as INPUT_IS_LIST has it.

        Raises:
            TypeError, ValueError: inputs that do not fit; with if_none "error" also that no image passes,
                with "best" that none could be scored.
        """
        least, by, otherwise = only("threshold", threshold), only("aspect", aspect), only("if_none", if_none)
        for name, value, known in (("aspect", by, ASPECTS), ("if_none", otherwise, NONE_PASSES)):
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
        chosen, faults, best = _Chosen(), [], None
        with ready(only("reward", reward)) as judge:
            for rows, text, latents in _contests(images, prompt, latent):
                output, fault = _ranked(rows, text, judge, 1)
                faults += fault
                for index, score in enumerate(_aspect(output, by) if output.seeds else []):
                    if score >= least:  # never true of NaN, which dropped images have
                        _keep(chosen, rows, latents, index, score)
                    if not math.isnan(score) and (best is None or score > best[-1]):
                        best = rows, latents, index, score
        if not chosen.images:
            if otherwise == "stop":
                return tuple(blocked(None) for _ in self.RETURN_TYPES)
            if best is None:
                raise ValueError(f"images: {'; '.join(faults) or f'the reward gave NaN as {by} of each'}")
            if otherwise == "error":
                raise ValueError(
                    f"threshold: no image passes: the best {by} is {best[-1]:.3f}, below {least:.3f}; lower the "
                    "threshold, make more images, or choose another if_none"
                )
            _keep(chosen, *best)
        return chosen.outputs(latent_given=latent is not None)


class ContactSheet:
    """Contact Sheet (AIGIQA)."""

    CATEGORY = "AIGIQA"
    DESCRIPTION = (
        "Draws all images with their scores in one picture, the best one in a frame. An image that cannot be scored "
        "is a tile that says why. The images are scored anew."
    )
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("sheet",)
    OUTPUT_TOOLTIPS = ("One picture a prompt, for Preview Image or Save Image.",)
    INPUT_IS_LIST = True
    OUTPUT_IS_LIST = (True,)
    FUNCTION = "draw"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Inputs, as ComfyUI asks for them."""
        return {"required": {"reward": REWARD, "images": IMAGES, "prompt": PROMPT}}

    def draw(self, reward: Sequence[Any], images: Sequence[Any], prompt: Sequence[str]) -> tuple[list[Tensor]]:
        """Score and draw; every input is a list, as INPUT_IS_LIST has it.

        Raises:
            TypeError, ValueError: inputs that do not fit.
        """
        with ready(only("reward", reward)) as judge:
            sheets = [
                contact_sheet(_ranked(rows, text, judge, len(rows))[0], text or "")
                for rows, text in grouped(images, prompt)
            ]
        return ([to_bhwc(load(sheet)[None]) for sheet in sheets],)


Contest = tuple[list[Tensor], str | None, list[Latent]]


def _contests(images: Sequence[Any], prompts: Sequence[Any], latents: Sequence[Any] | None) -> list[Contest]:
    """Groups of images that compete, their prompts, and the latents of their images, where these are given."""
    groups = grouped(images, prompts)
    if latents is None:
        return [(rows, text, []) for rows, text in groups]
    every, count = latent_rows(latents), sum(len(rows) for rows, _ in groups)
    if len(every) != count:
        remedy = "connect the LATENT that these images were decoded from, or none"
        if any(row["samples"].ndim == 5 and row["samples"].shape[2] > 1 for row in every):
            remedy = "a video's LATENT is one row for all its frames, which cannot be chosen apart: connect none"
        raise ValueError(f"latent: expected a row for each of the {count} images, got {len(every)}; {remedy}")
    rest = iter(every)
    return [(rows, text, [next(rest) for _ in rows]) for rows, text in groups]


def _ranked(rows: list[Tensor], text: str | None, reward: Any, top_k: int) -> tuple[BestOfNOutput, list[str]]:
    """The ranking, and why there is none where no image could be scored; the console tells it each time."""
    faults = []
    with logged_warnings():
        try:
            output = rerank(rows, text, reward, top_k=top_k)
        except NothingRankedError as error:
            output, faults = error.output, [in_comfyui(str(error))]
            logging.warning("AIGIQA: %s", faults[0])
    dropped = {index: in_comfyui(reason) for index, reason in output.dropped.items()}
    return replace(output, dropped=dropped), faults


def _aspect(output: BestOfNOutput, aspect: str) -> list[float]:
    """Scores of all images, in their order."""
    if aspect == "correspondence":
        if output.all_correspondence is None:
            raise ValueError("aspect: correspondence needs a prompt and a reward that gives it; fill in prompt")
        return output.all_correspondence
    return output.all_quality if aspect == "quality" else output.all_scores


def _keep(chosen: _Chosen, rows: list[Tensor], latents: list[Latent], index: int, score: float) -> None:
    chosen.images.append(rows[index])
    chosen.scores.append(score)
    chosen.indices.append(index)
    if latents:
        chosen.latents.append(latents[index])
