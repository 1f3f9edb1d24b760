from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from aigiqa_reward import CompositeReward, RewardOutput, create_reward
from aigiqa_reward.models.base import distinct_prompts
from aigiqa_reward.types import PromptFeatures


def brightness(images: Tensor, prompts: list[str] | None) -> Tensor:
    return images.mean(dim=(1, 2, 3))


def contrast(images: Tensor, prompts: list[str] | None) -> Tensor:
    return 100 * images.var(dim=(1, 2, 3)) - 7


class Conv(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3, generator=generator))
        self.register_buffer("offset", torch.randn(4, generator=generator))

    def forward(self, images: Tensor, prompts: list[str] | None) -> RewardOutput:
        maps = torch.tanh(nn.functional.conv2d(images, self.weight, self.offset, stride=2))
        first, second, third, fourth = maps.mean(dim=(2, 3)).unbind(dim=1)
        correspondence = None if prompts is None else third + fourth
        return RewardOutput(total=first + 2 * second, quality=second, correspondence=correspondence)


MEMBERS: dict[str, Callable[..., Any]] = {"brightness": brightness, "contrast": contrast, "conv": Conv()}
WEIGHTS = {"brightness": 1.0, "contrast": 3.0, "conv": 0.5}
PROMPTS = ["a cat", "a dog", "a cat", "a bird", "a fish"]


