from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_models import write_tiny_clip
from scipy.stats import spearmanr
from scored_images import tiny_model, write_scored_images

from aigiqa_reward.datasets import PreferencePairs, ScoredImages, Split, split_rows
from aigiqa_reward.rewards.build import build_model
from aigiqa_reward.training.fit import FitResult, fit, predict
from aigiqa_reward.training.recipes import Recipe
from aigiqa_reward.training.store import FeatureStore, LiveImages, store_features
from aigiqa_reward.training.tasks import PairTask, ScoreTask

PARTS = ("train", "validation", "test")
QUICK = Recipe(learning_rate=1e-2, batch_size=16, epochs=4)


@dataclass
class Bench:
    clip: Path
    folder: Path
    images: ScoredImages

    def __post_init__(self) -> None:
        self.split = split_rows(self.images, seed=0)
        self.task = ScoreTask.of(self.images, self.split.train)

    def source(self, model: Any, task: Any = None) -> FeatureStore:
        task = task or self.task
        return store_features(model, task.paths, task.prompts, self.folder / "store", progress=False)

    def fit(self, model: Any, recipe: Recipe, *, task: Any = None, **options: Any) -> FitResult:
        given: dict[str, Any] = {"split": self.split, "folder": None, "progress": False, **options}
        task = task or self.task
        source = given.pop("source", None) or self.source(model, task)
        return fit(model, task, given.pop("split"), recipe, source, given.pop("folder"), **given)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("fit")
    images = write_scored_images(folder / "data", prompts=24, images=8)
    return Bench(write_tiny_clip(folder / "clip", seed=0), folder, images)


def other_color(prompt: str) -> str:
    return prompt.replace("red", "blue") if "red" in prompt else prompt.replace("blue", "red")


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("ema", [0.0, pytest.param(0.9, marks=pytest.mark.slow)])
def test_it_learns_to_rank_images_and_to_read_prompts(bench: Bench, ema: float) -> None:
    model, rows = tiny_model("mst_clipiqa", bench.clip), bench.split.test
    swapped = [other_color(prompt) for prompt in bench.images.prompts]

    def agreement(prompts: Any) -> list[float]:
        scores = predict(model, prompts, bench.source(model), rows, progress=False)
        people = bench.images.quality[rows], bench.images.correspondence[rows]
        return [float(spearmanr(x, y)[0]) for x, y in zip(scores, people, strict=True)]

    assert max(map(abs, agreement(bench.images.prompts))) < 0.5
    result = bench.fit(model, replace(QUICK, epochs=25, ema=ema))
    assert min(agreement(bench.images.prompts)) > 0.6
    assert agreement(swapped)[1] < -0.3, "a picture fits the other color's prompts the less, the more it fits its own"
    assert result.best > 0.6
    assert result.history[-1]["loss"] < result.history[0]["loss"] / 2


def test_preferences_teach_which_image_is_better(bench: Bench) -> None:
    images = bench.images
    pairs_of_rows = [(a, b) for a, b in combinations(range(len(images)), 2) if images.prompts[a] == images.prompts[b]]
    kept = [(a, b) if images.quality[a] > images.quality[b] else (b, a) for a, b in pairs_of_rows]
    better, worse = (tuple(images.paths[pair[side]] for pair in kept) for side in (0, 1))
    pairs = PreferencePairs(prompts=tuple(images.prompts[a] for a, _ in kept), better=better, worse=worse)
    task, model, split = PairTask(pairs), tiny_model("mst_clipiqa", bench.clip), split_rows(pairs, seed=0)
    bench.fit(model, replace(QUICK, epochs=5), task=task, split=split)
    scores = predict(model, task.prompts, bench.source(model, task), task.rows(split.test), progress=False)
    total = np.stack([part for part in scores if part is not None]).mean(axis=0)
    assert np.mean(total[: len(split.test)] > total[len(split.test) :]) > 0.75


