from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import huber
from scipy.stats import pearsonr, spearmanr

from aigiqa_reward.datasets import PreferencePairs, ScoredImages
from aigiqa_reward.rewards.build import SYSTEMS
from aigiqa_reward.training.fit import rate
from aigiqa_reward.training.recipes import EMBEDDED, PUBLISHED, Recipe
from aigiqa_reward.training.tasks import (
    POINTWISE,
    PairTask,
    ScoreTask,
    pairwise_margin_loss,
    pairwise_preference_loss,
    preference_loss,
)

NAN = float("nan")


def scores(count: int, seed: int) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def margin_by_loops(predicted: list[float], target: list[float], margin: float) -> float:
    terms = []
    for i, j in product(range(len(predicted)), repeat=2):
        if target[i] != target[j]:
            sign = 1 if target[i] > target[j] else -1
            terms.append(max(0.0, -sign * (predicted[i] - predicted[j]) + margin))
    return sum(terms) / len(terms) if terms else 0.0


def bradley_terry_by_loops(predicted: list[float], target: list[float], temperature: float) -> float:
    terms = []
    for i, j in product(range(len(predicted)), repeat=2):
        if target[i] > target[j]:
            logit = torch.tensor((predicted[i] - predicted[j]) / temperature, dtype=torch.float64)
            terms.append(-float(torch.distributions.Bernoulli(logits=logit).log_prob(torch.tensor(1.0).double())))
    return sum(terms) / len(terms) if terms else 0.0


@pytest.mark.parametrize("count", [1, 2, 9])
def test_pairwise_losses_equal_their_sums(count: int) -> None:
    predicted, target = scores(count, 0), (scores(count, 50) * 4).round()  # with ties
    for value in (0.0, 0.1, 0.7):
        expected = margin_by_loops(predicted.tolist(), target.tolist(), value)
        assert float(pairwise_margin_loss(predicted, target, margin=value)) == pytest.approx(expected, abs=1e-12)
    for value in (0.05, 1.0, 10.0):
        expected = bradley_terry_by_loops(predicted.tolist(), target.tolist(), value)
        found = pairwise_preference_loss(predicted, target, temperature=value)
        assert float(found) == pytest.approx(expected, abs=1e-12)


def test_losses_of_scores_and_of_given_pairs_equal_numpy_and_bernoulli() -> None:
    predicted, target = scores(7, 0) * 3, scores(7, 1)
    error = (predicted - target).numpy()
    expected = {"mse": (error**2).mean(), "mae": np.abs(error).mean(), "smooth_l1": huber(1.0, error).mean()}
    assert {name: float(loss(predicted, target)) for name, loss in POINTWISE.items()} == pytest.approx(expected)
    wins = torch.distributions.Bernoulli(logits=(predicted - target) / 0.1).log_prob(torch.ones(7).double())
    assert float(preference_loss(predicted, target, temperature=0.1)) == pytest.approx(-float(wins.mean()))
    assert float(preference_loss(-torch.ones(1) * 1e4, torch.ones(1) * 1e4)) == pytest.approx(2e4)


ALL: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    **POINTWISE,
    "margin": pairwise_margin_loss,
    "pairwise": pairwise_preference_loss,
}


@pytest.mark.parametrize("name", ALL)
def test_a_step_down_the_gradient_raises_the_better_image_and_equal_targets_cost_nothing(name: str) -> None:
    predicted = torch.tensor([0.5, 0.5], requires_grad=True)
    (gradient,) = torch.autograd.grad(ALL[name](predicted, torch.tensor([0.9, 0.1])), predicted)
    assert gradient[0] < 0 < gradient[1]
    if name not in POINTWISE:
        for count in (1, 4):
            predicted = scores(count, 0).requires_grad_()
            loss = ALL[name](predicted, torch.full((count,), 0.3).double())
            (gradient,) = torch.autograd.grad(loss, predicted)
            assert float(loss.detach()) == 0.0 and not gradient.any()


