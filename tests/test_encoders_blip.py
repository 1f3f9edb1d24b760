"""BLIP as an encoder: against transformers, with gradients, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_blip import write_tiny_blip
from torch import Tensor
from transformers import BertTokenizerFast, BlipForImageTextRetrieval, CLIPConfig

from aigiqa_reward.encoders.blip import BLIPConfig, BLIPEncoder
from aigiqa_reward.utils.weights import load_strictly

TEXTS = ["a red apple", "a very long description of a castle on a hill above the sea at dusk"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_blip(tmp_path_factory.mktemp("blip"), seed=0)


@pytest.fixture
def encoder(folder: Path) -> BLIPEncoder:
    return BLIPEncoder(BLIPConfig(path_or_id=str(folder))).requires_grad_(False).eval()


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "broken"))


def draw_images(count: int = 2, side: int = 32) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def grounded(encoder: BLIPEncoder, images: Tensor, texts: list[str]) -> Tensor:
    return encoder.ground(encoder.look(images), **encoder.read(texts))


def test_states_are_those_of_the_published_class(folder: Path, encoder: BLIPEncoder) -> None:
    model = BlipForImageTextRetrieval.from_pretrained(folder).eval()
    tokens = BertTokenizerFast.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    images = draw_images().float()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.mean, encoder.std))
    with torch.no_grad():
        expected = model(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=(images - mean) / std
        )
    features = encoder.read(TEXTS)
    assert torch.equal(features["text"], tokens.input_ids)
    assert torch.equal(features["mask"], tokens.attention_mask.bool())
    seen = encoder.look(images)
    assert torch.allclose(seen, expected.last_hidden_state, atol=1e-5)
    states = encoder.ground(seen, **features)
    assert torch.allclose(states, expected.question_embeds, atol=1e-5)
    assert seen.shape == (2, 1 + 4 * 4, encoder.vision_width)
    assert states.shape[2] == encoder.grounded_width == encoder.width
    assert encoder.image_size == 32
    same = grounded(encoder, images, TEXTS[:1] * 2)
    assert ((same[0] - same[1]).norm(dim=-1) > 1e-3 * same[0].norm(dim=-1)).all(), "every word depends on the image"


def test_pixel_gradient_is_that_of_finite_differences(encoder: BLIPEncoder) -> None:
    encoder.double()
    images = draw_images().requires_grad_()
    features = encoder.read(TEXTS)
    mask = features["mask"][..., None]

    def states(images: Tensor) -> Tensor:
        return encoder.ground(encoder.look(images), **features) * mask

    assert torch.autograd.gradcheck(states, images, fast_mode=True)
    gradient = torch.autograd.grad(states(images)[..., 0].sum(), images)[0]
    assert (gradient.flatten(1).norm(dim=1) > 1e-3).all()


def test_words_beyond_the_window_are_named_and_the_end_is_kept(folder: Path) -> None:
    encoder = BLIPEncoder(BLIPConfig(path_or_id=str(folder), window=6))
    with pytest.warns(UserWarning, match=r"window of 6 tokens.*'five six'"):
        ids = encoder.read(["one two three four five six"])["text"]
    assert [encoder.tokenizer.id_to_token(token) for token in ids[0].tolist()] == [
        *("[CLS]", "one", "two", "three", "four", "[SEP]")
    ]


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ("a red apple", TypeError, "expected a list of at least one text"),
        (["a cat", "  "], ValueError, "no readable word"),
    ],
)
def test_unreadable_texts_are_refused(encoder, texts, error, message):
    with pytest.raises(error, match=f"texts: .*{message}"):
        encoder.read(texts)
    with pytest.raises(ValueError, match=r"images: expected sides of 32 px, got \(24, 24\)"):
        encoder.look(draw_images(side=24))


def test_a_description_builds_the_same_encoder_without_the_folder(tmp_path: Path) -> None:
    folder = write_tiny_blip(tmp_path / "model", seed=3)
    encoder = BLIPEncoder(BLIPConfig(path_or_id=str(folder), window=40)).eval()
    written = json.dumps(encoder.describe())
    assert str(tmp_path) not in written
    shutil.rmtree(folder)
    again = BLIPEncoder.from_description(json.loads(written)).eval()
    assert not torch.equal(again.look(draw_images()), encoder.look(draw_images()))
    load_strictly(again, encoder.state_dict(), source="the first")
    assert json.dumps(again.describe()) == written
    assert again.config.window == 40
    assert all(torch.equal(again.read(TEXTS)[name], tensor) for name, tensor in encoder.read(TEXTS).items())
    assert torch.equal(grounded(again, draw_images(), TEXTS), grounded(encoder, draw_images(), TEXTS))


def change_weights(folder: Path, *, drop: str | None = None, add: dict[str, Tensor] | None = None) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if drop is None or not name.startswith(drop)}
    save_file({**tensors, **(add or {})}, path, metadata={"format": "pt"})


def test_unused_heads_and_counters_may_be_missing_or_left_over(encoder: BLIPEncoder, broken: Path) -> None:
    BlipForImageTextRetrieval.from_pretrained(broken).half().save_pretrained(broken)
    counters = {"text_encoder.embeddings.position_ids": torch.arange(512).view(1, -1)}
    change_weights(broken, drop="itm_head.", add=counters)
    again = BLIPEncoder(BLIPConfig(path_or_id=str(broken))).eval()
    assert {tensor.dtype for tensor in again.parameters()} == {torch.float32}
    expected = grounded(encoder, draw_images(), TEXTS)
    assert torch.allclose(grounded(again, draw_images(), TEXTS), expected, atol=0.05)


def test_missing_and_unknown_weights_are_refused(broken: Path) -> None:
    change_weights(broken, drop="text_encoder.encoder.layer.1.crossattention.self.key.")
    with pytest.raises(ValueError, match=r"2 weights .*first: .*layer.1.crossattention.self.key.b"):
        BLIPEncoder(BLIPConfig(path_or_id=str(broken)))
    change_weights(broken, add={"visual_encoder.pos_embed": torch.zeros(1, 17, 32)})
    with pytest.raises(ValueError, match=r"3 weights .*model.safetensors"):
        BLIPEncoder(BLIPConfig(path_or_id=str(broken)))


@pytest.mark.parametrize("damage", ["another shape", "pickled only", "cut short"])
def test_weights_that_cannot_be_read_are_refused(damage: str, broken: Path) -> None:
    path, name = broken / "model.safetensors", "vision_model.embeddings.position_embedding"
    if damage == "another shape":
        change_weights(broken, drop=name, add={name: torch.zeros(1, 5, 32)})
    elif damage == "cut short":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        torch.save(load_file(path), broken / "pytorch_model.bin")
        path.unlink()
    with pytest.raises(ValueError, match=r"path_or_id: cannot load.*expected a folder.*model.safetensors"):
        BLIPEncoder(BLIPConfig(path_or_id=str(broken)))


def test_other_models_and_missing_parts_are_refused(broken: Path, tmp_path: Path) -> None:
    CLIPConfig().save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="holds a 'clip' model, expected 'blip'"):
        BLIPEncoder(BLIPConfig(path_or_id=str(tmp_path / "clip")))
    (broken / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"cannot load.*tokenizer.json"):
        BLIPEncoder(BLIPConfig(path_or_id=str(broken)))
    with pytest.raises(ValueError, match=r"no folder .*no Hub id"):
        BLIPEncoder(BLIPConfig(path_or_id=str(tmp_path / "nowhere")))
