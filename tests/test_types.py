from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

import jaxtyping
import numpy as np
import pytest
import torch

import aigiqa_reward
from aigiqa_reward import RewardOutput
from aigiqa_reward import images as pixels
from aigiqa_reward.types import PromptFeatures, as_reward_output


def features(*prompts: str) -> PromptFeatures:
    texts = tuple(dict.fromkeys(prompts))
    tensors = {
        "pooled": torch.arange(len(texts), dtype=torch.float32)[:, None].expand(-1, 4),
        "tokens": torch.arange(len(texts) * 6, dtype=torch.float32).view(len(texts), 2, 3),
    }
    index = torch.tensor([texts.index(prompt) for prompt in prompts])
    return PromptFeatures(texts=texts, index=index, tensors=tensors, model="counting")


def output(totals: list[float], *, correspondence: bool = True, **details: torch.Tensor) -> RewardOutput:
    total = torch.tensor(totals)
    return RewardOutput(
        total=total, quality=total + 1, correspondence=total - 1 if correspondence else None, details=details
    )


def package_modules() -> list[ModuleType]:
    walked = pkgutil.walk_packages(aigiqa_reward.__path__, "aigiqa_reward.")
    return [importlib.import_module(found.name) for found in walked if not found.name.endswith("__main__")]


def test_shape_annotations_are_enforced_during_the_tests():
    with pytest.raises(jaxtyping.TypeCheckError, match="Float"):
        pixels.resize(torch.rand(3, 20, 20), (10, 10))
    modules = package_modules()
    assert len(modules) > 10
    for module in [aigiqa_reward, *modules]:
        assert type(module.__loader__).__module__.startswith("jaxtyping"), module.__name__


def test_prompt_features_give_each_row_its_own_prompt():
    rows = features("a cat", "a dog", "a cat", "a bird")
    assert len(rows) == 4
    assert rows.prompts == ["a cat", "a dog", "a cat", "a bird"]
    assert rows.rows("pooled")[:, 0].tolist() == [0, 1, 0, 2]
    assert rows.rows("tokens").shape == (4, 2, 3)


def test_prompt_features_are_sliced_expanded_and_moved_whole():
    rows = features("a cat", "a dog", "a cat", "a bird")
    assert rows[1:3].prompts == ["a dog", "a cat"]
    assert rows[torch.tensor([3, 0])].prompts == ["a bird", "a cat"]
    assert rows[torch.tensor([True, False, False, True])].rows("pooled")[:, 0].tolist() == [0, 2]
    assert len(rows[:0]) == 0
    expanded = rows[1:2].expand(5)
    assert expanded.prompts == ["a dog"] * 5
    assert expanded.rows("pooled").shape == (5, 4)
    with pytest.raises(ValueError, match=r"exactly one prompt, got 4 rows"):
        rows.expand(2)
    moved = rows.to("meta")
    assert {tensor.device.type for tensor in (moved.index, *moved.tensors.values())} == {"meta"}
    assert moved.texts == rows.texts


def test_an_output_cannot_be_unpacked_or_looped_over():
    with pytest.raises(TypeError, match=r"\.total, \.quality"):
        _quality, _correspondence = output([1.0, 2.0])
    with pytest.raises(TypeError, match="not iterable"):
        list(output([1.0, 2.0]))


def test_outputs_are_detached_and_moved_whole():
    total = torch.rand(2, requires_grad=True) * 2
    attached = RewardOutput(total=total, quality=total, correspondence=total, details={"gate": total})

    def parts(of: RewardOutput) -> list[torch.Tensor]:
        return [of.total, of.quality, of.correspondence, of.details["gate"]]

    assert all(part.requires_grad for part in parts(attached))
    assert not any(part.requires_grad for part in parts(attached.detach()))
    assert all(torch.equal(part, total) for part in parts(attached.detach()))
    assert {part.device.type for part in parts(attached.to("meta"))} == {"meta"}


def test_rows_of_an_output_stay_together_and_cat_restores_what_slicing_took_apart():
    whole = output([1.0, 2.0, 3.0, 4.0, 5.0], gate=torch.rand(5), maps=torch.rand(5, 3, 3))
    part = whole[torch.tensor([2, 0])]
    assert (part.total.tolist(), part.quality.tolist(), part.correspondence.tolist()) == ([3, 1], [4, 2], [2, 0])
    assert torch.equal(part.details["maps"], whole.details["maps"][[2, 0]])
    joined = RewardOutput.cat([whole[:2], whole[2:3], whole[3:]])
    for name in ("total", "quality", "correspondence"):
        assert torch.equal(getattr(joined, name), getattr(whole, name))
    assert joined.details.keys() == whole.details.keys()
    assert all(torch.equal(joined.details[name], whole.details[name]) for name in whole.details)


def test_cat_leaves_out_details_that_do_not_fit_together():
    first = output([1.0], gate=torch.rand(1), maps=torch.rand(1, 3, 3), words=torch.rand(1, 5))
    second = output([2.0], gate=torch.rand(1), maps=torch.rand(1, 4, 3))
    joined = RewardOutput.cat([first, second])
    assert joined.details.keys() == {"gate"}
    assert RewardOutput.cat([second, first]).details.keys() == {"gate"}
    assert RewardOutput.cat([output([1.0], correspondence=False)] * 2).correspondence is None


def test_a_tensor_becomes_an_output_and_an_output_stays():
    scores = torch.rand(3, requires_grad=True)
    converted = as_reward_output(scores, 3)
    assert converted.total is converted.quality is scores
    assert converted.correspondence is None
    given = output([1.0, 2.0])
    assert as_reward_output(given, 2) is given


@pytest.mark.parametrize("shape", [(), (3,), (2, 1)])
@pytest.mark.parametrize(("name", "label"), [("total", "scores"), ("correspondence", "correspondence")])
def test_each_aspect_has_one_score_per_image(name, label, shape):
    scores = {"total": torch.zeros(2), "quality": torch.zeros(2), "correspondence": torch.zeros(2)}
    with pytest.raises(TypeError, match="my_reward returned ndarray; expected a tensor"):
        as_reward_output(np.zeros(2), 2, source="my_reward")
    with pytest.raises(ValueError, match=rf"my_reward returned {label} of shape .* for 2 images; expected \(2,\)"):
        as_reward_output(RewardOutput(**scores | {name: torch.zeros(shape)}), 2, source="my_reward")
