"""The contract of every published reward, on tiny random weights of the real classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_model_contract import PROMPTS, assert_gradient_equals_differences, scenes
from tiny_published import DESCRIPTIONS, tiny_published
from torch import nn

from aigiqa_reward import Reward, RewardOutput, Scorer, create_reward, list_rewards
from aigiqa_reward.rewards.bound import BoundReward
from aigiqa_reward.rewards.factory import _moved


@pytest.fixture(scope="module", params=list(DESCRIPTIONS))
def reward(request: pytest.FixtureRequest) -> Reward:
    return tiny_published(request.param)


def test_every_published_reward_is_tested() -> None:
    assert set(DESCRIPTIONS) == {*list_rewards()} - {*list_rewards(embedded=True), "ocr"}


def test_pixel_gradient_equals_central_differences(reward: Reward) -> None:
    exact = tiny_published(reward.name, dtype=torch.float64)
    rounded = reward.name in ("vqascore", "hpsv3")  # transformers' RMS norms stay float32
    steps = {"length": 5e-2, "error": 2e-2} if rounded else {}
    assert_gradient_equals_differences(lambda batch: exact(batch, PROMPTS[:1]).total.sum(), scenes(1, 48, 40), **steps)


def test_one_number_has_its_aspect_or_none(reward: Reward) -> None:
    output = reward(scenes(3, 40, 56), PROMPTS)
    judged = {"quality": output.quality, "correspondence": output.correspondence}
    for aspect, scores in judged.items():
        assert (scores is not None) == (reward.spec.judges == aspect)
        assert scores is None or torch.equal(scores, output.total)
    raw = output.details["raw"]
    line = torch.linalg.lstsq(torch.stack([raw, torch.ones(3)], dim=1), output.total[:, None]).residuals
    assert (line.abs() < 1e-9).all()


def test_rows_do_not_depend_on_their_batch(reward: Reward) -> None:
    images, order = scenes(3, 48, 64), torch.tensor([2, 0, 1])
    with torch.no_grad():
        together = reward(images, PROMPTS).total
        permuted = reward(images[order], [PROMPTS[i] for i in order]).total
        alone = reward(images[1:2], PROMPTS[1:2]).total
        encoded = reward(images, reward.encode_prompts(PROMPTS[:1]).expand(3)).total
    torch.testing.assert_close(together[order], permuted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together[1:2], alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encoded[0], together[0], rtol=1e-5, atol=1e-5)
    assert len(set(together.tolist())) == 3


def test_prompts_are_needed_or_ignored(reward: Reward) -> None:
    images = scenes(1, 48, 48)
    if reward.spec.needs_prompt:
        with pytest.raises(ValueError, match="needs one prompt per image"):
            reward(images)
        first, second = (reward(images, [prompt]).total for prompt in PROMPTS[:2])
        assert not torch.equal(first, second)
    else:
        assert torch.equal(reward(images).total, reward(images, PROMPTS[:1]).total)


def test_checkpointed_blocks_run_again_and_give_the_same_gradient(reward: Reward) -> None:
    images = scenes(1, 48, 40).requires_grad_()
    (expected,) = torch.autograd.grad(reward(images, PROMPTS[:1]).total.sum(), images)
    checkpointed = _moved(tiny_published(reward.name), None, None, checkpointing=True, offload=False)
    runs: list[nn.Module] = []
    for module in checkpointed.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda layer, _: runs.append(layer))
    total = checkpointed(images, PROMPTS[:1]).total.sum()
    before = len(runs)
    (found,) = torch.autograd.grad(total, images)
    assert len(runs) > before
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("size", [(16, 16), (16, 300), (300, 31)])
def test_every_size_scores(reward: Reward, size: tuple[int, int]) -> None:
    with torch.no_grad():
        assert torch.isfinite(reward(scenes(1, *size), PROMPTS[:1]).total).all()


def test_half_precision_is_near_and_returns_float32(reward: Reward) -> None:
    images = scenes(2, 48, 48)
    low = tiny_published(reward.name, dtype=torch.bfloat16)
    with torch.no_grad():
        expected, found = reward(images, PROMPTS[:2]).total, low(images.bfloat16(), PROMPTS[:2]).total
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 0.15 * max(1.0, float(expected.abs().max()))
    assert tiny_published(reward.name, dtype=torch.float64)(images, PROMPTS[:2]).total.dtype == torch.float64


def test_saved_and_loaded_rewards_are_equal_to_the_bit(reward: Reward, tmp_path: Path) -> None:
    reward.save_pretrained(tmp_path)
    images = scenes(1, 48, 64)
    with torch.no_grad():
        expected = reward(images, PROMPTS[:1]).total
        for again in (create_reward(reward.name, weights=tmp_path), Reward.from_pretrained(tmp_path)):
            assert torch.equal(again(images, PROMPTS[:1]).total, expected)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_everything_that_takes_a_reward_takes_one_number(reward: Reward) -> None:
    images = scenes(2, 48, 48)
    images[1] = torch.nan
    output = BoundReward(reward).score(images, PROMPTS[0])
    assert torch.isfinite(output.total[0])
    assert torch.isnan(output.total[1])
    joined = RewardOutput.cat([output, output])
    assert (joined.quality is None) == (output.quality is None)
    scored = Scorer(reward).score(list(scenes(2, 48, 40)), PROMPTS[0])
    assert (scored.quality is not None) == (reward.spec.judges == "quality")


@pytest.mark.filterwarnings("ignore:prompt of 30")
def test_long_prompts_are_cut(reward: Reward) -> None:
    prompt = " ".join(f"word{i}" for i in range(300))
    assert torch.isfinite(reward(scenes(1, 48, 48), [prompt]).total).all()
