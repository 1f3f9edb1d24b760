"""A prompt's record as JSON, and whether `ResultsFolder` wrote it: what else lies there counts as nothing."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from aigiqa_reward.sampling.candidates import Preview

_Kinds = type | tuple[type, ...]

_NUMBER: _Kinds = (int, float, type(None))
_TEXT: _Kinds = (str, type(None))

_SEED = re.compile(r"-?[0-9]{1,20}")

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
    """Whether a JSON value has all parts of a record, each of its kind, and can be written as JSON again.

    Seeds, which name files, are integers of 64 bits, as torch has them; NaN and infinite numbers are not JSON.
    """
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return False
    if not _has(value, _RECORD) or not all(_has(row, _CANDIDATE) for row in value["candidates"]):
        return False
    previews = value["previews"]
    return all(
        _SEED.fullmatch(seed) and isinstance(steps, list) and all(_has(step, _PREVIEW) for step in steps)
        for seed, steps in previews.items()
    )


def _has(value: Any, kinds: dict[str, _Kinds]) -> bool:
    return isinstance(value, dict) and all(name in value and _fits(value[name], kind) for name, kind in kinds.items())


def _fits(value: Any, kinds: _Kinds) -> bool:
    """Whether it is of one of these types, a truth value being no number, and as a number has at most 64 bits."""
    known = type(value) in (kinds if isinstance(kinds, tuple) else (kinds,))
    return known and (not isinstance(value, int) or -(2**63) <= value < 2**64)


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
