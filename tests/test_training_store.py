from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from clip_models import write_tiny_clip
from PIL import Image
from scored_images import tiny_model, write_scored_images

from aigiqa_reward import images as pixels
from aigiqa_reward.assistants import Assistants
from aigiqa_reward.datasets import ScoredImages
from aigiqa_reward.rewards.build import build_model
from aigiqa_reward.training.store import FeatureStore, LiveImages, asked_prompts, store_features

CPU = torch.device("cpu")
NO_CROPS: Any = SimpleNamespace(crop_features=())
FLOAT16 = {"rtol": 2**-10, "atol": 1e-6}  # twice what rounding to 11 significant bits may change


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("clip"), seed=0)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ScoredImages:
    return write_scored_images(tmp_path_factory.mktemp("data"), prompts=20, images=8)


@pytest.fixture(scope="module")
def features(images: ScoredImages, clip: Path) -> dict[str, torch.Tensor]:
    return directly(tiny_model("mst_clipiqa", clip), images.paths)


@torch.no_grad()
def directly(model: Any, paths: Any) -> dict[str, torch.Tensor]:
    rows = [model.forward_features(pixels.load(path)[None]) for path in paths]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def store(model: Any, images: ScoredImages, folder: Path, **options: Any) -> FeatureStore:
    return store_features(model, images.paths, images.prompts, folder, progress=False, **options)


def few(images: ScoredImages, folder: Path, count: int = 6) -> ScoredImages:
    shutil.copytree(images.paths[0].parents[1], folder)
    part = images.subset(np.arange(count))
    object.__setattr__(part, "paths", tuple(folder / "images" / name for name in part.names))
    return part


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    shown: list[int] = []
    handle = model.coarse.clip.visual.register_forward_hook(lambda *seen: shown.append(len(seen[2])))
    try:
        yield shown
    finally:
        handle.remove()


def assert_holds(found: FeatureStore, features: dict[str, torch.Tensor], rows: Any = None) -> None:
    seen, _ = found.features(NO_CROPS, np.arange(len(found)) if rows is None else np.asarray(rows), CPU)
    assert {tensor.dtype for tensor in seen.values()} == {torch.float32}
    torch.testing.assert_close(seen, features, **FLOAT16)


def test_features_are_what_the_towers_see_in_any_order(images: ScoredImages, clip: Path, tmp_path: Path) -> None:
    part, model, mixed = images.subset(np.arange(20)), tiny_model("mst_clipiqa", clip), [7, 0, 7, 19]
    found, features = store(model, part, tmp_path), directly(model, part.paths)
    assert_holds(found, features)
    assert_holds(found, {name: tensor[mixed] for name, tensor in features.items()}, mixed)
    assert found.features(NO_CROPS, np.arange(2), CPU)[1] is None and found.readable.all()


def test_images_of_many_sizes_and_crops(images: ScoredImages, clip: Path, tmp_path: Path) -> None:
    part = few(images, tmp_path / "data", 9)
    for row, size in ((1, (50, 40)), (2, (50, 40)), (5, (90, 33)), (8, (20, 60))):
        Image.open(part.paths[row]).resize(size).save(part.paths[row])
    model = tiny_model("tsp_mgs", clip)
    found = store(model, part, tmp_path / "store", batch_size=4)
    assert found.features(model, np.arange(9), CPU)[0]["crops"].shape == (9, 3, 32)
    assert_holds(found, directly(model, part.paths))
    live = LiveImages(part.paths, part.prompts, progress=False)
    assert_holds(found, live.features(model, np.array([8, 1]), CPU)[0], [8, 1])


@dataclass(frozen=True)
class Counting:
    identity: str = "counting"

    def describe(self, images: torch.Tensor) -> list[str]:
        return [" ".join(["bright"] * (1 + int(image.mean() * 40))) for image in images]


