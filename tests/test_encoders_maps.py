"""Maps of the image towers: which patch or cell they describe, and what the wrappers make of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from clip_models import CONFIG, write_tiny_clip
from safetensors.torch import save_file
from torch import Tensor

from aigiqa_reward.encoders.open_clip import OpenCLIPConfig, OpenCLIPEncoder
from aigiqa_reward.encoders.timm import TimmConfig, TimmEncoder
from aigiqa_reward.utils.weights import load_strictly

VIT = TimmConfig(architecture="vit_tiny_patch16_224", image_size=48)
LITE0 = TimmConfig(architecture="tf_efficientnet_lite0")


def draw_images(count: int = 2, height: int = 32, width: int = 32) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def frozen(config: TimmConfig, *blocks: int) -> TimmEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        return TimmEncoder(replace(config, blocks=blocks)).requires_grad_(False).eval().double()


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("clip"), seed=0)


@pytest.fixture
def clip(clip_folder: Path) -> OpenCLIPEncoder:
    return OpenCLIPEncoder(OpenCLIPConfig(architecture=f"local-dir:{clip_folder}")).requires_grad_(False).eval()


def test_patches_take_the_way_of_the_class_token(clip: OpenCLIPEncoder, clip_folder: Path) -> None:
    mean, std = (torch.tensor(CONFIG["preprocess_cfg"][name]).double().view(3, 1, 1) for name in ("mean", "std"))
    images = draw_images()
    visual = clip.double().clip.visual
    visual.output_tokens = True
    pooled, states = visual((images - mean) / std)
    visual.output_tokens = False
    assert torch.allclose(clip.encode_image(images), pooled, atol=1e-6)
    tokens = states @ visual.proj
    found = clip.encode_map(images)
    assert found.shape == (2, clip.width, 4, 4)
    for i in range(4):
        for j in range(4):
            assert torch.allclose(found[:, :, i, j], tokens[:, 4 * i + j], atol=1e-6)
    assert (found.flatten(2).std(dim=2) > 1e-3 * found.flatten(2).abs().mean(dim=2)).all()


def test_open_clip_outputs_never_fall_below_float32(clip: OpenCLIPEncoder) -> None:
    features = clip.features(draw_images().float())
    assert torch.equal(clip.project(features), clip.encode_image(draw_images().float()))
    assert features.shape[1] == clip.feature_width == clip.width == clip.encode_text(["a cat"]).shape[1]
    clip.to(torch.bfloat16)
    images = draw_images().bfloat16()
    assert {clip.encode_map(images).dtype, clip.encode_image(images).dtype} == {torch.float32}


def recorded(encoder: TimmEncoder, images: Tensor) -> list[Tensor]:
    outputs: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        for block in encoder.trunk.blocks
    ]
    encoder(images)
    for handle in handles:
        handle.remove()
    return outputs


def test_levels_of_a_vit_are_its_blocks_patches_in_order() -> None:
    encoder, images = frozen(VIT, -4, -3, -1), draw_images(height=48, width=48)
    found = encoder.levels(images)
    assert found.shape == (2, encoder.level_channels, encoder.level_side, encoder.level_side) == (2, 3 * 192, 3, 3)
    outputs = recorded(encoder, images)
    for place, block in enumerate((8, 9, 11)):
        tokens = outputs[block][:, 1:]  # the first is the class token
        level = found[:, place * 192 : (place + 1) * 192]
        assert torch.allclose(level.flatten(2).transpose(1, 2), tokens, atol=1e-10)


def test_levels_of_a_convolutional_model_are_brought_to_the_last_grid() -> None:
    encoder, images = frozen(LITE0, 1, 2, 4), draw_images(height=64, width=96)
    found = encoder.levels(images)
    assert found.shape == (2, encoder.level_channels, 2, 3) == (2, 24 + 40 + 320, 2, 3)
    stages = {output.shape[1]: output for output in recorded(encoder, images)}
    expected = []
    for channels in (24, 40, 320):
        cells = stages[channels].unflatten(2, (2, -1)).unflatten(4, (3, -1))
        expected.append(cells.mean(dim=(3, 5)))
    assert torch.allclose(found, torch.cat(expected, dim=1), atol=1e-10)
    assert (encoder.image_size, encoder.level_side) == (224, 7)
    assert encoder.levels(draw_images(height=75, width=101)).shape == (2, 24 + 40 + 320, 3, 4)


@pytest.mark.parametrize(
    ("tower", "side", "atol", "least"), [("clip", 32, 1e-5, 1e-3), ("vit", 48, 1e-4, 1e-6), ("lite0", 48, 1e-4, 1e-6)]
)
def test_the_maps_pixel_gradient_is_that_of_finite_differences(tower, side, atol, least, clip):
    levels = {"vit": frozen(VIT, -2, -1).levels, "lite0": frozen(LITE0, 2, 4).levels, "clip": clip.double().encode_map}
    images = draw_images(1, side, side).requires_grad_()
    assert torch.autograd.gradcheck(levels[tower], images, eps=1e-7, fast_mode=True, atol=atol)
    assert torch.autograd.grad(levels[tower](images).square().sum(), images)[0].norm() > least


@pytest.mark.parametrize("blocks", [(12,), (3, 3), (-1, 0)])
def test_blocks_that_cannot_be_given_are_refused(blocks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="blocks: expected"):
        TimmEncoder(replace(VIT, blocks=blocks))


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images: expected \(48, 48\) px, got \(48, 64\)"):
        TimmEncoder(VIT)(draw_images(height=48, width=64).float())


@pytest.mark.parametrize("config", [VIT, LITE0, TimmConfig(architecture="resnet18", mean=(0.5, 0.5, 0.5))])
def test_a_description_builds_the_same_model(config: TimmConfig) -> None:
    encoder = frozen(config, 1, -1)
    again = TimmEncoder.from_description({"smooth": 0.02} | json.loads(json.dumps(encoder.describe()))).eval().double()
    assert again.config == encoder.config
    load_strictly(again, encoder.state_dict(), source="the first")
    images = draw_images(1, 48, 48)
    assert torch.equal(again.levels(images), encoder.levels(images))


@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_224", "resnet10t"])
def test_weights_with_their_classifier_are_read_from_a_file(architecture: str, tmp_path: Path) -> None:
    published, path = timm.create_model(architecture, num_classes=7).eval(), tmp_path / "weights.safetensors"
    save_file(published.state_dict(), path)
    encoder = TimmEncoder(TimmConfig(architecture=architecture, weights=str(path))).eval()
    images = draw_images(1, 224, 224).float()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.config.mean, encoder.config.std))
    with torch.no_grad():
        expected = published.forward_features((images - mean) / std)
        found = encoder(images)
    assert torch.allclose(found, expected if expected.ndim == 4 else expected.transpose(1, 2), atol=1e-5)
    description = encoder.describe()
    assert not {"weights", "pretrained"} & description.keys()
    assert str(tmp_path) not in json.dumps(description)
