"""SC-AGIQA: visibility by the spectrum, pooling, and its equations on a tiny ViT and a tiny BLIP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plain import array, cross_attend, draw, linear, relu, stir
from scipy.special import expit
from tiny_blip import write_tiny_blip
from torch import Tensor

from aigiqa_reward import Reward
from aigiqa_reward.assistants import Assistants
from aigiqa_reward.encoders.blip import BLIPConfig
from aigiqa_reward.encoders.timm import TimmConfig
from aigiqa_reward.models.sc_agiqa import AQAFP, SCAGIQA, frequency_weights
from aigiqa_reward.rewards.build import build_model
from aigiqa_reward.rewards.factory import get_reward_spec

PROMPTS = ["a cat", "a castle in the clouds above a very long and winding river at dusk", "two red apples"]
SAID = "A red cube on a green floor."
SMALL: dict[str, Any] = {"width": 16, "heads": 4, "crops": 2, "short_side": 64, "prompt_in_quality": False}


def sensitivity(v: float) -> float:
    return 2.6 * (0.0192 + 0.114 * v) * np.exp(-((0.114 * v) ** 1.1))


def test_weights_are_those_of_each_patchs_spectrum() -> None:
    crops = draw(2, 32, 32)
    found = frequency_weights(crops, (2, 4), pixels_per_degree=40.0)
    for b in range(2):
        red, green, blue = array(crops[b])
        luma = 0.299 * red + 0.587 * green + 0.114 * blue
        scores = []
        for i in range(2):
            for j in range(4):
                amplitude = np.abs(np.fft.fft2(luma[16 * i : 16 * i + 16, 8 * j : 8 * j + 8])) / np.sqrt(16 * 8)
                weighted = [
                    amplitude[k, m] * sensitivity(40 * np.hypot(np.fft.fftfreq(16)[k], np.fft.fftfreq(8)[m]))
                    for k in range(16)
                    for m in range(8)
                    if (k, m) != (0, 0)
                ]
                scores.append(sum(weighted) / (16 * 8))
        plain = expit((np.array(scores) - np.mean(scores)) / np.sqrt(np.var(scores) + 1e-8))
        assert np.allclose(array(found[b]), plain, atol=1e-6)


def test_weights_are_differentiable_even_of_a_flat_image() -> None:
    crops = draw(1, 16, 16).requires_grad_()
    projection = torch.randn(4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: frequency_weights(x, (2, 2)) @ projection, crops, fast_mode=True)
    flat = torch.full((1, 3, 16, 16), 0.5, requires_grad=True)
    (gradient,) = torch.autograd.grad((frequency_weights(flat, (2, 2)) @ projection.float()).sum(), flat)
    assert torch.isfinite(gradient).all()


def test_pooling_is_its_equations() -> None:
    pool = stir(AQAFP(32)).double()
    features = torch.randn(2, 32, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.rand(2, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = pool(features, weights)
    assert pool.squeeze.out_features == 2, "a sixteenth of the channels"
    for b in range(2):
        f = array(features[b]).reshape(32, 12).T
        place = expit(linear(pool.spatial, f))
        channel = expit(linear(pool.excite, relu(linear(pool.squeeze, f.mean(axis=0)))))
        plain = (
            sum(w * x for w, x in zip(array(weights[b]), f * place * channel, strict=True)) / array(weights[b]).sum()
        )
        assert np.allclose(array(found[b]), plain)


@dataclass(frozen=True)
class Brightness:
    texts: Sequence[str]

    def describe(self, images: Tensor) -> list[str]:
        return [self.texts[int(len(self.texts) * float(image.mean().clamp(0, 0.999)))] for image in images]


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    vit = TimmConfig(architecture="vit_tiny_patch16_224", image_size=64, blocks=(8, 9, 10, 11))
    return {"vision": vit, "text": BLIPConfig(path_or_id=str(write_tiny_blip(tmp_path_factory.mktemp("blip"), seed=0)))}


def build(towers: dict[str, Any], captioner: Any = None, **settings: Any) -> SCAGIQA:
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        assistants = Assistants(captioner=captioner)
        model = build_model("sc_agiqa", towers=towers, assistants=assistants, settings=SMALL | settings)
    assert isinstance(model, SCAGIQA)
    stir(model.head)
    return model.double().eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return 0.4 * draw(3, 64, 96) + torch.tensor([0.0, 0.3, 0.6], dtype=torch.float64).view(3, 1, 1, 1)


def plain_scores(model: SCAGIQA, image: Tensor, prompt: str, description: str) -> tuple[float, float]:
    head, config, blip = model.head, model.config, model.text
    whole = F.interpolate(image[None], (21, 32), mode="bicubic", antialias=True, align_corners=False)
    canvas = image.new_tensor(blip.mean).view(1, 3, 1, 1).repeat(1, 1, 32, 32)
    canvas[:, :, 5:26] = whole
    read = []
    for text in (prompt, description):
        states = blip.ground(blip.look(canvas), **blip.read([text]))
        read.append(
            linear(head.words[1], array(F.layer_norm(states, (24,), head.grounded.weight, head.grounded.bias))[0])
        )
    consistency = cross_attend(head.align, read[0], read[1]).mean(axis=0)  # (4)
    preference = read[0] if config.preference == "prompt" else read[1]
    answers = []
    for left in (0, 32):
        crop = image[None, :, :, left : left + 64]
        maps = F.relu(head.reduce(model.vision.levels(crop)))
        places = array(head.mix(maps)).reshape(16, -1).T  # (5)
        preferred = places + linear(head.after, cross_attend(head.prefer, places, preference))
        weights = frequency_weights(crop, (4, 4))
        if config.frequency == "mean":
            weights = torch.ones_like(weights)
        visual, seen = (head.pool(torch.from_numpy(f.T.reshape(1, 16, 4, 4)), weights)[0] for f in (preferred, places))
        h = torch.cat([visual, torch.from_numpy(consistency)])
        alone = h if config.prompt_in_quality else torch.cat([seen, head.no_prompt])
        answers.append([float(head.quality(alone[None])[0].detach()), float(head.correspondence(h[None])[0].detach())])
    return tuple(np.mean(answers, axis=0))


@pytest.mark.parametrize(
    ("settings", "captioned"),
    [
        ({}, False),
        ({}, True),
        ({"preference": "description"}, True),
        ({"prompt_in_quality": True}, False),
        ({"frequency": "mean", "experts": 1}, True),
    ],
    ids=["paper", "captioner", "released", "prompt in quality", "plain"],
)
def test_scores_are_those_of_a_plain_loop(settings, captioned, towers, images):
    captioner = Brightness(["a dark room", "gray fog over the hills and far away", "snow"]) if captioned else None
    model = build(towers, captioner, **settings)
    output = model(images, model.encode_prompts(PROMPTS))
    described = PROMPTS if captioner is None else captioner.describe(images)
    assert len(set(described)) == 3
    plain = [plain_scores(model, *parts) for parts in zip(images, PROMPTS, described, strict=True)]
    assert np.allclose(np.stack([array(output.quality), array(output.correspondence)], axis=1), plain, atol=1e-6)
    assert output.correspondence.std() > 1e-3
    assert output.details["substitute_description"].tolist() == [not captioned] * 3
    if captioned:  # each row was scored with the others' descriptions of other lengths beside it
        alone = model(images[:1], model.encode_prompts(PROMPTS[:1]))
        assert torch.allclose(alone.correspondence[0], output.correspondence[0])


def test_prompt_in_quality_needs_prompts(towers: dict[str, Any], images: Tensor) -> None:
    for inside in (False, True):
        model = build(towers, prompt_in_quality=inside)
        assert model.needs_prompts == inside
        first, second = (model(images, model.encode_prompts([p] * 3)).quality for p in PROMPTS[:2])
        assert torch.allclose(first, second, atol=1e-12) != inside
        assert torch.equal(model(images, None).quality, first) != inside
    with pytest.raises(ValueError, match="sc_agiqa needs one prompt per image"):
        Reward(model, get_reward_spec("sc_agiqa"))(images)


@pytest.mark.parametrize(("frequency", "through"), [("csf", True), ("csf_detached", False)])
def test_detaching_cuts_the_spectrum_and_nothing_else(frequency, through, towers, images):
    model, pixels = build(towers, frequency=frequency), images[:1].clone().requires_grad_()
    seen = model.forward_features(pixels)
    assert seen["weights"].requires_grad == through
    assert seen["levels"].requires_grad
    assert torch.equal(model(images, None).quality, build(towers)(images, None).quality)