def some_images(count: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    level = torch.rand(count, 1, 1, 1, generator=generator)
    return (level + (0.2 + level) * (torch.rand(count, 3, 18, 20, generator=generator) - 0.5)).clamp(0, 1).to(dtype)


@pytest.fixture
def sample() -> Tensor:
    return some_images(40, seed=1)


@pytest.fixture
def images() -> Tensor:
    return some_images(5, seed=2)


def totals(member: Callable[..., Any], images: Tensor) -> np.ndarray:
    with torch.no_grad():
        result = member(images, ["a cat"] * len(images))
    return (result.total if isinstance(result, RewardOutput) else result).double().numpy()


def shares_below(reference: np.ndarray, scores: np.ndarray) -> np.ndarray:
    return np.interp(scores, np.sort(reference), np.linspace(0, 1, len(reference)))


def compose(sample: Tensor, combine: str, members: dict[str, Callable[..., Any]] = MEMBERS) -> CompositeReward:
    prompts = ["a cat"] * len(sample)
    weights = {name: WEIGHTS[name] for name in members}
    return CompositeReward.with_reference(members, sample, prompts, weights=weights, combine=combine)


def z_scores(reference: np.ndarray, scores: np.ndarray) -> np.ndarray:
    return (scores - reference.mean()) / reference.std(ddof=1)


@pytest.mark.parametrize(("combine", "scale"), [("zscore", z_scores), ("rank", shares_below)])
def test_scaled_totals_are_averaged_with_weights_and_each_row_is_scored_alone(sample, images, combine, scale):
    images, prompts = torch.cat([images, sample[:3]]), PROMPTS + ["a cat"] * 3  # also scores that are in the reference
    expected = sum(
        WEIGHTS[name] / sum(WEIGHTS.values()) * scale(totals(member, sample), totals(member, images))
        for name, member in MEMBERS.items()
    )
    composite = compose(sample, combine)
    output = composite(images, prompts).total.detach()
    np.testing.assert_allclose(output.numpy(), expected, rtol=1e-4, atol=1e-4)
    for row in range(5):
        alone = composite(images[row : row + 1], prompts[row : row + 1]).total
        torch.testing.assert_close(alone, output[row : row + 1], atol=1e-5, rtol=1e-5)


def rank_of(scores: list[float], reference: list[float]) -> list[float]:
    given = {"given": torch.tensor(reference)}
    composite = CompositeReward({"given": lambda *_: torch.tensor(scores)}, combine="rank", reference=given)
    return composite(torch.rand(len(scores), 3, 16, 16)).total.tolist()


def test_ranks_end_at_0_and_1_take_the_upper_end_of_ties_and_keep_nan():
    assert rank_of([-9, 1, 2, 5, 9, 1.5], [5, 2, 1]) == pytest.approx([0, 0, 0.5, 1, 1, 0.25])
    assert np.isnan(rank_of([float("nan"), 1.0], [0, 1, 1])).tolist() == [True, False]
    reference = [0, 0, 1, 1, 1, 2, 3, 3]
    assert rank_of([0, 1, 2, 3], reference) == pytest.approx([1 / 7, 4 / 7, 5 / 7, 1])
    assert (np.diff(rank_of(np.linspace(-0.5, 3.5, 81).tolist(), reference)) >= 0).all()
    scores = torch.tensor([-1.0, 0.0, 1.0, 2.0, 3.0], requires_grad=True)
    ties = {"given": torch.tensor([0.0, 0.0, 1.0, 2.0, 2.0])}
    composite = CompositeReward({"given": lambda *_: scores * 1}, combine="rank", reference=ties)
    composite(torch.rand(5, 3, 16, 16)).total.sum().backward()
    assert scores.grad.tolist()[0] == scores.grad.tolist()[3] == scores.grad.tolist()[4] == 0
    assert scores.grad.abs().max() <= 0.25  # one of four equal steps over a gap of 1; finite also at ties


@pytest.mark.parametrize(("combine", "dtype"), [("zscore", torch.bfloat16), ("rank", torch.int64)])
def test_coarse_totals_are_scaled_in_float32(combine, dtype):
    def score(values: Tensor) -> Tensor:
        reference = {"given": torch.tensor([0.0, 3.1, 7.3])}
        composite = CompositeReward({"given": lambda *_: values}, combine=combine, reference=reference)
        return composite(torch.rand(3, 3, 16, 16)).total

    values = torch.tensor([1, 2, 6]).to(dtype)
    assert score(values).dtype == torch.float32
    assert torch.equal(score(values), score(values.float()))


def test_quality_and_correspondence_are_the_members_own(sample, images):
    output = compose(sample, "zscore")(images, PROMPTS)
    conv = MEMBERS["conv"](images, PROMPTS)
    quality = (brightness(images, None) + 3 * contrast(images, None) + 0.5 * conv.quality) / 4.5
    torch.testing.assert_close(output.quality, quality)
    torch.testing.assert_close(output.correspondence, conv.correspondence)  # the only member that has one
    assert output.details.keys() == MEMBERS.keys()
    torch.testing.assert_close(output.details["contrast"], contrast(images, None))
    assert compose(sample, "zscore")(images).correspondence is None
    assert CompositeReward(TWO, reference=GOOD).weights == {"a": 0.5, "b": 0.5}


@pytest.mark.parametrize("combine", ["zscore", "rank"])
def test_gradients_equal_finite_differences(sample, combine):
    members = {name: Conv().double() if name == "conv" else member for name, member in MEMBERS.items()}
    composite = compose(sample.double(), combine, members).double()
    pixels = some_images(2, seed=5, dtype=torch.float64).requires_grad_()
    [analytic] = torch.autograd.grad(composite(pixels, PROMPTS[:2]).total.sum(), pixels)
    assert analytic.abs().amax(dim=(1, 2, 3)).min() > 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        direction = torch.randn(pixels.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            ahead, behind = (composite(pixels + h * direction, PROMPTS[:2]).total.sum() for h in (1e-6, -1e-6))
        numeric = float(ahead - behind) / 2e-6
        assert float((analytic * direction).sum()) == pytest.approx(numeric, rel=1e-4, abs=1e-6)


def test_modules_among_the_members_move_and_are_cast_with_it_and_the_reference_stays_float32(sample):
    composite = compose(sample, "zscore", {"brightness": brightness, "conv": Conv()})
    names = {name for name, _ in composite.named_parameters()}
    assert names == {"member_modules.conv.weight"}
    assert composite.to("meta").members["conv"].weight.device.type == "meta"
    assert composite.reference["brightness"].totals.device.type == "meta"
    half = compose(sample, "zscore", {"conv": Conv()}).half()
    assert half.members["conv"].weight.dtype == torch.float16
    assert half.reference["conv"].totals.dtype == torch.float32


def test_a_state_dict_restores_the_reference_and_the_members(sample, images):
    source = compose(sample, "zscore")
    target = compose(sample.flip(3) / 2, "zscore", {**MEMBERS, "conv": Conv(seed=9)})
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(images, PROMPTS).total, source(images, PROMPTS).total)


def test_images_are_checked_and_validation_can_be_skipped(sample, images):
    composite = compose(sample, "zscore", {"brightness": brightness})
    with pytest.raises(ValueError, match=r"images\.from_vae"):
        composite(images * 2 - 1)
    assert composite(images * 2 - 1, validate=False).total.shape == (5,)


class Reader:
    def __init__(self) -> None:
        self.read: list[list[str]] = []

    def encode_prompts(self, prompts: list[str]) -> PromptFeatures:
        self.read.append(list(prompts))
        texts, index = distinct_prompts(prompts)
        lengths = torch.tensor([float(len(text)) for text in texts])
        return PromptFeatures(texts=texts, index=index, tensors={"length": lengths}, model="reader")

    def __call__(self, images: Tensor, prompts: list[str] | PromptFeatures) -> Tensor:
        features = prompts if isinstance(prompts, PromptFeatures) else self.encode_prompts(prompts)
        return features.rows("length") + images.mean(dim=(1, 2, 3))


def spelling(images: Tensor, prompts: list[str]) -> Tensor:
    assert all(isinstance(prompt, str) for prompt in prompts)
    return torch.tensor([float(ord(prompt[2])) for prompt in prompts]) + images.mean(dim=(1, 2, 3))


def test_prompts_are_encoded_once_for_all_members_and_the_rest_sees_strings(images):
    reader, reference = Reader(), {"reader": torch.rand(9), "spelling": torch.rand(9)}
    inner = CompositeReward({"reader": reader, "spelling": spelling}, reference=reference)
    outer = CompositeReward(
        {"inner": inner, "brightness": brightness}, reference={"inner": torch.rand(9), "brightness": torch.rand(9)}
    )
    torch.testing.assert_close(outer(images, PROMPTS).correspondence, inner(images, PROMPTS).correspondence)
    for composite in (inner, outer):
        expected = composite(images, PROMPTS).total
        reader.read.clear()
        features = composite.encode_prompts(PROMPTS)
        torch.testing.assert_close(composite(images, features).total, expected, rtol=0, atol=0)
        torch.testing.assert_close(composite(images[3:], features[3:]).total, expected[3:])
        alone = composite.encode_prompts(PROMPTS[1:2])
        torch.testing.assert_close(composite(images, alone.expand(5)).total[1], expected[1])
        assert reader.read == [["a cat", "a dog", "a bird", "a fish"], ["a dog"]]


def test_features_of_another_reward_or_another_number_are_refused(images):
    reader = Reader()
    composite = CompositeReward({"reader": reader}, reference={"reader": torch.rand(9)})
    other = CompositeReward({"other": reader}, reference={"other": torch.rand(9)})
    for features in (reader.encode_prompts(PROMPTS), other.encode_prompts(PROMPTS)):
        with pytest.raises(ValueError, match="encode them with this reward's encode_prompts"):
            composite(images, features)
    with pytest.raises(ValueError, match="got 1 prompts for 5 images"):
        composite(images, composite.encode_prompts(PROMPTS[:1]))
    with pytest.raises(TypeError, match="got one string"):
        composite.encode_prompts("a cat")


GOOD = {"a": torch.rand(9), "b": torch.rand(9)}
TWO = {"a": brightness, "b": contrast}

REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"members": {}, "reference": {}}, "members: expected at least one reward"),
    ({"combine": "mean"}, "combine: expected 'zscore' or 'rank', got 'mean'"),
    ({"reference": {"a": GOOD["a"]}}, r"reference: .*each of \['a', 'b'\], got \['a'\]"),
    ({"reference": {**GOOD, "b": torch.rand(1)}}, r"reference\['b'\].*at least 2"),
    ({"reference": {**GOOD, "b": torch.ones(9)}}, r"reference\['b'\].*not all equal"),
    ({"reference": {**GOOD, "b": torch.tensor([1, float("nan")])}}, r"\['b'\].*finite"),
    ({"weights": {"a": 1}}, r"weights: expected an entry for each.*got \['a'\]"),
    ({"weights": {"a": 1, "b": 0}}, "weights: expected finite numbers above 0.*'b': 0"),
    (
        {"members": {"v1.5": nn.Identity(), "v1_5": nn.Identity()}, "reference": None},
        "differ by a dot alone.*another name",
    ),
    ({"combine": "rank", "reference": None}, "combine: 'rank' needs a reference"),
    ({"members": {"compact": 1.0, "b": brightness}, "reference": None}, "members: expected"),
    ({"members": {"compact": True}, "reference": None}, "members: expected"),
    ({"members": {"compact": 1.0}, "weights": {"compact": 2.0}, "reference": None}, "weights: the members are"),
    ({"members": {"compact": -1.0}, "reference": None}, "finite numbers above 0.*'compact': -1.0"),
    ({"members": {"compakt": 1.0}, "reference": None}, "did you mean 'compact'"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSALS)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        CompositeReward(**{"members": TWO, "reference": GOOD} | arguments)


