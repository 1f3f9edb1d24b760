"""The noun phrases of a prompt by rule: what a prompt names, without a language model."""

from __future__ import annotations

import re
from collections.abc import Iterator

from aigiqa_reward.assistants._pretrained import check_at_least

LIMIT = 8
"""Attributes a prompt at most. Chosen here: CPA-IQA leaves k open, and longer lists name the same things again."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_DETERMINERS = _words("a an the this these those some any each every his her its their my your our")

_BETWEEN = (
    # prepositions
    _words(
        "about above across after against along alongside amid amidst among around as at atop before behind below "
        "beneath beside between beyond by during featuring for from in inside into like near of off on onto over per "
        "through throughout to toward towards under underneath upon via versus vs with within without"
    )
    # conjunctions, relative and personal pronouns, particles
    | _words(
        "and or but nor & + while that which who whom whose where when then there he him she it they them himself "
        "herself itself themselves i you we up down out away together not"
    )
    # being and having, modals
    | _words("is are was were am be been being has have had having will would can could should may might must")
)
"""Words that stand between noun phrases and belong to none."""

_ACTIONS = _words(
    "wearing wears sitting sits standing holding holds carrying carries riding rides eating eats drinking drinks "
    "lying laying lies walking running jumping leaping flying floating swimming sleeping dancing singing playing "
    "reading writing watching looking gazing staring facing using making taking giving catching chasing hugging "
    "kissing fighting attacking climbing crossing driving pulling pushing throwing waving smiling laughing crying "
    "screaming howling showing shows depicting depicts containing contains surrounding covering hanging resting "
    "leaning emerging rising falling hovering exploring exploding growing going coming trying remembering "
    "swarming dropping sticking says saying reads reflecting enjoying having doing getting performing "
    "cooking working talking posing crouching kneeling perching gathering"
)
"""Verbs that stand between noun phrases, unless a noun follows at once that they may describe (`_MAY_DESCRIBE`)."""

_MAY_DESCRIBE = _words(
    "sleeping dancing singing flying floating running jumping leaping swimming smiling laughing crying screaming "
    "howling hanging rising falling growing hovering exploding emerging sitting standing walking reading writing "
    "playing fighting working cooking kneeling crouching climbing waving glowing driving"
)
"""Of these, the ones that stand before a noun as its adjective: a dancing woman, a flying car."""

_NOUNS_IN_ING = _words(
    "painting drawing building lighting clothing rendering engraving etching carving shading morning evening "
    "ceiling wedding king ring wing spring string thing being setting sling swing earring viking stocking railing "
    "awning landing opening crossing pudding dumpling lightning printing packaging"
)

_DONE = _words(
    "covered made dressed surrounded filled lit inspired illuminated seen located placed parked perched painted drawn "
    "taken captured rendered wrapped adorned decorated composed buried hidden reflected shown depicted carved "
    "sculpted built designed created submerged based dropped seated clad engulfed bathed covering engraved "
    "photographed viewed carried held worn followed illustrated styled overgrown trapped stuck"
)
"""Participles that link two noun phrases when a preposition follows: covered in snow, made of leaves."""

_FRAMES = _words(
    "photo photograph picture image pic style middle center centre side back kind type sort pair bunch piece number "
    "couple view"
)
"""Words that say nothing before `of`: a photo of, in the style of."""

_LINKS = re.compile(
    r"\b(next to|close to|in front of|on top of|out of|full of|made out of|because of|instead of|such as|as well as|"
    r"a lot of|lots of)\b",
    re.IGNORECASE,
)
"""Prepositions of several words."""

_COMMANDS = _words("generate create make draw render show please me imagine")
"""Words that ask for an image at the start of a prompt."""

_WEIGHT = re.compile(r"(?<=\S):\s*-?\d+(\.\d+)?(?=[)\]])")  # (masterpiece:1.2)
_FLAG = re.compile(r"<[^<>]*>|(?<!\S)(--|—)[a-z]+(\s+[\d.:]+)?(?!\S)", re.IGNORECASE)  # <lora:x:1>, --ar 16:9
_BREAKS = re.compile(r"[,;|()\[\]{}<>\n\r\t、，。；：！？]+|[.:!?]+(?=\s|$)|\s[-–—]+\s")
_EDGES = " \t'\"`´‘’“”«»*_~#.:!?-–—"


def noun_phrases(text: str, limit: int = LIMIT) -> list[str]:
    """What a prompt names: the offline substitute for a language model's attributes.

    By rule: the text is cut at punctuation, prepositions, conjunctions, pronouns, forms of being and having, and verbs
    such as wearing, sitting, holding; determiners and empty frames ("a photo of", "in the style of") are dropped.
    The rules are for English; a text in another language is cut at its punctuation.

    Args:
        text: a prompt.
        limit: largest number of phrases, the first ones.

    Returns:
        1 to `limit` phrases in the text's order, none twice in any letter case; the text itself if nothing is left.

    Raises:
        ValueError: `limit` is below 1.

    Example:
        >>> from aigiqa_reward.assistants import noun_phrases
        >>> noun_phrases("a photo of a red fox sitting in the snow, oil painting")
        ['red fox', 'snow', 'oil painting']
    """
    check_at_least("limit", limit, 1)
    found: dict[str, str] = {}
    cleaned = _LINKS.sub(" with ", _WEIGHT.sub("", _FLAG.sub(" ", text)))
    for number, segment in enumerate(_BREAKS.split(cleaned)):
        words = [word for word in (part.strip(_EDGES) for part in segment.split()) if word]
        if number == 0:
            words = _without_command(words)
        for phrase in _phrases(words):
            found.setdefault(phrase.casefold(), phrase)
    return list(found.values())[:limit] or [text]


def _without_command(words: list[str]) -> list[str]:
    start = 0
    while start < len(words) and words[start].lower() in _COMMANDS:
        start += 1
    return words[start:]


def _phrases(words: list[str]) -> Iterator[str]:
    """The noun phrases of words between two punctuation marks."""
    phrase: list[str] = []
    for place, word in enumerate(words):
        following = words[place + 1].lower() if place + 1 < len(words) else ""
        if _separates(word.lower(), following, first=not phrase):
            yield from _whole(phrase, word.lower())
            phrase = []
        elif phrase or word.lower() not in _DETERMINERS:
            phrase.append(word)
        if phrase and following in _DETERMINERS:  # a new one begins: "a cat the size of a house"
            yield from _whole(phrase, following)
            phrase = []
    yield from _whole(phrase, "")


def _separates(word: str, following: str, *, first: bool) -> bool:
    """Whether a word belongs to no noun phrase, given the next one and whether it would begin a phrase."""
    if word in _BETWEEN:
        return True
    ends = not following or following in _BETWEEN or following in _DETERMINERS
    if word in _ACTIONS:
        return ends or not (first and word in _MAY_DESCRIBE)
    if word in _DONE:
        return following in _BETWEEN
    if word.endswith("ing") and len(word) > 4 and word not in _NOUNS_IN_ING:
        return not first and ends and following not in ("", "of", "and", "or")
    return False


def _whole(phrase: list[str], separator: str) -> Iterator[str]:
    """A finished phrase, unless it is empty or a frame for what follows."""
    if phrase and not (separator == "of" and len(phrase) == 1 and phrase[0].lower() in _FRAMES):
        yield " ".join(phrase)
