"""Sharpness-aware and smoothed rewards against closed forms, in float64."""

from __future__ import annotations

import math
from typing import Any

import pipelines
import pytest
import torch
from pipelines import SIDE
from torch import Tensor, nn

from aigiqa_reward import CompositeReward, RewardOutput, Scorer, SharpnessAwareReward, SmoothedReward, create_reward
from aigiqa_reward.rewards.bound import BoundReward, device_of, reward_name
from aigiqa_reward.sampling import NoiseOptimizer, RewardGuidance
from aigiqa_reward.utils.run_folder import reward_identity

RADIUS = 0.01
PROMPTS = ["a fox", "a cat", "a dog"]


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pictures(count: int = 3, side: int = 16) -> Tensor:
    return random(count, 3, side, side).requires_grad_()


class Quadratic(nn.Module):
    """-(x - center)' D (x - center) / 2 with a diagonal D; with an even one the worst image in a ball is known."""

    def __init__(self, *, even: bool = True) -> None:
        super().__init__()
        self.center = nn.Parameter(random(3, 16, 16, seed=1))
        self.slopes = torch.full((3, 16, 16), 2.0, dtype=torch.float64) if even else random(3, 16, 16, seed=2)

    def forward(self, images: Tensor, prompts: Any) -> Tensor:
        return -(self.slopes * (images - self.center).square()).sum(dim=(1, 2, 3)) / 2


class Aspects(Quadratic):
    """Both aspects, of which correspondence depends on the prompt's length."""

    def forward(self, images: Tensor, prompts: Any) -> RewardOutput:
        quality, lengths = super().forward(images, prompts), images.new_tensor([len(prompt) for prompt in prompts])
        match = (images.sin().mean(dim=(1, 2, 3)) * lengths).sigmoid()
        return RewardOutput(total=quality + match, quality=quality, correspondence=match)


def rms(images: Tensor) -> Tensor:
    return images.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()


def gradient(reward: Any, images: Tensor) -> Tensor:
    output = reward(images, PROMPTS[: len(images)])
    total = output.total if isinstance(output, RewardOutput) else output
    return torch.autograd.grad(total.sum(), images)[0]


def test_the_gradient_is_that_at_the_worst_image_of_the_ball() -> None:
    images, plain = pictures(), Quadratic()
    reward = SharpnessAwareReward(plain, radius=RADIUS)
    away = (images - plain.center).detach()
    worst = images.detach() + RADIUS * away / rms(away)
    torch.testing.assert_close(gradient(reward, images), -2 * (worst - plain.center).detach())
    others = [random(3, 3, 16, 16, seed=seed) - 0.5 for seed in range(20)]
    totals = [plain(images + RADIUS * other / rms(other), PROMPTS) for other in others]
    assert bool((plain(worst, PROMPTS) < torch.stack(totals).amin(dim=0)).all())
    assert torch.equal(reward(images, PROMPTS).total, plain(images, PROMPTS)), "the score is that of the image"


def test_one_step_is_taken_where_the_slopes_differ() -> None:
    images, plain = pictures(), Quadratic(even=False)
    away = (plain.slopes * (images - plain.center)).detach()
    expected = -plain.slopes * (images.detach() + RADIUS * away / rms(away) - plain.center)
    torch.testing.assert_close(gradient(SharpnessAwareReward(plain, radius=RADIUS), images), expected.detach())


def test_a_radius_of_zero_gives_the_plain_gradient_and_no_gradient_costs_nothing() -> None:
    images, plain, calls = pictures(), Quadratic(even=False), []

    def counted(images: Tensor, prompts: Any) -> Tensor:
        calls.append(len(images))
        return plain(images, prompts)

    assert torch.equal(gradient(SharpnessAwareReward(counted, radius=0.0), images), gradient(plain, images))
    reward = SharpnessAwareReward(counted)
    with torch.no_grad():
        reward(images, PROMPTS)
    assert Scorer(reward).score(images.detach().float(), PROMPTS).total.shape == (3,)
    reward(images.detach(), PROMPTS)
    assert len(calls) == 4
    gradient(reward, images)
    assert len(calls) == 6, "one more forward pass"
    assert all(weight.grad is None for weight in plain.parameters())


