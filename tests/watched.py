"""Stock calls of tiny pipelines to be watched, and rewards to watch them with."""

from typing import Any

import pytest
import torch
from pipelines import SIDE
from pipelines_current import CALL
from torch import Tensor

from aigiqa_reward.types import RewardOutput

PROMPT = "a red apple"
STEPS = 4


def redness(images: Tensor, prompts: list[str]) -> Tensor:
    assert len(prompts) == len(images)
    return (images[:, 0] - images[:, 1:].mean(dim=1)).mean(dim=(1, 2))


class Recorder:
    """Redness that keeps what it was shown."""

    def __init__(self) -> None:
        self.images, self.prompts = [], []

    def __call__(self, images: Tensor, prompts: list[str]) -> RewardOutput:
        self.images.append(images)
        self.prompts.append(prompts)
        assert not torch.is_grad_enabled()
        quality = redness(images, prompts)
        return RewardOutput(total=2 * quality, quality=quality, correspondence=3 * quality)


def sample(pipe: Any, name: str = "sd", *, seed: int = 0, steps: int = STEPS, prompt: Any = PROMPT, **more: Any):
    call = {**CALL.get(name, {}), "height": SIDE, "width": SIDE, "num_inference_steps": steps, "output_type": "pt"}
    call |= {"generator": torch.Generator().manual_seed(seed), **more}
    return pipe(prompt=prompt, **call).images


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds or (3, 4, 5)]


def assert_close(one: Tensor, other: Tensor, tolerance: float = 1e-4) -> None:
    scale = max(1.0, float(other.abs().max()))
    torch.testing.assert_close(one / scale, other / scale, atol=tolerance, rtol=0)


def families(*names: str, slow: tuple[str, ...]) -> Any:
    """Parametrize a test's `name`; the names in `slow` are marked so."""
    params = [*names, *(pytest.param(name, marks=pytest.mark.slow) for name in slow)]
    return pytest.mark.parametrize("name", params)


def is_left_alone(pipe: Any) -> bool:
    """Whether the pipeline's and the scheduler's own methods are unwrapped."""
    return "step" not in vars(pipe.scheduler) and "prepare_latents" not in vars(pipe)


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert_same([*one, *one.values()], [*other, *other.values()])
    elif isinstance(one, list):
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    elif not callable(one):
        assert one == other or one is other
