"""`aigiqa-reward demo`: what it writes, says, refuses and survives, with the generator and reward that ship."""

from __future__ import annotations

import gc
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import ENVIRONMENT, command, lines, only_error, run
from diffusers import DDIMScheduler
from PIL import Image
from typer.testing import Result

from aigiqa_reward import BestOfN, create_reward, load_embedded_pipeline
from aigiqa_reward.cli._pipelines import loading
from aigiqa_reward.images import read_prompt
from aigiqa_reward.report import contact_sheet
from aigiqa_reward.toy.world import COLOR_NAMES, NOUNS

PROMPT = "a penguin on a yellow background"
FILES = {"contact-sheet.png", "results.jsonl", "best.png", "run.json"}
SETTINGS = {"num_inference_steps": 20, "guidance_scale": 1.0}
STEPS = 20


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return lines((folder / "results.jsonl").read_text())


def array(image: Image.Image | Path) -> np.ndarray:
    return np.asarray(Image.open(image) if isinstance(image, Path) else image)


def assert_holds(folder: Path, rows: list[dict[str, Any]]) -> None:
    assert names(folder) == FILES
    for name in ("contact-sheet.png", "best.png"):
        with Image.open(folder / name) as image:
            image.verify()
    assert array(folder / "best.png").shape == (64, 64, 3)
    assert "CFG scale: 1.0, Seed" in Image.open(folder / "best.png").info["parameters"]
    written = read_prompt(folder / "best.png")
    assert written is not None
    assert written.text == PROMPT
    best = max(rows, key=lambda row: row["total"])["seed"]
    image = load_embedded_pipeline()(PROMPT, generator=torch.Generator().manual_seed(best), **SETTINGS).images[0]
    assert np.abs(array(folder / "best.png").astype(int) - array(image)).max() <= 2


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    return run("demo", "--prompt", PROMPT, "--n", "3", "--seed", "5", "--output-dir", out), out


@pytest.fixture
def each_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int, torch.Tensor], None]], None]:
    def act_on(action: Callable[[int, torch.Tensor], None]) -> None:
        step, count = DDIMScheduler.step, iter(range(1, 10**6))

        def watched(*arguments: Any, **options: Any) -> Any:
            result = step(*arguments, **options)
            action(next(count), result[0])
            return result

        monkeypatch.setattr(DDIMScheduler, "step", watched)

    return act_on


@pytest.fixture
def nothing_is_sampled(each_step: Callable[..., None]) -> None:
    each_step(lambda number, latents: pytest.fail("sampling began"))


def test_it_is_best_of_n(shown):
    result, out = shown
    assert result.exit_code == 0, result.output
    search = BestOfN(load_embedded_pipeline(), create_reward("compact"), n=3, top_k=3, batch_size=8, progress=False)
    expected = search(PROMPT, seed=5, **SETTINGS)
    assert names(out) == FILES
    rows = rows_of(out)
    assert all(list(row) == ["seed", "prompt", "total", "quality", "correspondence", "error"] for row in rows)
    assert [(row["seed"], row["prompt"], row["error"]) for row in rows] == [(s, PROMPT, None) for s in (5, 6, 7)]
    scores = {"total": expected.all_scores, "quality": expected.all_quality}
    for name, column in (scores | {"correspondence": expected.all_correspondence}).items():
        assert [row[name] for row in rows] == pytest.approx(column, abs=1e-5)
    assert np.array_equal(array(out / "best.png"), array(expected.images[0]))
    assert np.array_equal(array(out / "contact-sheet.png"), array(contact_sheet(expected, PROMPT)))
    assert all(line.startswith("note: ") for line in result.stderr.splitlines())
    assert all(name in result.stderr for name in (str(out), *FILES - {"run.json"}))
    table = [line.split() for line in result.stdout.splitlines() if re.search(r"\d\.\d{4}", line)]
    places = [(str(place), str(seed)) for place, seed in enumerate(expected.seeds, start=1)]
    assert [(cells[0], cells[2]) for cells in table] == places
    (code,) = re.findall(r"in Python: (.*)", result.stderr)
    variables: dict[str, Any] = {}
    exec(code, variables)
    assert np.abs(array(variables["image"]).astype(int) - array(out / "best.png")).max() <= 2


