"""Verify a published reward: fetch its weights, check and load them strictly, and score two included images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aigiqa_reward.rewards.factory import create_reward
from aigiqa_reward.rewards.published import PUBLISHED, locate
from aigiqa_reward.rewards.scorer import Scorer
from aigiqa_reward.utils.io import read_json
from aigiqa_reward.utils.weights import ASSETS, sha256

IMAGES = ("sushi_midjourney.jpg", "sushi_sd15.jpg")
"""Images in assets/verify."""

PROMPT = "a tray of sushi"
REFERENCE = ASSETS / "verify" / "reference.json"
"""Verified rewards by name: "sha256" of the weights, and "raw", the scores of IMAGES."""

TOLERANCE = 1e-3
"""Largest accepted difference, as a share of the largest score: kernels and JPEG decoders differ by less."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify` found.

    Attributes:
        name: name of the reward.
        file: weights that were loaded.
        sha256: their hash.
        raw: raw scores of IMAGES.
        reference: those of the table, for weights of this hash; None if it has none.
    """

    name: str
    file: Path
    sha256: str
    raw: tuple[float, ...]
    reference: tuple[float, ...] | None

    @property
    def ok(self) -> bool:
        """Whether there is no reference, or the scores equal it."""
        pairs = zip(self.raw, self.reference or self.raw, strict=True)
        return all(abs(raw - expected) <= TOLERANCE * max(map(abs, self.raw)) for raw, expected in pairs)

    @property
    def entry(self) -> str:
        """The line of REFERENCE for these weights."""
        found = {"sha256": self.sha256, "raw": [round(raw, 6) for raw in self.raw]}
        return f"{json.dumps(self.name)}: {json.dumps(found)}"


def verify(name: str, weights: str | Path | None = None, table: Mapping[str, Any] | None = None) -> Verification:
    """Fetch a published reward's weights, load them strictly in float32 on the CPU, and score IMAGES.

    Args:
        name: name of a published reward.
        weights: local copy of the authors' file, or its folder; None fetches it from the Hub.
        table: references by name; None reads REFERENCE.
    """
    if name not in PUBLISHED:
        raise ValueError(f"name: expected a published reward, one of {', '.join(PUBLISHED)}, got {name!r}")
    scores = Scorer(create_reward(name, weights=weights)).score([ASSETS / "verify" / image for image in IMAGES], PROMPT)
    file = locate(name, weights)
    digest = sha256(file)
    known = (read_json(REFERENCE) if table is None else table).get(name)
    reference = None if known is None or known["sha256"] != digest else tuple(known["raw"])
    raw = tuple(scores.details["raw"].tolist())
    return Verification(name=name, file=file, sha256=digest, raw=raw, reference=reference)
