"""Where a training may report to: trackers of Accelerate, which would leave out in silence those it cannot import."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from aigiqa_reward.utils.io import MAX_BYTES, parse_json, read_regular, write_atomically

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
"""In the progress bar: name and format of a number."""

_WINDOW = 20  # steps that the speed is taken over
_MIBI = 2**20


class History:
    """One line a step and one a validation, in `history.jsonl`.

    Args:
        folder: of the training.
        accelerator: whose main process writes, and whose trackers are told.
        steps: of the whole training.
        images: rows of a step's whole batch.
        progress: show a bar.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, *, steps: int, images: int, progress: bool) -> None:
        self.file = folder / FILE
        self.accelerator = accelerator
        self.images = images
        self.lines: list[dict[str, Any]] = []
        self._before = 0.0
        self._since = time.perf_counter()
        self._times: list[float] = []
        self._shown: dict[str, str] = {}
        self._bar = tqdm(
            total=steps, desc="fine-tune", unit="step", disable=not (progress and accelerator.is_main_process)
        )

    @property
    def seconds(self) -> float:
        """Wall time of the training so far, over all its runs."""
        return self._before + time.perf_counter() - self._since

    def resume(self, step: int) -> None:
        """Take up the lines up to `step` of an earlier run; what lies beyond is made again."""
        if self.file.is_file():
            told = read_regular(self.file, most=MAX_BYTES).decode("utf-8", "replace").split("\n")
            lines = [line for line in map(_read, told) if line is not None]
            self.lines = [line for line in lines if line["step"] <= step] if step else []
        self._before = max((line["seconds"] for line in self.lines), default=0.0)
        self._since = time.perf_counter()
        if self.accelerator.is_main_process:
            write_atomically(self.file, "".join(map(_line, self.lines)).encode())
        self._bar.update(step)

    def step(self, step: int, numbers: Mapping[str, float]) -> None:
        """Note a step of the optimizer, counted from 1."""
        now = self.seconds
        self._times = [*self._times[-_WINDOW:], now]
        took = now - self._times[0]
        speed = {"images_per_second": self.images * (len(self._times) - 1) / took} if took > 0 else {}
        more = {**speed, **peak_memory(self.accelerator.device)}
        self._note({"step": step, "seconds": round(now, 3), **numbers, **more})
        self._bar.update()
        self._show({**numbers, **more})

    def validation(self, step: int, summary: Mapping[str, Any]) -> None:
        """Note what a validation found after `step` steps."""
        self._note({"step": step, "seconds": round(self.seconds, 3), "validation": dict(summary)})
        self._times = []  # images are counted in training alone
        self._show({name: summary[name] for name in ("holdout",) if name in summary})

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()

    def _note(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if self.accelerator.is_main_process:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(_line(line))
        numbers = {f"validation/{k}": v for k, v in line.get("validation", {}).items()} or line
        plain = {name: value for name, value in numbers.items() if isinstance(value, int | float)}
        self.accelerator.log({name: value for name, value in plain.items() if name != "step"}, step=line["step"])

    def _show(self, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            if name in _SHOWN and value is not None:
                title, form = _SHOWN[name]
                self._shown[title] = format(value, form)
        self._bar.set_postfix(self._shown)


def peak_memory(device: torch.device) -> dict[str, float]:
    """Most memory that tensors took on a GPU, in MiB; nothing on others, where nobody counts."""
    return {"peak_memory_mib": torch.cuda.max_memory_allocated(device) / _MIBI} if device.type == "cuda" else {}


def _line(line: Mapping[str, Any]) -> str:
    """JSON, which knows no NaN."""
    whole = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in line.items()}
    return json.dumps(whole) + "\n"


def _read(line: str) -> dict[str, Any] | None:
    """A line that was written to its end; None for what is none."""
    try:
        told = parse_json(line)
    except ValueError:
        return None
    if not isinstance(told, dict):
        return None
    counts = [told.get(name) for name in ("step", "seconds")]
    return told if all(isinstance(count, int | float) and 0 <= count < 2**63 for count in counts) else None


SHOWING: dict[str, dict[str, str]] = {"tensorboard": {"dataformats": "NHWC"}, "wandb": {}, "swanlab": {}}
"""Trackers that take a list of pictures for one step, and what they need to be told."""


def check_tracker(report_to: str | None) -> None:
    """Refuse a tracker that is unknown or not installed.

    Raises:
        ValueError: Accelerate knows none of that name.
        ImportError: it is not installed; says what brings it.
    """
    if report_to is None:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if report_to not in LOGGER_TYPE_TO_CLASS:
        raise ValueError(f"report_to: expected one of {', '.join(LOGGER_TYPE_TO_CLASS)}, got {report_to!r}")
    if report_to not in map(str, get_available_trackers()):
        ours = {"tensorboard": '"aigiqa-reward[finetune]"'}
        package = ours.get(report_to, report_to.replace("_", "-"))  # as PyPI has them: comet-ml, others are one word
        raise ImportError(f"report_to: {report_to} is not installed: pip install {package}")


def show_picture(accelerator: Accelerator, name: str, picture: np.ndarray, step: int) -> None:
    """Send a picture (H, W, 3) uint8 to the trackers of a training that show pictures."""
    for tracker in accelerator.trackers:
        if tracker.name in SHOWING:
            tracker.log_images({name: picture[None]}, step=step, **SHOWING[tracker.name])
