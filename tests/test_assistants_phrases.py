from __future__ import annotations

import pytest

from aigiqa_reward.assistants import noun_phrases
from aigiqa_reward.assistants.attributes import parse_attributes

PROMPTS = {
    "a photo of two cats sitting on a red sofa, oil painting": ["two cats", "red sofa", "oil painting"],
    "anthropomorphic shark in knight armor dropping his sword": ["anthropomorphic shark", "knight armor", "sword"],
    "portrait of a dancing eagle woman": ["portrait", "dancing eagle woman"],
    "a flying car over a city at night": ["flying car", "city", "night"],
    "A cat in the style of Van Gogh next to a dog": ["cat", "Van Gogh", "dog"],
    "a pair of shoes in front of a wooden door": ["shoes", "wooden door"],
    "a beautiful painting of the king's ring on a building": ["beautiful painting", "king's ring", "building"],
    "generate an image of a woman wearing a blue dress and holding flowers": ["woman", "blue dress", "flowers"],
    "The house is covered in snow. There are birds!": ["house", "snow", "birds"],
    'a sign that says "hello world"': ["sign", "hello world"],
    "a robot welding the door of a spaceship": ["robot", "door", "spaceship"],
    "(masterpiece:1.2), 1girl, [blue eyes], <lora:ink:0.8> 8k --ar 16:9": ["masterpiece", "1girl", "blue eyes", "8k"],
    "an old man's face, f/1.8, 85mm": ["old man's face", "f/1.8", "85mm"],
    "dog; cat | bird\nfish - shark": ["dog", "cat", "bird", "fish", "shark"],
    "a cat the size of a house": ["cat", "size", "house"],
    "一只猫，红色沙发": ["一只猫", "红色沙发"],
}


def test_a_prompts_noun_phrases_are_found():
    assert {prompt: noun_phrases(prompt) for prompt in PROMPTS} == PROMPTS


def test_a_text_without_any_is_given_back():
    for text in ("", "   ", "...", "of the", "sitting on", "a", ", ,", "--ar 16:9", "\n"):
        assert noun_phrases(text) == [text]


def test_repetitions_in_any_case_are_left_out_and_the_first_are_taken():
    assert noun_phrases("A Red car, a red car, the RED CAR, a dog") == ["Red car", "dog"]
    many = ", ".join(f"thing{number}" for number in range(20))
    assert noun_phrases(many) == [f"thing{number}" for number in range(8)]
    assert noun_phrases(many, limit=2) == ["thing0", "thing1"]
    with pytest.raises(ValueError, match="limit: expected an integer of at least 1"):
        noun_phrases("a cat", limit=0)


ANSWERS = {
    "plain lines": ("two cats\nred sofa\noil painting", ["two cats", "red sofa", "oil painting"]),
    "bullets": ("- two cats\n* red sofa\n• oil painting\n– soft light", 4),
    "numbers": ("1. two cats\n2) red sofa\n(3) oil painting\n4.soft light", 4),
    "emphasis": ('1. **two cats**\n2. "red sofa",\n3. *oil painting*.', 3),
    "bullets and numbers": ("- 1. two cats\n- 2. red sofa", ["two cats", "red sofa"]),
    "a greeting": ("Sure! Here are the phrases:\n\n- two cats\n\n- red sofa\n", ["two cats", "red sofa"]),
    "a sentence": ("two cats\nI hope that this list of phrases helps you a lot.\nred sofa", ["two cats", "red sofa"]),
    "one line": ("two cats, red sofa; oil painting.", ["two cats", "red sofa", "oil painting"]),
    "repetitions": ("two cats\nTwo cats\nred sofa", ["two cats", "red sofa"]),
    "thoughts": ("<think>\nA cat. Hm.\n</think>\n- two cats\n- red sofa", ["two cats", "red sofa"]),
    "thoughts cut off": ("<think>\nThe prompt says\n- two cats", []),
    "its own next question": ("two cats\nred sofa\n\nPrompt: a dog\nPhrases:\na dog", ["two cats", "red sofa"]),
    "numbers that belong": ("16:9 format\n1.8 aperture\n3D render", ["16:9 format", "1.8 aperture", "3D render"]),
    "nothing": ("", []),
    "no words": ("1.\n2.\n---\n***\n42", []),
    "one long sentence": ("I am sorry but I cannot see any picture in this conversation so far", []),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_phrases_of_an_answer(name):
    answer, expected = ANSWERS[name]
    four = ["two cats", "red sofa", "oil painting", "soft light"]
    assert parse_attributes(answer) == (four[:expected] if isinstance(expected, int) else expected)
    assert parse_attributes(answer, 1) == parse_attributes(answer)[:1]
