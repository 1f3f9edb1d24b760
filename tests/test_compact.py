"""The compact model: what its streams look at, and that its scores mean something on real images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from aigiqa_reward import Reward, Scorer, create_reward
from aigiqa_reward import images as pixels
from aigiqa_reward.embedded.degradations import degrade
from aigiqa_reward.embedded.pictures import all_pairs, compose
from aigiqa_reward.embedded.world import caption
from aigiqa_reward.models.compact import CompactConfig

EXAMPLES = Path(__file__).parents[1] / "examples" / "images"


@pytest.fixture(scope="module")
def reward() -> Reward:
    return create_reward("compact")


@pytest.mark.parametrize(
    ("size", "count"), [((512, 512), 4), ((512, 910), 8), ((300, 900), 12), ((16, 2048), 16), ((2048, 2048), 4)]
)
def test_longer_images_get_more_crops(reward: Reward, size: tuple[int, int], count: int) -> None:
    crops = reward.model.crops(torch.rand(1, 3, *size))
    assert crops.shape == (1, count, 3, 224, 224)


def test_crops_are_native_pixels_up_to_512(reward: Reward) -> None:
    image = torch.rand(1, 3, 512, 700)
    crops = reward.model.crops(image)
    assert torch.equal(crops[0, 0], image[0, :, :224, :224])
    assert torch.equal(crops[0, -1], image[0, :, -224:, -224:])
    large = torch.rand(1, 3, 1024, 1024)
    assert torch.equal(reward.model.crops(large), reward.model.crops(pixels.resize(large, (512, 512))))


def test_quality_is_the_mean_over_the_crops(reward: Reward) -> None:
    with torch.no_grad():
        output = reward(torch.rand(2, 3, 64, 64))
    assert torch.allclose(output.details["crop_quality"].mean(dim=1), output.quality, atol=1e-6)


def test_worse_generators_and_degradations_score_lower(reward: Reward) -> None:
    """Ground truth by construction: the same image blurred, with noise, and a generator from 2018."""
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


def test_scores_follow_human_scores_on_its_benchmark(reward: Reward, agiqa3k: Path) -> None:
    """The weights in the package are whole: these images were in training, so this says nothing of new ones."""
    from aigiqa_reward.datasets import read_agiqa3k

    images = read_agiqa3k(agiqa3k).subset(list(range(0, 2385, 40)))
    output = Scorer(reward, batch_size=16).score(list(images.paths), list(images.prompts))
    assert spearmanr(output.quality, images.quality).statistic > 0.8
    assert spearmanr(output.correspondence, images.correspondence).statistic > 0.6


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="crops: expected an integer of at least 1, got 0"):
        CompactConfig(crops=0)
    with pytest.raises(ValueError, match="width"):
        CompactConfig(width=1.5)  # type: ignore[arg-type]


def test_small_squares_are_one_crop_which_is_all_four(reward: Reward) -> None:
    image = torch.rand(2, 3, 64, 64)
    crops = reward.model.crops(image)
    assert crops.shape == (2, 1, 3, 224, 224)
    assert torch.equal(pixels.even_crops(image, 224, 4), crops.expand(-1, 4, -1, -1, -1))


# --------------------------------------------------------------------------------------------- the embedded world


@pytest.fixture(scope="module")
def unseen() -> np.ndarray:
    """Every pair of thing and colour that neither the reward nor the generator was trained on."""
    return all_pairs(held_out=True)


def test_the_right_caption_of_eight_is_preferred(reward: Reward, unseen: np.ndarray) -> None:
    """Wrong in the colour, in the thing, and in both; the full figure is examples/train_compact/evaluate_world.py's."""
    pictures = compose(unseen, np.random.default_rng(77))
    nouns, colours = unseen.T
    captions = [(nouns, colours), (nouns, (colours + 2) % 8), (nouns, (colours + 5) % 8)]
    captions += [((nouns + step) % 64, colours) for step in (1, 20, 41)]
    captions += [((nouns + step) % 64, (colours + step) % 8) for step in (3, 30)]
    with torch.inference_mode():
        scores = [
            reward(pictures, [caption(*pair) for pair in np.stack(pair, axis=1).tolist()]).correspondence
            for pair in captions
        ]
    assert float((torch.stack(scores).argmax(dim=0) == 0).float().mean()) >= 0.9


@pytest.mark.parametrize("column", range(3), ids=["blur", "noise", "warp"])
def test_quality_falls_as_degradation_grows(reward: Reward, unseen: np.ndarray, column: int) -> None:
    pictures = compose(unseen, np.random.default_rng(78))
    qualities = []
    for level in (0.0, 0.33, 0.67, 1.0):
        levels = torch.zeros(len(pictures), 3)
        levels[:, column] = level
        degraded = degrade(pictures, levels, torch.Generator().manual_seed(column))
        with torch.inference_mode():
            qualities.append(float(reward(degraded, None).quality.mean()))
    assert qualities == sorted(qualities, reverse=True)
    assert qualities[0] > qualities[-1] + 0.05