def test_a_second_demo_replaces_the_first_and_nothing_else(shown, tmp_path):
    shutil.copytree(shown[1], tmp_path, dirs_exist_ok=True)
    (tmp_path / "notes.txt").write_text("mine")
    again = run("demo", "--prompt", PROMPT, "--n", "1", "--seed", "9", "--output-dir", tmp_path)
    assert again.exit_code == 0, again.output
    assert [row["seed"] for row in rows_of(tmp_path)] == [9]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert names(tmp_path) == FILES | {"notes.txt"}


def test_the_first_batch_is_drawn_while_others_follow(each_step, tmp_path):
    seen: list[tuple[set[str], list[int]]] = []

    def look(number: int, latents: torch.Tensor) -> None:
        if number in (STEPS, STEPS + 1):
            found = names(tmp_path)
            seen.append((found, [row["seed"] for row in rows_of(tmp_path)] if found else []))

    each_step(look)
    assert run("demo", "--prompt", PROMPT, "--n", "9", "--output-dir", tmp_path).exit_code == 0
    assert seen == [(set(), []), (FILES, list(range(8)))]
    assert [row["seed"] for row in rows_of(tmp_path)] == list(range(9))


def test_loading_restores_the_collection_of_garbage():
    with pytest.raises(OSError), loading(), loading():
        assert not gc.isenabled()
        raise OSError
    assert gc.isenabled()


@pytest.mark.slow
def test_its_threads_spin_only_briefly(tmp_path):
    """Beside other processes, spinning threads multiply the time; libgomp says what it was told when it is loaded."""
    arguments = command("demo", "--n", "1", "--output-dir", str(tmp_path))
    settings = ENVIRONMENT | {"OMP_DISPLAY_ENV": "VERBOSE"}
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, env=settings)
    told = re.findall(r"GOMP_SPINCOUNT = '(\w+)'", done.stderr)
    assert told == ["2000"] or (sys.platform != "linux" and not told)


def test_candidates_that_were_dropped_are_listed(each_step, tmp_path):
    each_step(lambda number, latents: latents[1:].fill_(float("nan")))
    result = run("demo", "--prompt", PROMPT, "--n", "2", "--output-dir", tmp_path)
    assert result.exit_code == 0, result.output
    assert re.search(r"^warning: 1 of 2 candidates were dropped", result.stderr, re.MULTILINE)
    rows = rows_of(tmp_path)
    assert [row["error"] for row in rows] == [None, "NaN or infinite pixels"]
    assert rows[1]["total"] is None
    assert_holds(tmp_path, rows[:1])
    each_step(lambda number, latents: latents.fill_(float("nan")))
    result = run("demo", "--n", "2", "--output-dir", tmp_path)
    assert result.exit_code == 1
    assert "error: none of the 2 candidates could be ranked" in result.stderr
    assert "best" not in result.stderr
    assert names(tmp_path) == FILES - {"best.png"}
    assert len(rows_of(tmp_path)) == 2


def test_an_unknown_thing_is_answered_by_what_is_known(tmp_path):
    result = run("demo", "--prompt", "a wizard on a red background", "--n", "1", "--output-dir", tmp_path)
    assert result.exit_code == 0, result.output
    assert re.search(r"^warning: .*nothing that this prompt names.*'a penguin on a green background'", result.stderr)
    assert f"{len(NOUNS)} things: {', '.join(NOUNS)}" in " ".join(result.stderr.split())
    assert f"{len(COLOR_NAMES)} background colors: {', '.join(COLOR_NAMES)}\n" in result.stderr