@pytest.mark.parametrize("kind", [SharpnessAwareReward, SmoothedReward])
def test_a_row_depends_neither_on_batch_mates_nor_on_its_place(kind: Any) -> None:
    plain = Aspects()
    reward, images = kind(plain), pictures(2)
    output = reward(images, PROMPTS[:2])
    found = torch.autograd.grad(output.total.sum(), images)[0]
    alone = images[1:].detach().requires_grad_()
    own = reward(alone, PROMPTS[1:2])
    for name in ("total", "quality", "correspondence"):
        torch.testing.assert_close(getattr(own, name), getattr(output, name)[1:])
    torch.testing.assert_close(torch.autograd.grad(own.total.sum(), alone)[0], found[1:])
    assert all(weight.grad is None for weight in plain.parameters())


def test_every_aspect_has_a_gradient_at_the_worst_image() -> None:
    def both(images: Tensor, prompts: Any) -> RewardOutput:
        quality, correspondence = images.square().mean(dim=(1, 2, 3)), images.pow(3).mean(dim=(1, 2, 3))
        return RewardOutput(total=quality, quality=quality, correspondence=correspondence, details={"mine": quality})

    images = pictures(1)
    output = SharpnessAwareReward(both, radius=RADIUS)(images, PROMPTS[:1])
    worst = images.detach() * (1 - RADIUS / rms(images.detach()))
    assert output.correspondence is not None
    found = torch.autograd.grad(output.correspondence.sum(), images)[0]
    torch.testing.assert_close(found, 3 * worst.square() / images.numel())
    assert torch.equal(output.correspondence, images.pow(3).mean(dim=(1, 2, 3)))
    assert torch.equal(output.details["mine"], both(images, None).total)


def test_a_gradient_of_zero_or_none_moves_nothing() -> None:
    images = pictures(2)
    flat = SharpnessAwareReward(lambda images, prompts: (0 * images).mean(dim=(1, 2, 3)))
    assert gradient(flat, images).count_nonzero() == 0
    tiny = SharpnessAwareReward(lambda images, prompts: 1e-200 * images.square().mean(dim=(1, 2, 3)), radius=RADIUS)
    worst = images.detach() * (1 - RADIUS / rms(images.detach()))
    torch.testing.assert_close(1e200 * gradient(tiny, images), 2 * worst / images[0].numel())
    without = SharpnessAwareReward(lambda images, prompts: images.detach().mean(dim=(1, 2, 3)))
    with pytest.raises(ValueError, match=r"needs its gradient .*<lambda> \(sharpness-aware"):
        BoundReward(without).check_differentiable("DRaFT", "a fox")


def test_worst_images_stay_within_the_range_that_rewards_accept() -> None:
    images = torch.tensor([-0.5, 1.5, 0.5], dtype=torch.float64).view(3, 1, 1, 1).expand(3, 3, 16, 16).clone()
    seen: list[Tensor] = []

    def brightness(images: Tensor, prompts: Any) -> Tensor:
        seen.append(images.detach())
        return images.mean(dim=(1, 2, 3))

    for reward in (SharpnessAwareReward(brightness, radius=RADIUS), SmoothedReward(brightness, noise=0.3, n=1)):
        found = gradient(reward, images.requires_grad_())
        assert seen[-1].amin() >= -0.5 and seen[-1].amax() <= 1.5
        torch.testing.assert_close(found.sum(dim=(1, 2, 3)), torch.ones(3, dtype=torch.float64))
    assert seen[1][:, 0, 0, 0].tolist() == pytest.approx([-0.5, 1.49, 0.49])


def test_a_smoothed_linear_reward_is_the_reward_in_expectation() -> None:
    weights = random(3, 16, 16, seed=3) - 0.5

    def linear(images: Tensor, prompts: Any) -> Tensor:
        return (weights * images).sum(dim=(1, 2, 3))

    images, noise, count = pictures(), 0.1, 4000
    expected = linear(images, None)
    found = SmoothedReward(linear, noise=noise, shift=0, n=count)(images, PROMPTS)
    deviation = noise * float(weights.norm()) / math.sqrt(count)
    assert (found.total - expected).abs().max() < 4 * deviation
    assert (SmoothedReward(linear, noise=noise, shift=0, n=1)(images, PROMPTS).total != expected).all()
    torch.testing.assert_close(torch.autograd.grad(found.total.sum(), images)[0], weights.expand(3, -1, -1, -1))
    exact = SmoothedReward(linear, noise=0.0, shift=0)
    assert torch.equal(exact(images, PROMPTS).total, expected)
    assert torch.equal(gradient(exact, images), weights.expand(3, -1, -1, -1))


