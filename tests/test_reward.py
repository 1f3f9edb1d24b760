"""What a reward is besides its model: weights of its aspects, calibration, parts that stay in full precision."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from aigiqa_reward.models.base import FullPrecision
from aigiqa_reward.rewards.reward import Calibration, check_aspect_weights


@pytest.mark.parametrize(
    ("quality", "correspondence", "message"),
    [
        (-1, 1, "quality_weight: expected a finite number of at least 0, got -1"),
        (1, float("nan"), "correspondence_weight: .*got nan"),
        (1, float("inf"), "correspondence_weight: .*got inf"),
        (True, 1, "quality_weight: .*got True"),
        ("1", 1, "quality_weight: .*got '1'"),
        (0, 0, "at least one above 0"),
    ],
)
def test_weights_of_the_aspects_are_checked(quality, correspondence, message):
    with pytest.raises(ValueError, match=message):
        check_aspect_weights(quality, correspondence)
    check_aspect_weights(0, 1)
    check_aspect_weights(2.5, 0)


# -------------------------------------------------------------------------------------------- calibration, precision


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
    """Parameters and buffers of its own, and an ordinary layer inside."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.2345678))
        self.layer = nn.Linear(3, 2)
        self.register_buffer("steps", torch.tensor(7))


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to(bfloat16)": lambda module: module.to(torch.bfloat16),
    "to(float16)": lambda module: module.to(torch.float16),
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "half twice": lambda module: module.half().bfloat16(),
    "to device and dtype": lambda module: module.to("cpu", torch.float16),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("make", [fitted_calibration, Mixed])
def test_full_precision_keeps_every_bit_when_cast_down(cast, make):
    plain, kept = nn.Linear(2, 2), make()
    before = {name: tensor.clone() for name, tensor in kept.state_dict().items()}
    CASTS[cast](nn.Sequential(plain, kept))
    assert plain.weight.dtype in (torch.float16, torch.bfloat16)
    for name, tensor in kept.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("make", [fitted_calibration, Mixed])
def test_full_precision_becomes_double_and_moves(make):
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