def scored(quality: list[float], correspondence: list[float]) -> ScoredImages:
    words, zeros = tuple("abcdefghijkl"[: len(quality)]), np.zeros(len(quality))
    texts = {"names": words, "paths": tuple(map(Path, words)), "prompts": words, "generators": words}
    scores = {"quality": np.array(quality), "correspondence": np.array(correspondence)}
    return ScoredImages(**texts, **scores, quality_std=zeros, correspondence_std=zeros)


def test_targets_are_shares_of_the_best_training_score() -> None:
    task = ScoreTask.of(scored([1.0, 2.0, 8.0], [3.0, NAN, 6.0]), np.array([0, 1]))
    assert np.array_equal(task.targets, [[0.5, 1.0], [1.0, NAN], [4.0, 2.0]], equal_nan=True)
    assert np.isnan(ScoreTask.of(scored([1.0, 2.0], [NAN, NAN]), np.array([0, 1])).targets[:, 1]).all()
    for best in (0.0, -1.0):  # divided by a negative best score, the order of images would turn round
        with pytest.raises(ValueError, match="quality: expected a best training score above 0"):
            ScoreTask.of(scored([best, -2.0, -3.0], [1.0, 1.0, 2.0]), np.arange(3))


@pytest.mark.parametrize("loss", ["mse", "mae", "smooth_l1", "pairwise", "none"])
def test_scores_that_nobody_gave_neither_cost_nor_pull(loss: str) -> None:
    task = ScoreTask.of(scored([2.0, NAN, 4.0, 1.0], [NAN, 3.0, NAN, 1.0]), np.arange(4))
    recipe = Recipe(loss=loss, rank_weight=0.7, margin=0.2, temperature=0.5)
    predicted = [scores(4, 5).float().requires_grad_(), scores(4, 6).float().requires_grad_()]
    examples = np.array([3, 1, 0, 2])
    total = task.loss((predicted[0], predicted[1]), examples, recipe)
    total.backward()
    expected = 0.0
    for part, column in zip(predicted, task.targets.T, strict=True):
        known = [i for i, row in enumerate(examples) if not math.isnan(column[row])]
        x, y = part.detach()[known], torch.tensor(column[examples[known]]).float()
        if loss in POINTWISE:
            expected += float(POINTWISE[loss](x, y))
        elif loss == "pairwise":
            expected += bradley_terry_by_loops(x.tolist(), y.tolist(), 0.5)
        expected += 0.7 * margin_by_loops(x.tolist(), y.tolist(), 0.2)
        unknown = [i for i in range(4) if i not in known]
        assert part.grad is not None and torch.isfinite(part.grad).all() and not part.grad[unknown].any()
    assert float(total.detach()) == pytest.approx(expected, rel=1e-5)


def test_validation_is_the_mean_over_the_scored_aspects() -> None:
    rng = np.random.default_rng(0)
    quality, correspondence = rng.random(8) + 0.1, rng.random(8) + 0.1
    predicted, examples = (rng.random(8), rng.random(8)), np.arange(8)
    task = ScoreTask.of(scored(quality.tolist(), correspondence.tolist()), examples)
    pairs = list(zip(predicted, (quality, correspondence), strict=True))
    ranks = np.mean([spearmanr(x, y)[0] for x, y in pairs])
    straight = np.mean([pearsonr(x, y)[0] for x, y in pairs])
    assert task.measure(*predicted, examples, "srcc") == pytest.approx(ranks)
    assert task.measure(*predicted, examples, "srcc+plcc") == pytest.approx(ranks + straight)
    assert task.measure(predicted[0], None, examples, "srcc") == pytest.approx(spearmanr(predicted[0], quality)[0])
    assert task.measure(np.ones(8), None, examples, "srcc") == -1.0, "a constant is worse than any order"
    with pytest.raises(ValueError, match="at least 5"):
        task.measure(predicted[0][:4], None, examples[:4], "srcc")


