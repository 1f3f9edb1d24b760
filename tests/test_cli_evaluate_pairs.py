"""`aigiqa-reward evaluate --pairs`: accuracy on choices in the published layouts, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import lines, only_error, run
from PIL import Image
from test_datasets import (
    genai_bench_rows,
    hpdv2_rows,
    imagereward_rows,
    pickapic_rows,
    write_genai_bench,
    write_hpdv2,
    write_imagereward,
    write_pickapic,
)
from tiny_published import tiny_published

from aigiqa_reward import Reward, Scorer
from aigiqa_reward.datasets import PreferencePairs, read_data


def draw(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3)).repeat(16, axis=0).repeat(16, axis=1)
    Image.fromarray(pixels.astype(np.uint8)).save(path, format="PNG")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Each benchmark with images in its published layout."""
    folder = tmp_path_factory.mktemp("benchmarks")
    picked = pickapic_rows(count=6)
    for seed, row in enumerate(picked):
        for column in ("jpg_0", "jpg_1"):
            draw(folder / "image.png", 2 * seed + (column == "jpg_1"))
            row[column] = (folder / "image.png").read_bytes()
    write_imagereward(folder / "imagereward", imagereward_rows(), "test_images", "test")
    write_hpdv2(folder / "hpdv2", hpdv2_rows())
    write_genai_bench(folder / "genai_bench", genai_bench_rows())
    images = [path for path in folder.rglob("*") if path.suffix in (".webp", ".jpg", ".jpeg")]
    for seed, path in enumerate(sorted(images)):
        draw(path, seed)
    write_pickapic(folder / "pickapic", picked, "test")
    return {name: f"{name}:{folder / name}" for name in ("imagereward", "hpdv2", "pickapic", "genai_bench")}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folders = [tmp_path_factory.mktemp(name) for name in ("pickscore", "laion_aesthetic")]
    for folder in folders:
        tiny_published(folder.name.rstrip("0123456789")).save_pretrained(folder)
    return folders


def expected(table: PreferencePairs, reward: Any) -> float:
    scorer = Scorer(reward)
    better, worse = (scorer.score(list(side), list(table.prompts)).total for side in (table.better, table.worse))
    return ((better > worse).float() + 0.5 * (better == worse)).mean().item()


def test_each_reward_is_measured_on_each_benchmark(sources: dict[str, str], tiny: list[Path]) -> None:
    options = [word for source in sources.values() for word in ("--pairs", source)]
    options += [word for folder in tiny for word in ("--reward", folder)]
    result = run("evaluate", *options, "--device", "cpu", "--format", "jsonl")
    assert result.exit_code == 0, result.output
    found = {(row["data"], row["reward"]): row for row in lines(result.stdout)}
    assert list(found) == [(source, str(folder)) for folder in tiny for source in sources.values()]
    for folder in tiny:
        reward = Reward.from_pretrained(folder)
        for name, source in sources.items():
            table = read_data(source if name != "imagereward" else f"{source}/test.json")
            row = found[source, str(folder)]
            assert row["accuracy"] == pytest.approx(expected(table, reward), abs=1e-6)
            assert (row["pairs"], row["prompts"], row["left_out"]) == (len(table), len(set(table.prompts)), 0)
            assert row["low"] <= row["accuracy"] <= row["high"]
    table = run("evaluate", "--pairs", sources["genai_bench"], "--reward", tiny[0], "--device", "cpu").stdout
    header, _, row, *_, about = [line for line in table.splitlines() if line]
    assert header.split()[:3] == ["benchmark", "reward", "accuracy"]
    assert row.split()[:2] == ["GenAI-Bench", str(tiny[0])]
    assert "Pairs of which people prefer neither are left out" in about


def test_the_published_accuracy_stands_beside_the_measured_one(sources: dict[str, str], tiny: list[Path]) -> None:
    both = ["--pairs", sources["pickapic"], "--pairs", sources["hpdv2"], "--reward", "pickscore", "--weights", tiny[0]]
    result = run("evaluate", *both, "--device", "cpu")
    assert result.exit_code == 0, result.output
    picked, ranked = (line for line in result.stdout.splitlines() if "pickscore" in line)
    assert picked.endswith("test 70.5 %")
    assert "%" not in ranked


def test_ties_count_half_and_unreadable_images_are_left_out(tmp_path: Path) -> None:
    names = [f"{n}.jpg" for n in range(4)]
    entries = [{"prompt": "a cat", "image_path": names, "rank": [0, 1, 2, 3]}]
    file = write_hpdv2(tmp_path, entries)
    for name in names:
        draw(tmp_path / "test" / name, 0)  # all the same
    (tmp_path / "test" / "3.jpg").write_text("no image")
    result = run(
        "evaluate",
        "--pairs",
        f"hpdv2:{file}",
        "--reward",
        "compact",
        "--device",
        "cpu",
        "--batch-size",
        "1",
        "--format",
        "jsonl",
    )
    assert result.exit_code == 1
    assert f"error: {tmp_path / 'test' / '3.jpg'}: " in result.stderr
    (row,) = lines(result.stdout)
    assert {k: row[k] for k in ("accuracy", "pairs", "ties", "left_out")} == {
        "accuracy": 0.5, "pairs": 3, "ties": 3, "left_out": 3,
    }  # fmt: skip
    (tmp_path / "test.json").write_text(json.dumps([{**entries[0], "image_path": ["3.jpg", names[0]], "rank": [0, 1]}]))
    none = run("evaluate", "--pairs", f"hpdv2:{file}", "--reward", "compact", "--device", "cpu")
    assert (none.exit_code, none.stdout) == (1, "")
    assert "no pair both of whose images" in none.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "expected MODEL and --data NAME:PATH, or --pairs"),
        ("--pairs SOURCE", "--pairs: needs --reward NAME as well"),
        ("--reward compact", "--reward: needs --pairs NAME:PATH as well"),
        ("--pairs agiqa3k:x --reward compact", "--pairs: expected one of imagereward:PATH, hpdv2:PATH, "),
        ("--pairs hpdv2:nowhere --reward compact", "--pairs: expected HPD v2's JSON file"),
        ("--pairs SOURCE --reward pickscor", "did you mean 'pickscore'"),
        ("--pairs SOURCE --reward compact --reward ocr --weights x", "--weights: belongs to one reward"),
        ("compact --pairs SOURCE --reward compact --set a=1 --epochs 2", "leave out MODEL, --set, --epochs"),
        ("mst_clipiqa --data hpdv2:x", "--data: hpdv2:x holds choices .* pass --pairs hpdv2:x --reward mst_clipiqa"),
    ],
)
def test_usage_errors(sources: dict[str, str], arguments: str, message: str) -> None:
    words = [sources["hpdv2"] if word == "SOURCE" else word for word in arguments.split()]
    assert re.search(message, only_error(run("evaluate", *words)))
