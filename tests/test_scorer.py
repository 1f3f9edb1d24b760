from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_bound import Lengths
from torch import Tensor, nn

from aigiqa_reward import RewardOutput, Scorer
from aigiqa_reward.rewards.scorer import ScoringError
from aigiqa_reward.types import PromptError


def brightness(images: Tensor, prompts: list[str] | None) -> Tensor:
    return images.mean(dim=(1, 2, 3))


def detailed(images: Tensor, prompts: list[str] | None) -> RewardOutput:
    red, green, blue = images.mean(dim=(2, 3)).unbind(dim=1)
    details = {"gate": red * 2, "map": images[:, 0], "one": red[:, None]}
    return RewardOutput(total=red, quality=green, correspondence=blue, details=details)


def random_image(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(10 * seed, 10 * seed + 100, (height, width, 3), dtype=np.uint8)


SIZES = [(20, 30), (40, 24), (20, 30), (64, 64), (17, 90), (40, 24), (20, 30)]


@pytest.fixture
def arrays() -> list[np.ndarray]:
    return [random_image(*size, seed=seed) for seed, size in enumerate(SIZES)]


@pytest.fixture
def means(arrays) -> np.ndarray:
    return np.array([array.mean() / 255 for array in arrays])


def test_mixed_types_and_sizes_are_scored_in_order(arrays, means, tmp_path):
    Image.fromarray(arrays[1]).save(tmp_path / "one.png")
    Image.fromarray(arrays[2]).save(tmp_path / "two.png")
    inputs = [
        Image.fromarray(arrays[0]),
        tmp_path / "one.png",
        str(tmp_path / "two.png"),
        arrays[3],
        torch.from_numpy(arrays[4]).permute(2, 0, 1).float() / 255,
        arrays[5].transpose(2, 0, 1) / 255,
        torch.from_numpy(arrays[6]),
    ]  # PIL, paths, uint8 and double arrays, CHW and HWC, float and uint8 tensors
    output = Scorer(brightness, batch_size=3).score(inputs)
    np.testing.assert_allclose(output.total.numpy(), means, atol=1e-5)
    assert output.total.device.type == "cpu"
    assert output.correspondence is None


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_prompts_follow_their_images_through_batches_of_one_size(arrays, means, batch_size):
    counts, sizes = [4, 1, 2, 6, 3, 5, 7], []

    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        sizes.append(len(images))
        return images.mean(dim=(1, 2, 3)) + torch.tensor([float(len(prompt.split())) for prompt in prompts])

    prompts = tuple(" ".join(["word"] * count) for count in counts)
    output = Scorer(reward, batch_size=batch_size).score(arrays, prompts)
    np.testing.assert_allclose(output.total.numpy(), means + counts, atol=1e-5)
    assert max(sizes) <= batch_size
    assert sum(sizes) == len(arrays)


def test_every_part_of_the_output_keeps_the_order(arrays):
    output = Scorer(detailed, batch_size=4).score(arrays)
    channels = np.array([array.mean((0, 1)) / 255 for array in arrays])
    np.testing.assert_allclose(output.total.numpy(), channels[:, 0], atol=1e-5)
    np.testing.assert_allclose(output.quality.numpy(), channels[:, 1], atol=1e-5)
    np.testing.assert_allclose(output.correspondence.numpy(), channels[:, 2], atol=1e-5)
    np.testing.assert_allclose(output.details["gate"].numpy(), 2 * channels[:, 0], atol=1e-5)
    assert output.details["one"].shape == (len(arrays), 1)
    assert "map" not in output.details  # maps of different sizes cannot be one tensor


def test_stream_yields_each_result_as_soon_as_its_batch_is_scored(arrays, means):
    calls = []

    def reward(images: Tensor, prompts: None) -> Tensor:
        calls.append(len(images))
        return brightness(images, prompts)

    stream = Scorer(reward, batch_size=2).stream(arrays)
    assert calls == []
    first = next(stream)
    assert sum(calls) == 2
    rest = list(stream)
    assert [result.index for result in (first, *rest)] == list(range(len(arrays)))
    assert all(result.error is None and len(result.output) == 1 for result in rest)
    np.testing.assert_allclose([float(result.output.total) for result in (first, *rest)], means, atol=1e-5)


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        (["a cat"], ValueError, "expected one per input, got 1 prompts for 7 inputs"),
        (["a cat"] * 6 + [""], ValueError, r"prompts\[6\] is empty"),
        (["a cat"] * 6 + [None], TypeError, r"prompts\[6\]: expected a string, got NoneType"),
    ],
)
def test_prompts_that_do_not_fit_are_refused_before_scoring(arrays, prompts, error, message):
    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        pytest.fail("scored with prompts that do not fit")

    with pytest.raises(error, match=f"prompts.*{message}|{message}"):
        Scorer(reward).stream(arrays, prompts)  # at once, not at the first result


