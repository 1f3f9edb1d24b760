"""What the caller has set for its process neither changes scores nor is changed: autocast, defaults, random state."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from aigiqa_reward import CompositeReward, Reward, Scorer, create_reward, list_rewards, load_embedded_pipeline, rerank
from aigiqa_reward.encoders.open_clip import OpenCLIPConfig
from aigiqa_reward.images import load
from aigiqa_reward.report import heat_maps
from aigiqa_reward.rewards.bound import BoundReward
from aigiqa_reward.rewards.build import build_model
from aigiqa_reward.rewards.reward_fn import RewardFn
from aigiqa_reward.sampling import NoiseOptimizer, RewardGuidance
from aigiqa_reward.toy.judge import load_judge
from aigiqa_reward.utils.isolation import building, without_autocast

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a red apple on a blue background", "a penguin on a red background"]


@contextmanager
def surrounded(state: str) -> Iterator[None]:
    """Set what other packages of a program may have left; a tensor on the meta device has lost its values."""
    dtype = torch.bfloat16 if state == "autocast" else torch.float64
    blocks = {"autocast": torch.autocast("cpu", dtype=torch.bfloat16), "device block": torch.device("meta")}
    torch.set_default_dtype(dtype)
    torch.set_default_device("meta" if state == "device" else None)
    try:
        with blocks.get(state, nullcontext()):
            yield
            assert torch.get_default_dtype() == dtype
            assert torch.get_default_device().type == ("cpu" if state == "autocast" else "meta")
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def linear(images: Tensor, prompts: list[str] | None) -> Tensor:
    weights = torch.arange(3.0 * 64 * 64, device="cpu", dtype=torch.float32) / 5000
    return (images.flatten(1) @ weights[:, None])[:, 0] / 5000  # a product, which autocast rounds


def make(name: str, clip: str) -> Any:
    if name == "composite":
        members = {"linear": linear, "clip": make("clip", clip)}
        return CompositeReward.with_reference(members, IMAGES, PROMPTS)
    if name == "clip":
        return create_reward("tsp_mgs", encoder=OpenCLIPConfig(architecture=clip))
    return {"function": lambda: linear, "judge": load_judge}.get(name, lambda: create_reward(name))()


def outcomes(reward: Any) -> dict[str, Tensor]:
    given = IMAGES.clone().requires_grad_()
    found = {"scored": Scorer(reward).score(IMAGES, PROMPTS).total}
    if not isinstance(reward, Reward | CompositeReward):
        return found | {"as function": RewardFn(reward)(given, PROMPTS)[0].detach()}
    total = reward(given, PROMPTS).total
    with without_autocast():  # as trainers call backward
        return found | {"called": total.detach(), "gradient": torch.autograd.grad(total.sum(), given)[0]}


QUICK = ("compact", "clip", "composite", "function", "judge")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in list_rewards(embedded=True) if name not in QUICK]


@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_neither_scores_nor_gradients_depend_on_what_surrounds_a_call(name: str, clip: str) -> None:
    reward = make(name, clip)
    wanted = outcomes(reward)
    for state in ("autocast", "device", "device block"):
        if name == "function" and state != "autocast":
            continue  # a function's default device is its own
        with surrounded(state):
            found = outcomes(reward)
            built = make(name, clip) if state == "autocast" or name != "composite" else reward
            again = Scorer(built).score(IMAGES, PROMPTS).total
        for kind, tensor in {**wanted, "built there": wanted["scored"]}.items():
            assert (got := {**found, "built there": again}[kind]).dtype == tensor.dtype, (state, kind)
            assert torch.equal(got, tensor), (state, kind)


@pytest.mark.parametrize("kind", ["gradient", "distortion"])
def test_heat_maps_are_drawn_alike_in_autocast(kind: Any) -> None:
    reward = create_reward("cpa_iqa" if kind == "distortion" else "compact")
    wanted = heat_maps(reward, IMAGES[:1], PROMPTS[:1], kind).maps
    with surrounded("autocast"):
        assert torch.equal(heat_maps(reward, IMAGES[:1], PROMPTS[:1], kind).maps, wanted)


@pytest.mark.slow
def test_a_saved_reward_is_loaded_as_it_was_and_a_fresh_head_drawn_alike(tmp_path: Path) -> None:
    reward = create_reward("mst_clipiqa")
    reward.save_pretrained(tmp_path)
    heads = []
    for state in (None, "autocast", "device"):
        with surrounded(state) if state else nullcontext():
            loaded = Reward.from_pretrained(tmp_path)
            torch.manual_seed(0)
            heads.append(build_model("mst_clipiqa").head.state_dict())
        assert {t.dtype for t in loaded.state_dict().values()} == {t.dtype for t in reward.state_dict().values()}
        assert all(torch.equal(loaded.state_dict()[key], tensor) for key, tensor in reward.state_dict().items())
    assert all(torch.equal(head[key], tensor) for head in heads for key, tensor in heads[0].items())


def test_the_process_is_as_it_was(tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 40).save(tmp_path / "noise.png")

    def process() -> list[Any]:
        numbers = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
        filters = [(action, kind) for action, _, kind, _, _ in warnings.filters]
        settings = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
        return [numbers, filters, settings, dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules]

    create_reward("compact"), load_embedded_pipeline()  # the libraries add filters where they are imported
    before = process()
    reward = create_reward("compact")
    load_embedded_pipeline(), load_judge(), build_model("tsp_mgs"), reward.save_pretrained(tmp_path / "saved")
    Reward.from_pretrained(tmp_path / "saved")
    load(tmp_path / "noise.png"), rerank([tmp_path / "noise.png"], PROMPTS[0], reward)
    heat_maps(reward, IMAGES, PROMPTS)
    assert process() == before


def test_threads_that_build_leave_the_default_dtype() -> None:
    def build(_: int) -> torch.dtype:
        with building():
            return torch.zeros(1, device="cpu").dtype

    with surrounded("device"), ThreadPoolExecutor(4) as pool:
        assert set(pool.map(build, range(400))) == {torch.float32}


def test_gradients_are_switched_on_where_they_are_the_purpose_alone() -> None:
    pipe, few = load_embedded_pipeline(), {"num_inference_steps": 1, "guidance_scale": 1.0}
    with torch.inference_mode():
        reward = create_reward("compact")
        bound = BoundReward(reward)
        bound.score(IMAGES, PROMPTS)
    given = IMAGES.clone().requires_grad_()
    assert torch.autograd.grad(bound(given, PROMPTS).total.sum(), given)[0].abs().sum() > 0, "prompts kept since"
    wanted = heat_maps(reward, IMAGES, PROMPTS).maps

    def guided() -> list[float]:
        with RewardGuidance(pipe, reward, PROMPTS[0]) as guidance:
            pipe(PROMPTS[0], callback_on_step_end=guidance, generator=torch.Generator().manual_seed(0), **few)
        return guidance.history[0].gradient_norm

    optimize = NoiseOptimizer(pipe, reward, iterations=1, progress=False)
    with ExitStack() as stack:
        stack.callback(torch.set_grad_enabled, True)
        torch.set_grad_enabled(False)
        assert torch.equal(heat_maps(reward, IMAGES, PROMPTS).maps, wanted)
        assert guided()[0] > 0
        assert len(optimize(PROMPTS[0], num_inference_steps=1).history) == 2
        bound.check_differentiable("this", "a fox")
        assert not reward(given, PROMPTS).total.requires_grad
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        needing = {
            "RewardGuidance": guided,
            "NoiseOptimizer": lambda: optimize(PROMPTS[0], num_inference_steps=1),
            "DRaFT": lambda: bound.check_differentiable("DRaFT", "a fox"),
        }
        for name, call in needing.items():
            with pytest.raises(ValueError, match=rf"^{name}: torch\.inference_mode\(\) forbids gradients; call it out"):
                call()