def test_other_prompts_are_pushed_below_an_images_own(bench: Bench) -> None:
    fitting = np.flatnonzero(bench.images.correspondence > 0.5 + 4 * 0.6)
    split = Split(**{part: np.intersect1d(getattr(bench.split, part), fitting) for part in PARTS})
    prompts = bench.images.prompts, [other_color(prompt) for prompt in bench.images.prompts]

    def gap(weight: float) -> float:
        model = tiny_model("mst_clipiqa", bench.clip)
        bench.fit(model, replace(QUICK, epochs=14, mismatch_weight=weight), split=split)
        own, other = (predict(model, p, bench.source(model), split.test, progress=False)[1] for p in prompts)
        return float(np.mean(own - other))

    assert gap(1.0) > gap(0.0) + 0.1


def test_prompts_that_are_held_out_are_not_seen_as_wrong_ones_either(bench: Bench) -> None:
    held, prompts = set(bench.split.test), bench.images.prompts  # words of as many tokens leave padding as it is
    prompts = tuple(
        p.replace("red", "pink").replace("blue", "gray") if row in held else p for row, p in enumerate(prompts)
    )
    assert set(prompts) - set(bench.images.prompts)
    altered = ScoreTask.of(replace(bench.images, prompts=prompts), bench.split.train)
    trained = []
    for task in (bench.task, altered):
        model = tiny_model("mst_clipiqa", bench.clip)
        source = bench.source(model)
        bench.fit(model, replace(QUICK, epochs=2, mismatch_weight=1.0), task=task, source=source)
        trained.append(weights(model))
    assert not changed(*trained)


@pytest.mark.parametrize(
    ("name", "settings"), [("tsp_mgs", {"adapter_rank": 4}), pytest.param("mst_clipiqa", {}, marks=pytest.mark.slow)]
)
def test_frozen_towers_stay_as_they_were(bench: Bench, name: str, settings: dict[str, Any]) -> None:
    model = tiny_model(name, bench.clip, **settings)
    before = weights(model)
    bench.fit(model, replace(QUICK, crops=2))
    moved = changed(before, weights(model))
    assert moved and all(name.startswith("head.") for name in moved)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


class FirstIsBest(ScoreTask):
    epochs = 0

    def measure(self, *scores: Any) -> float:
        self.epochs += 1
        return super().measure(*scores) - 3 * self.epochs


def test_fine_tuned_towers_learn_images_and_texts_but_no_temperature(bench: Bench) -> None:
    model, part = tiny_model("tsp_mgs", bench.clip), bench.images.subset(np.arange(24))
    split = Split(train=np.arange(16), validation=np.arange(16, 24), test=np.zeros(0, int))
    task = FirstIsBest.of(part, split.train)
    before = weights(model)
    with torch.no_grad():  # before the towers change, so that anything that is kept of them would be stale
        model(torch.rand(1, 3, 40, 40), model.encode_prompts(["a red house"]))
    recipe = Recipe(loss="mae", learning_rate=3e-3, weight_decay=0.0, batch_size=4, epochs=3, train_towers=True)
    source = LiveImages(part.paths, part.prompts, progress=False)
    assert bench.fit(model, recipe, task=task, split=split, source=source, seed=1).best_epoch == 1
    moved = changed(before, weights(model))
    for tower in ("clip.visual.transformer", "clip.transformer", "clip.token_embedding", "clip.text_projection"):
        assert any(name.startswith(f"encoder.{tower}") for name in moved), tower
    assert "encoder.clip.logit_scale" not in moved
    again, image = tiny_model("tsp_mgs", bench.clip), torch.rand(2, 3, 40, 40)
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        first, second = (m(image, m.encode_prompts(["a red house"] * 2)) for m in (model, again))
    assert torch.equal(first.quality, second.quality) and torch.equal(first.correspondence, second.correspondence)


def test_batch_norms_learn_weights_and_keep_statistics(bench: Bench) -> None:
    model: Any = build_model("mst_clipiqa", settings={"coarse_side": 64, "fine_side": 64, "width": 32})
    part = bench.images.subset(np.arange(9))
    split = Split(train=np.arange(4), validation=np.arange(4, 9), test=np.zeros(0, int))
    before = weights(model)
    recipe = replace(QUICK, batch_size=4, epochs=1, train_towers=True)
    source = LiveImages(part.paths, part.prompts, progress=False)
    bench.fit(model, recipe, task=ScoreTask.of(part, split.train), split=split, source=source)
    moved = changed(before, weights(model))
    assert any("bn1.weight" in name for name in moved)
    assert not [name for name in moved if name.endswith(("running_mean", "running_var", "num_batches_tracked"))]