def test_descriptions_of_any_length_are_kept_and_belong_to_their_captioner(
    images: ScoredImages, tmp_path: Path
) -> None:
    part = few(images, tmp_path / "data")
    for row, level in enumerate((40, 200, 90, 10, 255, 120)):
        Image.new("RGB", (64, 64), (level, level, level)).save(part.paths[row])
    small = {"crops": 1, "short_side": 224, "resolution": 224}
    model: Any = build_model("sc_agiqa", assistants=Assistants(captioner=Counting()), settings=small)
    found = store(model, part, tmp_path / "store", batch_size=2)
    rows = np.arange(len(part))
    live = LiveImages(part.paths, part.prompts, progress=False).features(model, rows, CPU)[1]
    for context in (found.features(model, rows, CPU)[1], live):
        assert context is not None
        lengths = context["description_mask"].sum(dim=1)
        assert lengths.tolist() == [1 + int(level / 255 * 40) for level in (40, 200, 90, 10, 255, 120)]
        for row in rows:
            with torch.no_grad():
                own = model.prepare(pixels.load(part.paths[row])[None], asked_prompts([part.prompts[row]]))
            alone = own["description"][0, own["description_mask"][0]]
            kept = context["description"][row, context["description_mask"][row]]
            torch.testing.assert_close(kept, alone, rtol=2**-10, atol=1e-4)
    other: Any = build_model("sc_agiqa", assistants=Assistants(captioner=Counting("other")), settings=small)
    store(other, part, tmp_path / "store", batch_size=2)
    assert len(list((tmp_path / "store").iterdir())) == 2
    store(other, replace(part, prompts=("a gray square",) * len(part)), tmp_path / "store", batch_size=2)
    assert len(list((tmp_path / "store").iterdir())) == 3, "an assistant may read the prompt"


SCRIPT = """
import os, signal, sys, time
from pathlib import Path
tests, clip, data, folder, mine, other, kill_after = sys.argv[1:]
sys.path.insert(0, tests)
from scored_images import tiny_model
from aigiqa_reward.datasets import read_agiqa3k
from aigiqa_reward.training.store import store_features
images, model, shown = read_agiqa3k(data), tiny_model("mst_clipiqa", Path(clip)), []
def show(module, inputs, output):
    shown.append(len(output))
    time.sleep(0.02)
    if sum(shown) / 2 >= int(kill_after):
        os.kill(os.getpid(), signal.SIGKILL)
model.coarse.clip.visual.register_forward_hook(show)
Path(mine).touch()
while not Path(other).exists():
    time.sleep(0.01)
store_features(model, images.paths, images.prompts, Path(folder), progress=False)
print("shown", sum(shown) // 2)
"""


def start(images: ScoredImages, clip: Path, folder: Path, mine: Path, other: Path, kill_after: int) -> Any:
    arguments = [Path(__file__).parent, clip, images.paths[0].parents[1], folder, mine, other, kill_after]
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_killed_computation_goes_on_where_it_was(
    images: ScoredImages, clip: Path, features: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    process = start(images, clip, tmp_path / "store", tmp_path / "a", tmp_path / "a", 100)
    assert process.wait(timeout=600) == -9, process.stderr.read()
    (home,) = (tmp_path / "store").iterdir()
    assert json.loads((home / "progress.json").read_text())["done"] == 64
    model = tiny_model("mst_clipiqa", clip)
    with counted(model) as shown:
        found = store(model, images, tmp_path / "store")
    assert sum(shown) / 2 == 160 - 64
    assert_holds(found, features)


@pytest.mark.slow
def test_of_two_processes_one_computes_and_both_have_it_all(
    images: ScoredImages, clip: Path, features: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    ready = tmp_path / "a", tmp_path / "b"
    both = [start(images, clip, tmp_path / "store", *pair, 1000) for pair in (ready, ready[::-1])]
    outputs = [process.communicate(timeout=600) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sorted(output[0].split()[-1] for output in outputs) == ["0", "160"]
    model = tiny_model("mst_clipiqa", clip)
    with counted(model) as shown:
        assert_holds(store(model, images, tmp_path / "store"), features)
    assert not shown


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut array": lambda home: (home / "fine.npy").write_bytes((home / "fine.npy").read_bytes()[:-100]),
    "short array": lambda home: np.save(home / "fine.npy", np.zeros((5, 32), np.float16)),
    "no array": lambda home: (home / "fine.npy").unlink(),
    "no progress": lambda home: (home / "progress.json").unlink(),
    "words": lambda home: (home / "progress.json").write_text('{"done": "six", "unreadable": [], "arrays": ["fine"]}'),
    "beyond": lambda home: (home / "progress.json").write_text('{"done": 7, "unreadable": [], "arrays": ["fine"]}'),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "cut array")) for n in DAMAGES])
