"""The node that scores images one by one."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

from aigiqa_reward import RewardFunction, RewardOutput, Scorer
from aigiqa_reward.images import load, to_bhwc
from aigiqa_reward.report import draw_heat_maps, heat_maps

from .inputs import PROMPT, REWARD, image_rows, in_comfyui, logged_warnings, prompt_or_none
from .reward import blocked, ready

HEAT_MAPS = ("auto", "distortion", "gradient", "off")


class Score:
    """Score Images (AIGIQA)."""

    CATEGORY = "AIGIQA"
    DESCRIPTION = (
        "Scores each image: perceptual quality, correspondence to the prompt, and their mean, the total; null for what "
        "the reward does not judge. For embedded rewards, 1 is the best score that people gave in the benchmark they "
        "were trained on. A list of images of several sizes works."
    )
    RETURN_TYPES = ("FLOAT", "STRING", "IMAGE")
    RETURN_NAMES = ("scores", "json", "heat_maps")
    OUTPUT_IS_LIST = (True, False, False)
    OUTPUT_TOOLTIPS = (
        "Total of each image, in the images' order, higher is better.",
        "A JSON list, one object per image: total, quality, correspondence, details, and which heat map was drawn, "
        "or why none. Preview Any shows it.",
        "The images in gray under a heat map, from dark (0) to bright (1); heat_map chooses what it shows.",
    )
    FUNCTION = "score"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Declare the inputs."""
        images = ("IMAGE", {"tooltip": "A batch, or a list of images of any sizes."})
        tooltip = (
            "distortion: where the model finds distortions (cpa_iqa alone). gradient: where the score reacts most to "
            "the pixels, relative within each image; costs about twice the scoring. auto: distortion where there is "
            "one, else gradient, none where the reward has neither. off: none, fastest."
        )
        return {
            "required": {"reward": REWARD, "images": images, "prompt": PROMPT},
            "optional": {"heat_map": (list(HEAT_MAPS), {"default": "auto", "tooltip": tooltip})},
        }

    def score(self, reward: Any, images: Any, prompt: str = "", heat_map: str = "auto") -> tuple[list[float], str, Any]:
        """Score a batch; fails with the reason where an image cannot be scored or a chosen heat map not be drawn."""
        rows, text = image_rows([images]), prompt_or_none(prompt)
        kind = fault = None
        with ready(reward) as judge, logged_warnings():
            output = _scored(judge, rows, text)
            if heat_map == "off":
                drawn = blocked("heat_map is off: choose auto, distortion or gradient in Score Images (AIGIQA)")
            else:
                pixels = torch.stack([load(row) for row in rows])  # as they were scored: alpha on white
                try:
                    heat = heat_maps(judge, pixels, text, kind=heat_map)
                    drawn, kind = to_bhwc(draw_heat_maps(pixels, heat)), heat.kind
                except torch.OutOfMemoryError:
                    raise
                except (ValueError, RuntimeError) as error:  # these images were scored: what fails is the gradient
                    if heat_map != "auto":
                        raise
                    fault = str(error)
                    drawn = blocked(f"no heat map of this reward: {fault}")
        numbers = {name: getattr(output, name) for name in ("total", "quality", "correspondence")}
        details = {name: values for name, values in output.details.items() if values.ndim == 1}
        report = [
            {
                "index": index,
                "prompt": text,
                **{name: None if values is None else float(values[index]) for name, values in numbers.items()},
                "details": {name: values[index].item() for name, values in details.items()},
                "heat_map": kind,
                "heat_map_error": fault,
            }
            for index in range(len(output))
        ]
        return output.total.tolist(), json.dumps(report, ensure_ascii=False, indent=1), drawn


def _scored(reward: RewardFunction, rows: list[Tensor], text: str | None) -> RewardOutput:
    outputs, failed = [], []
    for result in Scorer(reward, batch_size=8).stream(rows, text):
        if result.output is None:
            failed.append(f"image {result.index}: {in_comfyui(result.error or '')}")
        elif math.isnan(float(result.output.total)):
            failed.append(f"image {result.index}: the reward gave NaN")
        else:
            outputs.append(result.output)
    if failed:
        raise ValueError(f"images: {len(failed)} of {len(rows)} cannot be scored: {'; '.join(failed)}")
    return RewardOutput.cat(outputs)