def test_without_a_reference_the_totals_are_mixed_as_they_are(images):
    members = {"hpsv2.1": Conv(), "conv": Conv(seed=3)}
    output = CompositeReward(members, weights={"hpsv2.1": 3, "conv": 1})(images, PROMPTS)
    first, second = (member(images, PROMPTS).total for member in members.values())
    torch.testing.assert_close(output.total, 0.75 * first + 0.25 * second)
    assert torch.equal(output.details["hpsv2.1"], first)


def test_weights_by_name_create_the_rewards():
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    reward = CompositeReward({"compact": 1.0, "tsp_mgs": 0.5})
    parts = {name: create_reward(name)(images, PROMPTS[:2]).total for name in ("compact", "tsp_mgs")}
    expected = (parts["compact"] + 0.5 * parts["tsp_mgs"]) / 1.5
    torch.testing.assert_close(reward(images, PROMPTS[:2]).total, expected)
    scaled = CompositeReward.with_reference({"compact": 1.0}, images, PROMPTS[:2])(images, PROMPTS[:2]).total
    assert float(scaled.mean()) == pytest.approx(0, abs=1e-4)


def test_a_member_that_does_not_give_one_score_per_image_is_named(images):
    composite = CompositeReward({"bad": lambda images, prompts: images.mean()}, reference={"bad": GOOD["b"]})
    with pytest.raises(ValueError, match=r"member 'bad' returned .*expected \(5,\)"):
        composite(images)