def test_a_damaged_store_is_computed_again(name: str, images: ScoredImages, clip: Path, tmp_path: Path) -> None:
    part, model = images.subset(np.arange(6)), tiny_model("mst_clipiqa", clip)
    store(model, part, tmp_path)
    (home,) = tmp_path.iterdir()
    DAMAGES[name](home)
    assert_holds(store(model, part, tmp_path), directly(model, part.paths))
    assert list(tmp_path.iterdir()) == [home]


def test_unreadable_images_are_left_out_and_listed(images: ScoredImages, clip: Path, tmp_path: Path) -> None:
    part, model = few(images, tmp_path / "data"), tiny_model("mst_clipiqa", clip)
    part.paths[0].write_text("no picture")
    part.paths[2].write_bytes(part.paths[2].read_bytes()[:200])
    part.paths[5].unlink()
    for _ in range(2):
        found = store(model, part, tmp_path / "store")
        assert found.readable.tolist() == [False, True, False, True, True, False]
        assert [entry.path for entry in found.unreadable] == [part.paths[row] for row in (0, 2, 5)]
        for entry, word in zip(found.unreadable, ("not an image", "truncated", "no such file"), strict=True):
            assert word in entry.reason and str(entry.path) in entry.reason
        assert_holds(found, directly(model, [part.paths[row] for row in (1, 3, 4)]), [1, 3, 4])


def test_refusals_say_what_to_do(images: ScoredImages, clip: Path, tmp_path: Path) -> None:
    part, model = few(images, tmp_path / "data"), tiny_model("mst_clipiqa", clip)
    needed = 6 * 2 * 32 * 2  # images, streams, channels, bytes
    with pytest.raises(ValueError, match=r"^max_bytes: .* of 6 images.*allow more.*train_towers=True"):
        store(model, part, tmp_path / "store", max_bytes=needed - 1)
    assert not list((tmp_path / "store").rglob("*.npy"))
    assert len(store(model, part, tmp_path / "store", max_bytes=needed)) == 6
    with torch.no_grad():
        model.coarse.clip.visual.proj.mul_(1e6)
    with pytest.raises(ValueError, match=r"^model: its feature 'coarse'.*float16.*train_towers=True"):
        store(model, part, tmp_path / "store")
    for path in part.paths:
        path.write_text("no picture")
    for read in (lambda: store(model, part, tmp_path / "store"), lambda: LiveImages(part.paths, part.prompts)):
        with pytest.raises(ValueError, match=f"^paths: none of the 6 images.*first: {part.paths[0]}.*not an image"):
            read()


def test_a_store_belongs_to_towers_crops_and_files_and_to_no_head(
    images: ScoredImages, clip: Path, tmp_path: Path
) -> None:
    part, folder = few(images, tmp_path / "data"), tmp_path / "store"
    store(tiny_model("mst_clipiqa", clip), part, folder)
    (first,) = folder.iterdir()
    same = tiny_model("mst_clipiqa", clip, seed=5, fusion="mean", hidden=24)
    with counted(same) as shown:
        store(same, part, folder)
    assert not shown
    for settings in ({}, {"crops": 2}, {"short_side": 48}, {"train_crops": 1, "alpha": "learned"}):
        store(tiny_model("tsp_mgs", clip, **settings), part, folder)
    store(tiny_model("mst_clipiqa", write_tiny_clip(tmp_path / "other", seed=1)), part, folder)
    Image.open(part.paths[3]).rotate(180).save(part.paths[3])
    model = tiny_model("mst_clipiqa", clip)
    assert_holds(store(model, part, folder), directly(model, part.paths))
    store(model, part.subset(np.arange(5)), folder)
    assert len(list(folder.iterdir())) == 7 and first in folder.iterdir()
