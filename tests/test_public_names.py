"""The names that users and their scripts call, with the arguments they call them with: changing one is a decision.

Written down from the plan of the library, not from its code.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from typing import Any

import pytest
import torch

import aigiqa_reward
from aigiqa_reward import BestOfNOutput, CompositeReward, Reward, RewardFunction, RewardOutput
from aigiqa_reward.sampling.candidates import BestOfNOutput as Output

FIXED = (
    "create_reward", "list_rewards", "Reward", "RewardOutput", "CompositeReward", "Scorer", "BestOfN", "BestOfNOutput",
    "rerank", "load_embedded_pipeline",
)  # fmt: skip
SAMPLING = ("RewardGuidance", "RewardLogger", "EarlyExit", "ParticleSteering", "NoiseOptimizer")

NEEDED = inspect.Parameter.empty
"""In place of a default: an argument that has none."""

CALLS: dict[str, dict[str, Any]] = {
    "BestOfN": {
        "pipe": NEEDED, "reward": NEEDED, "n": 16, "batch_size": 4, "top_k": 1, "pruning": None, "reward_prompt": None,
    },
    "BestOfN.__call__": {"self": NEEDED, "prompt": NEEDED, "seed": 0},
    "Scorer": {"reward": NEEDED, "batch_size": 32},
    "Scorer.score": {"self": NEEDED, "inputs": NEEDED, "prompts": None},
    "rerank": {"images": NEEDED, "prompt": NEEDED, "reward": NEEDED, "top_k": None},
    "Reward.__call__": {"self": NEEDED, "images": NEEDED, "prompts": None},
    "Reward.encode_prompts": {"self": NEEDED, "prompts": NEEDED},
    "Reward.prepare": {"self": NEEDED, "images": NEEDED, "prompts": None},
    "list_rewards": {},
    "load_embedded_pipeline": {},
}  # fmt: skip
"""What can be given by place, in this order, and its default. Later arguments may be added behind, with defaults."""

KEYWORDS: dict[str, dict[str, Any]] = {
    "create_reward": {"device": None, "dtype": None, "weights": None, "revision": None, "preset": None},
    "Reward.__call__": {"context": None, "validate": True},
}
"""What is given by name."""


def called(name: str) -> inspect.Signature:
    """The signature of a public name, or of a method of one."""
    first, _, method = name.partition(".")
    value = getattr(aigiqa_reward, first)
    if name == "Reward.__call__":
        method = "forward"  # nn.Module's call passes everything on
    return inspect.signature(getattr(value, method) if method else value)


def misfits(signature: inspect.Signature, order: dict[str, Any], keywords: dict[str, Any]) -> list[str]:
    """In what a signature differs from the one promised."""
    by_place = [p for p in signature.parameters.values() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    found = []
    if [p.name for p in by_place][: len(order)] != list(order):
        found.append(f"in order: {[p.name for p in by_place]}, promised {list(order)}")
    for name, default in {**order, **keywords}.items():
        parameter = signature.parameters.get(name)
        if parameter is None or parameter.default != default:
            found.append(f"{name}: {parameter}, promised {default!r}")
    added = [p for p in signature.parameters.values() if p.name not in {**order, **keywords}]
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found += [f"{p.name}: added without a default" for p in added if p.default is NEEDED and p.kind not in variadic]
    return found


def test_the_names_are_there():
    assert set(FIXED) <= set(aigiqa_reward.__all__)
    assert all(hasattr(aigiqa_reward, name) for name in aigiqa_reward.__all__)
    assert set(SAMPLING) <= set(importlib.import_module("aigiqa_reward.sampling").__all__)


@pytest.mark.parametrize("name", [*CALLS, *(KEYWORDS.keys() - CALLS.keys())])
def test_they_are_called_as_promised(name):
    order = CALLS.get(name, {"name": NEEDED})
    assert misfits(called(name), order, KEYWORDS.get(name, {})) == []


def test_a_best_of_n_passes_the_pipelines_own_arguments_on():
    kinds = {p.name: p.kind for p in called("BestOfN.__call__").parameters.values()}
    assert kinds["pipe_kwargs"] is inspect.Parameter.VAR_KEYWORD


def test_outputs_have_the_promised_fields():
    assert {"total", "quality", "correspondence", "details"} == {f.name for f in dataclasses.fields(RewardOutput)}
    fields = {field.name for field in dataclasses.fields(BestOfNOutput)}
    assert {"images", "scores", "seeds", "all_scores", "all_seeds"} <= fields
    assert Output is BestOfNOutput


def test_what_is_called_with_images_and_prompts_is_a_reward_function():
    def brightness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images.mean(dim=(1, 2, 3))

    assert isinstance(brightness, RewardFunction)
    assert all(issubclass(kind, torch.nn.Module) and callable(kind) for kind in (Reward, CompositeReward))


def test_a_changed_signature_is_seen():
    def renamed(images: Any, text: Any, reward: Any, top_k: int | None = None) -> None: ...
    def other_default(images: Any, prompt: Any, reward: Any, top_k: int = 1) -> None: ...
    def needs_more(images: Any, prompt: Any, reward: Any, top_k: int | None = None, *, device: str) -> None: ...

    for changed, said in ((renamed, "in order"), (other_default, "top_k: "), (needs_more, "device: added")):
        assert any(line.startswith(said) for line in misfits(inspect.signature(changed), CALLS["rerank"], {}))
