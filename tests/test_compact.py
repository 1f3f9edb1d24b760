"""The compact model: its crops, and its scores on real images."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm

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


@pytest.mark.parametrize(("size", "count"), [((512, 512), 4), ((300, 900), 12), ((16, 2048), 16), ((2048, 2048), 4)])
def test_longer_images_get_more_crops(reward: Reward, size: tuple[int, int], count: int) -> None:
    assert reward.model.crops(torch.rand(1, 3, *size)).shape == (1, count, 3, 224, 224)


def test_crops_are_native_pixels_up_to_512(reward: Reward) -> None:
    image = torch.rand(1, 3, 512, 700)
    crops = reward.model.crops(image)
    assert torch.equal(crops[0, 0], image[0, :, :224, :224])
    assert torch.equal(crops[0, -1], image[0, :, -224:, -224:])
    large = torch.rand(1, 3, 1024, 1024)
    assert torch.equal(reward.model.crops(large), reward.model.crops(pixels.resize(large, (512, 512))))
    small = torch.rand(2, 3, 64, 64)
    crops = reward.model.crops(small)
    assert crops.shape == (2, 1, 3, 224, 224)
    assert torch.equal(pixels.even_crops(small, 224, 4), crops.expand(-1, 4, -1, -1, -1))


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


def test_noise_is_out_of_distribution_and_scored_images_are_not(reward: Reward) -> None:
    files = sorted(EXAMPLES.glob("*.jpg"))[::2]
    noise = torch.rand(1, 3, 512, 512, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        known = torch.cat([reward(pixels.load(file)[None]).details["out_of_distribution"] for file in files])
        strange = reward(noise).details["out_of_distribution"]
    assert float((known > 1).float().mean()) <= 0.2
    assert (strange > 1).all()
    assert strange.min() > known.max()


def test_held_out_intervals_have_their_coverage() -> None:
    with np.load(EXAMPLES.parent / "train_compact" / "predictions.npz", allow_pickle=False) as table:
        standard = np.abs(table["target_quality"] - table["predicted_quality"]) / table["predicted_uncertainty"]
    assert 0.77 < float((standard < norm.ppf(0.9)).mean()) < 0.83


def ascended(reward: Reward, image: torch.Tensor, steps: int) -> torch.Tensor:
    for _ in range(steps):
        leaf = image.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(reward(leaf).quality.sum(), leaf)
        image = (image + gradient / gradient.square().mean().sqrt() / 255).clamp(0, 1)
    return image


def test_trust_falls_beyond_its_limit_only(reward: Reward) -> None:
    likeness = reward.model.head.likeness
    limit, softness = likeness.guard_limits.tolist()
    inverse = torch.linalg.pinv(likeness.guard.double())
    places = torch.zeros(4, len(likeness.guard), dtype=torch.float64)
    places[:, 3] = torch.tensor([0.0, 0.99, 1 + softness / limit, 1 + 3 * softness / limit]) * limit
    places *= len(likeness.guard) ** 0.5  # the root mean square over all directions
    standard = (places - likeness.guard_bias.double()) @ inverse.T
    statistics = standard.float() * likeness.deviation + likeness.mean
    torch.testing.assert_close(likeness.trust(statistics), torch.tensor([1.0, 1.0, 0.5, 0.1]), atol=5e-3, rtol=0)


def test_images_and_pictures_are_trusted_and_scores_are_multiplied(reward: Reward, unseen: np.ndarray) -> None:
    files = sorted(EXAMPLES.glob("*.jpg"))[::4]
    with torch.no_grad():
        trust = torch.cat([reward(pixels.load(file)[None]).details["trust"] for file in files])
        pictures = reward(compose(unseen[:4], np.random.default_rng(5))).details["trust"]
        whole = pixels.load(files[0])[None]
        before = reward(whole, ["sushi"])
        half = create_reward("compact")
        pushed = half.model.head.likeness.pushed(half.model.statistics(half.model.forward_features(whole)))
        half.model.head.likeness.guard_limits.copy_(torch.tensor([float(pushed) / 2, float(pushed) / 2]))
        after = half(whole, ["sushi"])
    assert float((trust == 1).float().mean()) >= 0.9
    assert (pictures == 1).all()
    assert float(after.details["trust"]) == pytest.approx(0.5, abs=1e-3)
    torch.testing.assert_close(after.quality, before.quality * after.details["trust"])
    torch.testing.assert_close(after.correspondence, before.correspondence * after.details["trust"])


@pytest.mark.slow
def test_the_guard_holds_an_ascent_back(reward: Reward) -> None:
    image = pixels.resize(pixels.load(EXAMPLES / "sushi_sd15_normal.jpg")[None], (224, 224))
    open_reward = create_reward("compact")
    open_reward.model.head.likeness.guard_limits[0] = 1e6
    free, held = ascended(open_reward, image, 8), ascended(reward, image, 8)
    with torch.no_grad():
        start = float(reward(image).quality)
        free, held = float(open_reward(free).quality) - start, float(reward(held).quality) - start
    assert free > 0.3
    assert held < 0.75 * free
