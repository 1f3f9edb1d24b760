"""Validation images, their scores and measures, and what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from validated import CALL, PROMPTS, SEEDS, brightness, redness, tools_of, validate

from aigiqa_reward import CompositeReward, create_reward, load_embedded_pipeline
from aigiqa_reward.finetuning import validation as measures
from aigiqa_reward.finetuning.results import PER_IMAGE, ValidationResult
from aigiqa_reward.finetuning.validation import CANDIDATES, Validation, default_holdout
from aigiqa_reward.types import RewardOutput


@pytest.fixture(scope="module")
def tools() -> Any:
    return tools_of(load_embedded_pipeline())


@pytest.fixture(scope="module")
def looks() -> measures.Looks:
    return measures.Looks()


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory) -> tuple[ValidationResult, Path]:
    folder = tmp_path_factory.mktemp("validation")
    return validate(folder), folder


def calls(pipe: Any) -> torch.Tensor:
    images = [
        pipe(prompt, generator=torch.Generator("cpu").manual_seed(seed), output_type="pt", **CALL).images[0]
        for prompt in PROMPTS
        for seed in range(SEEDS)
    ]
    return torch.stack(images).unflatten(0, (len(PROMPTS), SEEDS))


def test_the_images_are_the_pipelines_own_with_the_adapter(tools: Any, validated: Any) -> None:
    result, _ = validated
    expected = calls(tools.rollout.pipe)
    made = Validation(tools, PROMPTS, brightness, seeds=SEEDS).images(range(9))
    torch.testing.assert_close(made.clamp(0, 1), expected.flatten(0, 1), rtol=0, atol=2e-5)
    tiles = (expected * 255).round().permute(0, 1, 3, 4, 2).numpy()
    assert result.tiles.shape == tiles.shape
    assert np.abs(result.tiles.astype(float) - tiles).max() <= 1
    with tools.lora.off():
        assert (calls(tools.rollout.pipe) - expected).abs().max() > 0.05


def test_the_scores_are_the_rewards_of_these_images(tools: Any, validated: Any) -> None:
    result, _ = validated
    images = calls(tools.rollout.pipe).flatten(0, 1)
    trained = redness(images, [prompt for prompt in PROMPTS for _ in range(SEEDS)])
    for name, expected in {
        "reward": trained.total,
        "quality": trained.quality,
        "correspondence": trained.correspondence,
        "holdout": brightness(images, [""] * len(images)),
        "chroma": measures.chroma(images),
        "contrast": measures.contrast(images),
    }.items():
        assert expected is not None
        np.testing.assert_allclose(result.numbers[name].ravel(), expected.numpy(), rtol=0, atol=2e-5)
    assert np.isnan(result.numbers["holdout_correspondence"]).all()
    summary = result.summary()
    assert summary["reward"] == pytest.approx(result.reward.mean())
    assert "holdout_correspondence" not in summary
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_validation_draws_nothing_from_the_global_state_and_repeats_itself(tools: Any) -> None:
    validation = Validation(tools, PROMPTS[:1], brightness, seeds=2)
    before = torch.get_rng_state()
    first = validation.run(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    second = validation.run(10)
    assert all(np.array_equal(first.numbers[name], second.numbers[name], equal_nan=True) for name in PER_IMAGE)
    assert not any(weight.grad is not None for weight in tools.lora.weights.values())


def test_images_that_are_not_finite_are_counted_and_never_scored(tmp_path: Path) -> None:
    shown = []

    def strict(images: torch.Tensor, prompts: list[str]) -> RewardOutput:
        assert images.isfinite().all()
        shown.append(len(images))
        return redness(images, prompts)

    tools = tools_of(load_embedded_pipeline(), strict)
    validation = Validation(tools, PROMPTS[:2], brightness, seeds=2, folder=tmp_path, batch_size=2)
    broken = tools.rollout.pipe.vae.decoder
    hook = broken.register_forward_hook(lambda module, given, made: made.index_fill(0, torch.tensor([1]), torch.nan))
    try:
        result = validation.run(0)
    finally:
        hook.remove()
    assert (result.nonfinite, sum(shown)) == (2, 2)
    assert np.isnan(result.reward).tolist() == [[False, True]] * 2
    assert np.isnan(result.diversity).all()
    summary = result.summary()
    assert summary["nonfinite"] == 2
    assert summary["reward"] == pytest.approx(np.nanmean(result.reward))
    assert "diversity" not in summary
    again = ValidationResult.read(tmp_path, 0)
    np.testing.assert_array_equal(again.reward, result.reward)
    weight = next(w for name, w in tools.lora.weights.items() if "lora_B" in name)
    with torch.no_grad():
        weight.fill_(torch.nan)
    nothing = validation.run(1)
    assert nothing.nonfinite == 4
    assert "reward" not in nothing.summary()


class Wrapped(torch.nn.Module):
    def __init__(self, reward: torch.nn.Module) -> None:
        super().__init__()
        self.reward = reward

    def forward(self, images: Tensor, prompts: Any) -> Tensor:
        return 2 * self.reward(images, prompts).total


@pytest.mark.slow
def test_the_holdout_is_not_part_of_a_trained_module() -> None:
    compact = create_reward("compact")
    for reward, expected in ((compact, "mst_clipiqa"), (Wrapped(compact), "mst_clipiqa"), (brightness, "compact")):
        held = default_holdout(reward)
        assert held.name == expected
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(held(images, ["a red apple", "a cat"]).total, held(images).total), "both aspects"


@pytest.mark.slow
def test_the_holdout_is_not_part_of_a_composite() -> None:
    compact, mst = create_reward("compact"), create_reward("mst_clipiqa")
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    both = CompositeReward.with_reference({"a": compact, "b": mst}, images, ["a cat", "a dog"])
    assert default_holdout(both).name not in ("compact", "mst_clipiqa")
    every = torch.nn.ModuleList([compact, mst, *(create_reward(name) for name in CANDIDATES[2:])])
    with pytest.raises(ValueError, match=r"holdout: .* pass another reward"):
        default_holdout(every)  # pyright: ignore[reportArgumentType]


def test_diversity_is_zero_for_copies_and_grows_with_difference(tools: Any, looks: measures.Looks) -> None:
    made = calls(tools.rollout.pipe)
    copies = looks(made[0, :1].expand(4, -1, -1, -1))
    assert measures.diversity(copies) == 0
    noise = 0.02 * torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    noisy = measures.diversity(looks((made[0, :1] + noise).clamp(0, 1)))
    seeds, prompts = measures.diversity(looks(made[0])), measures.diversity(looks(made[:, 0]))
    assert 0 < noisy < seeds < prompts
    vectors = looks(made[0]).double().numpy()
    cosines = [1 - vectors[i] @ vectors[j] for i, j in ((0, 1), (0, 2), (1, 2))]
    assert seeds == pytest.approx(np.mean(cosines), rel=1e-4)
    assert np.isnan(measures.diversity(looks(made[0, :1])))


def test_saturation_chroma_and_contrast_by_construction() -> None:
    decoded = torch.full((3, 3, 8, 8), 0.5)
    decoded[0, :, :2] = 1.3
    decoded[0, :, 2:4] = -0.2
    decoded[1, 0] = 1 - 0.4 / 255
    decoded[1, 1] = 1 - 0.6 / 255
    decoded[2] = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
    decoded[2, :, :4] = 1.0
    assert measures.saturation(decoded).tolist() == pytest.approx([0.5, 1 / 3, 1.0])
    images = decoded.clamp(0, 1)
    assert measures.chroma(images).tolist()[::2] == pytest.approx([0.0, 0.5 * np.hypot(1, 0.5)])
    assert measures.contrast(images).tolist()[::2] == pytest.approx([np.sqrt(0.125), (1 - 0.299) / 2])


def test_what_is_written_is_read_again(validated: Any) -> None:
    result, folder = validated
    names = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert names == {"step-000007.json", "step-000007.png", "tiles/step-000007.png"}
    again = ValidationResult.read(folder, 7)
    assert again.summary() == result.summary()
    np.testing.assert_array_equal(again.tiles, result.tiles)
    for name in PER_IMAGE:
        np.testing.assert_array_equal(again.numbers[name], result.numbers[name])
    with pytest.raises(ValueError, match="folder: cannot read the validation of step 8"):
        ValidationResult.read(folder, 8)
