"""What every text tower owes its user: say which words it did not read."""

from __future__ import annotations

import unicodedata
import warnings


def warn_dropped(text: str, dropped: str, limit: int, *, tower: str) -> None:
    """Warn that a prompt is longer than a tower's window, naming what was left out."""
    shown = dropped if len(dropped) <= 120 else f"{dropped[:60]} ... {dropped[-55:]}"
    warnings.warn(
        f"prompt of {len(text.split())} words exceeds {tower}'s window of {limit} tokens; "
        f"these last words were dropped: {shown!r}",
        UserWarning,
        stacklevel=2,
    )


def warn_if_not_latin(text: str, *, tower: str) -> None:
    """Warn that a prompt is mostly in a script that an English-trained tower does not understand."""
    letters = [character for character in text if character.isalpha()]
    foreign = sum("LATIN" not in unicodedata.name(letter, "") for letter in letters)
    if foreign * 2 > len(letters):
        warnings.warn(
            f"prompt {text[:40]!r} is mostly not in Latin script; {tower} was trained on English text, "
            "so its correspondence score means little: pass an English reward prompt",
            UserWarning,
            stacklevel=2,
        )
