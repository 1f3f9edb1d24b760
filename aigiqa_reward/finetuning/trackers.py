"""Where a training may report to: trackers of Accelerate, which would leave out in silence those it cannot import."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from accelerate import Accelerator

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
