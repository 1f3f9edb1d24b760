from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_models import write_tiny_clip
from safetensors.torch import load_file
from scored_images import tiny_model, write_scored_images
from torch import nn

from aigiqa_reward.datasets import ScoredImages, Split, split_rows
from aigiqa_reward.training.checkpoints import load_checkpoint, save_checkpoint
from aigiqa_reward.training.fit import FitResult, fit
from aigiqa_reward.training.recipes import Recipe
from aigiqa_reward.training.store import LiveImages, store_features
from aigiqa_reward.training.tasks import ScoreTask
from aigiqa_reward.utils.weights import WeightsError

QUICK = Recipe(learning_rate=1e-2, batch_size=8, epochs=5)
TOWERS = replace(QUICK, learning_rate=1e-3, epochs=3, train_towers=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ScoredImages:
    return write_scored_images(tmp_path_factory.mktemp("data"), prompts=12, images=6)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("clip"), seed=0)


def train(model: Any, images: ScoredImages, recipe: Recipe, folder: Path, kept: Path, **options: Any) -> FitResult:
    split = split_rows(images, seed=0)
    source: Any = LiveImages(images.paths, images.prompts, progress=False)
    if not recipe.train_towers:
        source = store_features(model, images.paths, images.prompts, kept, progress=False)
    return fit(model, ScoreTask.of(images, split.train), split, recipe, source, folder, progress=False, **options)


class Interruption(KeyboardInterrupt):
    """Ctrl-C, at a moment of our choice."""


@contextmanager
def interrupted_after(module: nn.Module, calls: int) -> Iterator[None]:
    left = [calls]

    def count(part: nn.Module, _inputs: Any, _output: Any) -> None:
        left[0] -= part.training
        if left[0] < 0:
            raise Interruption

    handle = module.register_forward_hook(count)
    try:
        with pytest.raises(Interruption):
            yield
    finally:
        handle.remove()


def assert_same(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


CASES: dict[str, tuple[str, dict[str, Any], Recipe, str, int]] = {
    # system, settings, recipe, a module of every step, its calls in about two and a half epochs
    "noise": ("mst_clipiqa", {"bottleneck": 0.01}, replace(QUICK, mismatch_weight=0.3), "head.fusion", 15),
    "average": ("mst_clipiqa", {}, replace(QUICK, ema=0.9, optimizer="adam", rank_weight=1.0), "head.fusion", 15),
    "towers": ("tsp_mgs", {}, TOWERS, "encoder.clip.visual", 180),
}


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case != "average")) for case in CASES])
def test_an_interrupted_training_ends_as_one_that_was_not(
    case: str, images: ScoredImages, clip: Path, tmp_path: Path
) -> None:
    name, settings, recipe, module, calls = CASES[case]
    straight, broken, again = (tiny_model(name, clip, seed=seed, **settings) for seed in (0, 0, 9))
    expected = train(straight, images, recipe, tmp_path / "straight", tmp_path)
    with interrupted_after(broken.get_submodule(module), calls):
        train(broken, images, recipe, tmp_path / "broken", tmp_path)
    state = json.loads((tmp_path / "broken" / "checkpoint" / "state.json").read_text())
    assert 0 < state["epoch"] < recipe.epochs
    result = train(again, images, recipe, tmp_path / "broken", tmp_path)
    assert result == expected
    assert_same(again.state_dict(), straight.state_dict())
    written, twin = (torch.load(tmp_path / run / "checkpoint" / "state.pt") for run in ("broken", "straight"))
    for part in ("model", "average", "best_state"):
        assert_same(written[part], twin[part])
    assert {file.name for file in (tmp_path / "broken" / "checkpoint").iterdir()} == {"state.json", "state.pt"}
    finished = tiny_model(name, clip, seed=7, **settings)
    assert train(finished, images, recipe, tmp_path / "broken", tmp_path) == expected, "there is nothing left to do"
    assert_same(finished.state_dict(), straight.state_dict())


def test_a_checkpoint_of_other_settings_is_refused(images: ScoredImages, clip: Path, tmp_path: Path) -> None:
    folder, kept, recipe = tmp_path / "run", tmp_path / "store", replace(QUICK, epochs=1)
    model = tiny_model("mst_clipiqa", clip)
    train(model, images, recipe, folder, kept)
    before = {file: file.read_bytes() for file in (folder / "checkpoint").iterdir()}
    scores = replace(images, quality=images.quality[::-1].copy())
    prompts = replace(images, prompts=images.prompts[::-1])
    attempts: list[tuple[str, Any]] = [
        ("epochs: 1 there, 3 now", lambda: train(model, images, replace(recipe, epochs=3), folder, kept)),
        ("seed: 0 there, 1 now", lambda: train(model, images, recipe, folder, kept, seed=1)),
        ("examples", lambda: train(model, scores, recipe, folder, kept)),
        ("examples", lambda: train(model, prompts, recipe, folder, kept)),
        ("model.config", lambda: train(tiny_model("mst_clipiqa", clip, fusion="mean"), images, recipe, folder, kept)),
    ]
    for named, attempt in attempts:
        with pytest.raises(ValueError, match=f"^folder: .*other settings \\({named}.*another folder"):
            attempt()
    assert {file: file.read_bytes() for file in (folder / "checkpoint").iterdir()} == before


