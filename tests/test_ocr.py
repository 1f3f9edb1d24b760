"""The reward `ocr` on rendered text; its weights are in the package rapidocr."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from aigiqa_reward import BestOfN, Reward, Scorer, create_reward, get_reward_spec, load_embedded_pipeline
from aigiqa_reward.models import ocr
from aigiqa_reward.models.ocr import _likeness, quoted_text
from aigiqa_reward.rewards.bound import BoundReward
from aigiqa_reward.sampling import BestOfEachError, best_of_each
from aigiqa_reward.types import PromptError

pytest.importorskip("rapidocr", reason="the reward ocr needs the extra ocr")
pytest.importorskip("onnxruntime", reason="the reward ocr needs the extra ocr")


@pytest.fixture(scope="module")
def reward() -> Reward:
    return create_reward("ocr")


def written(text: str) -> Image.Image:
    image = Image.new("RGB", (320, 160), "white")
    ImageDraw.Draw(image).text((20, 20), text, fill="black", font=ImageFont.load_default(size=48))
    return image


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign that says "Hello  World"', "helloworld"),
        ("a sign, “One” above „Two“", "onetwo"),
        ("a poster 'Don't panic' on a wall", "don'tpanic"),
        ('the dog\'s "OPEN" sign', "open"),
        *((prompt, None) for prompt in ("a sign", "the dogs' toys and the cats' bowl", 'a 5" and a 6" pipe', '" "')),
    ],
)
def test_quoted_parts_are_joined_and_a_prompt_without_is_refused(prompt: str, text: str | None) -> None:
    with nullcontext() if text else pytest.raises(PromptError, match="has no text in quotes"):
        assert quoted_text(prompt) == text


def test_the_distance_is_levenshtein_s() -> None:
    assert [_likeness("kitten", other) for other in ("kitten", "sitting", "")] == [1, 1 - 3 / 7, 0]


def test_rendered_text_scores_by_its_likeness(reward: Reward) -> None:
    texts = ["Hello\nWORLD", "Help World", ""]
    scores = Scorer(reward).score([written(text) for text in texts], 'a sign that says "hello world"')
    assert scores.total.tolist() == pytest.approx([1, 0.8, 0])
    assert (scores.quality, scores.correspondence.tolist()) == (None, scores.total.tolist())
    first, second = Scorer(reward).stream([written("OPEN")] * 2, ['a sign "open"', "a sign"])
    assert (first.error, float(first.output.total), second.output) == (None, 1, None)
    assert "no text in quotes" in second.error


def test_gradient_methods_refuse_it_and_best_of_n_takes_it(reward: Reward, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="DRaFT needs its gradient"):
        BoundReward(reward).check_differentiable("DRaFT", 'a sign "OPEN"')
    pipe: Any = load_embedded_pipeline()
    with pytest.raises(BestOfEachError) as caught:  # of the prompt without quotes alone
        best_of_each(BestOfN(pipe, reward, n=2), ["a sign", 'a sign "OPEN"'], tmp_path, num_inference_steps=1)
    assert list(caught.value.failures) == [0]
    assert "no text in quotes" in caught.value.failures[0]
    assert not get_reward_spec("ocr").differentiable


def test_it_is_saved_and_loaded_and_has_no_choices(reward: Reward, tmp_path: Path) -> None:
    reward.save_pretrained(tmp_path)
    images, prompts = torch.ones(1, 3, 64, 64), ['a sign "OPEN"']
    assert torch.equal(Reward.from_pretrained(tmp_path)(images, prompts).total, reward(images, prompts).total)
    for choice in ({"quality_weight": 0.2}, {"preset": "paper"}):
        with pytest.raises(ValueError, match="ocr has no such choice"):
            create_reward("ocr", **choice)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ocr._reader.cache_clear()
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ImportError, match=r'pip install "\.\[ocr\]"'):
        create_reward("ocr")
