"""`prompts_from`: images scored with the prompts in them or beside them, as rows, tables and in Python."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import prompt_files as files
import pytest
from commands import lines, only_error, run
from hostile_prompts import HOSTILE, write_hostile
from prompt_files import POSITIVE, graph
from torch import Tensor

from aigiqa_reward import Scorer
from aigiqa_reward.datasets import read_data, read_table
from aigiqa_reward.rewards.scorer import ScoringError

FOLDERS = ("a1111", "comfyui", "kohya", "imagefolder", "exif")
COUNT = 20


def raw_prompt(folder: str, number: int) -> str:
    return f"a (red:1.{number % 10}) fox number {number} <lora:{folder}:.8>, in {folder}"


def clean_prompt(folder: str, number: int) -> str:
    return f"a red fox number {number}, in {folder}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five people's folders of twenty images each."""
    root = tmp_path_factory.mktemp("folders")
    for name in FOLDERS:
        (root / name).mkdir()
        index = (root / name / "metadata.jsonl").open("w") if name == "imagefolder" else io.StringIO()
        for number in range(COUNT):
            raw, file = raw_prompt(name, number), root / name / f"{number:05}.png"
            if name == "a1111":
                files.a1111_png(file, raw)
            elif name == "comfyui":
                files.comfyui_png(file, graph(*list(POSITIVE.values())[number % len(POSITIVE)](raw)))
            elif name == "kohya":
                files.kohya(root / name, file.name, raw, ".txt" if number % 2 else ".caption")
            elif name == "exif":
                files.a1111_exif(file.with_suffix(".jpg"), raw)
            else:
                files.picture(number).save(file)
            index.write(json.dumps({"file_name": file.name, "text": raw}) + "\n")
        index.close()
    return root


def found_in(rows: list[dict[str, Any]]) -> list[tuple[str, int, str, str]]:
    return [(Path(r["path"]).parent.name, int(Path(r["path"]).stem), r["prompt"], r["raw_prompt"]) for r in rows]


def test_five_peoples_folders_are_scored_by_one_command(folders: Path, tiny: list[str]) -> None:
    given = ["--prompts-from", "auto", "--recursive", *tiny]
    result = run("score", folders, *given, "--format", "jsonl")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""  # sidecars are no files that were left out
    rows = lines(result.stdout)
    every = [(name, number) for name in sorted(FOLDERS) for number in range(COUNT)]
    assert found_in(rows) == [(*each, clean_prompt(*each), raw_prompt(*each)) for each in every]
    plain = run("score", folders / "a1111", *tiny, "--format", "jsonl", "--prompt", clean_prompt("a1111", 0))
    assert lines(plain.stdout)[0]["total"] == pytest.approx(rows[0]["total"], abs=1e-5)  # the text that the reward read

    table = run("rank", folders / "kohya", "--prompts-from", "sidecar", *tiny, "--format", "csv")
    ranked = list(csv.DictReader(io.StringIO(table.stdout)))
    assert list(ranked[0])[:3] == ["path", "prompt", "raw_prompt"]
    assert set(found_in(ranked)) == {each for each in found_in(rows) if each[0] == "kohya"}


def test_hostile_files_are_rows_with_errors(tmp_path: Path, tiny: list[str]) -> None:
    for number, kind in enumerate(HOSTILE):
        (tmp_path / f"{number:02}").mkdir()
        write_hostile(tmp_path / f"{number:02}", kind)
    files.a1111_png(tmp_path / "good.png", "a red fox")
    result = run("score", tmp_path, "--recursive", "--prompts-from", "auto", *tiny, "--format", "jsonl")
    assert result.exit_code == 1
    rows = lines(result.stdout)
    assert len(HOSTILE) >= 30
    assert [Path(row["path"]).name for row in rows if row["error"] is None] == ["good.png"]
    assert len(rows) == len(HOSTILE) + 1
    assert all(row["total"] is None and "raw_prompt" not in row for row in rows if row["error"] is not None)
    assert result.stderr.count("error: ") == len(HOSTILE)

    unread = run("score", tmp_path, "--recursive", *tiny, "--format", "jsonl")  # the pixels, as ever
    assert unread.exit_code == 0
    assert all(row["error"] is None for row in lines(unread.stdout))


