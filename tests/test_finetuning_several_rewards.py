"""Algorithms that compare images, with a mixture of rewards: advantages of each, mixed by weight."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
from algorithm_runs import PLAIN, batches, context_of, run_backward
from test_finetuning_loop import train
from torch import Tensor

from aigiqa_reward import CompositeReward
from aigiqa_reward.finetuning import DDPO, DiffusionNFT, FlowGRPO
from aigiqa_reward.finetuning.algorithms.base import Algorithm

ALGORITHMS: dict[str, Algorithm] = {
    "ddpo": DDPO(images_per_prompt=4, advantage_clip=50.0, deviation="batch"),
    "grpo": FlowGRPO(images_per_prompt=4, advantage_clip=50.0, deviation="batch"),
    "nft": DiffusionNFT(images_per_prompt=4),
}


def red(images: Tensor, prompts: list[str]) -> Tensor:
    return images[:, 0].mean(dim=(1, 2)).detach()


def contrast(images: Tensor, prompts: list[str]) -> Tensor:
    return images.std(dim=(1, 2, 3)).detach()


def mixture(scale: float = 1.0, **weights: float) -> CompositeReward:
    members = {"red": red, "contrast": lambda images, prompts: scale * contrast(images, prompts)}
    return CompositeReward(members, weights=weights or {"red": 3.0, "contrast": 1.0})


def prepared(name: str, reward: Any, **options: Any) -> dict[str, Tensor]:
    pipe = pipelines.stable_diffusion_3() if name == "grpo" else pipelines.stable_diffusion()
    context = context_of(pipe, reward, moved=0.1, call={**PLAIN, "num_inference_steps": 3}, **options)
    return dict(ALGORITHMS[name].prepare(context, batches([0, 1, 2, 3], [4, 5, 6, 7], group=4)))


def by_hand(memory: dict[str, Tensor], name: str) -> np.ndarray:
    values = np.stack([memory[f"reward/{name}/{part}"].double().numpy() for part in range(2)])
    return (values - values.mean(axis=1, keepdims=True)) / (values.std() + 1e-4)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_advantages_are_mixed_by_weight_whatever_the_scales(name: str) -> None:
    one, other = prepared(name, mixture()), prepared(name, mixture(1000.0))
    expected = 0.75 * by_hand(one, "red") + 0.25 * by_hand(one, "contrast")
    found = torch.stack([one[f"advantages/{part}"] for part in range(2)])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-3)
    for part in range(2):
        # 1e-4 is added to each std: the one that is 1000 times as large hardly feels it.
        torch.testing.assert_close(other[f"advantages/{part}"], one[f"advantages/{part}"], rtol=0.05, atol=0.05)
        total = 0.75 * one[f"reward/red/{part}"] + 0.25 * one[f"reward/contrast/{part}"]
        torch.testing.assert_close(one[f"reward/{part}"], total)


def test_one_member_is_that_reward_and_equal_ones_do_not_count() -> None:
    plain = prepared("nft", red)
    for reward in (CompositeReward({"red": red}), mixture(0.0, red=1.0, contrast=1e-9)):
        found = prepared("nft", reward)
        torch.testing.assert_close(found["advantages/0"], plain["advantages/0"], rtol=1e-4, atol=1e-4)
        assert not found["degenerate/0"].any()


def test_a_capped_mixture_is_compared_by_its_total() -> None:
    assert not prepared("nft", mixture(), ceiling=-1.0)["advantages/0"].any()


@pytest.mark.parametrize("rows", [[0], [0, 1, 2, 3]])
def test_images_that_are_not_finite_cost_no_others_their_members(rows: list[int]) -> None:
    """Neither one of a batch, nor all of a batch, of which no score but a NaN total is known."""
    pipe, seen = pipelines.stable_diffusion(), []

    def spoil(_: Any, __: Any, output: Tensor) -> Tensor:
        spoiled, seen[:] = output.clone(), [*seen, len(output)]
        if sum(seen) <= 4:
            spoiled[rows] = math.nan
        return spoiled

    pipe.vae.decoder.conv_out.register_forward_hook(spoil)
    context = context_of(pipe, mixture(), moved=0.1, call={**PLAIN, "num_inference_steps": 2})
    algorithm, parts = ALGORITHMS["nft"], batches([0, 1, 2, 3], [4, 5, 6, 7], group=4)
    memory = algorithm.prepare(context, parts)
    assert memory["dropped/0"].nonzero()[:, 0].tolist() == rows and not memory["dropped/1"].any()
    assert memory["advantages/1"].abs().min() > 0
    for outcomes in run_backward(algorithm, context, parts, memory):
        assert all("reward/red" in outcome.measures and outcome.loss.isfinite() for outcome in outcomes)


def test_each_reward_has_its_curve(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_train_steps": 2, "train_batch_size": 2, "sampling": {**PLAIN}}
    result = train(tmp_path, reward=mixture(), algorithm=DiffusionNFT(images_per_prompt=2), **settings)
    for line in result.history:
        mixed = 0.75 * line["reward/red"] + 0.25 * line["reward/contrast"]
        assert line["reward"] == pytest.approx(mixed, rel=1e-5)
    assert (tmp_path / "curves.png").is_file()
