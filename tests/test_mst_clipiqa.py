"""MST-CLIPIQA: its size on the published towers, its equations on a tiny CLIP, its streams on the compact towers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plain import array, attend, cosine, cross_attend, draw, linear, relu, stir, tiny_clip
from scipy.special import expit, softmax
from torch import nn
from torch.distributions import Normal, kl_divergence

from aigiqa_reward import images as pixels
from aigiqa_reward.encoders.open_clip import OpenCLIPConfig, OpenCLIPEncoder
from aigiqa_reward.models.mst_clipiqa import MSTCLIPIQA, QUALITY_LEVELS, RELEASED_A, RELEASED_B, MSTCLIPIQAConfig
from aigiqa_reward.rewards.build import build_model

PROMPTS = ["a cat", "a castle in the clouds above a very long and winding river at dusk", "two red apples"]
SMALL: dict[str, Any] = {"width": 32, "hidden": 16, "head_hidden": 24, "rank": 8, "heads": 4}


def count(*parts: nn.Module | nn.Parameter | None) -> int:
    return sum(
        p.numel() for part in parts for p in (part.parameters() if isinstance(part, nn.Module) else [part]) if p.numel()
    )


Towers = tuple[OpenCLIPEncoder, OpenCLIPEncoder]


def test_trained_parameters_are_those_of_the_paper() -> None:
    with torch.random.fork_rng(devices=[]):
        tower = OpenCLIPEncoder(OpenCLIPConfig(architecture="ViT-B-32"), load_weights=False).requires_grad_(False)
    published = (tower, tower)  # ViT-B-16 has the same widths
    model = MSTCLIPIQA(MSTCLIPIQAConfig(prompt_branch=None), *published)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(name.startswith("head.") for name in trained)
    assert count(model.head) == 788_353
    with_prompt = MSTCLIPIQA(MSTCLIPIQAConfig(), *published)
    assert count(with_prompt.head.fusion, with_prompt.head.quality) == 788_353
    everything = MSTCLIPIQA(MSTCLIPIQAConfig(bottleneck=0.1, anchor=True), *published)
    assert count(with_prompt.head) < count(everything.head) <= 1_100_000
    assert torch.equal(model.head.fusion.coarse.weight, torch.eye(512))
    assert torch.equal(model.head.fusion.fine.weight, torch.eye(512))
    first = MSTCLIPIQA(RELEASED_A, *published)
    assert count(first.head.fusion, first.head.temperature) == count(first.head) == 722_561
    second = MSTCLIPIQA(RELEASED_B, *published)
    assert count(second.head.fusion, second.head.attend, second.head.quality) == 2_299_010
    assert count(second.head.quality) == count(second.head.correspondence)


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Towers:
    return tiny_clip(tmp_path_factory.mktemp("coarse"), seed=0), tiny_clip(tmp_path_factory.mktemp("fine"), seed=1)


def build(towers: Towers, *, moved: bool = True, **settings: Any) -> MSTCLIPIQA:
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        model = MSTCLIPIQA(MSTCLIPIQAConfig(**SMALL | settings), *towers)
    if moved:
        stir(model.head)
    return model.double().eval()


def embeddings(towers: Towers, images: torch.Tensor) -> list[np.ndarray]:
    return [
        array(tower.encode_image(pixels.letterbox(images, 32, fill=images.new_tensor(tower.mean)))) for tower in towers
    ]


def score(head: nn.Module, z: np.ndarray) -> np.ndarray:
    return linear(head.out, relu(linear(head.hidden, z)))[:, 0]


@pytest.mark.parametrize("fusion", ["gate", "mean"])
def test_quality_is_the_gated_fusion_of_both_towers(towers: Towers, fusion: str) -> None:
    model, images = build(towers, fusion=fusion), draw(3, 40, 52)
    coarse, fine = embeddings(towers, images)
    part = model.head.fusion
    gate = expit(linear(part.gate, relu(linear(part.hidden, np.concatenate([coarse, fine], axis=1)))))
    assert np.abs(gate - 0.5).max() > 0.05, "a gate at 1/2 would not tell the two settings apart"
    if fusion == "mean":
        gate = np.full_like(gate, 0.5)
    z = gate * linear(part.coarse, coarse) + (1 - gate) * linear(part.fine, fine)
    output = model(images, None)
    assert np.allclose(array(output.quality), score(model.head.quality, z))
    assert np.allclose(array(output.details["gate"]), gate.mean(axis=1))
    assert output.correspondence is None


def test_levels_read_z_by_its_likeness_to_five_texts(towers: Towers) -> None:
    model, images = build(towers, quality_head="levels", prompt_branch=None), draw(3, 32, 32)
    coarse, fine = embeddings(towers, images)
    z, _ = model.head.fusion(torch.from_numpy(coarse), torch.from_numpy(fine))
    texts = [array(towers[0].encode_text([text]))[0] for text in QUALITY_LEVELS]
    output = model(images, model.encode_prompts(PROMPTS))
    for i in range(3):
        shares = softmax([math.exp(array(model.head.temperature)) * cosine(array(z[i]), text) for text in texts])
        assert np.allclose(array(output.details["quality_levels"][i]), shares, atol=1e-6)
        assert np.isclose(array(output.quality[i]), sum(j * share for j, share in enumerate(shares)) / 4)
    assert output.correspondence is None, "this variant has no branch for the prompt"
    with pytest.raises(ValueError, match="width: expected 32 for quality_head='levels', got 16"):
        build(towers, quality_head="levels", width=16)


@pytest.mark.parametrize("branch", ["low_rank", "full"])
def test_correspondence_reads_z_after_it_has_attended_to_the_words(towers: Towers, branch: str) -> None:
    model, images = build(towers, prompt_branch=branch, anchor=True), draw(3, 32, 32)
    coarse, fine = embeddings(towers, images)
    z = array(model.head.fusion(torch.from_numpy(coarse), torch.from_numpy(fine))[0])
    output, attention = model(images, model.encode_prompts(PROMPTS)), model.head.attend
    for i, prompt in enumerate(PROMPTS):
        words, mask = towers[0].encode_words([prompt])
        assert mask.all()
        words = array(words[0])
        if branch == "full":
            taken = cross_attend(attention.attend, z[i : i + 1], linear(attention.words, words))
        else:
            query = linear(attention.query, z[i : i + 1])
            taken = attend(query, linear(attention.key, words), linear(attention.value, words), heads=4)
            taken = linear(attention.out, taken)
        plain = score(model.head.correspondence, z[i : i + 1] + array(attention.alpha) * taken)[0]
        likeness = cosine(coarse[i], array(towers[0].encode_text([prompt]))[0])
        assert np.isclose(array(output.details["similarity"][i]), likeness)
        assert np.isclose(array(output.correspondence[i]), plain + 4 * array(model.head.anchor.weight) * likeness)


def test_bottleneck_penalty_is_the_divergence_from_the_standard_normal(towers: Towers) -> None:
    model, images = build(towers, bottleneck=0.3), draw(3, 32, 32)
    coarse, fine = embeddings(towers, images)
    z, _ = model.head.fusion(torch.from_numpy(coarse), torch.from_numpy(fine))
    layer = model.head.bottleneck
    log_variance = torch.from_numpy(linear(layer.log_variance, relu(linear(layer.hidden, array(z)))))
    divergence = kl_divergence(Normal(z, (log_variance / 2).exp()), Normal(0.0, 1.0)).mean(dim=1)
    output = model(images, None)
    assert torch.allclose(output.details["penalty"], 0.3 * divergence)
    assert torch.equal(output.quality, model(images, None).quality), "no noise in evaluation"
    assert np.allclose(array(output.quality), score(model.head.quality, array(z)))


def test_the_compact_tower_sees_the_whole_image_at_two_resolutions() -> None:
    size = (64, 640)
    model = build_model("mst_clipiqa").eval()
    assert model.fine is None
    images = draw(1, *size).float()
    with torch.no_grad():
        seen = model.forward_features(images)
        for name, side in (("coarse", 256), ("fine", 512)):
            scale = side / math.sqrt(size[0] * size[1])
            wanted = [max(32, round(part * scale)) for part in size]
            scaled = F.interpolate(images, wanted, mode="bicubic", antialias=True, align_corners=False)
            maps = model.coarse.image.encoder(scaled)
            assert torch.allclose(seen[name], maps.mean(dim=(2, 3)), atol=1e-5)
    assert not torch.allclose(seen["coarse"], seen["fine"], atol=1e-2)
    assert set(model.standardized) == {"coarse", "fine"}
