"""A reward bound to prompts: encoded once, finite rows only, its own precision, and with or without gradients."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aigiqa_reward import BestOfN, CompositeReward, RewardOutput, Scorer, create_reward, rerank
from aigiqa_reward.rewards.bound import BoundReward, device_of, reward_name
from aigiqa_reward.types import PromptError, PromptFeatures


class Lengths:
    name = "lengths"

    def __init__(self) -> None:
        self.encoded: list[list[str]] = []
        self.seen: list[Tensor] = []

    def encode_prompts(self, prompts: list[str]) -> PromptFeatures:
        for prompt in prompts:
            if "?" in prompt:
                raise PromptError(prompt)
        self.encoded.append(prompts)
        texts = tuple(dict.fromkeys(prompts))
        lengths = torch.tensor([float(len(text)) for text in texts])
        index = torch.tensor([texts.index(prompt) for prompt in prompts])
        return PromptFeatures(texts=texts, index=index, tensors={"length": lengths}, model="lengths")

    def __call__(self, images: Tensor, prompts: PromptFeatures | None) -> RewardOutput:
        self.seen.append(images)
        quality = images.mean(dim=(1, 2, 3))
        length = None if prompts is None else prompts.rows("length").to(quality)
        total = quality if length is None else quality + length
        return RewardOutput(total=total, quality=quality, correspondence=length)


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    assert isinstance(prompts, list)
    return images.mean(dim=(1, 2, 3))


def levels(*values: float) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 16, 16).clone()


def test_prompts_are_encoded_once_and_looked_up_afterwards() -> None:
    reward = Lengths()
    bound = BoundReward(reward, ["aa", "b", "aa"])
    images = levels(0.1, 0.2, 0.3)
    assert bound(images, ["b", "aa", "b"]).correspondence.tolist() == [1, 2, 1]
    assert bound(images, "b").correspondence.tolist() == [1, 1, 1]
    assert bound(images, None).correspondence is None
    assert reward.encoded == [["aa", "b", "aa"]]
    assert bound(images[:1], ["ccc"]).total.tolist() == pytest.approx([3.1])
    assert BoundReward(brightness).encode(["a"]) == ["a"], "of a reward that encodes nothing"
    assert BoundReward(brightness)(images, "a").total.tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_unreadable_prompts_are_found_and_the_others_encoded() -> None:
    reward = Lengths()
    bound = BoundReward(reward)
    assert list(bound.unreadable(["a", "?", "b", "??", "a"])) == ["?", "??"]
    assert reward.encoded == [["a", "b"]]
    assert bound.unreadable(["b"]) == {} == BoundReward(brightness).unreadable(["?"])
    with pytest.raises(PromptError, match=r"'\?' holds no readable word"):
        BoundReward(reward, ["?"])


@pytest.mark.parametrize("text", ["a smiling face \ud83d", "caf\udce9"], ids=["half a character", "undecoded byte"])
def test_a_text_that_no_tokenizer_reads_is_the_error_of_its_row_for_every_reward(text: str) -> None:
    message = rf"prompts: '{re.escape(ascii(text)[1:-1])}' has half of a character or .* at position {len(text) - 1}; "
    composite = CompositeReward({"bright": brightness}, reference={"bright": torch.tensor([0.0, 1.0])})
    for reward in (brightness, Lengths(), composite, create_reward("compact")):
        scores = Scorer(reward).score(levels(0.1, 0.2, 0.3), ["a", text, "a"], on_error="nan")
        assert scores.total.isnan().tolist() == [False, True, False]
        (found,) = BoundReward(reward).unreadable(["a", text]).values()
        assert re.match(message, found)
        with pytest.raises(PromptError, match=message):
            BoundReward(reward, [text])
        with pytest.raises(ValueError, match=message.removeprefix("prompts").join(["^prompt", ""])):
            rerank(levels(0.1, 0.2), text, reward)
    with pytest.raises(PromptError, match=message):
        create_reward("compact")(levels(0.1, 0.2), ["a", text])
    with pytest.raises(ValueError, match=r"prompt: .* has half of a character"):
        BestOfN(lambda **_: None, brightness, n=1, reward_prompt="a")(text)


def test_only_finite_images_are_scored() -> None:
    reward = Lengths()
    images = levels(0.1, torch.nan, 0.3, torch.inf).requires_grad_()
    output = BoundReward(reward).score(images, ["a", "bb", "ccc", "dddd"])
    assert output.total.nan_to_num(-1).tolist() == pytest.approx([1.1, -1, 3.3, -1])
    assert output.correspondence is not None
    assert output.correspondence.nan_to_num(-1).tolist() == [1, -1, 3, -1]
    assert not output.total.requires_grad
    assert len(reward.seen[0]) == 2
    assert BoundReward(brightness).score(images[1:2], "a").total.isnan().tolist() == [True]


def test_precision_and_range_are_the_rewards() -> None:
    reward = Lengths()
    bound = BoundReward(reward)
    for dtype, expected in ((torch.float16, torch.float32), (torch.float64, torch.float64)):
        bound(levels(-3.0, 0.5, 9.0).to(dtype), "a")
        assert reward.seen[-1].dtype == expected
    assert -1 < float(reward.seen[-1].min()) < float(reward.seen[-1].max()) < 2  # what a Reward accepts
    linear = nn.Conv2d(3, 1, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = BoundReward(lambda images, prompts: linear(images).flatten())(levels(0.5), "a").total
    assert total.dtype == torch.float32


def test_a_reward_without_gradients_is_refused_by_name() -> None:
    BoundReward(brightness).check_differentiable("RewardGuidance", "a fox")
    BoundReward(create_reward("compact")).check_differentiable("RewardGuidance", "a fox")

    def flat(images: Tensor, prompts: list[str]) -> Tensor:
        return images.detach().mean(dim=(1, 2, 3))

    with torch.no_grad(), pytest.raises(ValueError, match=r"^reward: DRaFT needs its gradient.*flat returns scores"):
        BoundReward(flat).check_differentiable("DRaFT", "a fox")


def test_device_and_name_are_those_of_the_reward() -> None:
    class Placed(nn.Linear):
        device: Any = "meta"

    assert device_of(brightness) is device_of(nn.Identity()) is BoundReward(brightness).device is None
    assert device_of(nn.Linear(2, 2, device="meta")) == device_of(Placed(2, 2)) == torch.device("meta")
    names = [BoundReward(Lengths()).name, reward_name(brightness), reward_name(nn.Identity())]
    assert names == ["lengths", "brightness", "Identity"]
    placed: Any = Lengths()
    placed.device = "meta"
    BoundReward(placed)(levels(0.5), None)
    assert placed.seen[0].device.type == "meta"
    with pytest.raises(TypeError, match=r"reward: expected a Reward, its name or a function.*got int.*create_reward"):
        BoundReward(3)  # type: ignore[arg-type]
