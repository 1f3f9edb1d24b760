"""The world of the embedded generator: 64 things on 8 background colors, so that what a picture shows can be checked.

The things are Fluent 3D emoji, found by code point; their names are Unicode's. Every thing has one background color
that no training picture shows it on (`is_held_out`): the hard prompts.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from functools import cache

# fmt: off
THINGS = {
    "red apple": 0x1F34E, "green apple": 0x1F34F, "tangerine": 0x1F34A, "lemon": 0x1F34B, "banana": 0x1F34C,
    "pineapple": 0x1F34D, "strawberry": 0x1F353, "watermelon": 0x1F349, "cherries": 0x1F352, "grapes": 0x1F347,
    "carrot": 0x1F955, "broccoli": 0x1F966, "avocado": 0x1F951, "mushroom": 0x1F344, "hamburger": 0x1F354,
    "doughnut": 0x1F369, "birthday cake": 0x1F382, "pretzel": 0x1F968, "cactus": 0x1F335, "tulip": 0x1F337,
    "sunflower": 0x1F33B, "palm tree": 0x1F334, "evergreen tree": 0x1F332, "maple leaf": 0x1F341,
    "penguin": 0x1F427, "octopus": 0x1F419, "turtle": 0x1F422, "crab": 0x1F980, "butterfly": 0x1F98B,
    "lady beetle": 0x1F41E, "owl": 0x1F989, "tropical fish": 0x1F420, "elephant": 0x1F418, "flamingo": 0x1F9A9,
    "snail": 0x1F40C, "panda face": 0x1F43C, "balloon": 0x1F388, "guitar": 0x1F3B8, "trumpet": 0x1F3BA,
    "trophy": 0x1F3C6, "crown": 0x1F451, "key": 0x1F511, "bell": 0x1F514, "hammer": 0x1F528, "candle": 0x1F56F,
    "teddy bear": 0x1F9F8, "teapot": 0x1FAD6, "magnet": 0x1F9F2, "camera": 0x1F4F7, "gem stone": 0x1F48E,
    "top hat": 0x1F3A9, "t-shirt": 0x1F455, "jack-o-lantern": 0x1F383, "ghost": 0x1F47B, "snowman": 0x26C4,
    "soccer ball": 0x26BD, "umbrella": 0x1F302, "rocket": 0x1F680, "automobile": 0x1F697, "bus": 0x1F68C,
    "sailboat": 0x26F5, "helicopter": 0x1F681, "tractor": 0x1F69C, "bicycle": 0x1F6B2,
}
# fmt: on
"""Name to code point. Two names are shorter than Unicode's (closed umbrella, snowman without snow)."""

# fmt: off
COLORS = {
    "red": (214, 48, 49), "orange": (243, 146, 43), "yellow": (248, 218, 74), "green": (60, 163, 82),
    "blue": (58, 110, 214), "purple": (134, 74, 184), "white": (246, 246, 246), "black": (28, 28, 30),
}
# fmt: on
"""Background colors, sRGB 0 to 255."""

SIDE = 64
"""Side of a picture in px."""

NOUNS, COLOR_NAMES = tuple(THINGS), tuple(COLORS)

WORDINGS = (
    "{thing} on {a_color} background",
    "{thing} on {color}",
    "{thing}, {color} background",
    "a picture of {thing} on {a_color} background",
    "{thing} in front of {a_color} background",
    "{a_color} background with {thing}",
)
"""Wordings of the training captions."""

_NO_ARTICLE = ("cherries", "grapes", "broccoli")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The subject of a prompt: indices into NOUNS and COLOR_NAMES, or None where it names nothing known."""

    noun: int | None
    color: int | None


def _with_article(words: str) -> str:
    return words if words in _NO_ARTICLE else f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption(noun: int, color: int, wording: int = 0) -> str:
    """Return the caption of a thing on a background color, by index, in one of WORDINGS."""
    thing, name = NOUNS[noun], COLOR_NAMES[color]
    return WORDINGS[wording].format(thing=_with_article(thing), color=name, a_color=_with_article(name))


def all_captions() -> list[str]:
    """Return every caption: nouns outermost, then colors, then wordings."""
    counts = len(NOUNS), len(COLORS), len(WORDINGS)
    return [caption(*indices) for indices in itertools.product(*map(range, counts))]


def is_held_out(noun: int, color: int) -> bool:
    """Return whether training never shows this thing on this color: one color per thing, each color 8 times."""
    return (3 * noun + noun // 8) % len(COLORS) == color


@cache
def _known_words() -> set[str]:
    return {"the", *_words(" ".join(all_captions()))}


def _words(text: str) -> list[str]:
    return re.findall(r"[\w-]+", text.lower())


def unknown_words(prompt: str) -> list[str]:
    """Return the words of a prompt that are in no training caption, each once, in their order."""
    known = _known_words()
    return [word for word in dict.fromkeys(_words(prompt)) if word not in known and word.removesuffix("s") not in known]


def read_subject(prompt: str) -> Subject:
    """Find the thing and background color that a prompt names.

    The longest name wins, and a thing's own words are not its background: "a red apple" names no background color.
    """
    text = prompt.lower()
    noun = None
    for name in sorted(NOUNS, key=len, reverse=True):
        found = re.search(rf"(?<!\w){re.escape(name)}s?(?!\w)", text)
        if found:
            noun = NOUNS.index(name)
            text = text[: found.start()] + " " + text[found.end() :]
            break
    color = rf"(?<!\w)({'|'.join(COLOR_NAMES)})(?!\w)"
    places = (rf"{color}\s+background", rf"\b(?:on|in front of)\s+(?:an?\s+)?{color}", color)
    found = next((match for place in places if (match := re.search(place, text))), None)
    return Subject(noun=noun, color=COLOR_NAMES.index(found[1]) if found else None)
