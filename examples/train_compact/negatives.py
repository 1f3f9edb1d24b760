"""Make captions wrong by rules: a word or phrase is replaced by another one of its kind."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# fmt: off
RULES = (
    ("color", "red, orange, yellow, green, blue, purple, white, black, brown, pink, gray, grey, tan, golden, silver"),
    ("count", "one, two, three, four, five, six, several, many"),
    ("noun", "man, woman, boy, girl, baby"),
    ("noun", "dog, cat, horse, bird, cow, sheep, elephant, bear, zebra, giraffe"),
    ("noun", "ball, frisbee, stick, toy, bone, book, guitar, camera, umbrella, phone, flag, kite, balloon"),
    ("noun", "car, bus, truck, motorcycle, bicycle, bike, boat, train, airplane, sled"),
    ("noun", "skateboard, surfboard, snowboard, scooter, skis, kayak"),
    ("noun", "beach, street, field, forest, mountain, lake, river, ocean, pool, park, desert, snow, grass, sand, road, "
             "building, room, kitchen, playground, stadium"),
    ("noun", "shirt, jacket, dress, hat, helmet, coat, suit, jeans, skirt, swimsuit"),
    ("noun", "apple, banana, pizza, sandwich, cake, donut, carrot, broccoli, sushi, mushroom"),
    ("noun", "chair, bench, table, bed, couch, sofa, toilet, sink"),
    ("noun", "soccer, football, basketball, baseball, tennis, hockey, volleyball"),
    ("noun", "castle, temple, house, tower, bridge, city"),
    ("noun", "robot, astronaut, knight, wizard, dragon, warrior, princess"),
    ("noun", "tree, flower, rock, wall, fence, rope"),
    ("relation", "to the left of, to the right of"), ("relation", "above, below"),
    ("relation", "in front of, behind"), ("relation", "on top of, under"), ("relation", "inside, outside"),
    ("relation", "into, out of"), ("relation", "up, down"), ("relation", "over, under"),
    ("relation", "near, far from"), ("relation", "toward, away from"), ("relation", "on, under"),
    ("relation", "with, without"),
    ("style", "anime style, baroque style, abstract style, realistic style, sci-fi style"),
    ("style", "close-up, long-shot, top view, elevation view"), ("style", "warm color, cold color"),
    ("style", "soft lighting, hdr lighting"), ("style", "hyper detail, blurred detail"),
)
# fmt: on
"""Kind and phrases of each group. A phrase is replaced by another of its group, a noun also by one of another group."""

NOT_WRONG = {
    "gray": "grey, silver", "grey": "gray, silver", "silver": "gray, grey", "tan": "brown", "brown": "tan",
    "golden": "yellow", "yellow": "golden", "two": "one", "three": "one", "four": "one, several, many",
    "five": "one, several, many", "six": "one, several, many", "several": "one, many", "many": "one, several",
    "man": "boy", "boy": "man, baby", "woman": "girl", "girl": "woman, baby", "baby": "boy, girl",
    "bike": "bicycle", "bicycle": "bike", "couch": "sofa", "sofa": "couch", "forest": "park", "park": "forest",
    "road": "street", "street": "road", "jacket": "coat", "coat": "jacket", "ocean": "beach", "beach": "ocean, sand",
    "sand": "beach", "grass": "field", "field": "grass", "lake": "river", "river": "lake", "football": "soccer",
    "soccer": "football",
}  # fmt: skip
"""Phrases of its group that do not replace one: they may be right as well, or make no sentence ("one dogs")."""

NEED_ARTICLE = ("on", "with", "up", "into", "over")
"""Relations that are replaced only before a determiner."""

IRREGULAR = {"man": "men", "woman": "women", "baby": "babies", "city": "cities"} | {
    noun: noun for noun in ("sheep", "jeans", "skis")
}


@dataclass(frozen=True, kw_only=True)
class Wrong:
    """A wrong caption, the kind of its rule, and the characters (start, end) of `text` that are wrong."""

    kind: str
    text: str
    span: tuple[int, int]


class Place(NamedTuple):
    """Where a rule applies to a caption: its kind, the characters (start, end), and what may replace them."""

    kind: str
    span: tuple[int, int]
    replacements: tuple[str, ...]


def plural(noun: str) -> str:
    """Return the plural of a noun of RULES."""
    return IRREGULAR.get(noun) or noun + ("es" if noun[-1] in "sxh" else "s")


def _rules() -> dict[str, list[tuple[str, tuple[str, ...]]]]:
    """Kind and replacements of each phrase, of which a noun has two: near and far ones."""
    groups = [(kind, phrases.split(", ")) for kind, phrases in RULES]
    nouns = [noun for kind, group in groups if kind == "noun" for noun in group]
    rules: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    for kind, group in groups:
        for phrase in group:
            kept = {phrase, *NOT_WRONG.get(phrase, "").split(", ")}
            found = [tuple(other for other in group if other not in kept)]
            if kind == "noun":
                found.append(tuple(other for other in nouns if other not in group))
            rules.setdefault(phrase, []).extend((kind, words) for words in found)
            if kind == "noun":
                rules.setdefault(plural(phrase), [(kind, tuple(map(plural, words))) for words in found])
    return rules


_BY_PHRASE = _rules()
_PHRASE = re.compile(rf"\b(?=({'|'.join(sorted(map(re.escape, _BY_PHRASE), key=len, reverse=True))})\b)")
_ARTICLE = re.compile(r" (a|an|the|his|her|two|some)\b")


def find_places(caption: str) -> list[Place]:
    """Find all places of a caption that a rule applies to."""
    text, places = caption.lower(), []
    for match in _PHRASE.finditer(text):
        phrase, span = match[1], match.span(1)
        if phrase not in NEED_ARTICLE or _ARTICLE.match(text, span[1]):
            places += [Place(kind, span, words) for kind, words in _BY_PHRASE[phrase]]
    return places


def wrong_caption(caption: str, rng: np.random.Generator) -> Wrong | None:
    """Draw a kind of the rules that apply, then a place and a replacement; None if no rule applies."""
    places = find_places(caption)
    if not places:
        return None
    kinds = sorted({place.kind for place in places})
    chosen = kinds[rng.integers(len(kinds))]
    places = [place for place in places if place.kind == chosen]
    _, (start, end), replacements = places[rng.integers(len(places))]
    words = replacements[rng.integers(len(replacements))]
    return Wrong(kind=chosen, text=caption[:start] + words + caption[end:], span=(start, start + len(words)))
