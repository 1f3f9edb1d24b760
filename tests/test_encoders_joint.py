"""The compact towers in one space: images, their places, texts, words, and words in sight of an image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from plain import array, cosine, draw, linear
from scipy.special import softmax
from torch import Tensor

from aigiqa_reward import images as pixels
from aigiqa_reward.encoders.compact import CompactEncoder
from aigiqa_reward.rewards.build import load_compact_encoder

EXAMPLES = Path(__file__).parents[1] / "examples" / "images"
TEXTS = ["a cat", "a castle in the clouds above a very long and winding river at dusk", "two red apples on a table"]


@pytest.fixture(scope="module")
def encoder() -> CompactEncoder:
    return load_compact_encoder().double()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return draw(2, 96, 128)


def plain_embedding(encoder: CompactEncoder, feature: np.ndarray) -> np.ndarray:
    part = encoder.alignment
    named = softmax(linear(encoder.image.classifier, feature)) @ array(encoder.image.class_names)
    centered = (feature - array(part.feature_mean)) / array(part.feature_std)
    learned = array(part.place_out.weight) @ (array(part.place_in.weight) @ centered)
    return named / np.linalg.norm(named) - array(part.semantic_mean) + learned


def test_images_and_places_come_in_by_the_same_map(encoder: CompactEncoder, images: Tensor) -> None:
    maps, features = encoder.encode_map(images), encoder.image.encoder(images)
    assert maps.shape == (2, 384, 3, 4)
    pooled = encoder.encode_image(images)
    for b in range(2):
        assert np.allclose(array(pooled[b]), plain_embedding(encoder, array(features[b]).mean(axis=(1, 2))))
        for i, j in ((0, 0), (1, 2), (2, 3)):
            assert np.allclose(array(maps[b, :, i, j]), plain_embedding(encoder, array(features[b, :, i, j])))


@pytest.mark.parametrize("size", [(32, 32), (33, 100), (75, 330)])
def test_any_size_from_32_px_has_a_place_per_32_px(encoder: CompactEncoder, size: tuple[int, int]) -> None:
    image = draw(1, *size)
    rows, columns = (-(-side // 32) for side in size)
    features, levels = encoder.observe(image)
    assert torch.allclose(features, encoder.image.encoder(image))
    assert torch.allclose(levels, encoder.levels(image))
    assert encoder.encode_map(image).shape == (1, encoder.width, rows, columns)
    assert encoder.look(image).shape == (1, rows * columns, encoder.width)
    assert levels.shape == (1, encoder.level_channels, rows, columns)


def test_a_place_sees_what_lies_there(encoder: CompactEncoder) -> None:
    sushi = pixels.resize(pixels.load(EXAMPLES / "sushi_xl22_normal.jpg")[None].double(), (224, 224))
    both = torch.cat([sushi, torch.full_like(sushi, 0.5)], dim=3)
    text = encoder.encode_text(["a tray of sushi"])[0].view(1, -1, 1, 1)
    likeness = torch.cosine_similarity(encoder.encode_map(both), text, dim=1)[0]
    assert likeness[:, :6].mean() > likeness[:, 8:].mean() + 0.05
    assert torch.cosine_similarity(encoder.encode_image(sushi), text[..., 0, 0]) > 0.1


def test_words_mean_about_what_their_text_means(encoder: CompactEncoder) -> None:
    words, mask = encoder.encode_words(TEXTS)
    embedded = encoder.encode_text(TEXTS)
    assert mask.sum(dim=1).tolist()[0] == 2
    for i in range(3):
        mean = array(words[i, mask[i]].mean(dim=0))
        assert cosine(mean, array(embedded[i])) > 0.9
        assert cosine(mean, array(embedded[i - 1])) < 0.5
        alone, kept = encoder.encode_words([TEXTS[i]])
        assert kept.all()
        assert torch.allclose(alone[0], words[i, mask[i]], atol=1e-9), "padding changes no word"


def test_grounded_words_are_their_equation_without_padding(encoder: CompactEncoder, images: Tensor) -> None:
    seen, read = encoder.look(images), encoder.read(TEXTS[:2])
    places = torch.randn(2, 3, 384, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda seen: encoder.ground(seen, **read), places, fast_mode=True, atol=1e-4)
    found = encoder.ground(seen, **read)
    assert found.shape == (*read["mask"].shape, encoder.grounded_width)
    assert not read["mask"].all()
    assert torch.equal(found[~read["mask"]], torch.zeros_like(found[~read["mask"]]))
    rubbish = torch.where(read["mask"][..., None], read["text"], read["text"] + 9)
    assert torch.equal(encoder.ground(seen, rubbish, read["mask"]), found)
    for b in range(2):
        places = array(seen[b])
        for k, word in enumerate(array(read["text"][b, read["mask"][b]])):
            shares = softmax([encoder.logit_scale * cosine(word, place) for place in places])
            taken = shares @ places
            plain = np.concatenate([taken, word * taken * np.sqrt(384)])
            assert np.allclose(array(found[b, k]), plain)
