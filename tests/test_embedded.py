"""The embedded world: its words, its pictures, its judge, and the generator."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from aigiqa_reward import load_embedded_pipeline
from aigiqa_reward.toy import world
from aigiqa_reward.toy.degradations import DEGRADATIONS, degrade
from aigiqa_reward.toy.judge import Judge, load_judge
from aigiqa_reward.toy.pictures import all_pairs, compose
from aigiqa_reward.toy.pipeline import GENERATOR
from aigiqa_reward.toy.world import Subject, all_captions, caption, is_held_out, read_subject, unknown_words
from aigiqa_reward.utils.weights import WeightsError


@pytest.fixture(scope="module")
def judge() -> Judge:
    return load_judge()


@pytest.fixture(scope="module")
def pairs() -> np.ndarray:
    return np.concatenate([all_pairs(held_out=False), all_pairs(held_out=True)])[::2]


@pytest.fixture(scope="module")
def pictures(pairs: np.ndarray) -> torch.Tensor:
    return compose(pairs, np.random.default_rng(123_456))


def mean_channel_error(picture: torch.Tensor, color: int) -> float:
    corners = picture[:, [0, 0, -1, -1], [0, -1, 0, -1]].T * 255
    return float((corners - torch.tensor(list(world.COLORS.values())[color])).abs().mean(dim=1).median())


def test_every_caption_is_read_back():
    assert (len(set(world.NOUNS)), len(world.COLOR_NAMES)) == (64, 8)
    for noun, color, wording in itertools.product(range(0, 64, 3), range(8), range(len(world.WORDINGS))):
        assert read_subject(caption(noun, color, wording)) == Subject(noun=noun, color=color)


def test_words_of_no_caption_are_unknown():
    assert not any(map(unknown_words, all_captions()))
    assert unknown_words("A fluffy penguin rides two penguins on the red, red background") == ["fluffy", "rides", "two"]


@pytest.mark.parametrize(
    ("prompt", "thing", "color"),
    [
        ("a red apple", "red apple", None),
        ("A GREEN APPLE on a RED background", "green apple", "red"),
        ("an airbus on black", None, "black"),
        ("", None, None),
        ("a jack-o-lantern, whiteish", "jack-o-lantern", None),
        ("a green, red apple in front of a blue wall", "red apple", "blue"),
        ("a yellow background with an orange crab", "crab", "yellow"),
    ],
)
def test_subjects_of_free_prompts(prompt: str, thing: str | None, color: str | None):
    subject = read_subject(prompt)
    assert (None if subject.noun is None else world.NOUNS[subject.noun]) == thing
    assert (None if subject.color is None else world.COLOR_NAMES[subject.color]) == color


def test_each_thing_has_one_held_out_color_and_each_color_eight_things():
    held_out = np.array([[is_held_out(noun, color) for color in range(8)] for noun in range(64)])
    assert (held_out.sum(axis=1) == 1).all()
    assert (held_out.sum(axis=0) == 8).all()
    assert len(all_pairs(held_out=True)) == 64
    assert len(all_pairs(held_out=False)) == 448


def test_pictures_repeat_with_their_generator_and_have_their_color(pairs: np.ndarray):
    first, again = (compose(pairs[:32], np.random.default_rng(5)) for _ in range(2))
    assert first.shape == (32, 3, world.SIDE, world.SIDE)
    assert torch.equal(first, again)
    assert not torch.equal(first, compose(pairs[:32], np.random.default_rng(6)))
    assert float(first.min()) >= 0 and float(first.max()) <= 1
    errors = [mean_channel_error(picture, int(color)) for picture, (_, color) in zip(first, pairs, strict=False)]
    assert max(errors) < 15


def test_the_judge_is_right_on_clean_pictures(judge: Judge, pictures: torch.Tensor, pairs: np.ndarray):
    noun, color = judge.recognizes(pictures, [caption(*pair) for pair in pairs.tolist()])
    assert float((noun & color).float().mean()) >= 0.98


def test_the_judge_gives_wrong_prompts_a_low_score(judge: Judge, pictures: torch.Tensor, pairs: np.ndarray):
    images, true = pictures[:64], pairs[:64]
    right = judge(images, [caption(*pair) for pair in true.tolist()]).total
    other_noun = judge(images, [caption((noun + 7) % 64, color) for noun, color in true.tolist()]).total
    other_color = judge(images, [caption(noun, (color + 3) % 8) for noun, color in true.tolist()]).total
    assert bool((right <= 0).all())
    assert float(right.mean()) > -0.1
    assert float(torch.stack([other_noun, other_color]).max()) < -2


@pytest.mark.parametrize("column", range(len(DEGRADATIONS)))
def test_the_judge_measures_degradation(judge: Judge, pictures: torch.Tensor, column: int):
    generator = torch.Generator().manual_seed(column)
    measured = []
    some = pictures[::8]
    for level in (0.0, 0.45, 0.9):
        levels = torch.zeros(len(some), len(DEGRADATIONS))
        levels[:, column] = level
        measured.append(float(judge.examine(degrade(some, levels, generator)).degradation[:, column].mean()))
    assert measured == sorted(measured)
    assert measured[0] < 0.1
    assert measured[2] > measured[0] + 0.3


def test_the_judge_takes_any_size_and_gives_each_picture_its_own_score(judge: Judge, pictures: torch.Tensor):
    large = torch.nn.functional.interpolate(pictures[:4], scale_factor=3, mode="bicubic").clamp(0, 1)
    assert torch.equal(judge.examine(large).nouns.argmax(1), judge.examine(pictures[:4]).nouns.argmax(1))
    together, alone = judge.examine(pictures[:4]).nouns, judge.examine(pictures[2:3]).nouns
    assert torch.allclose(together[2:3], alone, atol=1e-4)
    images = pictures[:2].clone().requires_grad_()
    judge(images, ["a bus on red", "a key on blue"]).total.sum().backward()
    assert images.grad is not None
    assert bool((images.grad.flatten(1).abs().sum(dim=1) > 0).all())


@pytest.mark.parametrize(
    ("prompts", "error", "says"),
    [
        (["a dragon on a blue background"], ValueError, "no thing in 'a dragon on a blue background'.*red apple"),
        (["a red apple"], ValueError, "no background color in 'a red apple'.*red, orange"),
        (["a key on red", "a key on blue"], ValueError, "expected 1, one per image, got 2"),
        ("a key on red", TypeError, r"pass \[text\] \* 1"),
    ],
)
def test_prompts_that_the_judge_cannot_read(judge: Judge, prompts: Any, error: type[Exception], says: str):
    with pytest.raises(error, match=says):
        judge(torch.rand(1, 3, 64, 64), prompts)


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return load_embedded_pipeline()


def test_plain_from_pretrained_loads_the_same_in_one_dtype(pipe: StableDiffusionPipeline):
    plain = StableDiffusionPipeline.from_pretrained(GENERATOR)
    parts = {name: part for name, part in plain.components.items() if isinstance(part, torch.nn.Module)}
    assert parts.keys() == {"vae", "text_encoder", "unet"}
    words = {word for name in (*world.NOUNS, *world.COLOR_NAMES) for word in name.replace("-", " - ").split()}
    assert all(plain.tokenizer.tokenize(word) == [f"{word}</w>"] for word in words - {"-"}), "a token per word"
    for name, part in parts.items():
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}
        for key, tensor in getattr(pipe, name).state_dict().items():
            assert torch.equal(tensor, part.state_dict()[key])


@pytest.mark.parametrize("name", ["vae/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json"])
def test_damaged_files_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    copy = tmp_path / "generator"
    shutil.copytree(GENERATOR, copy)
    file = copy / name
    file.write_bytes(file.read_bytes()[:-1] + b" ")
    monkeypatch.setattr("aigiqa_reward.toy.pipeline.GENERATOR", copy)
    with pytest.raises(WeightsError, match=rf"{file.name}.*damaged"):
        load_embedded_pipeline()


@pytest.mark.slow
def test_samples_show_what_the_prompt_says(pipe: StableDiffusionPipeline, judge: Judge):
    chosen = np.random.default_rng(2).permutation(all_pairs(held_out=False))[:8]
    prompts = [caption(*pair) for pair in chosen.tolist()]
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in range(len(prompts))]
    images = pipe(prompts, generator=generators, num_inference_steps=20, guidance_scale=3.0, output_type="pt").images
    assert images.shape == (8, 3, world.SIDE, world.SIDE)
    noun, color = judge.recognizes(images, prompts)
    assert int(noun.sum()) >= 7
    assert int(color.sum()) >= 7
