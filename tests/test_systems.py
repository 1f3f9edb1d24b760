"""The contract of the five systems on the compact towers: rows, gradients, precision, prompts."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from plain import stir
from test_model_contract import _leaves_global_randomness_alone as _leaves_global_randomness_alone
from test_model_contract import assert_gradient_equals_differences, scenes
from torch import Tensor

from aigiqa_reward.models.base import ModelOutput, TrainedModel
from aigiqa_reward.rewards.build import SYSTEMS, build_model, empty_model

PROMPTS = ["a red apple on a table", "a castle in the clouds above a long river, oil painting", "two cats"]
FEWER_CROPS: dict[str, dict[str, Any]] = {
    "mst_clipiqa": {"coarse_side": 128, "fine_side": 256, "bottleneck": 0.1},
    "tsp_mgs": {"crops": 2, "short_side": 256, "resolution": 256},
    "sc_agiqa": {"crops": 2, "short_side": 256, "resolution": 256},
    "ma_agiqa": {"crops": 2, "short_side": 256, "resolution": 256},
    "cpa_iqa": {"side": 224},
}
"""Settings that make a pass fast."""

OTHERWISE: dict[str, Any] = {
    "fusion": "mean", "anchor": False, "train_crops": 7, "levels": "one", "alpha": "learned", "words_in_quality": True,
    "frequency": "mean", "preference": "description", "prompt_in_quality": True, "semantics": "zeros", "dropout": 0.5,
    "tiers": ("global",), "attributes": 2, "grid": 2, "scenario": "poster",
}  # fmt: skip
"""Settings that do not change the towers' features."""

NEARBY = {"crops": 1, "resolution": 32, "short_side": -32, "side": -32, "coarse_side": -32, "fine_side": -32}
"""Settings that change the towers' features, and a difference to another value."""


@lru_cache(maxsize=1)
def heads() -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    made = {}
    for name, settings in FEWER_CROPS.items():
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(0)
            model = build_model(name, settings=settings)
        assert isinstance(model, TrainedModel)
        stir(model.head)
        images = scenes(6, 96, 80, seed=7)
        with torch.no_grad():
            seen = dict(model.forward_features(images))
            seen |= {f"context.{key}": value for key, value in (model.prepare(images, None) or {}).items()}
        for key, module in model.standardized.items():
            module.fit(seen[key])
        made[name] = model.describe(), model.state_dict()
    return made


def build(name: str, dtype: torch.dtype = torch.float32) -> TrainedModel:
    description, weights = heads()[name]
    with torch.random.fork_rng(devices=[]):
        model = empty_model(name, json.loads(json.dumps(description)))
    assert isinstance(model, TrainedModel)
    model.load_state_dict(weights)
    return model.requires_grad_(False).eval().to(dtype)


@pytest.fixture(scope="module", params=list(SYSTEMS))
def model(request: pytest.FixtureRequest) -> TrainedModel:
    return build(request.param)


@pytest.fixture(scope="module", params=list(SYSTEMS))
def exact(request: pytest.FixtureRequest) -> TrainedModel:
    return build(request.param, torch.float64)


def score(model: TrainedModel, images: Tensor, prompts: list[str] | None, **context: Any) -> ModelOutput:
    return model(images, None if prompts is None else model.encode_prompts(prompts), **context)


def tensors(output: ModelOutput) -> dict[str, Tensor]:
    named = {"quality": output.quality, **output.details}
    return named if output.correspondence is None else {"correspondence": output.correspondence, **named}


def test_pixel_gradient_equals_central_differences(exact: TrainedModel) -> None:
    images, prompts = scenes(1, 96, 80), exact.encode_prompts(PROMPTS[:1])
    context = exact.prepare(images.double(), prompts)

    def total(batch: Tensor) -> Tensor:
        output = exact(batch, prompts, context)
        return (output.quality + output.correspondence).sum()

    assert_gradient_equals_differences(total, images)


