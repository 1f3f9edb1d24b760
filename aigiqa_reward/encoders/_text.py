"""Reading of texts that every text tower shares, with warnings about words that it does not use."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

from aigiqa_reward.types import PromptError


def read_tokens(
    tokenizer: Tokenizer, texts: Sequence[str], window: int, *, tower: str, argument: str, padding: int = 0
) -> tuple[Tensor, Tensor]:
    """Return ids (P, L) of texts, cut to `window` tokens with a warning, and a mask (P, L) that is False at padding."""
    unknown, rows = getattr(tokenizer.model, "unk_token", None), []
    for text in texts:
        encoding = tokenizer.encode(text)
        if len(encoding.ids) <= 2:  # start and end
            raise PromptError(text, argument)
        ids = encoding.ids
        words = [token for token in encoding.tokens[1:-1] if token != unknown and any(map(str.isalnum, token))]
        warn_if_not_understood(text, tower=tower, known=bool(words))
        if len(ids) > window:
            warn_dropped(text, text[encoding.offsets[window - 1][0] :].strip(), window, tower=tower)
            ids = ids[: window - 1] + ids[-1:]
        rows.append(ids)
    length = max(len(row) for row in rows)
    ids = torch.tensor([row + [padding] * (length - len(row)) for row in rows])
    return ids, torch.tensor([[place < len(row) for place in range(length)] for row in rows])


def warn_dropped(text: str, dropped: str, limit: int, *, tower: str) -> None:
    """Warn that a prompt is longer than a tower's window, naming the dropped words."""
    shown = dropped if len(dropped) <= 120 else f"{dropped[:60]} ... {dropped[-55:]}"
    warnings.warn(
        f"prompt of {len(text.split())} words exceeds {tower}'s window of {limit} tokens; "
        f"these last words were dropped: {shown!r}",
        stacklevel=2,
    )


def warn_if_not_understood(text: str, *, tower: str, known: bool = True) -> None:
    """Warn that a prompt is mostly in a script that an English-trained tower cannot read, or has no word `known`."""
    letters = [character for character in text if character.isalpha()]
    foreign = sum("LATIN" not in unicodedata.name(letter, "") for letter in letters)
    if foreign * 2 > len(letters) or not known:
        what = "is mostly not in Latin script" if foreign * 2 > len(letters) else "has no word that is known"
        warnings.warn(
            f"prompt {text[:40]!r} {what}; {tower} was trained on English text, "
            "so its correspondence score means little: pass an English reward prompt",
            stacklevel=2,
        )
