"""The node that loads a reward."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from aigiqa_reward import create_reward, get_reward_spec, list_rewards

from .reward import DEVICES, LoadedReward, compute_device

DTYPES = ("float32", "bfloat16", "float16")


class RewardLoader:
    """Load Reward (AIGIQA)."""

    CATEGORY = "AIGIQA"
    DESCRIPTION = (
        "Loads a reward that judges images by perceptual quality, by correspondence to the prompt, or by both in one "
        "number of human preference. Start with `compact`; it and the other embedded ones need no download. PickScore, "
        "HPSv2.1, ImageReward and others are fetched from the Hugging Face Hub once, 2 to 17 GB each."
    )
    RETURN_TYPES = ("AIGIQA_REWARD",)
    RETURN_NAMES = ("reward",)
    OUTPUT_TOOLTIPS = ("For the other AIGIQA nodes.",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Declare the inputs."""
        judges = (
            "Which model judges. `aigiqa-reward rewards` lists what each of them judges, its size and its license. "
            "cpa_iqa also draws distortion maps."
        )
        towers = "Of the towers; heads always compute in float32. Choose bfloat16 or float16 for models of several GB."
        keep = "On: stays on the device between runs. Off: moves to ComfyUI's offload device after each use."
        yours = (
            "Your reward instead of the embedded weights: a folder written by `aigiqa-reward train` or a Hugging Face "
            "Hub id. For pickscore and the other published rewards: a local copy of the authors' file, or its folder."
        )
        share = {"default": 0.5, "min": 0.0, "max": 1.0, "step": 0.05}
        quality = share | {"tooltip": "Share of perceptual quality in the total, of a reward that judges both."}
        correspondence = share | {"tooltip": "Share of correspondence to the prompt in the total, likewise."}
        return {
            "required": {
                "name": (list_rewards(), {"default": "compact", "tooltip": judges}),
                "device": (list(DEVICES), {"default": "auto", "tooltip": "auto: the device ComfyUI computes on."}),
                "dtype": (list(DTYPES), {"default": "float32", "tooltip": towers}),
                "keep_loaded": ("BOOLEAN", {"default": True, "tooltip": keep}),
            },
            "optional": {
                "weights": ("STRING", {"default": "", "tooltip": yours}),
                "quality_weight": ("FLOAT", quality),
                "correspondence_weight": ("FLOAT", correspondence),
            },
        }

    @classmethod
    def IS_CHANGED(cls, weights: str = "", **_inputs: Any) -> str:
        """Have a folder of weights loaded again after it was written again."""
        given = _given(weights)
        folder = Path(os.path.expanduser(given)) if given else None  # noqa: PTH111  (as create_reward does)
        if folder is None or not folder.is_dir():
            return ""
        return ",".join(f"{file.name}:{file.stat().st_mtime_ns}" for file in sorted(folder.iterdir()))

    def load(
        self,
        name: str,
        device: str = "auto",
        dtype: str = "float32",
        keep_loaded: bool = True,
        weights: str = "",
        quality_weight: float = 0.5,
        correspondence_weight: float = 0.5,
    ) -> tuple[LoadedReward]:
        """Build the reward on the CPU; its first use moves it to the device."""
        place = compute_device(device)
        with torch.inference_mode(False):  # else the weights let no gradient pass, which heat maps need
            both = get_reward_spec(name).judges == "quality and correspondence"
            shares = {"quality_weight": quality_weight, "correspondence_weight": correspondence_weight} if both else {}
            reward = create_reward(name, dtype=getattr(torch, dtype), weights=_given(weights), **shares)
        return (LoadedReward(reward, place, keep_loaded=keep_loaded),)


def _given(weights: str | None) -> str | None:
    """Return a path without the quotes that Windows copies with it; None for an empty one."""
    text = (weights or "").strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1].strip()
    return text or None
