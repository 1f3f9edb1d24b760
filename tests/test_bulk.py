"""Scoring and sampling on a real Ray cluster of two workers: the same results as without, resumed, one schema."""

from __future__ import annotations

import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import prompt_files
import pyarrow as pa
import pytest
import torch
from bulk_runs import PROMPT, pictures, rows_in, two_cpus, write_files
from commands import lines, only_error, run
from pyarrow import parquet

from aigiqa_reward import Scorer
from aigiqa_reward.bulk.cluster import Workers
from aigiqa_reward.bulk.inputs import find_shards
from aigiqa_reward.bulk.scoring import Results, _decode, _read, _Scoring, _Task, table_schema


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with two_cpus() as ray:
        yield ray


def three_forms(files: dict[str, bytes], folder: Path) -> list[str]:
    """The files as a folder, a table and a tar."""
    write_files(files, folder / "images")
    table = pa.table({"image": list(files.values()), "path": list(files)})
    parquet.write_table(table, folder / "a.parquet", row_group_size=6)
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name in files:
            tar.add(folder / "images" / name, name)
    return [str(folder / name) for name in ("images", "a.parquet", "a.tar")]


@pytest.fixture(scope="module")
def scored(
    cluster: Any, tiny_reward: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[object], dict[str, bytes], Path]:
    """A command without its prompt that has run once, with one worker, the image files, and the results' folder."""
    files, folder = pictures(10), tmp_path_factory.mktemp("scored")
    out, reward = folder / "out", folder / "reward"
    tiny_reward.save_pretrained(reward)
    command = ["score", *three_forms(files, folder), "--engine", "ray", "--output-dir", out, "--batch-size", 4]
    command += ["--reward", reward, "--details", "quality_levels"]
    first = run(*command, "--prompt", PROMPT, "--cpus-per-worker", 2)
    assert first.exit_code == 1, first.output  # one image per form is broken
    return command, files, out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_three_forms_get_the_scores_of_scorer(
    scored: tuple[list[object], dict[str, bytes], Path], tiny_reward: Any
) -> None:
    _, files, out = scored
    schemas = {parquet.read_schema(file).remove_metadata() for file in out.glob("*.parquet")}
    assert [schema.names for schema in schemas] == [
        ["path", "prompt", "total", "quality", "correspondence", "quality_levels", "error"]
    ]
    rows = rows_in(out)
    name = {row["path"]: Path(row["path"].rpartition("::")[2]).name for row in rows}
    assert sorted(name.values()) == sorted(3 * list(files))
    images = out.parent / "images"
    oracle = Scorer(tiny_reward).score([str(images / file) for file in files], PROMPT, on_error="nan")
    expected = dict(zip(files, zip(oracle.total.tolist(), oracle.correspondence.tolist(), strict=True), strict=True))
    for row in rows:
        assert row["prompt"] == PROMPT
        if name[row["path"]] == "broken.png":
            assert row["total"] is None and "broken.png" in row["error"]
        else:
            assert (row["total"], row["correspondence"]) == pytest.approx(expected[name[row["path"]]], abs=1e-5)
    assert (out / "histograms.png").is_file() and (out / "best-and-worst.png").is_file()


@pytest.mark.slow
def test_prompts_of_files_get_the_rows_of_one_process(cluster: Any, tmp_path: Path) -> None:
    images, raw = tmp_path / "images", "a (red:1.2) fox <lora:x:.8>"
    images.mkdir()
    prompt_files.a1111_png(images / "embedded.png", raw)
    prompt_files.kohya(images, "sidecar.png", f"{raw} of kohya")
    prompt_files.picture().save(images / "nothing.png")
    given = ["score", images, "--prompts-from", "auto"]
    here = lines(run(*given, "--format", "jsonl").stdout)
    assert run(*given, "--engine", "ray", "--output-dir", tmp_path / "out").exit_code == 1  # one has no prompt
    there = rows_in(tmp_path / "out")
    names = ["path", "prompt", "raw_prompt", "total", "quality", "correspondence", "error"]
    assert list(there[0]) == names
    for row, other in zip(here, there, strict=True):
        assert [row.get(n) for n in names] == pytest.approx([other[n] for n in names], abs=1e-5)
    assert [row["prompt"] for row in there] == ["a red fox", None, "a red fox of kohya"]


def test_embedded_prompts_are_read_in_tables_and_tars(tmp_path: Path) -> None:
    file = prompt_files.a1111_png(tmp_path / "a.png", "a (red:1.2) fox")
    shards, _ = find_shards(three_forms({"a.png": file.read_bytes()}, tmp_path), prompts_from="embedded")
    read = [{"count": -1, **item._asdict()} for shard in shards for item in shard.read()]
    rows = [_decode(row, "embedded") for row in read]
    assert [(row["prompt"], row["raw_prompt"]) for row in rows] == [("a red fox", "a (red:1.2) fox")] * 3