def test_one_prompt_is_encoded_once_for_all_batches_and_none_gives_quality_alone(arrays, means):
    reward = Lengths()
    Scorer(reward, batch_size=2).score(arrays, "a cat")
    assert reward.encoded == [["a cat"]]
    output = Scorer(reward).score(arrays)
    assert output.correspondence is None
    np.testing.assert_allclose(output.total.numpy(), means, atol=1e-5)


@pytest.fixture
def damaged(arrays, tmp_path) -> list[Any]:
    (tmp_path / "text.png").write_text("no image")
    return [tmp_path / "absent.png", *arrays[1:3], tmp_path / "text.png", *arrays[4:6], np.zeros((8, 8, 3))]


def test_unreadable_inputs_raise_an_error_that_carries_all_other_scores_or_are_nan_on_request(damaged, means):
    message = r"3 could not be read, the first is inputs\[0\]: .*absent.*\.output"
    with pytest.raises(ScoringError, match=message) as caught:
        Scorer(brightness, batch_size=2).score(damaged)
    assert caught.value.errors.keys() == {0, 3, 6}
    assert "at least 16 px" in caught.value.errors[6]
    assert caught.value.output is not None
    means[[0, 3, 6]] = np.nan
    np.testing.assert_allclose(caught.value.output.total.numpy(), means, atol=1e-5)
    expected = [True, False, False, True, False, False, True]
    output = Scorer(detailed, batch_size=3).score(damaged, on_error="nan")
    for scores in (output.total, output.quality, output.correspondence, output.details["gate"]):
        assert scores.isnan().tolist() == expected


def test_an_input_whose_prompt_cannot_be_read_is_reported_and_the_others_scored(arrays, means):
    scorer = Scorer(Lengths(), batch_size=3)
    prompts = ["aa", "?", "ccc", "??"]
    output = scorer.score(arrays[:4], prompts, on_error="nan")
    assert output.correspondence is not None
    assert output.correspondence.nan_to_num(-1).tolist() == [2, -1, 3, -1]
    np.testing.assert_allclose(output.quality, [means[0], np.nan, means[2], np.nan], atol=1e-5)
    errors = [result.error for result in scorer.stream([*arrays[:3], "absent.png"], prompts)]
    assert errors[0] is errors[2] is None
    assert "'?' holds no readable word" in str(errors[1])
    assert "no such file" in str(errors[3]), "of two faults the image's is reported"
    with pytest.raises(PromptError, match=r"prompts: .*no readable word"):
        scorer.stream(arrays, "?")  # at once: the argument is at fault, not an input


def test_settings_and_inputs_are_checked(arrays):
    with pytest.raises(TypeError, match=r"reward: expected a Reward, its name or a function.*got int"):
        Scorer(3)
    with pytest.raises(ValueError, match="batch_size: expected an integer of at least 1"):
        Scorer(brightness, batch_size=0)
    for inputs, error, message in (
        ([], ValueError, "at least one image, got none"),
        ("image.png", TypeError, "list of images.*got str; wrap a single image in a list"),
        (torch.rand(3, 20, 20), ValueError, r"got shape \(3, 20, 20\); wrap one image in a list"),
    ):
        with pytest.raises(error, match=f"inputs: .*{message}"):
            Scorer(brightness).score(inputs)
    with pytest.raises(ValueError, match="on_error: expected 'raise' or 'nan', got 'ignore'"):
        Scorer(brightness).score(arrays, on_error="ignore")
    with pytest.raises(ValueError, match=r"returned scores of shape \(\) for 1 images; expected \(1,\)"):
        Scorer(lambda images, prompts: images.mean()).score([np.zeros((20, 20, 3))])


def test_scoring_builds_no_graph_and_its_scores_are_ordinary_tensors(arrays):
    grad_modes, head = [], nn.Linear(3, 1)

    def reward(images: Tensor, prompts: None) -> Tensor:
        grad_modes.append(torch.is_grad_enabled())
        return head(images.mean(dim=(2, 3))).squeeze(1)

    output = Scorer(reward, batch_size=3).score(arrays)
    assert grad_modes and not any(grad_modes)
    assert not output.total.requires_grad
    weight = torch.ones(len(arrays), requires_grad=True)
    (weight * output.total).sum().backward()  # inference tensors could not be saved for this
    assert torch.equal(weight.grad, output.total)
    assert torch.is_grad_enabled()
