"""Sharpness-aware gradients of trainings: at the worst image, and at the worst LoRA weights."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pipelines
import pytest
import torch
from algorithm_runs import batch_of, batches, changed, context_of, flat, gradient, precise, put, take_gradient
from finetuned import CALL, PROMPTS, warmth
from safetensors.torch import load_file
from torch import Tensor

from aigiqa_reward import SharpnessAwareReward
from aigiqa_reward.finetuning import DRaFT, FinetuneConfig, FinetuneResult, FinetuningError, ReFL, finetune
from aigiqa_reward.finetuning.algorithms.base import PARAMETER_RADIUS, RewardBackpropagation
from aigiqa_reward.finetuning.batch import Batch, Memory, Outcome
from aigiqa_reward.finetuning.context import TrainingContext
from aigiqa_reward.finetuning.lora import FILE
from aigiqa_reward.finetuning.trainer import Trainer

QUICK: dict[str, Any] = {"rank": 2, "train_batch_size": 1, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}
QUICK |= {"max_train_steps": 3, "checkpointing_steps": 1, "sampling": {**CALL, "num_inference_steps": 1}}
QUICK |= {"kl_coeff": 0.0, "checkpoints_total_limit": None}


@pytest.fixture(scope="module")
def double() -> TrainingContext:
    return context_of(precise())


def train(folder: Path, algorithm: Any, *, pipe: Any = None, reward: Any = warmth, **changes: Any) -> FinetuneResult:
    resumed = {name: changes.pop(name) for name in ("resume_from_checkpoint",) if name in changes}
    pipe, config = pipe or pipelines.stable_diffusion(), FinetuneConfig(**{**QUICK, **changes})
    return finetune(pipe, reward, PROMPTS, algorithm, folder, config, progress=False, **resumed)


def weights(folder: Path) -> list[Tensor]:
    return list(load_file(folder / FILE).values())


def same(first: Path, second: Path) -> bool:
    return all(torch.equal(one, other) for one, other in zip(weights(first), weights(second), strict=True))


@dataclass(frozen=True, kw_only=True)
class Quadratic(RewardBackpropagation):
    """The reward -(w - c)' D (w - c) / 2 of the weights w, and |w|^2 / 2 as the penalty; D and c differ by row."""

    name: ClassVar[str] = "quadratic"
    title: ClassVar[str] = "Quadratic"

    def losses(self, context: TrainingContext, batch: Batch, part: int, memory: Memory) -> Iterator[Outcome]:
        weights = torch.cat([weight.flatten() for weight in context.lora.weights.values()])
        reward = -sum(((weights - c) * d * (weights - c)).sum() for c, d in map(self.form, batch.rows)) / 2 / len(batch)
        loss = context.penalty * weights.square().sum() / 2 - reward
        yield Outcome(loss=loss, measures={"reward": torch.as_tensor(reward).detach()[None]})

    @staticmethod
    def form(row: int) -> tuple[float, float]:
        return 0.1 * row, 1.0 + row


def trainer(context: TrainingContext, algorithm: Any, folder: Path) -> Trainer:
    return Trainer(context, PROMPTS, algorithm, folder, FinetuneConfig(**QUICK), None, {}, [], False)


@pytest.mark.parametrize("penalty", [0.0, 0.7])
def test_the_gradient_is_that_at_the_worst_weights(double: TrainingContext, penalty: float, tmp_path: Path) -> None:
    radius, start = 0.1, flat(double)
    algorithm = Quadratic(sharpness_aware="parameters", parameter_radius=radius)
    forms = [Quadratic.form(row) for row in range(4)]

    def slope(weights: Tensor) -> Tensor:
        return -torch.stack([d * (weights - c) for c, d in forms]).mean(dim=0)

    away = -slope(start)
    worst = start + radius * start.norm() * away / away.norm()
    expected = penalty * worst - slope(worst)
    context = changed(double, penalty=penalty)
    take_gradient(context)
    finite, measured = trainer(context, algorithm, tmp_path)._gradients(batches([0, 1], [2, 3]))
    assert finite and torch.equal(flat(context), start) and context.penalty == penalty
    torch.testing.assert_close(take_gradient(context), expected)
    reward = -torch.stack([(d * (start - c).square()).sum() for c, d in forms]) / 2
    found = float(torch.stack(measured["reward"]).mean())
    assert found == pytest.approx(float(reward.mean())), "what is logged is not the worst"
    put(context, worst)
    finite, there = trainer(context, Quadratic(), tmp_path / "there")._gradients(batches([0, 1], [2, 3]))
    torch.testing.assert_close(torch.stack(measured["loss"]), torch.stack(there["loss"]))
    take_gradient(context)
    put(context, start)


