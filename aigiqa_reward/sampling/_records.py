"""A prompt's record as JSON, and whether `ResultsFolder` wrote it: what else lies there counts as nothing."""

from __future__ import annotations

import math
from typing import Any

from aigiqa_reward.sampling.candidates import Preview

_Kinds = type | tuple[type, ...]

_NUMBER: _Kinds = (int, float, type(None))
_TEXT: _Kinds = (str, type(None))

_RECORD: dict[str, _Kinds] = {
    "prompt": str,
    "finished": bool,
    "error": _TEXT,
    "denoiser_calls": (int, type(None)),
    "candidates": list,
    "previews": dict,
}
_CANDIDATE: dict[str, _Kinds] = {
    "seed": int,
    "total": _NUMBER,
    "quality": _NUMBER,
    "correspondence": _NUMBER,
    "error": _TEXT,
    "rank": (int, type(None)),
    "image": _TEXT,
}
_PREVIEW: dict[str, _Kinds] = {
    "step": int,
    "steps": int,
    "total": _NUMBER,
    "quality": _NUMBER,
    "correspondence": _NUMBER,
}


def is_record(value: Any) -> bool:
    """Whether a JSON value has all parts of a record, each of its kind; seeds, which name files, are integers."""
    if not _has(value, _RECORD) or not all(_has(row, _CANDIDATE) for row in value["candidates"]):
        return False
    previews = value["previews"]
    return all(
        seed.removeprefix("-").isdecimal() and isinstance(steps, list) and all(_has(step, _PREVIEW) for step in steps)
        for seed, steps in previews.items()
    )


def _has(value: Any, kinds: dict[str, _Kinds]) -> bool:
    return isinstance(value, dict) and all(
        name in value and isinstance(value[name], kind) for name, kind in kinds.items()
    )


def preview_of(told: dict[str, Any]) -> Preview:
    """A preview of a record; NaN for a reward that was none."""
    total, quality = (math.nan if told[name] is None else told[name] for name in ("total", "quality"))
    return Preview(
        step=told["step"], steps=told["steps"], total=total, quality=quality, correspondence=told["correspondence"]
    )


def finite(value: Any) -> Any:
    """With None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
