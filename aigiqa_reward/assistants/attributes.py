"""The visual attributes of a prompt, by a language model or, without it, by rule."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from aigiqa_reward.assistants.base import AssistantConfig, PretrainedAssistant, generate_greedily, pad_on_the_left
from aigiqa_reward.utils.checks import integer

LIMIT = 8  # attributes per prompt: CPA-IQA leaves k open; longer lists repeat themselves


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_DETERMINERS = _words("a an the this these those some any each every his her its their my your our")

# Between noun phrases and part of none: prepositions; conjunctions, pronouns, particles; being, having, modals
_BETWEEN = _words(
    "about above across after against along alongside amid amidst among around as at atop before behind below beneath "
    "beside between beyond by during featuring for from in inside into like near of off on onto over per through "
    "throughout to toward towards under underneath upon via versus vs with within without and or but nor & + while "
    "that which who whom whose where when then there he him she it they them himself herself itself themselves i you "
    "we up down out away together not is are was were am be been being has have had having will would can could should "
    "may might must"
)
# Verbs that may be the adjective of a noun: a dancing woman, a flying car
_MAY_DESCRIBE = _words(
    "sleeping dancing singing flying floating running jumping leaping swimming smiling laughing crying screaming "
    "howling hanging rising falling growing hovering exploding emerging sitting standing walking reading writing "
    "playing fighting working cooking kneeling crouching climbing waving driving"
)
# Verbs between noun phrases
_ACTIONS = _words(
    "wearing wears sits holding holds carrying carries riding rides eating eats drinking drinks lying laying lies "
    "watching looking gazing staring facing using making taking giving catching chasing hugging kissing attacking "
    "crossing pulling pushing throwing showing shows depicting depicts containing contains surrounding covering "
    "resting leaning exploring going coming trying remembering swarming dropping sticking says saying reads reflecting "
    "enjoying having doing getting performing talking posing perching gathering"
)
_NOUNS_IN_ING = _words(
    "painting drawing building lighting clothing rendering engraving etching carving shading morning evening ceiling "
    "wedding king ring wing spring string thing being setting sling swing earring viking stocking railing awning "
    "landing opening crossing pudding dumpling lightning printing packaging"
)
# Participles that link two noun phrases when a preposition follows: covered in snow, made of leaves
_DONE = _words(
    "covered made dressed surrounded filled lit inspired illuminated seen located placed parked perched painted drawn "
    "taken captured rendered wrapped adorned decorated composed buried hidden reflected shown depicted carved sculpted "
    "built designed created submerged based dropped seated clad engulfed bathed covering engraved photographed viewed "
    "carried held worn followed illustrated styled overgrown trapped stuck"
)
# Words without content before `of`: a photo of, in the style of
_FRAMES = _words(
    "photo photograph picture image pic style middle center centre side back kind type sort pair bunch piece number "
    "couple view"
)
_COMMANDS = _words("generate create make draw render show please me imagine")  # at the start of a prompt
_LINKS = re.compile(
    r"\b(next to|close to|in front of|on top of|out of|full of|made out of|because of|instead of|such as|as well as|"
    r"a lot of|lots of)\b",
    re.IGNORECASE,
)
_WEIGHT = re.compile(r"(?<=\S):\s*-?\d+(\.\d+)?(?=[)\]])")  # (masterpiece:1.2)
_FLAG = re.compile(r"<[^<>]*>|(?<!\S)(--|—)[a-z]+(\s+[\d.:]+)?(?!\S)", re.IGNORECASE)  # <lora:x:1>, --ar 16:9
_BREAKS = re.compile(r"[,;|()\[\]{}<>\n\r\t、，。；：！？]+|[.:!?]+(?=\s|$)|\s[-–—]+\s")
_EDGES = " \t'\"`´‘’“”«»*_~#.:!?-–—"


def noun_phrases(text: str, limit: int = LIMIT) -> list[str]:
    """Extract the noun phrases of a prompt, the offline substitute for a language model's attributes.

    The text is cut at punctuation, prepositions, conjunctions, pronouns, forms of being and having, and verbs such as
    wearing and holding; determiners and empty frames ("a photo of") are dropped. The rules are for English; a text in
    another language is cut at its punctuation.

    Returns:
        1 to `limit` phrases in the text's order, without repetitions in any case; the text itself if there is none.

    Example:
        >>> from aigiqa_reward.assistants import noun_phrases
        >>> noun_phrases("a photo of a red fox sitting in the snow, oil painting")
        ['red fox', 'snow', 'oil painting']
    """
    integer("limit", limit, least=1)
    found: dict[str, str] = {}
    cleaned = _LINKS.sub(" with ", _WEIGHT.sub("", _FLAG.sub(" ", text)))
    for number, segment in enumerate(_BREAKS.split(cleaned)):
        words = [word for part in segment.split() if (word := part.strip(_EDGES))]
        while number == 0 and words and words[0].lower() in _COMMANDS:
            del words[0]
        for phrase in _phrases(words):
            found.setdefault(phrase.casefold(), phrase)
    return list(found.values())[:limit] or [text]


def _phrases(words: list[str]) -> Iterator[str]:
    """Yield the noun phrases of words between two punctuation marks."""
    phrase: list[str] = []
    for word, following in itertools.pairwise([*words, ""]):
        following = following.lower()
        separator = _separates(word.lower(), following, first=not phrase)
        if not separator and (phrase or word.lower() not in _DETERMINERS):
            phrase.append(word)
        if separator or following in ("", *_DETERMINERS):  # a determiner begins another: "a cat the size of a house"
            frame = separator and word.lower() == "of" and len(phrase) == 1 and phrase[0].lower() in _FRAMES
            if phrase and not frame:
                yield " ".join(phrase)
            phrase = []


def _separates(word: str, following: str, *, first: bool) -> bool:
    """Decide whether a word belongs to no noun phrase, by the next word and whether it would begin a phrase."""
    if word in _BETWEEN:
        return True
    ends = not following or following in _BETWEEN or following in _DETERMINERS
    if word in _MAY_DESCRIBE:
        return ends or not first
    if word in _ACTIONS:
        return True
    if word in _DONE:
        return following in _BETWEEN
    if word.endswith("ing") and len(word) > 4 and word not in _NOUNS_IN_ING:
        return not first and ends and following not in ("", "of", "and", "or")
    return False


INSTRUCTION = (
    "List what must be visible in an image made from the prompt below: objects, their attributes, the style. "
    "Write at most {limit} short phrases in English, one a line, and nothing else.\n\nPrompt: {prompt}\nPhrases:\n"
)
"""CPA-IQA has a language model split the prompt into latent attributes; this wording is ours."""


@dataclass(frozen=True, kw_only=True)
class AttributesConfig(AssistantConfig):
    """Which causal language model splits prompts, and how.

    Attributes:
        limit: largest number of attributes per prompt.
        max_new_tokens: length at which an answer is cut; the default has room for 8 phrases of 8 English words.
    """

    limit: int = LIMIT
    max_new_tokens: int = 128


class LLMAttributes(PretrainedAssistant[AttributesConfig]):
    """Splits prompts into short visual attributes, for CPA-IQA's implicit alignment.

    Any transformers causal language model, best one tuned to follow instructions; decoding is greedy. The cache keeps
    the model's answers unparsed.
    """

    kind = "attributes"
    recipe: ClassVar[Mapping[str, Any]] = {"instruction": INSTRUCTION}
    wanted = "a causal language model"
    mapping = "MODEL_FOR_CAUSAL_LM_MAPPING"
    parts = ("AutoTokenizer", "AutoModelForCausalLM")

    @cached_property
    def _processor(self) -> Any:
        tokenizer = super()._processor
        pad_on_the_left(tokenizer)
        return tokenizer

    def decompose(self, texts: list[str]) -> list[list[str]]:
        """Split each prompt into 1 to `limit` phrases; its noun phrases, with a warning, where the model gives none."""
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"texts: expected a list of prompts, got {texts!r:.80}; pass [prompt] for one")
        if not texts:
            return []
        answers = self._serve(texts, lambda rows: self._ask([texts[row] for row in rows]), str)
        attributes = [parse_attributes(answer, self.config.limit) for answer in answers]
        if unread := [text for text, found in zip(texts, attributes, strict=True) if not found]:
            warnings.warn(
                f"{self.config.path_or_id} gave no list of phrases for {len(unread)} of {len(texts)} prompts (first: "
                f"{unread[0]!r:.80}); their noun phrases are used. A model tuned to follow instructions answers better",
                UserWarning,
                stacklevel=2,
            )
        return [found or noun_phrases(text, self.config.limit) for text, found in zip(texts, attributes, strict=True)]

    def _ask(self, texts: list[str]) -> list[str]:
        tokenizer = self._processor
        prompts = [INSTRUCTION.format(limit=self.config.limit, prompt=" ".join(text.split())) for text in texts]
        options = {}
        if tokenizer.chat_template:
            turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
            prompts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            options = {"add_special_tokens": False}  # the template has them
        inputs = tokenizer(prompts, padding=True, return_tensors="pt", **options).to(self.config.device)
        return generate_greedily(self._model, tokenizer, inputs, self.config.max_new_tokens)


_BULLET = re.compile(r"^\s*([-–—*•·>+]+\s*|\(?(\d{1,2}|[a-zA-Z])[.):]\s+|\(?\d{1,2}[.)](?!\d))+")
_AROUND = " \t'\"`“”‘’*_.,;"


def parse_attributes(answer: str, limit: int = LIMIT) -> list[str]:
    """Parse a language model's answer: a phrase per line, with or without bullets, numbers, quotes, emphasis.

    Headings (ending with a colon), sentences (more than 8 words), repetitions and a reasoning model's thoughts are left
    out; a single line is cut at its commas. A line that begins with "Prompt:" ends the answer: models not tuned to
    follow instructions continue with another question.
    """
    lines: list[str] = []
    spoken = answer.rpartition("</think>")[2].partition("<think>")[0]
    for line in spoken.splitlines():
        if line.strip().lower().startswith("prompt:"):
            break
        if (text := _BULLET.sub("", line).strip(_AROUND)) and not text.endswith((":", "!")):
            lines.append(text)
    if len(lines) == 1:
        lines = [part.strip(_AROUND) for part in re.split(r"[,;]", lines[0])]
    found: dict[str, str] = {}
    for line in lines:
        if any(character.isalpha() for character in line) and len(line.split()) <= 8:
            found.setdefault(line.casefold(), line)
    return list(found.values())[:limit]
