"""A prompt's visual attributes, one by one, by a language model or, without it, by rule."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from aigiqa_reward.assistants._entries import TEXT
from aigiqa_reward.assistants._image_text import generate_greedily, pad_on_the_left
from aigiqa_reward.assistants._pretrained import (
    AssistantConfig,
    PretrainedAssistant,
    check_at_least,
    load_description,
    load_model,
    load_part,
)
from aigiqa_reward.assistants.cache import AssistantCache
from aigiqa_reward.assistants.phrases import LIMIT, noun_phrases

INSTRUCTION = (
    "List what must be visible in an image made from the prompt below: objects, their attributes, the style. "
    "Write at most {limit} short phrases in English, one a line, and nothing else.\n\nPrompt: {prompt}\nPhrases:\n"
)
"""CPA-IQA says that a language model takes the prompt apart into latent attributes; this wording is ours."""

_LONGEST = 8
"""Words of the longest phrase that counts as an attribute; a longer line is taken for a sentence. Chosen here."""

_WANTED = "a causal language model"


@dataclass(frozen=True, kw_only=True)
class AttributesConfig(AssistantConfig):
    """Which causal language model takes prompts apart, and how.

    Attributes:
        limit: attributes a prompt at most.
        max_new_tokens: length at which an answer is cut. Chosen here: 8 phrases of 8 English words, with room.

    Example:
        >>> from aigiqa_reward.assistants import AttributesConfig
        >>> AttributesConfig(path_or_id="Qwen/Qwen2.5-0.5B-Instruct", device="cpu", limit=4).limit
        4
    """

    limit: int = LIMIT
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("limit", self.limit, 1)
        check_at_least("max_new_tokens", self.max_new_tokens, 1)


class LLMAttributes(PretrainedAssistant[AttributesConfig]):
    """Takes prompts apart into short visual attributes, for CPA-IQA's implicit alignment.

    Any transformers causal language model, best one tuned to follow instructions; decoding is greedy. The cache keeps
    the model's answers as they were given.

    Args:
        config: which model.
        cache: where answers are kept; None asks the model every time.

    Example:
        >>> from aigiqa_reward.assistants import AttributesConfig, LLMAttributes
        >>> reader = LLMAttributes(AttributesConfig(path_or_id="Qwen/Qwen2.5-0.5B-Instruct"))  # loads nothing yet
        >>> reader.decompose([])
        []
    """

    kind = "attributes"

    def __init__(self, config: AttributesConfig, *, cache: AssistantCache | None = None) -> None:
        super().__init__(config, cache=cache)

    def _recipe(self) -> dict[str, Any]:
        return {"instruction": INSTRUCTION}

    @cached_property
    def _model(self) -> Any:
        return load_model("AutoModelForCausalLM", self.config, wanted=_WANTED)

    @cached_property
    def _tokenizer(self) -> Any:
        load_description(self.config, mapping="MODEL_FOR_CAUSAL_LM_MAPPING", wanted=_WANTED)
        tokenizer = load_part("AutoTokenizer", self.config, wanted=_WANTED)
        pad_on_the_left(tokenizer)
        return tokenizer

    def decompose(self, texts: list[str]) -> list[list[str]]:
        """The visual attributes of each prompt.

        Args:
            texts: N prompts.

        Returns:
            N lists of 1 to `limit` short phrases.

        Warns:
            UserWarning: once a call, if answers held no such phrases; those prompts' noun phrases stand in.

        Raises:
            TypeError: one text instead of a list, or an item that is not a text.
            ValueError: the model cannot be loaded.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"texts: expected a list of prompts, got {texts!r:.80}; pass [prompt] for one")
        if not texts:
            return []
        answers = self._serve(texts, lambda rows: self._ask([texts[row] for row in rows]), TEXT)
        attributes = [parse_attributes(answer, self.config.limit) for answer in answers]
        if unread := [text for text, found in zip(texts, attributes, strict=True) if not found]:
            warnings.warn(
                f"{self.config.path_or_id} gave no list of phrases for {len(unread)} of {len(texts)} prompts (first: "
                f"{unread[0]!r:.80}); their noun phrases stand in. A model tuned to follow instructions answers better",
                UserWarning,
                stacklevel=2,
            )
        return [found or noun_phrases(text, self.config.limit) for text, found in zip(texts, attributes, strict=True)]

    def _ask(self, texts: list[str]) -> list[str]:
        tokenizer = self._tokenizer
        prompts = [INSTRUCTION.format(limit=self.config.limit, prompt=" ".join(text.split())) for text in texts]
        options = {}
        if tokenizer.chat_template:
            turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
            prompts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            options = {"add_special_tokens": False}  # the template has them
        inputs = tokenizer(prompts, padding=True, return_tensors="pt", **options).to(self.config.device)
        return generate_greedily(self._model, tokenizer, inputs, self.config.max_new_tokens)


_BULLET = re.compile(r"^\s*([-–—*•·>+]+\s*|\(?(\d{1,2}|[a-zA-Z])[.):]\s+|\(?\d{1,2}[.)](?!\d))+")
_EDGES = " \t'\"`“”‘’*_.,;"


def parse_attributes(answer: str, limit: int = LIMIT) -> list[str]:
    """The phrases of a language model's answer: one a line, with or without bullets, numbers, quotes or emphasis.

    Headings (lines that end with a colon), sentences (more than 8 words), repetitions and a reasoning model's thoughts
    are left out; a single line is cut at its commas. What follows a line that begins with "Prompt:" is another
    question, which models not tuned to follow instructions like to ask themselves.

    Returns:
        At most `limit` phrases; none if the answer holds none.
    """
    lines: list[str] = []
    spoken = answer.rpartition("</think>")[2].partition("<think>")[0]
    for line in spoken.splitlines():
        if line.strip().lower().startswith("prompt:"):
            break
        if (text := _BULLET.sub("", line).strip(_EDGES)) and not text.endswith((":", "!")):
            lines.append(text)
    if len(lines) == 1:
        lines = [part.strip(_EDGES) for part in re.split(r"[,;]", lines[0])]
    found: dict[str, str] = {}
    for line in lines:
        if any(character.isalpha() for character in line) and len(line.split()) <= _LONGEST:
            found.setdefault(line.casefold(), line)
    return list(found.values())[:limit]