@pytest.mark.parametrize("damage", [b"no checkpoint", None])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, damage: bytes | None) -> None:
    numbers = {"epoch": 1, "best_epoch": 1, "best": 0.5, "history": [{"loss": 1.0}]}
    assert load_checkpoint(tmp_path / "checkpoint", {"seed": 0}) is None
    save_checkpoint(tmp_path / "checkpoint", {**numbers, "model": {"a": torch.ones(2)}}, {"seed": 0})
    found = load_checkpoint(tmp_path / "checkpoint", {"seed": 0})
    assert found is not None and found["history"] == [{"loss": 1.0}]
    file = tmp_path / "checkpoint" / "state.pt"
    file.write_bytes(file.read_bytes()[:-200] if damage is None else damage)
    with pytest.raises(WeightsError, match=r"checkpoint: .*state\.pt is damaged .*remove it to start again"):
        load_checkpoint(tmp_path / "checkpoint", {"seed": 0})


def test_a_write_that_is_cut_off_leaves_a_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(epoch: int) -> None:
        state = {"epoch": epoch, "best_epoch": 1, "best": 0.5, "history": [], "model": {"a": torch.ones(2) * epoch}}
        save_checkpoint(tmp_path, state, {})

    save(1)
    put, left = Path.replace, [0]

    def change(self: Path, target: Path) -> Path:
        left[0] -= 1
        if left[0] < 0:
            raise Interruption
        return put(self, target)

    for writes in range(3):  # every change of a name is a moment at which the process may end
        left[0] = writes
        with monkeypatch.context() as patch, contextlib.suppress(Interruption):
            patch.setattr(Path, "replace", change)
            save(2)
        found = load_checkpoint(tmp_path, {})
        assert found is not None and found["epoch"] == (2 if writes == 2 else 1)
        assert found["model"]["a"].tolist() == [found["epoch"]] * 2
        assert {path.name for path in tmp_path.iterdir()} == {"state.json", "state.pt"}


SCRIPT = """
import json, sys
from dataclasses import replace
from pathlib import Path
tests, clip, data, out = sys.argv[1:]
sys.path.insert(0, tests)
import numpy as np
from accelerate import Accelerator
from safetensors.torch import save_file
from scored_images import tiny_model
from test_training_checkpoints import QUICK, joint_split
from aigiqa_reward.datasets import read_agiqa3k
from aigiqa_reward.training.fit import fit
from aigiqa_reward.training.store import store_features
from aigiqa_reward.training.tasks import ScoreTask
accelerator, images, out = Accelerator(cpu=True), read_agiqa3k(data), Path(out)
rank, split = accelerator.process_index, joint_split(images)

class Own(ScoreTask):
    def measure(self, *arguments):
        # Two machines do not compute to the same last bit; here one of them sees no epoch better than the first.
        return super().measure(*arguments) if rank == 0 else -len(arguments)

def train(name, task, recipe):
    model, shown = tiny_model("mst_clipiqa", Path(clip)), []
    model.head.fusion.register_forward_hook(lambda m, i, o: shown.append(len(i[0])) if m.training else None)
    source = store_features(model, images.paths, images.prompts, out / "store", progress=False)
    result = fit(model, task, split, recipe, source, out / name, accelerator=accelerator, progress=False)
    save_file(model.state_dict(), out / f"{name}-{rank}.safetensors")
    record = {"history": result.history, "best_epoch": result.best_epoch, "shown": shown}
    (out / f"{name}-{rank}.json").write_text(json.dumps(record))

task = ScoreTask.of(images, split.train)
assert accelerator.num_processes == 2
train("joint", task, replace(QUICK, batch_size=4, epochs=2))
train("patience", Own(images, task.targets), replace(QUICK, batch_size=4, epochs=12, patience=1))
unscored = ScoreTask(images, np.stack([task.targets[:, 0], np.full(len(images), np.nan)], axis=1))
train("unscored", unscored, replace(QUICK, batch_size=4, epochs=2))
"""


def joint_split(images: ScoredImages) -> Split:
    split = split_rows(images, seed=0)
    return replace(split, train=split.train[:48])


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_joint_batch(images: ScoredImages, clip: Path, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += map(str, [tmp_path / "train.py", Path(__file__).parent, clip, images.paths[0].parents[1], tmp_path])
    own = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, env=own, capture_output=True, text=True, timeout=600, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    runs = ("joint", "patience", "unscored")
    records = {name: [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in (0, 1)] for name in runs}
    for name, (first, second) in records.items():
        assert_same(*(load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in (0, 1)))
        assert (first["history"], first["best_epoch"]) == (second["history"], second["best_epoch"])
        assert first["history"][-1]["loss"] < first["history"][0]["loss"]
    assert [record["shown"] for record in records["joint"]] == [[4] * 12] * 2
    model, split = tiny_model("mst_clipiqa", clip), joint_split(images)
    source = store_features(model, images.paths, images.prompts, tmp_path / "store", progress=False)
    recipe = replace(QUICK, batch_size=8, epochs=2)
    alone = fit(model, ScoreTask.of(images, split.train), split, recipe, source, None, progress=False)
    for ours, theirs in zip(alone.history, records["joint"][0]["history"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    for name, tensor in load_file(tmp_path / "joint-0.safetensors").items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-3, atol=1e-4)
