"""(images, prompts, metadata) -> (rewards, info), compared to the reward itself."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from aigiqa_reward import CompositeReward, Reward, RewardOutput, create_reward
from aigiqa_reward.rewards.reward_fn import RewardFn

PROMPTS = ("a red apple", "a dog", "a penguin")


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    return images.mean(dim=(1, 2, 3))


@pytest.fixture(scope="module")
def reward() -> Reward:
    return create_reward("compact")


@pytest.fixture(scope="module")
def eight_bits() -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 256, (3, 5, 6, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


@pytest.fixture(scope="module")
def images(eight_bits: np.ndarray) -> Tensor:
    return torch.from_numpy(eight_bits.transpose(0, 3, 1, 2).astype(np.float32) / 255)


def test_it_gives_what_the_reward_gives(reward: Reward, images: Tensor):
    metadata = [{"count": row} for row in range(3)]
    rewards, info = reward.as_reward_fn()(images, PROMPTS, metadata)
    expected = reward(images, list(PROMPTS))
    assert (rewards.dtype, rewards.shape, rewards.requires_grad) == (torch.float32, (3,), False)
    torch.testing.assert_close(rewards, expected.total)
    assert expected.correspondence is not None
    bare, alone = reward.as_reward_fn()(images[:1], None, None)
    assert bare.tolist() == alone["quality"].tolist() and "correspondence" not in alone
    for name, column in {"quality": expected.quality, "correspondence": expected.correspondence}.items():
        assert (info[name].dtype, info[name].shape) == (np.float32, (3,))
        np.testing.assert_allclose(info[name], column.numpy(), rtol=1e-6)


def test_every_form_of_the_same_images_is_the_same(images: Tensor, eight_bits: np.ndarray):
    seen: list[Tensor] = []
    forms: dict[str, Any] = {
        "float NCHW": images,
        "uint8 NHWC": eight_bits,
        "float NHWC": eight_bits.astype(np.float64) / 255,
        "uint8 NCHW": torch.from_numpy(eight_bits.transpose(0, 3, 1, 2).copy()),
        "PIL": [Image.fromarray(image) for image in eight_bits],
    }
    for name, form in forms.items():
        rewards, _ = RewardFn(lambda images, prompts: seen.append(images) or brightness(images, prompts))(form, PROMPTS)
        np.testing.assert_allclose(rewards.numpy(), eight_bits.mean(axis=(1, 2, 3)) / 255, rtol=1e-5, err_msg=name)
        torch.testing.assert_close(seen[-1], images, rtol=0, atol=1e-7, msg=name)


def test_gradients_pass_where_the_images_want_them(images: Tensor):
    own = images.clone().requires_grad_()
    rewards, _ = RewardFn(brightness)(own, PROMPTS, {})
    rewards.sum().backward()
    assert own.grad is not None
    torch.testing.assert_close(own.grad, torch.full_like(own, 1 / (3 * 40 * 48)))
    with torch.no_grad():
        assert not RewardFn(brightness)(own, PROMPTS)[0].requires_grad


def test_a_composite_lists_the_totals_of_its_members(images: Tensor):
    def red(images: Tensor, prompts: list[str]) -> RewardOutput:
        return RewardOutput(total=images[:, 0].mean(dim=(1, 2)), quality=images[:, 1].mean(dim=(1, 2)))

    reference = {"brightness": torch.tensor([0.0, 1.0]), "red": torch.tensor([0.0, 2.0])}
    composite = CompositeReward({"brightness": brightness, "red": red}, reference=reference)
    rewards, info = composite.as_reward_fn()(images, PROMPTS, [{}] * 3)
    bright, reddish = images.numpy().mean(axis=(1, 2, 3)), images[:, 0].numpy().mean(axis=(1, 2))
    np.testing.assert_allclose(info["details/brightness"], bright, rtol=1e-5)
    np.testing.assert_allclose(info["details/red"], reddish, rtol=1e-5)
    scaled = [(bright - 0.5) / 0.5**0.5, (reddish - 1) / 2**0.5]
    np.testing.assert_allclose(rewards.numpy(), np.mean(scaled, axis=0), rtol=1e-4)


def test_it_has_a_name_and_can_be_sent_to_another_process(reward: Reward, images: Tensor):
    assert reward.as_reward_fn().__name__ == "compact"
    reference = {"brightness": torch.tensor([0.0, 1.0])}
    score = CompositeReward({"brightness": brightness}, reference=reference).as_reward_fn()
    assert score.__name__ == "CompositeReward"
    again = pickle.loads(pickle.dumps(score))
    torch.testing.assert_close(again(images, PROMPTS, None)[0], score(images, PROMPTS, None)[0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(2, 32, 32, 3), "channels-last"),
        ([Image.new("RGB", (32, 32)), Image.new("RGB", (48, 32))], "all of one size, got 32 x 32, 48 x 32 px"),
        ([], "at least one image"),
        ("images", "got str"),
    ],
)
def test_images_that_cannot_be_a_batch_are_refused(reward: Reward, given: Any, message: str):
    with pytest.raises((TypeError, ValueError), match=message):
        reward.as_reward_fn()(given, ["a dog", "a cat"], None)
