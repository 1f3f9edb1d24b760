"""OCR: whether the text in quotes of a prompt is written in the image, as the reward for text of Flow-GRPO.

Liu et al. 2025, "Flow-GRPO: Training Flow Matching Models via Online RL", rewards 1 - (edit distance) / (length of the
prompt's text), at least 0; here the divisor is the longer of both texts, so that more text than asked for lowers the
score as well. The reader is RapidOCR with the PP-OCR models in its package.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aigiqa_reward.models.base import QualityModel
from aigiqa_reward.types import Context, Images, PromptError, PromptFeatures, RewardOutput
from aigiqa_reward.utils.checks import how_to_install

_QUOTES = str.maketrans("“”„«»「」‘’", '"""""""' + "''")
_QUOTED = re.compile(r"""(?<!\w)"([^"]+)"|(?<!\w)'(.+?)'(?!\w)""")
"""A part in double quotes, or in single ones that are no apostrophes."""


class OCR(QualityModel):
    """1 - (edit distance) / (length of the longer text) between a prompt's quoted text and what is read in an image.

    Several quoted parts are joined in their order, lines of the image from top to bottom. Case and whitespace do not
    count. Each image is read alone, in 8 bits, on the CPU; no gradient passes.
    """

    name = "ocr"
    needs_prompts = True

    def __init__(self) -> None:
        super().__init__()
        _reader()  # so that a missing package is known at once

    def describe(self) -> dict[str, Any]:
        return {}

    def encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return {"characters": torch.tensor([len(quoted_text(text)) for text in texts])}

    @torch.no_grad()
    def forward(self, images: Images, prompts: PromptFeatures | None, context: Context | None = None) -> RewardOutput:
        del context
        assert prompts is not None  # a reward that needs prompts refuses a call without them
        pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        scores = [_likeness(quoted_text(p), _read(image)) for p, image in zip(prompts.prompts, pixels, strict=True)]
        total = torch.tensor(scores, dtype=images.dtype, device=images.device)
        return RewardOutput(total=total, correspondence=total, details={"raw": total})


def quoted_text(prompt: str) -> str:
    """Return the text in quotes of a prompt, without whitespace and case; a PromptError if there is none."""
    found = _normalized("".join("".join(parts) for parts in _QUOTED.findall(prompt.translate(_QUOTES))))
    if not found:
        fault = 'has no text in quotes, which ocr looks for in the image; write it as in: a sign that says "OPEN"'
        raise PromptError(prompt, fault=fault)
    return found


def _normalized(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def _read(image: np.ndarray) -> str:
    """Read an RGB image (H, W, 3) of uint8."""
    lines = _reader()(np.ascontiguousarray(image[..., ::-1])).txts  # arrays are taken as BGR
    return _normalized("".join(lines or ()).translate(_QUOTES))


@cache
def _reader() -> Any:
    try:
        from rapidocr import RapidOCR

        return RapidOCR(params={"Global.log_level": "critical"})
    except ImportError as error:
        raise ImportError(f"the reward ocr needs rapidocr and onnxruntime; {how_to_install('ocr')}") from error


def _likeness(first: str, second: str) -> float:
    """Return 1 - Levenshtein distance / length of the longer text."""
    row = list(range(len(second) + 1))
    for i, one in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (one != other))
    return 1 - row[-1] / max(len(first), len(second))
