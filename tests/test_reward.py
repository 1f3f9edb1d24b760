"""What a reward is besides its model: weights of its aspects, calibration, full precision, context, torchmetrics."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn

import aigiqa_reward
from aigiqa_reward import RewardOutput, Scorer, create_reward
from aigiqa_reward.models.base import FullPrecision
from aigiqa_reward.rewards.reward import Calibration, check_aspect_weights


@pytest.mark.parametrize(
    ("quality", "correspondence", "message"),
    [
        (-1, 1, "quality_weight: expected a finite number of at least 0, got -1"),
        (1, float("nan"), "correspondence_weight: .*got nan"),
        ("1", 1, "quality_weight: .*got '1'"),
        (0, 0, "at least one above 0"),
    ],
)
def test_weights_of_the_aspects_are_checked(quality, correspondence, message):
    with pytest.raises(ValueError, match=message):
        check_aspect_weights(quality, correspondence)
    check_aspect_weights(0, 1)
    check_aspect_weights(2.5, 0)


def test_a_context_that_prepare_did_not_return_is_refused():
    reward = create_reward("cpa_iqa")
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    prompts = ["a cat", "a dog", "a bird"]
    with pytest.raises(ValueError, match=r"'regions' has shape \(1, 4, 8, 8\) for 3 images.*reward\.prepare"):
        reward(images, prompts, context={"regions": torch.ones(1, 4, 8, 8)})
    with pytest.raises(ValueError, match=r"expected some of regions, got \['captions'\]"):
        reward(images, prompts, context={"captions": torch.ones(3, 1)})


def fitted_calibration() -> Calibration:
    calibration = Calibration()
    calibration.quality.copy_(torch.tensor([0.1234567, -0.7654321]))
    calibration.correspondence.copy_(torch.tensor([2.3456789, 0.0987654]))
    return calibration


def test_calibration_is_affine_for_each_aspect_and_never_clamps():
    raw = torch.tensor([-30.0, 0.0, 40.0], dtype=torch.float64)
    calibration = fitted_calibration()
    np.testing.assert_allclose(calibration(raw, "quality"), 0.1234567 * raw.numpy() - 0.7654321, rtol=1e-6)
    np.testing.assert_allclose(calibration(raw, "correspondence"), 2.3456789 * raw.numpy() + 0.0987654, rtol=1e-6)
    assert torch.equal(Calibration()(raw, "quality"), raw)


class Mixed(FullPrecision):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.2345678))
        self.layer = nn.Linear(3, 2)
        self.register_buffer("steps", torch.tensor(7))


@pytest.mark.parametrize("make", [fitted_calibration, Mixed])
def test_full_precision_keeps_every_bit_when_cast_down_and_becomes_double_and_moves(make):
    plain, kept = nn.Linear(2, 2), make()
    before = {name: tensor.clone() for name, tensor in kept.state_dict().items()}
    nn.Sequential(plain, kept).half().to("cpu", torch.bfloat16)
    assert plain.weight.dtype == torch.bfloat16
    for name, tensor in kept.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
    double = nn.Sequential(make()).double()
    assert {t.dtype for t in double.state_dict().values() if t.is_floating_point()} == {torch.float64}
    moved = nn.Sequential(make()).to("meta", torch.float16)
    assert {tensor.device.type for tensor in moved.state_dict().values()} == {"meta"}
    assert {t.dtype for t in moved.state_dict().values() if t.is_floating_point()} == {torch.float32}


def test_parameters_stay_parameters_and_keep_their_gradients():
    module = Mixed()
    module.layer(torch.rand(4, 3)).sum().backward()
    gradient = module.layer.weight.grad.clone()
    module.half()
    assert isinstance(module.scale, nn.Parameter)
    assert {name for name, _ in module.named_parameters()} == {"scale", "layer.weight", "layer.bias"}
    assert torch.equal(module.layer.weight.grad, gradient)


def by_color(images: Tensor, prompts: list[str] | None) -> RewardOutput:
    red, green, blue = images.mean(dim=(2, 3)).unbind(dim=1)
    return RewardOutput(total=red, quality=green, correspondence=None if prompts is None else blue)


def drawn(count: int, seed: int) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def metric(aspect: str = "total", reward: Any = by_color, **options: Any) -> Any:
    pytest.importorskip("torchmetrics")
    from aigiqa_reward import RewardMetric

    return RewardMetric(reward, aspect, **options)


@pytest.mark.parametrize("aspect", ["total", "quality", "correspondence"])
def test_a_metric_is_the_mean_of_the_scores_in_any_batches(aspect):
    images, prompts = drawn(7, seed=0), [f"prompt {row}" for row in range(7)]
    expected = getattr(Scorer(by_color).score(images, prompts), aspect).mean()
    whole, parts = metric(aspect), metric(aspect, batch_size=2)
    whole.update(images, prompts)
    for rows in (slice(0, 1), slice(1, 5), slice(5, 7)):
        parts.update(images[rows], prompts[rows])
    torch.testing.assert_close(whole.compute(), expected)
    torch.testing.assert_close(parts.compute(), expected)


def test_a_metric_keeps_the_properties_of_torchmetrics():
    images, prompts = drawn(5, seed=1), ["a fox"] * 5
    first, second, both = metric(), metric(), metric()
    assert first.higher_is_better and not first.full_state_update and not first.is_differentiable
    torch.testing.assert_close(first(images[:2], prompts[:2]), by_color(images[:2], prompts).total.mean())
    second.update(images[2:], prompts[2:])
    both.update(images, prompts)
    again = second.clone()
    second.merge_state(first)
    torch.testing.assert_close(second.compute(), both.compute())
    first.reset()
    assert first.count == 0
    first.update(images[2:], prompts[2:])
    assert first.compute() == again.compute()
    assert not metric(reward=Mixed()).state_dict(), "a checkpoint holds no weights of the reward"


def test_a_metric_without_what_it_needs_says_so(monkeypatch):
    with pytest.raises(ValueError, match="aspect: expected one of total, quality, correspondence, got 'beauty'"):
        metric("beauty")
    with pytest.raises(ValueError, match="aspect: the reward gives no correspondence here; pass prompts"):
        metric("correspondence").update(drawn(2, seed=0))
    with pytest.warns(UserWarning, match="compute"):
        assert math.isnan(metric().compute())
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.delitem(sys.modules, "aigiqa_reward.rewards.metric")
    with pytest.raises(ImportError, match=r'pip install "\.\[metrics\]"'):
        _ = aigiqa_reward.RewardMetric


def _score_a_share(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = metric()
    found.update(drawn(5, seed=1)[slice(0, 2) if rank == 0 else slice(2, 5)], "a fox")
    (Path(folder) / str(rank)).write_text(str(float(found.compute())))


@pytest.mark.slow
def test_two_processes_share_one_mean(tmp_path):
    multiprocessing.spawn(_score_a_share, (str(tmp_path),), nprocs=2)
    expected = float(by_color(drawn(5, seed=1), None).total.mean())
    assert [float((tmp_path / str(rank)).read_text()) for rank in range(2)] == pytest.approx([expected] * 2)
