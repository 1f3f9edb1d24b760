"""The compact model: its crops, and its scores on real images."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aigiqa_reward import Reward, create_reward
from aigiqa_reward import images as pixels
from aigiqa_reward.toy.pictures import all_pairs, compose
from aigiqa_reward.toy.world import caption

EXAMPLES = Path(__file__).parents[1] / "examples" / "images"


@pytest.fixture(scope="module")
def reward() -> Reward:
    return create_reward("compact")


@pytest.mark.parametrize("text", ["🍣🍣🍣", "🚗 🍣!", "x" * 300])
def test_a_text_without_a_known_word_is_scored_with_a_warning(reward: Reward, text: str, recwarn: Any) -> None:
    images = torch.rand(1, 3, 64, 64)
    reward(images, [f"a tray of {text[:2]}"])
    assert not recwarn.list
    reward(images, [text])
    (warning,) = recwarn.list
    assert re.search(
        rf"{re.escape(text[:40])}' has no word that is known; .*English reward prompt", str(warning.message)
    )


@pytest.mark.parametrize(
    ("size", "views"),
    [
        ((512, 512), (1, 512, 512)),
        ((300, 512), (1, 300, 512)),
        ((64, 64), (1, 224, 224)),
        ((300, 900), (3, 300, 300)),
        ((1024, 1024), (4, 512, 512)),
        ((2048, 2048), (4, 512, 512)),
        ((16, 2048), (4, 224, 224)),
        ((520, 600), (1, 512, 512)),
    ],
)
def test_native_views(reward: Reward, size: tuple[int, int], views: tuple[int, int, int]) -> None:
    count, height, width = views
    assert reward.model.native(torch.rand(1, 3, *size)).shape == (1, count, 3, height, width)


def test_views_are_native_pixels(reward: Reward) -> None:
    image = torch.rand(1, 3, 512, 700)
    views = reward.model.native(image)
    assert torch.equal(views[0, 0], image[0, :, :, :512])
    assert torch.equal(views[0, -1], image[0, :, :, -512:])


def test_worse_generators_and_degradations_score_lower(reward: Reward) -> None:
    good = pixels.load(EXAMPLES / "sushi_xl22_normal.jpg")[None]
    blurred = pixels.resize(pixels.resize(good, (64, 64)), (512, 512))
    noisy = good + 0.4 * torch.randn(good.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        clean, blur, noise = (float(reward(image, validate=False).quality) for image in (good, blurred, noisy))
        old = float(reward(pixels.load(EXAMPLES / "sushi_AttnGAN_normal.jpg")[None]).quality)
    assert clean > blur + 0.1
    assert clean > noise + 0.1
    assert clean > old + 0.3


def test_the_right_prompt_fits_better_than_others(reward: Reward) -> None:
    image = pixels.load(EXAMPLES / "sushi_sd15_normal.jpg")[None]
    prompts = ["a tray of sushi", "a motorcycle on the road", "a portrait of a man", "a dog in a garden"]
    with torch.no_grad():
        scores = reward(image.expand(4, -1, -1, -1), prompts).correspondence
    assert int(scores.argmax()) == 0


@pytest.fixture(scope="module")
def unseen() -> np.ndarray:
    return all_pairs(held_out=True)


def test_the_right_caption_of_eight_is_preferred(reward: Reward, unseen: np.ndarray) -> None:
    pairs = unseen[::6]
    pictures = compose(pairs, np.random.default_rng(77))
    nouns, colors = pairs.T
    captions = [(nouns, colors), (nouns, (colors + 2) % 8), (nouns, (colors + 5) % 8)]
    captions += [((nouns + step) % 64, colors) for step in (1, 20, 41)]
    captions += [((nouns + step) % 64, (colors + step) % 8) for step in (3, 30)]
    scores = []
    with torch.inference_mode():
        seen = reward.model.forward_features(pictures)
        for pair in captions:
            features = reward.encode_prompts([caption(*each) for each in np.stack(pair, axis=1).tolist()])
            scores.append(reward.model.forward_head(seen, features, None).correspondence)
    assert float((torch.stack(scores).argmax(dim=0) == 0).float().mean()) >= 0.9


def test_uncertainty_is_a_deviation_on_the_scale_of_quality(reward: Reward) -> None:
    images = torch.stack([pixels.load(EXAMPLES / f"sushi_{name}_normal.jpg") for name in ("sd15", "AttnGAN")])
    with torch.no_grad():
        before = reward(images)
        scaled = create_reward("compact")
        scaled.calibration.quality.copy_(torch.tensor([-2.0, 1.0]))
        after = scaled(images)
    assert ((before.details["uncertainty"] > 0.01) & (before.details["uncertainty"] < 0.5)).all()
    torch.testing.assert_close(after.details["uncertainty"], 2 * before.details["uncertainty"])


def test_scored_images_are_within_the_known_distance(reward: Reward) -> None:
    files = sorted(EXAMPLES.glob("*.jpg"))[::2]
    with torch.no_grad():
        known = torch.cat([reward(pixels.load(file)[None]).details["out_of_distribution"] for file in files])
    assert float((known > 1).float().mean()) <= 0.2
    assert len(set(known.tolist())) == len(files)


def test_scores_lie_in_the_unit_interval_and_a_wrong_prompt_scores_near_zero(reward: Reward) -> None:
    image = pixels.load(EXAMPLES / "sushi_midjourney_normal.jpg")[None].expand(2, -1, -1, -1)
    with torch.no_grad():
        out = reward(image, ["a tray of sushi", "a red bus on a bridge"])
    assert ((out.quality > 0) & (out.quality < 1)).all()
    assert out.correspondence[0] > 0.4
    assert out.correspondence[1] < 0.25
    assert out.details["match"][0] > 0.5 > out.details["match"][1]


def test_the_swapped_word_is_supported_least(reward: Reward, unseen: np.ndarray) -> None:
    pairs = unseen[::4]
    pictures = compose(pairs, np.random.default_rng(78))
    wrong = [caption(noun, (color + 3) % 8, wording=1) for noun, color in pairs.tolist()]  # "a key on red"
    wrong += [caption((noun + 9) % 64, color, wording=1) for noun, color in pairs.tolist()]
    with torch.inference_mode():
        words = reward(pictures.repeat(2, 1, 1, 1), wrong).details["word_scores"]
    found = []
    for row, text in enumerate(wrong):
        count = len(text.split())
        assert bool(words[row, :count].isfinite().all() & words[row, count:].isnan().all())
        swapped = {count - 1} if row < len(pairs) else set(range(count - 2))  # the color, or the thing's words
        found.append(int(words[row, :count].argmin()) in swapped)
    assert np.mean(found) >= 0.8


def test_word_scores_do_not_depend_on_batch_mates(reward: Reward) -> None:
    images = torch.rand(2, 3, 64, 64)
    texts = ["a fox", "a jack-o-lantern, photographed at night in the rain"]
    with torch.no_grad():
        both, alone = reward(images, texts).details["word_scores"], reward(images[:1], texts[:1]).details["word_scores"]
    assert both.shape == (2, 8)
    torch.testing.assert_close(both[:1, :2], alone, atol=1e-5, rtol=0)
