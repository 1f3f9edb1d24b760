"""TSP-MGS: its equations in a plain loop on a tiny CLIP, its adapters, and the texts it keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from plain import array, cosine, draw, linear, stir, tiny_clip
from scipy.special import expit, softmax
from torch import Tensor

from aigiqa_reward import images as pixels
from aigiqa_reward.encoders.open_clip import OpenCLIPEncoder
from aigiqa_reward.models.tsp_mgs import TSPMGS, TSPMGSConfig

PROMPTS = ["a cat", "a castle in the clouds above a very long and winding river at dusk", "two red apples"]
MATCHES = ("badly", "poorly", "fairly", "well", "perfectly")
LOOKS = ("bad", "poor", "fair", "good", "perfect")
TASKS = ("quality", "correspondence")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> OpenCLIPEncoder:
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return draw(3, 32, 64)


def build(clip: OpenCLIPEncoder, **settings: Any) -> TSPMGS:
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        return TSPMGS(TSPMGSConfig(crops=3, short_side=32, **settings), clip).double().eval()


class Plain:
    def __init__(self, model: TSPMGS, clip: OpenCLIPEncoder, image: Tensor) -> None:
        self.model, self.clip, self.config = model, clip, model.config
        whole = pixels.letterbox(image[None], 32, fill=image.new_tensor(clip.mean))
        crops = [image[None, :, :, left : left + 32] for left in (0, 16, 32)]
        self.whole, *self.crops = (array(clip.encode_image(view))[0] for view in (whole, *crops))

    def text(self, task: str, text: str) -> np.ndarray:
        embedded = array(self.clip.encode_text([text]))[0]
        if not self.config.adapter_rank:
            return embedded
        layers = self.model.head.adapters[task].text
        return embedded + linear(layers.up, linear(layers.down, embedded))

    def part(self, task: str, name: str) -> np.ndarray:
        embedded = []
        for feature in [self.whole] if name == "whole" else self.crops:
            added = np.zeros(32)
            if self.config.adapter_rank:
                standard, layers = self.model.head.standard, self.model.head.adapters[task].image
                centered = (feature - array(standard.mean)) / array(standard.deviation)
                added = linear(layers.up, linear(layers.down, centered))
            embedded.append(feature + added)
        return np.mean(embedded, axis=0)

    def coarse(self, task: str, texts: list[str]) -> float:
        alpha = float(task == "correspondence")
        if self.config.alpha == "learned":
            alpha = float(expit(array(self.model.head.alpha)[TASKS.index(task)]))
        score = 0.0
        for name, weight in (("whole", alpha), ("crops", 1 - alpha)):
            cosines = [cosine(self.part(task, name), self.text(task, text)) for text in texts]
            count = len(texts)
            if self.config.levels == "one":
                score += weight * cosines[-1]
                continue
            shares = softmax(self.clip.logit_scale * np.array(cosines))  # (3)
            expected = sum((j + 1) * share for j, share in enumerate(shares))
            score += weight * count / (count - 1) * (expected - 1) / count  # (5), over L
        if self.config.adapter_rank:
            adapter = self.model.head.adapters[task]
            score = array(adapter.scale) * score + array(adapter.shift)
        return float(score)

    def fine(self, task: str, prompt: str) -> float:
        words, mask = self.clip.encode_words([prompt])
        read = array(words[0, mask[0]])
        similarities = [np.mean([cosine(self.part(task, p), w) for w in read]) for p in ("whole", "crops")]  # (4)
        return float(sum(similarities) / 2)  # (6), over L

    def with_words(self, task: str, coarse: float, prompt: str) -> float:
        if self.config.adapter_rank:
            return coarse + float(array(self.model.head.adapters[task].words)) * self.fine(task, prompt)
        return (coarse + self.fine(task, prompt)) / (2 if self.config.zero_shot else 1)  # (7)

    def scores(self, prompt: str) -> tuple[float, float]:
        looks = [f"A photo of {level} quality." for level in LOOKS]
        if self.config.perception == "antonyms":
            looks = ["Bad photo.", "Good photo."]
        quality = self.coarse("quality", looks)
        if self.config.words_in_quality:
            quality = self.with_words("quality", quality, prompt)
        matches = [f"A photo that {level} matches {prompt}." for level in MATCHES]
        return quality, self.with_words("correspondence", self.coarse("correspondence", matches), prompt)


SETTINGS: dict[str, dict[str, Any]] = {
    "as published": {},
    "zero-shot": {"zero_shot": True},
    "one level, alpha learned": {"levels": "one", "alpha": "learned"},
    "antonyms": {"perception": "antonyms"},
    "words in quality": {"words_in_quality": True},
    "adapters, all learned": {"adapter_rank": 4, "alpha": "learned", "words_in_quality": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_scores_are_those_of_a_plain_loop(name: str, clip: OpenCLIPEncoder, images: Tensor) -> None:
    model = build(clip, **SETTINGS[name])
    stir(model.head)
    model.head.standard.fit(draw(20, 1, 32, seed=5)[:, 0, 0] * 3)
    output = model(images, model.encode_prompts(PROMPTS))
    plain = [Plain(model, clip, image).scores(prompt) for image, prompt in zip(images, PROMPTS, strict=True)]
    found = np.stack([array(output.quality), array(output.correspondence)], axis=1)
    assert np.allclose(found, plain, atol=1e-9)
    assert (found.std(axis=0) > 1e-3).all(), "scores that are all alike prove nothing"
    assert model.needs_prompts == model.config.words_in_quality
    if not model.needs_prompts:
        assert torch.equal(model(images, None).quality, output.quality)


@pytest.fixture
def own_clip(tmp_path: Any) -> OpenCLIPEncoder:
    return tiny_clip(tmp_path / "clip")


def test_texts_follow_a_tower_in_training_and_its_best_weights(own_clip: OpenCLIPEncoder, images: Tensor) -> None:
    model = build(own_clip)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = model(images, None).quality
    own_clip.requires_grad_(True)
    model(images, None).quality.sum().backward()
    assert own_clip.clip.token_embedding.weight.grad.abs().sum() > 0, "the quality texts are trained as well"
    with torch.no_grad():
        for parameter in own_clip.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        trained = model(images, None).quality
    assert not torch.allclose(trained, before, atol=1e-3)
    model.requires_grad_(False)
    assert torch.allclose(model(images, None).quality, trained, atol=1e-9)
    model.load_state_dict(start)
    assert torch.allclose(model(images, None).quality, before, atol=1e-9)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"crops": 0}, "crops: expected an integer of at least 1, got 0"),
        ({"resolution": 100}, "resolution: expected None or at least self.short_side=512, got 100"),
        ({"levels": "two"}, r"levels: expected one of \('five', 'one'\), got 'two'"),
        ({"alpha": "both"}, "alpha: expected one of"),
        ({"adapter_rank": -1}, "adapter_rank: expected an integer of at least 0, got -1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TSPMGSConfig(**setting)
