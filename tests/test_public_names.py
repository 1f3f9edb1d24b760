"""The names that users' scripts call, with the arguments that they call them with: changing one is a decision."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from typing import Any

import pytest
import torch

import aigiqa_reward
from aigiqa_reward import BestOfNOutput, CompositeReward, Reward, RewardFunction, RewardOutput

PUBLIC = {
    "aigiqa_reward": (
        "create_reward", "list_rewards", "get_reward_spec", "Reward", "RewardOutput", "CompositeReward", "Scorer",
        "BestOfN",
        "BestOfNOutput", "rerank", "load_embedded_pipeline", "RewardFunction", "RewardMetric",
        "SharpnessAwareReward", "SmoothedReward",
    ),
    "aigiqa_reward.sampling": ("RewardGuidance", "RewardLogger", "EarlyExit", "ParticleSteering", "NoiseOptimizer"),
    "aigiqa_reward.finetuning": (
        "finetune", "FinetuneConfig", "DRaFT", "ReFL", "DPO", "DDPO", "FlowGRPO", "DiffusionNFT",
    ),
    "aigiqa_reward.images": ("load", "read_prompt", "Prompt"),
}  # fmt: skip

NEEDED = inspect.Parameter.empty
"""In place of a default: an argument that has none."""

CALLS: dict[str, dict[str, Any]] = {
    "BestOfN": {
        "pipe": NEEDED, "reward": NEEDED, "n": 16, "batch_size": 4, "top_k": 1, "pruning": None, "reward_prompt": None,
    },
    "BestOfN.__call__": {"self": NEEDED, "prompt": None, "seed": 0},
    "Scorer": {"reward": NEEDED, "batch_size": 32},
    "Scorer.score": {"self": NEEDED, "inputs": NEEDED, "prompts": None},
    "rerank": {"images": NEEDED, "prompt": NEEDED, "reward": NEEDED, "top_k": None},
    "Reward.forward": {"self": NEEDED, "images": NEEDED, "prompts": None},
    "Reward.encode_prompts": {"self": NEEDED, "prompts": NEEDED},
    "Reward.prepare": {"self": NEEDED, "images": NEEDED, "prompts": None},
    "create_reward": {"name": NEEDED},
    "list_rewards": {},
    "get_reward_spec": {"name": NEEDED},
    "load_embedded_pipeline": {},
}  # fmt: skip
"""Arguments that can be given by position, in order, with their defaults. Others may follow, with defaults."""

KEYWORDS: dict[str, dict[str, Any]] = {
    "create_reward": {"device": None, "dtype": None, "weights": None, "revision": None, "preset": None},
    "Reward.forward": {"context": None, "validate": True},
    "Scorer.score": {"on_error": "raise", "prompts_from": None},
}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module in PUBLIC for name in PUBLIC[module]])
def test_every_public_name_is_listed_and_there(module: str, name: str) -> None:
    if name == "RewardMetric":
        pytest.importorskip("torchmetrics")
    assert name in importlib.import_module(module).__all__
    assert getattr(importlib.import_module(module), name) is not None


@pytest.mark.parametrize("name", CALLS)
def test_arguments_are_those_that_users_give(name: str) -> None:
    first, _, method = name.partition(".")
    value = getattr(aigiqa_reward, first)
    parameters = inspect.signature(getattr(value, method) if method else value).parameters
    by_position = [p.name for p in parameters.values() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    promised = CALLS[name] | KEYWORDS.get(name, {})
    assert by_position[: len(CALLS[name])] == list(CALLS[name])
    assert {p: parameters[p].default for p in promised} == promised
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    added = [p for p in parameters.values() if p.name not in promised and p.kind not in variadic]
    assert [p.name for p in added if p.default is NEEDED] == []
    if name == "BestOfN.__call__":
        assert parameters["pipe_kwargs"].kind is inspect.Parameter.VAR_KEYWORD


def test_fine_tuning_is_called_by_position() -> None:
    from aigiqa_reward.finetuning import FinetuneConfig, finetune

    order = ["pipe", "reward", "train_data", "algorithm", "output_dir", "config"]
    parameters = inspect.signature(finetune).parameters
    assert list(parameters)[: len(order)] == order
    assert {"validation_prompts", "holdout", "callbacks"} <= parameters.keys()
    config = FinetuneConfig(max_train_steps=3, train_batch_size=2, learning_rate=1e-4, rank=4, seed=1, sampling={})
    assert config.max_train_steps == 3


@pytest.mark.parametrize("name", aigiqa_reward.__all__)
def test_public_signatures_have_real_types(name: str) -> None:
    if name == "RewardMetric":
        pytest.importorskip("torchmetrics")
    value = getattr(aigiqa_reward, name)
    functions = (
        [value]
        if inspect.isfunction(value)
        else [f for n, f in vars(value).items() if inspect.isfunction(f) and n[0] != "_"]
    )
    hints = {hint for function in functions for n, hint in function.__annotations__.items() if n != "pipe_kwargs"}
    assert "Any" not in hints


def test_outputs_have_the_promised_fields() -> None:
    assert {"total", "quality", "correspondence", "details"} == {f.name for f in dataclasses.fields(RewardOutput)}
    fields = {field.name for field in dataclasses.fields(BestOfNOutput)}
    assert {"images", "scores", "seeds", "all_scores", "all_seeds"} <= fields


def test_what_is_called_with_images_and_prompts_is_a_reward_function() -> None:
    def brightness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images.mean(dim=(1, 2, 3))

    assert isinstance(brightness, RewardFunction)
    assert all(issubclass(kind, torch.nn.Module) and callable(kind) for kind in (Reward, CompositeReward))
