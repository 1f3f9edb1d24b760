"""MA-AGIQA: MANIQA's head and the adaptive fusion against plain numpy, and the language model's features."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_models import write_tiny_clip
from plain import array, cosine, draw, linear, relu, stir
from scipy.special import expit, softmax
from tiny_transformers import WIDTH, write_tiny_llava
from torch import Tensor

from aigiqa_reward.assistants import Assistants, LMMSemantics, SemanticsConfig
from aigiqa_reward.encoders.open_clip import OpenCLIPConfig
from aigiqa_reward.encoders.timm import TimmConfig, TimmEncoder
from aigiqa_reward.models.ma_agiqa import MAAGIQA, MAAGIQAConfig, ManiqaHead, ScaledSwin, TransposedAttention
from aigiqa_reward.rewards.build import build_model, empty_model

PROMPTS = ["a cat", "a castle in the clouds above a long river", "two red apples"]
SMALL: dict[str, Any] = {"width": 16, "heads": 2, "window": 2, "crops": 2, "short_side": 64}


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attend_channels(module: TransposedAttention, x: np.ndarray) -> np.ndarray:
    query, key, value = (linear(layer, x) for layer in (module.query, module.key, module.value))
    out = np.zeros_like(x)
    for c in range(len(x)):
        shares = softmax([query[c] @ key[other] / np.sqrt(x.shape[1]) for other in range(len(x))])
        out[c] = x[c] + sum(share * value[other] for other, share in enumerate(shares))
    return out


def test_head_without_its_swin_blocks_is_a_plain_chain() -> None:
    head = stir(ManiqaHead(MAAGIQAConfig(width=8, heads=2, window=2, swin_scale=0.0), 6, 3)).double().eval()
    maps = rows(2, 6, 3, 3)
    head.standard.fit(rows(40, 6, 3, 3, seed=1) * 2 + 1)
    found, weight = head(maps)
    for b in range(2):
        x = array(maps[b]).reshape(6, 9)
        x = (x - array(head.standard.mean)[:, None]) / array(head.standard.deviation)[:, None]
        for attention in head.first:
            x = attend_channels(attention, x)
        x = linear(head.reduce, x.T).T
        for attention in head.second:
            x = attend_channels(attention, x)
        places = linear(head.halve, x.T)
        score = relu(linear(head.score[3], relu(linear(head.score[0], places)))[:, 0])
        share = expit(linear(head.weight[3], relu(linear(head.weight[0], places)))[:, 0])
        assert np.allclose(array(weight[b]), share)
        assert np.allclose(array(found[b]), score * share)
        assert score.max() > 0


def test_swin_blocks_add_their_scale_and_look_across_windows() -> None:
    maps = rows(1, 4, 4, 4)
    blocks = {s: stir(ScaledSwin(4, 4, heads=2, window=2, scale=s)).double().eval() for s in (0.5, 1.0)}
    blocks[0.5].load_state_dict(blocks[1.0].state_dict())
    assert torch.allclose((blocks[0.5](maps) - maps) * 2, blocks[1.0](maps) - maps)
    maps.requires_grad_()
    # Place (1, 1) is in the first window; the second block shifts it together with (2, 2), of the last.
    (seen,) = torch.autograd.grad(blocks[1.0](maps)[0, :, 1, 1].sum(), maps)
    assert seen[0, :, 2, 2].norm() > 1e-6
    assert seen[0, :, 3, 3].norm() > 1e-6
    (corner,) = torch.autograd.grad(blocks[1.0](maps)[0, :, 0, 0].sum(), maps)
    assert corner[0, :, 3, 3].norm() < 1e-20, "a shift does not wrap around the border"


def plain_fusion(module: Any, vectors: list[np.ndarray]) -> tuple[float, np.ndarray]:
    own, *assisting = vectors
    joined = [linear(module.own, own)]
    joined += [relu(linear(layer[0], part)) for layer, part in zip(module.assisting, assisting, strict=True)]
    weights = expit(linear(module.gate, np.concatenate(joined)))
    fused = sum(weight * part for weight, part in zip(weights, joined, strict=True))
    return float(linear(module.out, linear(module.mix, fused))[0]), weights


@dataclass(frozen=True)
class Colors:
    width: int = 3

    def read(self, images: Tensor) -> Tensor:
        flat = images.flatten(2)
        return torch.stack([flat.mean(dim=2), flat.std(dim=2)], dim=1).float()


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    clip = write_tiny_clip(tmp_path_factory.mktemp("clip"), seed=0)
    return {
        "vision": TimmConfig(architecture="vit_tiny_patch16_224", image_size=64, blocks=(10, 11)),
        "matcher": OpenCLIPConfig(architecture=f"local-dir:{clip}"),
    }


def build(towers: dict[str, Any], reader: Any = None, **settings: Any) -> MAAGIQA:
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        assistants = Assistants(semantics=reader)
        model = build_model("ma_agiqa", towers=towers, assistants=assistants, settings=SMALL | settings)
    assert isinstance(model, MAAGIQA)
    stir(model.head)
    return model.double().eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return draw(3, 64, 96)


@pytest.mark.parametrize("semantics", ["features", "zeros"])
def test_scores_are_means_of_the_fusion_over_the_crops(semantics: str, towers: dict[str, Any], images: Tensor) -> None:
    model = build(towers, Colors(), semantics=semantics)
    model.head.semantics.fit(rows(30, 3))
    output = model(images, model.encode_prompts(PROMPTS))
    read = (array(Colors().read(images)) - array(model.head.semantics.mean)) / array(model.head.semantics.deviation)
    read = read * (semantics == "features")
    clip = model.matcher
    for i, prompt in enumerate(PROMPTS):
        text = array(clip.encode_text([prompt]))[0]
        whole = torch.nn.functional.interpolate(images[i : i + 1], (21, 32), mode="bicubic", antialias=True)
        canvas = images.new_tensor(clip.mean).view(1, 3, 1, 1).repeat(1, 1, 32, 32)
        canvas[:, :, 5:26] = whole
        image = array(clip.encode_image(canvas))[0]
        product = image / np.linalg.norm(image) * text / np.linalg.norm(text) * np.sqrt(32)
        quality, match = [], []
        for left in (0, 32):
            own, _ = model.head.maniqa(model.vision.levels(images[i : i + 1, :, :, left : left + 64]))
            quality.append(plain_fusion(model.head.quality, [array(own)[0], *read[i]])[0])
            match.append(plain_fusion(model.head.correspondence, [array(own)[0], *read[i], product])[0])
        assert np.isclose(array(output.quality[i]), np.mean(quality))
        added = 4 * array(model.head.anchor.weight) * cosine(image, text)
        assert np.isclose(array(output.correspondence[i]), np.mean(match) + added)
    assert output.details["substitute_semantics"].tolist() == [False] * 3


def test_forward_prepares_the_context_without_gradients(towers: dict[str, Any], images: Tensor) -> None:
    model, pixels = build(towers, Colors()), images.clone().requires_grad_()
    with pytest.raises(ValueError, match="context: expected what prepare returned"):
        model.forward_head(model.forward_features(images), None, None)
    prepared = model.prepare(pixels, None)
    assert not prepared["semantics"].requires_grad
    gradients = []
    for context in (None, prepared):
        gradients += torch.autograd.grad(model(pixels, None, context).quality.sum(), pixels)
    assert torch.equal(*gradients)
    assert gradients[0].norm() > 1e-6
    turned = {name: tensor.flip(0) for name, tensor in prepared.items()}
    assert not torch.allclose(model(images, None).quality, model(images, None, turned).quality, atol=1e-4)


def test_misfits_are_refused(towers: dict[str, Any], images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"needs a multimodal model.*Assistants\(semantics=LMMSemantics"):
        build(towers, semantics_width=8)  # before any tower is loaded
    model = build(towers, Colors())
    model.semantics = None
    with pytest.raises(ValueError, match="without the compact towers"):
        model(images, None)
    with pytest.raises(ValueError, match="semantics_width: expected 3 as in the multimodal model, got 5"):
        MAAGIQA(MAAGIQAConfig(**SMALL, semantics_width=5), TimmEncoder(towers["vision"]), side=4, semantics=Colors())
    with pytest.raises(ValueError, match="width: expected a multiple of 2 heads = 8, got 12"):
        MAAGIQAConfig(width=12)


def test_a_language_models_width_is_read_from_it(towers: dict[str, Any], images: Tensor, tmp_path: Path) -> None:
    reader = LMMSemantics(SemanticsConfig(path_or_id=str(write_tiny_llava(tmp_path / "llava"))))
    model = build({"vision": towers["vision"]}, reader)
    assert model.config.semantics_width == WIDTH
    assert model(images, model.encode_prompts(PROMPTS)).correspondence is None, "without a matcher"
    context = model.prepare(images, None)
    assert torch.equal(context["semantics"], reader.read(images).double())
    assert not context["substitute_semantics"].any()
    assert model.forward_features(images)["levels"].shape == (3, 2, 2 * 192, 4, 4)
    description = json.loads(json.dumps(model.describe()))
    with pytest.raises(ValueError, match=r"trained with a semantics.*Assistants\(semantics="):
        empty_model("ma_agiqa", description)
    again = empty_model("ma_agiqa", description, Assistants(semantics=reader)).double().eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(images, None).quality, model(images, None).quality)


def test_the_substitute_is_the_mean_and_deviation_of_the_compact_towers_map() -> None:
    model = build_model("ma_agiqa").eval()
    assert model.matcher is None
    images = draw(2, 256, 256).float()
    context = model.prepare(images, None)
    with torch.no_grad():
        maps = array(model.vision.image.encoder(images)).reshape(2, 1280, -1)
    assert np.allclose(array(context["semantics"][:, 0]), maps.mean(axis=2), atol=1e-5)
    assert np.allclose(array(context["semantics"][:, 1]), maps.std(axis=2), atol=1e-5)
    assert context["substitute_semantics"].tolist() == [True, True]
