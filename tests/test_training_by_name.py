from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_models import write_tiny_clip
from scipy.stats import linregress, spearmanr
from scored_images import SMALL, tiny_tower, write_scored_images

from aigiqa_reward import Reward, Scorer, create_reward
from aigiqa_reward.datasets import PreferencePairs, ScoredImages, split_rows
from aigiqa_reward.evaluation import ProtocolReport
from aigiqa_reward.rewards.factory import get_reward_spec
from aigiqa_reward.training import report as protocol
from aigiqa_reward.training.by_name import Trained, TrainingPlan, calibrate
from aigiqa_reward.training.by_name import train_reward as train
from aigiqa_reward.training.fit import predict
from aigiqa_reward.training.recipes import EMBEDDED, PUBLISHED, Recipe
from aigiqa_reward.training.report import GENERATOR, MODEL, RIDGE, SHUFFLED, ProtocolSettings, run_protocol
from aigiqa_reward.training.store import FeatureStore
from aigiqa_reward.training.tasks import ScoreTask

QUICK = Recipe(learning_rate=1e-2, batch_size=8, epochs=6)
Planned = Callable[..., TrainingPlan]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ScoredImages:
    return write_scored_images(tmp_path_factory.mktemp("data"), prompts=16, images=6)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Planned:
    folder = tmp_path_factory.mktemp("towers")
    clip = write_tiny_clip(folder / "clip", seed=0)

    def planned(name: str = "mst_clipiqa", **changes: Any) -> TrainingPlan:
        role, settings = SMALL[name]
        defaults: dict[str, Any] = {"towers": {role: tiny_tower(clip)}, "settings": settings, "recipe": QUICK}
        return TrainingPlan(name=name, **{**defaults, "cache": folder / "store", **changes})

    return planned


@pytest.fixture(scope="module")
def trained(images: ScoredImages, plan: Planned, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, Path]:
    folder = tmp_path_factory.mktemp("trained")
    longer = plan(recipe=replace(QUICK, epochs=12))
    return train(longer, images, split_rows(images, seed=0), folder, progress=False), folder


def raw_scores(trained: Any, rows: np.ndarray) -> list[np.ndarray]:
    scores = predict(trained.reward.model, trained.task.prompts, trained.source, rows, progress=False)
    return [part for part in scores if part is not None]


def outputs(reward: Reward, images: ScoredImages) -> list[np.ndarray]:
    scores = Scorer(reward, batch_size=16).score(list(images.paths), list(images.prompts))
    assert scores.correspondence is not None
    return [scores.quality.numpy(), scores.correspondence.numpy()]


def test_a_trained_reward_loads_with_the_scores_it_was_judged_by(
    images: ScoredImages, plan: Planned, trained: tuple[Trained, Path]
) -> None:
    split, (first, folder) = split_rows(images, seed=0), trained
    found = outputs(create_reward("mst_clipiqa", weights=folder), images)
    expected = raw_scores(first, np.arange(len(images)))
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-3)  # the features of the second were stored as float16
    for x, y in zip(found, outputs(first.reward, images), strict=True):
        np.testing.assert_array_equal(x, y)
    for x, scores in zip(found, (images.quality, images.correspondence), strict=True):
        assert spearmanr(x[split.test], scores[split.test])[0] > 0.5
        shares = scores[split.train] / scores[split.train].max()  # 1 is the best human score
        assert np.abs(x[split.train] - shares).mean() < np.abs(shares.mean() - shares).mean() / 1.5
    longer = plan(recipe=replace(QUICK, epochs=12))
    assert train(longer, images, split, folder, progress=False).result == first.result, "there is nothing left to do"
    written = {file.name for file in folder.iterdir()}
    assert written >= {"checkpoint", "config.json", "model.safetensors", "training.json"}
    record = json.loads((folder / "training.json").read_text())
    assert record["plan"] == {"name": "mst_clipiqa", "preset": None, "settings": longer.settings, "seed": longer.seed}
    assert Recipe(**record["recipe"]) == longer.recipe


def test_losses_of_order_alone_end_on_the_human_scale(images: ScoredImages, plan: Planned) -> None:
    split = split_rows(images, seed=0)
    trained = train(plan(recipe=replace(QUICK, loss="pairwise")), images, split, None, progress=False)
    for raw, aspect in zip(raw_scores(trained, split.train), ("quality", "correspondence"), strict=True):
        scores = getattr(images, aspect)[split.train]
        line = linregress(raw, scores / scores.max())
        found = getattr(trained.reward.calibration, aspect).tolist()
        assert found == pytest.approx([line.slope, line.intercept], rel=1e-4)