def test_a_gradient_of_zero_moves_nothing(double: TrainingContext, tmp_path: Path) -> None:
    context = changed(double, ceiling=-9.0)
    finite, _ = trainer(context, DRaFT(sharpness_aware="both"), tmp_path)._gradients([batch_of((0,))])
    assert finite and take_gradient(context).count_nonzero() == 0


@pytest.mark.parametrize("kind", [DRaFT, ReFL])
def test_the_image_part_is_that_of_the_wrapped_reward(double: TrainingContext, kind: Any) -> None:
    batch, radius = batch_of((0, 1)), 0.1
    plain, found = (kind(sharpness_aware=part, image_radius=r) for part, r in ((None, None), ("image", radius)))
    wrapped = changed(double, reward=SharpnessAwareReward(warmth, radius=radius))
    first, second = gradient(double, found, batch), gradient(wrapped, plain, batch)
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12 * float(second.norm()))
    assert not torch.allclose(first, gradient(double, plain, batch), rtol=1e-3, atol=1e-3 * float(second.norm()))
    (one,), (other,) = (algorithm.losses(double, batch, 0, {}) for algorithm in (plain, found))
    assert torch.equal(one.loss, other.loss) and torch.equal(one.measures["reward"], other.measures["reward"])


def test_radii_of_zero_train_as_without(tmp_path: Path) -> None:
    zero = DRaFT(sharpness_aware="both", image_radius=0.0, parameter_radius=0.0)
    for name, algorithm in (("plain", DRaFT()), ("zero", zero), ("both", DRaFT(sharpness_aware="both"))):
        train(tmp_path / name, algorithm, kl_coeff=0.1)
    assert same(tmp_path / "plain", tmp_path / "zero")
    assert not same(tmp_path / "plain", tmp_path / "both")
    assert zero.weight_ball == ReFL(sharpness_aware="image").weight_ball == 0
    assert ReFL(sharpness_aware="parameters").weight_ball == PARAMETER_RADIUS


def test_a_signal_at_the_worst_weights_keeps_those_of_the_last_step(tmp_path: Path) -> None:
    algorithm = DRaFT(sharpness_aware="both", image_radius=0.05, parameter_radius=0.1)
    whole, stopped, killed = tmp_path / "whole", tmp_path / "stopped", tmp_path / "killed"
    train(whole, algorithm)
    pipe, calls = pipelines.stable_diffusion(), []

    def stop(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 7 and not killed.exists():  # the second pass of the second step: two batches, two passes
            os.kill(os.getpid(), signal.SIGTERM)
            shutil.copytree(stopped, killed)

    pipe.unet.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, algorithm, pipe=pipe, checkpointing_steps=0)
    assert [path.name for path in killed.glob("checkpoint-*")] == ["checkpoint-1"]
    assert same(killed / "checkpoint-1", whole / "checkpoint-1"), "not the worst ones"
    train(killed, algorithm, resume_from_checkpoint="latest")
    train(stopped, algorithm, resume_from_checkpoint="latest")
    assert same(killed, whole) and same(stopped, whole)
    with pytest.raises(ValueError, match=r"draft.parameter_radius: 0.1 there, None now"):
        train(whole, DRaFT(sharpness_aware="both", image_radius=0.05), resume_from_checkpoint="latest")


@pytest.mark.slow
def test_what_is_not_finite_at_the_worst_weights_keeps_the_weights_before(tmp_path: Path) -> None:
    calls: list[int] = []

    def broken(images: Tensor, prompts: list[str]) -> Tensor:
        if images.requires_grad:
            calls.append(1)
        return warmth(images, prompts) * (
            float("nan") if len(calls) > 11 else 1
        )  # one call before the first of four a step

    algorithm = DRaFT(sharpness_aware="parameters")
    train(tmp_path / "plain", algorithm, max_train_steps=2)
    with pytest.raises(FinetuningError, match=r"step 3: the loss became NaN .*broken gave NaN or infinity for 2 of 2"):
        train(tmp_path / "broken", algorithm, reward=broken)
    assert len(list((tmp_path / "broken").glob("checkpoint-*"))) == 2
    assert same(tmp_path / "broken" / "checkpoint-2", tmp_path / "plain")