def test_training_reaches_every_part_of_the_head(model: TrainedModel) -> None:
    trained = build(model.name)
    trained.head.requires_grad_(True)
    images = scenes(3, 80, 96)
    with torch.no_grad():
        seen = trained.forward_features(images, generator=torch.Generator().manual_seed(0))
        prompts = trained.encode_prompts(PROMPTS)
        context = trained.prepare(images, prompts)
    outputs = [trained.forward_head(seen, given, context) for given in (None, prompts)]
    used = ("quality", "correspondence", "penalty")
    loss = sum(value.square().sum() for output in outputs for name, value in tensors(output).items() if name in used)
    loss.backward()
    silent = {name for name, p in trained.head.named_parameters() if p.grad is None or not p.grad.any()}
    idle = {name.split(".experts.")[0] + name.split(".experts.")[1][0] for name in silent if ".experts." in name}
    assert len(idle) <= 2, "of four experts per aspect three answer"
    # TSP-MGS reads the words for quality only with words_in_quality.
    assert {name for name in silent if ".experts." not in name} <= {"adapters.quality.words"}
    assert all(p.grad is None for name, p in trained.named_parameters() if not name.startswith("head."))


@torch.no_grad()
def test_rows_do_not_depend_on_their_batch(model: TrainedModel) -> None:
    images, order = scenes(3, 80, 112), torch.tensor([2, 0, 1])
    together = tensors(score(model, images, PROMPTS))
    assert all(len(value) == 3 for value in together.values()), "first dimension B"
    assert together["quality"].std() > 1e-4
    assert together["correspondence"].std() > 1e-4
    permuted = tensors(score(model, images[order], [PROMPTS[i] for i in order]))
    alone = tensors(score(model, images[1:2], PROMPTS[1:2]))
    assert alone.keys() == together.keys()
    for name, value in together.items():
        assert torch.allclose(value[1].float(), alone[name][0].float(), rtol=1e-3, atol=1e-4), name
        assert torch.allclose(value[order].float(), permuted[name].float(), rtol=1e-3, atol=1e-4), name


@torch.no_grad()
def test_features_can_be_stored_and_scored_later(model: TrainedModel) -> None:
    images = scenes(2, 96, 72)
    prompts = model.encode_prompts(PROMPTS[:2])
    context = model.prepare(images, prompts)
    seen = {name: tensor.half().float() for name, tensor in model.forward_features(images).items()}  # as in stores
    later, direct = model.forward_head(seen, prompts, context), model(images, prompts)
    assert torch.allclose(later.quality, direct.quality, rtol=0.02, atol=0.02)
    assert torch.allclose(later.correspondence, direct.correspondence, rtol=0.02, atol=0.02)
    for name in model.crop_features:
        drawn = model.forward_features(images, generator=torch.Generator().manual_seed(0), crops=3)[name]
        assert drawn.shape == (2, 3, *seen[name].shape[2:]), name
    assert {field for field in model.feature_settings if not hasattr(model.config, field)} == set()


@torch.no_grad()
def test_a_digest_serves_any_prompt(model: TrainedModel) -> None:
    images = scenes(2, 96, 72)
    seen, context = model.forward_features(images), model.prepare(images, None)
    digest = model.digest(seen)
    for texts in (PROMPTS[:2], PROMPTS[1:], None):
        prompts = None if texts is None else model.encode_prompts(texts)
        first, second = (tensors(model.forward_head(given, prompts, context)) for given in (seen, digest))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


@torch.no_grad()
def test_feature_settings_are_those_that_change_the_features(model: TrainedModel) -> None:
    views, config = [scenes(1, 96, 80), scenes(1, 300, 280)], model.config

    def features(**changes: Any) -> list[Tensor]:
        model.config = replace(config, **changes)
        seen = [tensor for images in views for tensor in model.forward_features(images).values()]
        model.config = config
        return seen

    def same(first: list[Tensor], second: list[Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    before, names = features(), {field.name for field in dataclasses.fields(config)}
    assert set(model.feature_settings) <= names & NEARBY.keys()
    assert same(features(**{name: OTHERWISE[name] for name in names & OTHERWISE.keys()}), before)
    for name in names & NEARBY.keys():
        after = features(**{name: getattr(config, name) + NEARBY[name]})
        assert same(after, before) != (name in model.feature_settings), name