def test_preferences_pull_their_images_apart_and_count_what_was_ordered_right() -> None:
    better, worse = (Path("a1"), Path("b2"), Path("a1")), (Path("a2"), Path("b1"), Path("a3"))
    task = PairTask(PreferencePairs(prompts=("a", "b", "a"), better=better, worse=worse))
    examples = np.array([2, 1])
    rows = task.rows(examples)
    assert [task.paths[row] for row in rows] == [better[2], better[1], worse[2], worse[1]]
    assert [task.prompts[row] for row in rows] == ["a", "b", "a", "b"]
    readable = np.array([path != Path("a3") for path in task.paths])
    assert task.usable(np.arange(3), readable).tolist() == [0, 1]
    quality, match = torch.tensor([1.0, 0.0, 0.0, 3.0]).requires_grad_(), torch.tensor([0.5, 0.5, 0.0, 1.0])
    loss = task.loss((quality, match), examples, Recipe(temperature=2.0))
    loss.backward()
    logits = torch.tensor([0.75 - 0.0, 0.25 - 2.0]) / 2.0
    assert float(loss.detach()) == pytest.approx(
        -float(torch.distributions.Bernoulli(logits=logits).log_prob(torch.ones(2)).mean())
    )
    assert quality.grad is not None and (quality.grad[:2] < 0).all() and (quality.grad[2:] > 0).all()
    assert task.measure(quality.detach().numpy(), None, examples, "srcc") == 0.5


def test_an_image_in_pairs_of_several_prompts_is_read_with_that_of_each_pair() -> None:
    fox, cat, prompts = Path("fox.png"), Path("cat.png"), ("a red fox", "a gray cat", "a red fox")
    better, worse = (fox, cat, cat), (cat, fox, fox)
    task = PairTask(PreferencePairs(prompts=prompts, better=better, worse=worse))
    rows = task.rows(np.arange(3))
    assert [(task.paths[row], task.prompts[row]) for row in rows] == list(zip(better + worse, prompts * 2, strict=True))
    assert len(task.paths) == 4, "each image once with each of its prompts"


INVALID: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("loss", "optimizer", "schedule", "monitor", "keep"), ("other",)),
    **dict.fromkeys(("batch_size", "epochs", "step_epochs"), (0, 1.5, True, None)),
    **dict.fromkeys(("crops", "patience"), (0, 2.0)),
    **dict.fromkeys(("temperature", "learning_rate", "step_factor", "clip_norm"), (0.0, NAN, "1")),
    **dict.fromkeys(("rank_weight", "margin", "mismatch_weight", "mismatch_margin", "weight_decay"), (-0.1, math.inf)),
    **dict.fromkeys(("warmup_epochs", "ema"), (-0.1, NAN)),
}


def test_an_invalid_setting_is_named() -> None:
    for name, value in ((name, value) for name, values in INVALID.items() for value in values):
        with pytest.raises((ValueError, TypeError), match=f"^{name}: expected .*{value!r}"):
            Recipe(**{name: value})  # pyright: ignore[reportArgumentType]


def test_settings_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^loss: 'none' leaves nothing"):
        Recipe(loss="none")
    with pytest.raises(ValueError, match=r"^patience: .*keep='best'"):
        Recipe(keep="last", patience=3)


def test_every_system_has_both_recipes_and_embedded_ones_leave_the_towers_alone() -> None:
    assert PUBLISHED.keys() == SYSTEMS.keys() == EMBEDDED.keys() - {"compact"}
    assert not any(recipe.train_towers for recipe in EMBEDDED.values())


def test_rates_follow_their_schedules() -> None:
    base = Recipe(epochs=10, warmup_epochs=2.0, step_epochs=3, step_factor=0.1)
    for schedule in ("constant", "cosine", "step"):
        recipe = replace(base, schedule=schedule)
        assert 0 < rate(recipe, 0.0) < 0.01
        assert rate(recipe, 1.0) == pytest.approx(0.5, abs=0.01)
        assert all(0 <= rate(recipe, epochs) <= 1 for epochs in np.linspace(0, 10, 501))
    assert {rate(replace(base, schedule="constant"), epochs) for epochs in (2.0, 5.0, 9.9)} == {1.0}
    assert [rate(replace(base, schedule="step"), e) for e in (2.0, 4.9, 5.0, 8.0)] == pytest.approx([1, 1, 0.1, 0.01])
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
    for epoch in range(9):  # torch's own schedule over the eight epochs after the warm-up
        assert rate(replace(base, schedule="cosine"), 2.0 + epoch) == pytest.approx(cosine.get_last_lr()[0], abs=1e-6)
        optimizer.step()
        cosine.step()