def test_one_source_of_prompts_is_given(folders: Path, tiny: list[str]) -> None:
    given = ["score", folders / "kohya", "--prompts-from", "auto", *tiny]
    message = only_error(run(*given, "--prompt", "a fox"))
    assert message == "error: --prompts-from: expected one source of prompts, got --prompt as well\n"
    assert "embedded" in run("score", folders / "kohya", *tiny, "--prompts-from", "file").output


def count_words(images: Tensor, prompts: list[str]) -> Tensor:
    return images.mean(dim=(1, 2, 3)) * 0 + images.new_tensor([len(prompt.split()) for prompt in prompts])


def test_scorer_reads_the_prompts_of_files(tmp_path: Path) -> None:
    paths = [files.a1111_png(tmp_path / f"{n}.png", "fox " * n) for n in (1, 2)]
    files.picture().save(tmp_path / "3.png")
    scorer = Scorer(count_words, batch_size=2)
    assert scorer.score(paths, prompts_from="auto").total.tolist() == [1, 2]
    with pytest.raises(ScoringError, match=r"inputs\[1\]: .*3\.png: there is no prompt in it; ") as raised:
        scorer.score([paths[1], tmp_path / "3.png", paths[0]], prompts_from="embedded")
    assert raised.value.output is not None
    assert raised.value.output.total.nan_to_num(-1).tolist() == [2, -1, 1]
    nothing = scorer.score([tmp_path / "3.png"], prompts_from="sidecar", on_error="nan")
    assert nothing.total.isnan().tolist() == [True]


def test_scorer_checks_its_arguments(tmp_path: Path) -> None:
    scorer = Scorer(count_words)
    with pytest.raises(ValueError, match="prompts, prompts_from: expected one of them, got both"):
        scorer.score(["a.png"], "a fox", prompts_from="auto")
    with pytest.raises(ValueError, match="prompts_from: expected 'auto', 'embedded' or 'sidecar', got 'file'"):
        scorer.score(["a.png"], prompts_from="file")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"prompts_from: expected paths as inputs, got Image at inputs\[0\]"):
        scorer.score([files.picture()], prompts_from="auto")


@pytest.fixture
def table(tmp_path: Path) -> Iterator[Path]:
    rows = ["path,quality"]
    for number in range(8):
        files.a1111_png(tmp_path / f"{number}.png", f"a (red:1.2) fox {number}")
        rows.append(f"{number}.png,{number}")
    (tmp_path / "scores.csv").write_text("\n".join(rows))
    yield tmp_path / "scores.csv"


def test_a_table_without_prompts_takes_those_of_its_images(table: Path) -> None:
    expected = [f"a red fox {number}" for number in range(8)]
    assert read_table(table, "embedded").prompts == tuple(expected)
    files.picture().save(table.parent / "1.png")
    with pytest.warns(
        UserWarning, match=r"1 of its 8 images are left out, as no prompt can be read for them; the first: .*1\.png"
    ):
        images = read_data(f"csv:{table}", prompts_from="auto")
    assert images.prompts == tuple(expected[:1] + expected[2:])


def test_a_table_says_what_it_misses(table: Path) -> None:
    with pytest.raises(ValueError, match="prompts_from='auto'"):
        read_table(table)
    with pytest.raises(ValueError, match="prompts_from: none of the 8 images has a prompt; the first: "):
        read_table(table, "sidecar")
    with pytest.raises(ValueError, match="prompts_from: agiqa3k brings its prompts"):
        read_data("agiqa3k:.", prompts_from="auto")
    table.write_text("path,caption,quality\n0.png,a fox,1\n")
    with pytest.raises(ValueError, match=r"prompts_from: .* has the column caption; remove it, or leave out"):
        read_table(table, "auto")


def test_evaluate_and_train_read_such_tables(table: Path) -> None:
    folder = table.parent / "report"
    given = ["evaluate", "compact", "--weights", "embedded", "--data", f"csv:{table}", "--device", "cpu"]
    assert "--prompts-from auto" in run(*given, "--output-dir", folder).output
    assert run(*given, "--output-dir", folder, "--prompts-from", "auto").exit_code == 0
    assert (folder / "table.csv").is_file()
    message = only_error(
        run("train", "compact", "--init", "embedded", "--data", "pickapic:.", "--prompts-from", "auto")
    )
    assert message == "error: --prompts-from: pickapic brings its prompts; leave it out\n"