@pytest.mark.slow
def test_the_same_command_scores_with_two_workers_what_is_missing_and_another_is_refused(
    scored: tuple[list[object], dict[str, bytes], Path],
) -> None:
    command, _, out = scored
    rows, parts = rows_in(out), sorted(out.glob("part-*.parquet"))
    kept = {part: part.stat().st_mtime_ns for part in parts[1:]}
    parts[0].unlink()  # as an interruption leaves it
    assert run(*command, "--prompt", PROMPT).exit_code == 1
    again = rows_in(out)
    assert [row["path"] for row in again] == [row["path"] for row in rows]
    scores = [[row["total"] for row in some if row["total"] is not None] for some in (again, rows)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)  # batches differ
    assert {part: part.stat().st_mtime_ns for part in kept} == kept
    tried = run(*command, "--prompt", PROMPT, "--dry-run")
    assert tried.exit_code == 0 and "images in 4 shards, 2 workers: " in tried.stdout, tried.output
    other = run(*command, "--prompt", "a blue circle")
    assert "--output-dir" in only_error(other) and "prompt: 'a red square' there" in other.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", ["best-of-n", "pairs"])
def test_sampling_gives_the_files_of_one_process(cluster: Any, tmp_path: Path, command: str) -> None:
    given = [command, "--model", "embedded", "--n", 2, "--num-inference-steps", 1, "--device", "cpu"]
    given += ["--prompt", "a crown", "--prompt", "a penguin", "--prompt", "a fox"]
    for engine in ("local", "ray"):
        result = run(*given, "--engine", engine, "--output-dir", tmp_path / engine)
        assert result.exit_code == 0, result.output
    here, there = (contents(tmp_path / engine) for engine in ("local", "ray"))
    assert here.keys() == there.keys()
    assert [name for name in here if here[name] != there[name]] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--output-dir: expected a folder"),
        (["--output-dir", "out", "--format", "csv"], "leave out --output and --format"),
        (["--output-dir", "out", "--prompts", "prompts.csv"], "--prompts: expected prompts beside the images"),
        (["--output-dir", "out", "--prompt", "a", "--prompt", "b"], "--prompt: expected one prompt for all images"),
        (["--output-dir", "out", "--prompt", "a", "--prompts-from", "auto"], "got --prompt as well"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: list[str], message: str, tmp_path: Path) -> None:
    assert message in only_error(run("score", "images", "--engine", "ray", *options, cwd=tmp_path))


def test_options_of_ray_need_the_engine(tmp_path: Path) -> None:
    assert "--output-dir: needs --engine ray" in only_error(run("score", "a.png", "--output-dir", tmp_path))


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = run("score", tmp_path, "--engine", "ray", "--output-dir", tmp_path / "out")
    assert 'pip install ".[ray]"' in only_error(result)


def picky(images: torch.Tensor, prompts: Any) -> torch.Tensor:
    if "bad" in prompts:
        raise ValueError("prompts: expected a good one")
    return images.mean(dim=(1, 2, 3))


def test_a_prompt_that_the_reward_refuses_costs_its_own_row_and_a_blank_one_is_none(tmp_path: Path) -> None:
    picture, workers = pictures(1)["000.png"], Workers(count=1, resources={}, decoding=1.0, threads=None)
    table = pa.table({"image": [picture] * 4, "prompt": ["good", "bad", "good", "  "]})
    parquet.write_table(table, tmp_path / "a.parquet")
    (shard,), _ = find_shards([str(tmp_path / "a.parquet")])
    rows = [_decode(row, None) for row in _read({"task": _Task(0, shard, frozenset(), None)}, None)]
    assert [row["prompt"] for row in rows] == ["good", "bad", "good", None, None]  # the last one counts the others
    build: Any = {"picky": picky}.copy
    records = _Scoring(build, 4, (), workers).records(rows[:3])
    assert [records[place]["error"] for place in range(3)] == [None, "prompts: expected a good one", None]


def test_a_line_that_was_cut_off_is_scored_again(tmp_path: Path) -> None:
    schema = table_schema(["compact"], {})
    rows = {row: {"path": f"{row}.png", "prompt": None, "total": row / 7, "error": None} for row in range(3)}
    Results(tmp_path, schema).add(5, {row: rows[row] for row in (2, 0)})
    file = tmp_path / "unfinished" / "000005.jsonl"
    file.write_bytes(file.read_bytes() + json.dumps([1, rows[1]]).encode()[:-5])

    results = Results(tmp_path, schema)
    results.resume()
    results.end(5, 3)
    assert results.missing(5) == [1]
    results.add(5, {1: rows[1]})
    assert [row["path"] for row in rows_in(tmp_path)] == ["0.png", "1.png", "2.png"]
    assert not file.exists()