def test_shifts_are_uniform_and_move_the_picture() -> None:
    ramp = torch.arange(16, dtype=torch.float64) / 16
    across = ramp.expand(1, 3, 16, 16).contiguous()
    down = across.transpose(2, 3)

    def center(images: Tensor, prompts: Any) -> Tensor:
        return images[:, :, 7:9, 7:9].mean(dim=(1, 2, 3))

    for image in (across, down):
        one = [SmoothedReward(center, noise=0, shift=3, n=1, seed=s)(image, PROMPTS[:1]).total for s in range(300)]
        moves = ((torch.cat(one) - center(image, None)) * 16).round(decimals=9)
        assert sorted(set(moves.tolist())) == [-3, -2, -1, 0, 1, 2, 3]
        mean = SmoothedReward(center, noise=0, shift=3, n=3000)(image, PROMPTS[:1]).total
        assert float(mean) == pytest.approx(float(center(image, None)), abs=4 * 2 / 16 / math.sqrt(3000))


def test_draws_are_those_of_the_seed_and_leave_the_random_state() -> None:
    def plain(images: Tensor, prompts: Any) -> Tensor:
        return images.square().mean(dim=(1, 2, 3))

    images = pictures(2, 32)
    before = torch.random.get_rng_state()
    one, again, other = (SmoothedReward(plain, seed=seed)(images, PROMPTS[:2]).total for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), before)
    half = SmoothedReward(plain, seed=1)(images.float(), PROMPTS[:2]).total
    torch.testing.assert_close(half.double(), one, rtol=1e-5, atol=1e-6)


def test_wrapped_rewards_work_wherever_a_reward_does() -> None:
    plain = create_reward("compact")
    images = pictures(3, 32).detach().float()
    for reward in (SharpnessAwareReward(plain), SmoothedReward(plain), SharpnessAwareReward(SmoothedReward(plain))):
        assert device_of(reward) == torch.device("cpu")
        assert Scorer(reward).score(images, PROMPTS).correspondence is not None
        assert CompositeReward({"mine": reward})(images, PROMPTS).total.shape == (3,)
        assert "compact" in reward_name(reward)
    settings: list[Any] = [SharpnessAwareReward(plain), SharpnessAwareReward(plain, radius=0.1), SmoothedReward(plain)]
    settings += [SmoothedReward(plain, seed=1), SmoothedReward(plain, n=1), plain]
    assert len({reward_identity(reward) for reward in settings}) == len(settings)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(SharpnessAwareReward, {"radius": value}) for value in (-1.0, math.inf, math.nan)]
    + [(SmoothedReward, {name: -1}) for name in ("noise", "shift")]
    + [(SmoothedReward, {"n": 0}), (SmoothedReward, {"seed": 2**64})],
)
def test_settings_out_of_range_are_refused(kind: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(settings))}: expected"):
        kind(Quadratic(), **settings)
    with pytest.raises(TypeError, match=r"^reward: expected a Reward, its name or a function"):
        kind(3)


def corner(images: Tensor, prompts: Any) -> Tensor:
    return images[:, 0, :4, :4].sin().mean(dim=(1, 2))


def test_guidance_and_noise_optimization_take_the_gradient_at_the_worst_image() -> None:
    pipe, call = pipelines.stable_diffusion(), {"height": SIDE, "width": SIDE, "num_inference_steps": 1}
    plan: dict[str, Any] = {"iterations": 1, "clip": math.inf, "progress": False}
    noises = []
    for reward, radius in ((corner, 0.0), (corner, 0.2), (SharpnessAwareReward(corner, radius=0.2), 0.0)):
        out = NoiseOptimizer(pipe, reward, image_radius=radius, **plan)("a cat", **call)
        noises.append(out.noise)
    assert torch.equal(noises[1], noises[2]) and not torch.equal(noises[0], noises[1])
    norms = []
    for reward, radius in ((corner, 0.0), (corner, 0.2), (SharpnessAwareReward(corner, radius=0.2), 0.0)):
        with RewardGuidance(pipe, reward, "a cat", image_radius=radius) as guidance:
            pipe("a cat", callback_on_step_end=guidance, generator=torch.Generator().manual_seed(0), **call)
        norms.append((guidance.history[0].total, guidance.history[0].gradient_norm))
    assert norms[1] == norms[2] != norms[0] and norms[0][0] == norms[1][0]
    message = r"^image_radius: expected a number of at least 0"
    with pytest.raises(ValueError, match=message):
        RewardGuidance(pipe, corner, "a cat", image_radius=-1.0)
    with pytest.raises(ValueError, match=message):
        NoiseOptimizer(pipe, corner, image_radius=-1.0)
