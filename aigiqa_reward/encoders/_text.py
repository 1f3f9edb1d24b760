"""Reading of texts that every text tower shares, with warnings about words that it does not use."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from aigiqa_reward.types import PromptError


def read_tokens(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    window: int,
    *,
    tower: str,
    argument: str,
    padding: int = 0,
    special: int = 2,
    multilingual: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return ids (P, L) of texts, cut to `window` tokens with a warning, and a mask (P, L) that is False at padding.

    A tokenizer adds `special` tokens to a text: start and end, or the end alone.
    """
    unknown, rows = getattr(tokenizer.model, "unk_token", None), []
    for text in texts:
        encoding = tokenizer.encode(text)
        if len(encoding.ids) <= special:
            raise PromptError(text, argument)
        ids = encoding.ids
        if not multilingual:
            tokens = zip(encoding.tokens, encoding.special_tokens_mask, strict=True)
            words = [token for token, added in tokens if not added and token != unknown]
            warn_if_not_understood(text, tower=tower, known=any(map(str.isalnum, "".join(words))))
        if len(ids) > window:
            warn_dropped(text, text[encoding.offsets[window - 1][0] :].strip(), window, tower=tower)
            ids = ids[: window - 1] + ids[-1:]
        rows.append(ids)
    length = max(len(row) for row in rows)
    ids = torch.tensor([row + [padding] * (length - len(row)) for row in rows])
    return ids, torch.tensor([[place < len(row) for place in range(length)] for row in rows])


def clip_tokens(tokenizer: Any, texts: Sequence[str], *, tower: str) -> Tensor:
    """Return the ids (P, window) of texts by open_clip's `SimpleTokenizer`, padded with 0; cut texts keep their end.

    A text without words raises a PromptError; dropped words and texts that are not in Latin script give a warning.
    """
    room = tokenizer.context_length - 2  # for the start and end tokens
    for text in texts:
        warn_if_not_understood(text, tower=tower)
        words = text.split()
        ends = list(accumulate(len(tokenizer.encode(word)) for word in words))
        if not ends or ends[-1] == 0:
            raise PromptError(text)
        if ends[-1] > room:
            kept = sum(end <= room for end in ends)
            warn_dropped(text, " ".join(words[kept:]), tokenizer.context_length, tower=tower)
    return tokenizer(list(texts))


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