def test_preferences_keep_the_scale_of_the_reward_they_refine(
    images: ScoredImages, plan: Planned, tmp_path: Path
) -> None:
    reward = Reward(plan().build(), get_reward_spec("mst_clipiqa"))
    reward.calibration.quality.copy_(torch.tensor([0.2, 0.5]))
    reward.save_pretrained(tmp_path / "former")
    pairs = PreferencePairs(prompts=images.prompts[:30], better=images.paths[:30], worse=images.paths[30:60])
    further = plan(towers={}, settings={}, init=tmp_path / "former", recipe=replace(QUICK, epochs=1))
    trained = train(further, pairs, split_rows(pairs, seed=0), tmp_path / "new", progress=False)
    for again in (trained.reward, Reward.from_pretrained(tmp_path / "new")):
        assert torch.equal(again.calibration.quality, reward.calibration.quality)
    assert TrainingPlan(name="cpa_iqa").calibration()["quality"].tolist() == [1, 0]
    embedded = TrainingPlan(name="cpa_iqa", init="embedded").calibration()
    assert torch.equal(embedded["quality"], create_reward("cpa_iqa").calibration.quality)


def test_too_few_images_to_choose_the_epoch_by_are_refused_before_features_are_computed(
    images: ScoredImages, plan: Planned, tmp_path: Path
) -> None:
    split = replace(split_rows(images, seed=0), validation=np.arange(0))
    with pytest.raises(ValueError, match=r"validation: expected at least 5 scored images.*got 0"):
        train(plan(cache=tmp_path / "store"), images, split, None)
    assert not (tmp_path / "store").exists()


def test_calibration_never_turns_the_order_round(images: ScoredImages, trained: tuple[Trained, Path]) -> None:
    first, rows = trained[0], np.arange(len(images))
    assert isinstance(first.task, ScoreTask)
    reversed_task = ScoreTask(images, 1.2 - first.task.targets)
    for raw, target in zip(raw_scores(first, rows), reversed_task.targets.T, strict=True):
        assert linregress(raw, target).slope < 0
    reward = Reward(first.reward.model, get_reward_spec("mst_clipiqa"))
    calibrate(reward, reversed_task, first.source, rows)
    assert reward.calibration.quality.tolist() == reward.calibration.correspondence.tolist() == [1.0, 0.0]