def test_the_seed_decides_everything_and_global_randomness_is_left_alone(bench: Bench) -> None:
    recipe, found = replace(QUICK, epochs=1, mismatch_weight=0.3), []
    for run, seed in enumerate((3, 3, 4)):
        model = tiny_model("mst_clipiqa", bench.clip, bottleneck=0.01)  # which draws noise in training
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run)
            before = torch.random.get_rng_state(), str(np.random.get_state()), random.getstate()  # noqa: NPY002
            found.append((bench.fit(model, recipe, seed=seed), weights(model)))
            assert torch.equal(before[0], torch.random.get_rng_state())
            assert before[1:] == (str(np.random.get_state()), random.getstate())  # noqa: NPY002
    assert found[0][0] == found[1][0]
    assert not changed(found[0][1], found[1][1])
    assert changed(found[0][1], found[2][1])


@pytest.mark.parametrize("batch_size", [7, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_epoch_shows_every_example_once(bench: Bench, batch_size: int) -> None:
    model = tiny_model("mst_clipiqa", bench.clip)
    source, part = bench.source(model), bench.split.train[:33]
    seen: list[np.ndarray] = []

    def note(module: Any, inputs: Any, _output: Any) -> None:
        if module.training:
            seen.append(inputs[0].detach().numpy().copy())

    model.head.fusion.register_forward_hook(note)
    split = replace(bench.split, train=part)
    bench.fit(model, replace(QUICK, batch_size=batch_size, epochs=2), split=split, source=source)
    assert len(seen) == 2 * max(1, 33 // batch_size)
    assert np.ptp([len(step) for step in seen]) <= 1
    rows = np.concatenate(seen)
    expected = source.features(model, part, torch.device("cpu"))[0]["coarse"].numpy()
    assert Counter(map(bytes, rows)) == Counter(map(bytes, np.concatenate([expected, expected])))


def test_early_stopping_keeps_the_best_epoch(bench: Bench) -> None:
    model = tiny_model("mst_clipiqa", bench.clip)
    recipe = replace(QUICK, learning_rate=0.03, epochs=60, patience=2, schedule="constant")
    result = bench.fit(model, recipe)
    values = [entry["validation"] for entry in result.history]
    assert result.stopped_early and len(values) == result.best_epoch + 2 < 60
    assert max(values) == values[result.best_epoch - 1] == result.best
    rows = bench.split.validation
    scores = predict(model, bench.images.prompts, bench.source(model), rows, progress=False)
    people = bench.images.quality[rows], bench.images.correspondence[rows]
    measured = np.mean([spearmanr(x, y)[0] for x, y in zip(scores, people, strict=True)])
    assert measured == pytest.approx(result.best), "the weights are those of that epoch"
    last = tiny_model("mst_clipiqa", bench.clip)
    second = bench.fit(last, replace(recipe, epochs=len(values), patience=None, keep="last"))
    assert [entry["validation"] for entry in second.history] == values
    assert (second.best_epoch, second.best) == (len(values), values[-1])
    assert any(not torch.equal(a, b) for a, b in zip(model.head.parameters(), last.head.parameters(), strict=True))


def test_refusals_name_the_argument(bench: Bench) -> None:
    model = tiny_model("mst_clipiqa", bench.clip)
    with pytest.raises(ValueError, match=r"^source: .*FeatureStore with train_towers=True"):
        bench.fit(model, replace(QUICK, train_towers=True))
    with pytest.raises(ValueError, match=r"^split: .*got \d+ and 0"):
        bench.fit(model, QUICK, split=replace(bench.split, validation=np.zeros(0, int)))
    with pytest.raises(ValueError, match=r"^learning_rate: the loss became (nan|inf) in epoch \d+; lower"):
        bench.fit(model, replace(QUICK, learning_rate=1e30))
