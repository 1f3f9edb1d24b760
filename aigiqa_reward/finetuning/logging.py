"""The log of a training: `history.jsonl`, progress bar, and the trackers of Accelerate."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from aigiqa_reward.utils.checks import how_to_install
from aigiqa_reward.utils.io import MAX_BYTES, read_regular, write_atomically
from aigiqa_reward.utils.run_folder import read_jsonl, to_json

if TYPE_CHECKING:
    from accelerate import Accelerator

FILE = "history.jsonl"
_SHOWN = {
    "reward": ("reward", ".4f"),
    "holdout": ("held-out", ".4f"),
    "kl": ("kl", ".4f"),
    "accuracy": ("accuracy", ".2f"),
    "images_per_second": ("images/s", ".2f"),
    "peak_memory_mib": ("MiB", ".0f"),
}
"""Name and format of the numbers in the progress bar."""

_WINDOW = 20  # steps that the speed is averaged over


class History:
    """The lines of `history.jsonl`: one per step, one per validation."""

    def __init__(self, folder: Path, accelerator: Accelerator, *, steps: int, images: int, progress: bool) -> None:
        self.file, self.accelerator, self.images = folder / FILE, accelerator, images
        self.lines: list[dict[str, Any]] = []
        self._before = 0.0
        self._since = time.perf_counter()
        self._times: list[float] = []
        self._shown: dict[str, str] = {}
        disabled = not (progress and accelerator.is_main_process)
        self._bar = tqdm(total=steps, desc="fine-tune", unit="step", disable=disabled)

    @property
    def seconds(self) -> float:
        """Wall time of the training so far, including earlier runs."""
        return self._before + time.perf_counter() - self._since

    def resume(self, step: int) -> None:
        """Keep the lines up to `step` of an earlier run, and drop those after it."""
        if self.file.is_file():
            lines = read_jsonl(read_regular(self.file, most=MAX_BYTES))
            self.lines = [line for line in lines if line["step"] <= step] if step else []
        self._before = max((line["seconds"] for line in self.lines), default=0.0)
        self._since = time.perf_counter()
        if self.accelerator.is_main_process:
            write_atomically(self.file, "".join(f"{to_json(line)}\n" for line in self.lines).encode())
        self._bar.update(step)

    def step(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log an optimizer step, counted from 1."""
        now = self.seconds
        self._times = [*self._times[-_WINDOW:], now]
        took = now - self._times[0]
        more = {"images_per_second": self.images * (len(self._times) - 1) / took} if took else {}
        if self.accelerator.device.type == "cuda":
            more["peak_memory_mib"] = torch.cuda.max_memory_allocated(self.accelerator.device) / 2**20
        self._note({"step": step, "seconds": round(now, 3), **numbers, **more})
        self._bar.update()
        self._show({**numbers, **more})

    def validation(self, step: int, summary: Mapping[str, Any]) -> None:
        """Log the validation after `step` steps."""
        self._note({"step": step, "seconds": round(self.seconds, 3), "validation": dict(summary)})
        self._times = []  # the speed leaves out validations
        self._show({"holdout": summary["holdout"]} if "holdout" in summary else {})

    def close(self) -> None:
        """Close the progress bar."""
        self._bar.close()

    def _note(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if self.accelerator.is_main_process:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(f"{to_json(line)}\n")
        numbers = {f"validation/{k}": v for k, v in line.get("validation", {}).items()} or line
        self.accelerator.log({name: value for name, value in numbers.items() if name != "step"}, step=line["step"])

    def _show(self, numbers: Mapping[str, float]) -> None:
        self._shown |= {_SHOWN[n][0]: format(value, _SHOWN[n][1]) for n, value in numbers.items() if n in _SHOWN}
        self._bar.set_postfix(self._shown)


SHOWING: dict[str, dict[str, str]] = {"tensorboard": {"dataformats": "NHWC"}, "wandb": {}, "swanlab": {}}
"""Trackers that show images, and the arguments that they need."""


def check_tracker(report_to: str | None) -> None:
    """Refuse a tracker that is unknown or not installed; Accelerate would ignore it silently."""
    if report_to is None:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if report_to not in LOGGER_TYPE_TO_CLASS:
        raise ValueError(f"report_to: expected one of {', '.join(LOGGER_TYPE_TO_CLASS)}, got {report_to!r}")
    if report_to not in map(str, get_available_trackers()):
        other = f"pip install {report_to.replace('_', '-')}"
        command = how_to_install("finetune") if report_to == "tensorboard" else other
        raise ImportError(f"report_to: {report_to} is not installed: {command}")


def show_picture(accelerator: Accelerator, name: str, picture: np.ndarray, step: int) -> None:
    """Send a picture (H, W, 3) uint8 to the trackers that show images."""
    for tracker in accelerator.trackers:
        if tracker.name in SHOWING:
            tracker.log_images({name: picture[None]}, step=step, **SHOWING[tracker.name])