def test_a_failed_upload_says_that_the_reward_is_saved(
    images: ScoredImages, plan: Planned, trained: tuple[Trained, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(reward: Reward, repo: str) -> None:
        raise OSError(f"401 for {repo}")

    monkeypatch.setattr(Reward, "push_to_hub", refuse)
    longer, split = plan(recipe=replace(QUICK, epochs=12)), split_rows(images, seed=0)
    with pytest.raises(OSError, match=rf"hub_model_id: .* saved in {trained[1]}, .* me/mine: 401 for me/mine"):
        train(longer, images, split, trained[1], progress=False, hub_model_id="me/mine")
    with pytest.raises(ValueError, match="hub_model_id: expected owner/name, got 'mine'"):
        train(longer, images, split, None, hub_model_id="mine")


def test_plans_that_cannot_be_followed_are_refused(plan: Planned, tmp_path: Path) -> None:
    for arguments, message in (
        ({"name": "compact"}, r"^init: expected 'embedded', .*got None; examples/train_compact fits it afresh"),
        ({"name": "tsp-mgs"}, r"^name: expected one of .*tsp_mgs.*'tsp-mgs'$"),
        ({"name": "tsp_mgs", "init": tmp_path, "preset": "paper"}, r"^init: .*preset nor towers"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainingPlan(**arguments)
    Reward(plan().build(), get_reward_spec("mst_clipiqa")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a 'mst_clipiqa' reward, expected 'tsp_mgs'"):
        TrainingPlan(name="tsp_mgs", init=tmp_path).build()
    with pytest.raises(ValueError, match=r"seeds, ablation_seeds: .*got 2 and 3"):
        ProtocolSettings(seeds=2, ablation_seeds=3)


def test_the_recipe_follows_from_the_towers(plan: Planned) -> None:
    assert TrainingPlan(name="tsp_mgs").chosen_recipe == EMBEDDED["tsp_mgs"]
    assert TrainingPlan(name="tsp_mgs", preset="paper").chosen_recipe == PUBLISHED["tsp_mgs"]
    assert plan("tsp_mgs", recipe=None).chosen_recipe == PUBLISHED["tsp_mgs"]
    assert plan("tsp_mgs").chosen_recipe == QUICK
    for options in (Recipe, TrainingPlan, ProtocolSettings):
        assert all(field.metadata["help"].endswith(".") for field in fields(options))


def test_the_seed_draws_the_head_and_leaves_global_randomness_alone(plan: Planned) -> None:
    before = torch.random.get_rng_state()
    heads = [plan(seed=seed).build().head.state_dict().values() for seed in (1, 1, 2)]
    first, second, other = ([tensor.tolist() for tensor in head] for head in heads)
    assert torch.equal(before, torch.random.get_rng_state())
    assert first == second != other


SETTINGS = ProtocolSettings(seeds=2, ablation_seeds=1, same_generator="one")
ABLATION = next(iter(protocol.ABLATIONS["mst_clipiqa"]))


class Interruption(KeyboardInterrupt):
    """Ctrl-C, between two trainings."""


@pytest.mark.slow
def test_a_protocol_that_is_interrupted_trains_nothing_twice(
    images: ScoredImages, plan: Planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[int, str]] = []

    def noted(own: TrainingPlan, *arguments: Any, **options: Any) -> Any:
        if len(trained) == stop:
            raise Interruption
        trained.append((own.seed, own.settings.get("fusion", "gate")))
        return train(own, *arguments, **options)

    monkeypatch.setattr(protocol, "train_reward", noted)
    stop = 2
    with pytest.raises(Interruption):
        run_protocol(plan(), images, SETTINGS, tmp_path / "broken", title="blur", progress=False)
    finished = (tmp_path / "broken" / "seed0.npz").stat().st_mtime_ns
    stop = 1000
    report = run_protocol(plan(), images, SETTINGS, tmp_path / "broken", title="blur", progress=False)
    assert trained == [(0, "gate"), (0, "mean"), (1, "gate")]
    assert (tmp_path / "broken" / "seed0.npz").stat().st_mtime_ns == finished
    assert ProtocolReport.load(tmp_path / "broken" / "report.json").as_dict() == report.as_dict()
    straight = run_protocol(plan(), images, SETTINGS, tmp_path / "straight", title="blur", progress=False)
    assert report.as_dict() == straight.as_dict()
    with pytest.raises(ValueError, match=r"^folder: .*another protocol.*another folder"):
        run_protocol(plan(), images, ProtocolSettings(seeds=3), tmp_path / "broken", title="blur", progress=False)


def test_the_report_holds_the_model_its_controls_and_its_ablation(
    images: ScoredImages, plan: Planned, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, seeds=1)
    report = run_protocol(plan(), images, settings, tmp_path, title="blur", progress=False)
    split, kept = split_rows(images, seed=0), np.load(tmp_path / "seed0.npz")
    assert kept["rows"].tolist() == split.test.tolist()
    wrong = kept["wrong_prompt_correspondence"]
    for task, more in (("quality", set()), ("correspondence", {SHUFFLED})):
        found = {entry.predictor: entry for entry in report.scores if entry.task == task}
        assert found.keys() == {MODEL, RIDGE, GENERATOR, ABLATION} | more
        target, generators = getattr(images, task), np.array(images.generators)
        assert found[MODEL].srcc == pytest.approx(spearmanr(kept[task], target[split.test])[0])
        means = {g: target[split.train][generators[split.train] == g].mean() for g in set(generators)}
        expected = spearmanr([means[generators[row]] for row in split.test], target[split.test])[0]
        assert found[GENERATOR].srcc == pytest.approx(expected)
    assert found[SHUFFLED].srcc == pytest.approx(spearmanr(wrong[:, 0], target[split.test])[0])
    above = [own > other for own, row in zip(kept["correspondence"], wrong, strict=True) for other in row]
    assert found[MODEL].right_prompt_auc == pytest.approx(np.mean(above), abs=0.01)
    assert found[MODEL].srcc > 0.5 > abs(found[RIDGE].srcc), "the image alone does not say which color is meant"


def test_ridge_sees_means_and_deviations_over_crops_and_places() -> None:
    rng = np.random.default_rng(0)
    arrays = {"flat": (70, 3), "sequence": (70, 4, 3), "map": (70, 3, 2, 5), "maps": (70, 4, 3, 2, 5)}
    kept = {name: rng.standard_normal(shape).astype(np.float16) for name, shape in arrays.items()}
    context = {"context.answers": kept["sequence"], "context.length": kept["flat"], "context.found": kept["flat"] > 0}
    found = protocol.pooled_features(FeatureStore({**kept, **context}, []))
    for row in (0, 69):
        x = {name: array[row].astype(np.float64) for name, array in kept.items()}
        places = [x["sequence"], x["map"].reshape(3, -1).T, x["maps"].transpose(0, 2, 3, 1).reshape(-1, 3)]
        expected = [x["flat"], *(np.concatenate([p.mean(axis=0), p.std(axis=0)]) for p in places)]
        expected.append(x["sequence"].ravel())
        np.testing.assert_allclose(found[row], np.concatenate(expected), atol=1e-3)
