"""The contract of every embedded reward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from clip_models import write_tiny_clip
from PIL import Image

from aigiqa_reward import Reward, RewardOutput, Scorer, create_reward, list_rewards
from aigiqa_reward.encoders.open_clip import OpenCLIPConfig

PROMPTS = ["a red apple on a table", "a castle in the clouds, oil painting", "two cats"]
Maker = Callable[..., Reward]


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("clip"), seed=0)


ZERO_SHOT = "tsp_mgs, zero-shot"
"""The reward that scores on any CLIP without training, here a tiny one."""


SLOW = ("mst_clipiqa", "sc_agiqa", "tsp_mgs", "cpa_iqa", "ma_agiqa")
"""In the slow suite: tests/test_systems.py checks the same of their models, on fewer crops."""


@pytest.fixture(
    scope="module",
    params=[
        *(pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in list_rewards(embedded=True)),
        ZERO_SHOT,
    ],
)
def make(request: pytest.FixtureRequest, tiny_clip: Path) -> Maker:
    if request.param != ZERO_SHOT:
        return partial(create_reward, request.param)
    encoder = OpenCLIPConfig(architecture=f"local-dir:{tiny_clip}")

    def build(**arguments: object) -> Reward:
        return create_reward("tsp_mgs", **({} if "weights" in arguments else {"encoder": encoder}), **arguments)

    return build


@pytest.fixture(scope="module")
def reward(make: Maker) -> Reward:
    return make()


@pytest.fixture(scope="module")
def seen(reward: Reward) -> tuple[torch.Tensor, RewardOutput]:
    images = scenes(3, 64, 80)
    with torch.no_grad():
        return images, reward(images, PROMPTS)


def scenes(count: int, height: int, width: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, max(2, height // 16), max(2, width // 16), generator=generator)
    blocks = torch.nn.functional.interpolate(coarse, size=(height, width), mode="nearest")
    grain = torch.randn(count, 3, height, width, generator=generator)
    strength = torch.linspace(0.01, 0.08, count).view(-1, 1, 1, 1)
    return (0.15 + 0.7 * blocks + strength * grain).clamp(0.1, 0.9)


def assert_gradient_equals_differences(
    total: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, length: float = 1e-8, error: float = 1e-4
) -> None:
    images = images.double().requires_grad_()
    (gradient,) = torch.autograd.grad(total(images), images)
    assert torch.isfinite(gradient).all()
    assert gradient.norm() > 1e-6, "an image without any gradient cannot be improved"
    other = torch.randn(images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        for direction in (gradient, other):
            step = length * direction / direction.norm()
            numeric = (total(images + step) - total(images - step)) / 2
            analytic = (gradient * step).sum()
            assert abs(float(numeric - analytic)) <= error * abs(float(analytic)) + 1e-14


def test_pixel_gradient_equals_central_differences(make: Maker) -> None:
    reward, images = make(dtype=torch.float64), scenes(1, 96, 80)
    context = reward.prepare(images.double(), PROMPTS[:1])
    assert_gradient_equals_differences(lambda batch: reward(batch, PROMPTS[:1], context=context).total.sum(), images)


def test_pixels_get_gradients_and_weights_none(reward: Reward) -> None:
    images = scenes(1, 64, 64).requires_grad_()
    before = reward(images, PROMPTS[:1])
    for aspect in (before.quality, before.correspondence):
        (gradient,) = torch.autograd.grad(aspect.sum(), images, retain_graph=True)
        assert gradient.norm() > 0
    before.total.sum().backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in reward.parameters())
    reward.train()
    assert not any(module.training for module in reward.modules())
    assert torch.equal(reward(images, PROMPTS[:1]).total, before.total)


def test_rows_do_not_depend_on_their_batch(reward: Reward, seen: tuple[torch.Tensor, RewardOutput]) -> None:
    (images, together), order = seen, torch.tensor([2, 0, 1])
    with torch.no_grad():
        permuted = reward(images[order], [PROMPTS[i] for i in order])
        alone = reward(images[1:2], PROMPTS[1:2])
        encoded = reward(images, reward.encode_prompts(PROMPTS))
    assert torch.allclose(encoded.total, together.total, atol=1e-6)
    assert all(len(detail) == 3 for detail in together.details.values())
    for aspect in ("total", "quality", "correspondence"):
        scores = getattr(together, aspect)
        assert torch.allclose(scores[order], getattr(permuted, aspect), atol=1e-5)
        assert abs(float(scores[1] - getattr(alone, aspect)[0])) < 1e-5


def test_quality_does_not_depend_on_the_prompt_but_correspondence_does(reward: Reward) -> None:
    images = scenes(1, 96, 96)
    with torch.no_grad():
        without = reward(images)
        first, second = reward(images, PROMPTS[:1]), reward(images, PROMPTS[1:2])
    assert without.correspondence is None
    assert torch.equal(without.total, without.quality)
    assert torch.allclose(without.quality, first.quality, atol=1e-6)
    assert torch.equal(first.quality, second.quality)
    assert abs(float(first.correspondence - second.correspondence)) > 1e-6


def test_one_image_has_one_score_in_every_form(reward: Reward, tmp_path: Path) -> None:
    image = (scenes(1, 72, 100)[0] * 255).round() / 255
    array = (image * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(array).save(tmp_path / "image.png")
    forms = [Image.fromarray(array), tmp_path / "image.png", array, image, image.permute(1, 2, 0), array / 255.0]
    scores = Scorer(reward, batch_size=2).score(forms, PROMPTS[0]).total
    batch = Scorer(reward).score(image.permute(1, 2, 0)[None], PROMPTS[0]).total
    assert float(scores.max() - scores.min()) < 1e-3
    assert abs(float(batch[0] - scores[0])) < 1e-3


SIZES = [(16, 16), (16, 512), (512, 31)]


@pytest.mark.parametrize(
    "size", [*SIZES, *(pytest.param(size, marks=pytest.mark.slow) for size in ((2048, 16), (224, 1000), (1536, 2048)))]
)
def test_every_size_and_aspect_ratio_scores(reward: Reward, size: tuple[int, int]) -> None:
    with torch.no_grad():
        output = reward(scenes(1, *size), PROMPTS[:1])
    assert torch.isfinite(output.total).all()
    assert torch.isfinite(output.correspondence).all()


def test_precision_of_inputs_and_reward(make: Maker) -> None:
    images = scenes(1, 64, 64)
    single, double = make(), make(dtype=torch.float64)
    with torch.no_grad():
        full = single(images, PROMPTS[:1])
        assert full.total.dtype == torch.float32
        for half in (torch.float16, torch.bfloat16):
            output = single(images.to(half), PROMPTS[:1])
            assert {output.total.dtype, output.quality.dtype, output.correspondence.dtype} == {torch.float32}
        exact = double(images.double(), PROMPTS[:1])
    assert {exact.total.dtype, exact.quality.dtype, exact.correspondence.dtype} == {torch.float64}
    assert all(detail.dtype == torch.float64 for detail in exact.details.values() if detail.is_floating_point())
    assert torch.allclose(exact.total.float(), full.total, atol=1e-4)


def test_errors_name_the_argument_and_the_remedy(reward: Reward) -> None:
    images = scenes(2, 64, 64)
    with pytest.raises(ValueError, match=r"2 images.*expand"):
        reward(images, PROMPTS)
    with pytest.raises(TypeError, match=r"prompts.*one string.*len\(images\)"):
        reward(images, PROMPTS[0])
    with pytest.raises(ValueError, match=r"prompts\[1\] is empty"):
        reward(images, [PROMPTS[0], "  "])
    with pytest.raises(TypeError, match=r"prompts\[0\]: expected a string, got NoneType"):
        reward(images, [None, PROMPTS[0]])
    with pytest.raises(ValueError, match=r"images\.from_vae"):
        reward(images * 2 - 1, PROMPTS[:2])
    with pytest.raises(ValueError, match="NaN"):
        reward(images.where(images < 0.5, torch.nan), PROMPTS[:2])
    with pytest.raises(TypeError, match="255"):
        reward((images * 255).byte(), PROMPTS[:2])
    foreign = reward.encode_prompts(PROMPTS[:2])
    with pytest.raises(ValueError, match="encoded by 'other'"):
        reward(images, type(foreign)(texts=foreign.texts, index=foreign.index, tensors=foreign.tensors, model="other"))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [(" ".join(f"word{i}" for i in range(300)), r"300 words.*dropped.*word299"), ("桌子上的红苹果", "Latin")],
    ids=["long", "another script"],
)
def test_prompts_are_scored_with_a_warning(reward: Reward, prompt: str, message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        features = reward.encode_prompts([prompt])
    with torch.no_grad():
        assert torch.isfinite(reward(scenes(1, 64, 64), features).total).all()


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float64, torch.bfloat16))],
)
def test_saved_and_loaded_rewards_are_equal_to_the_bit(make: Maker, tmp_path: Path, dtype: torch.dtype) -> None:
    reward = make(quality_weight=3.0, correspondence_weight=1.0, dtype=dtype)
    reward.save_pretrained(tmp_path)
    again, direct = make(weights=tmp_path), Reward.from_pretrained(tmp_path)
    images = scenes(1, 64, 96)
    with torch.no_grad():
        expected = reward(images, PROMPTS[:1])
        mean = 0.75 * expected.quality + 0.25 * expected.correspondence
        assert torch.allclose(expected.total, mean, atol=1e-6)
        for loaded in (again, direct):
            assert loaded.quality_weight == 3.0
            output = loaded(images, PROMPTS[:1])
            assert torch.equal(output.total, expected.total)
            assert torch.equal(output.correspondence, expected.correspondence)
    assert {file.suffix for file in tmp_path.iterdir()} <= {".json", ".safetensors", ".md"}


@pytest.fixture(autouse=True)
def _leaves_global_randomness_alone() -> Iterator[None]:
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(before, torch.random.get_rng_state()), "the library drew from the global generator"