def test_a_missing_color_and_a_cut_prompt_are_reported(tmp_path):
    result = run("demo", "--prompt", "a red apple" + ", zzyzx" * 40, "--n", "1", "--output-dir", tmp_path)
    assert result.exit_code == 0, result.output
    unknown, second, *others = result.stderr.splitlines()
    assert unknown == (
        "warning: the embedded generator does not know zzyzx; it knows 64 things and these background colors: "
        f"{', '.join(COLOR_NAMES)}"
    )
    assert re.fullmatch(r"warning: .*reads the first 24 of the prompt's \d+ tokens", second)
    assert all(re.match(r"(warning|note): ", line) for line in others)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n", "0"], "'--n'"),
        (["--seed", str(2**32)], "'--seed'"),
        (["--prompt", " \n"], "--prompt: expected a text"),
        (["--prompt", "\udcff"], "--prompt: .* has half of a character or an undecoded byte"),
        (["--output-dir", "file"], "--output-dir: expected a folder, got the file file"),
        (["--output-dir", "file/below"], "--output-dir: cannot write in file/below"),
        (["--output-dir", "x" * 300], "--output-dir: cannot write in x+: File name too long"),
        (["--output-dir", "."], "--output-dir: best.png was not written by such a run"),
    ],
)
def test_usage_errors(nothing_is_sampled, tmp_path, arguments, message):
    for name in ("file", "best.png"):
        (tmp_path / name).write_text("mine")
    assert re.search(message, only_error(run("demo", *arguments, cwd=tmp_path)))
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"file": "mine", "best.png": "mine"}


@pytest.mark.parametrize(
    ("step", "kept"), [pytest.param(STEPS + 3, 8, marks=pytest.mark.slow, id="second batch"), (3, 0)]
)
def test_what_was_made_before_an_interruption_is_kept(each_step, tmp_path, step, kept):
    def interrupt(number: int, latents: torch.Tensor) -> None:
        if number == step:
            raise KeyboardInterrupt

    each_step(interrupt)
    result = run("demo", "--prompt", PROMPT, "--n", "9", "--output-dir", tmp_path / "new")
    assert result.exit_code == 130
    if kept:
        assert result.stderr.endswith("error: interrupted: 8 of 9 candidates\n")
        rows = rows_of(tmp_path / "new")
        assert [row["seed"] for row in rows] == list(range(8))
        assert_holds(tmp_path / "new", rows)
    else:
        assert (result.stdout, result.stderr) == ("", "error: interrupted\n")
        assert not list(tmp_path.iterdir())


def test_a_process_prints_our_lines_only_and_needs_no_network(tmp_path):
    (tmp_path / "file").write_text("")
    nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    home = ENVIRONMENT | nowhere | {"HOME": str(tmp_path / "file" / "home"), "HF_HOME": str(tmp_path / "hub")}
    arguments = command("demo", "--n", "1")
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, env=home, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    ours = [line for line in lines if "onnxruntime" not in line]  # which diffusers loads if it is there
    assert [line.partition(" ")[0] for line in ours] == ["note:", "note:", "note:"]
    assert done.stdout.split()[:5] == ["#", "image", "total", "quality", "correspondence"]
    assert "\x1b" not in "".join([done.stdout, *ours])
    assert names(tmp_path / "aigiqa-demo") == FILES


def test_help_names_the_defaults():
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", run("demo", "--help").stdout).split())
    for default in ("a penguin on a green background", "16", "0", "aigiqa-demo"):
        assert f"[default: {default}]" in text


@pytest.mark.skipif(sys.platform == "win32", reason="there the system opens files without a command")
def test_the_contact_sheet_is_opened(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = run("demo", "--n", "1", "--output-dir", "-a folder", "--open", cwd=tmp_path)
    assert missing.exit_code == 0, missing.output
    assert "warning: cannot open" in missing.stderr
    opened = tmp_path / "opened"
    for name in ("xdg-open", "open"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "$1" > {opened}.part && /bin/mv {opened}.part {opened}\n')
        (tmp_path / name).chmod(0o755)
    result = run("demo", "--n", "1", "--output-dir", "-a folder", "--open", cwd=tmp_path)
    assert result.exit_code == 0, result.output
    assert "warning" not in result.stderr
    until = time.monotonic() + 30
    while not opened.exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert opened.read_text() == f"{tmp_path / '-a folder' / 'contact-sheet.png'}\n"
