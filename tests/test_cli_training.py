"""The commands that train and evaluate, on a benchmark of 48 small images; and the scenarios of cpa_iqa."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ENVIRONMENT, lines, only_error, opening, run
from PIL import Image
from scipy.stats import pearsonr, spearmanr

from aigiqa_reward import Scorer, create_reward
from aigiqa_reward.datasets import read_agiqa3k, read_imagereward, read_table, split_rows
from aigiqa_reward.evaluation import ProtocolReport
from aigiqa_reward.training.by_name import whole_split

GENERATORS = ("sd1.5_normal", "sd1.5_highcorr", "sd1.5_lowcorr", "AttnGAN_normal", "midjourney_normal", "dalle2_normal")
PROMPTS = [f"a {thing} on a table" for thing in ("cat", "dog", "car", "tree", "house", "boat", "bird", "cup")]
COLUMNS = "name,prompt,adj1,adj2,style,mos_quality,std_quality,mos_align,std_align"
PRINTED = re.compile(r"test: (quality|correspondence) SRCC (\S+), PLCC (\S+), (\d+) images")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("agiqa3k"), np.random.default_rng(0)
    (folder / "images").mkdir()
    rows = [COLUMNS]
    for number, prompt in enumerate(PROMPTS):
        for place, generator in enumerate(GENERATORS):
            blocks = rng.integers(0, 256, (8, 8, 3)).repeat(8, axis=0).repeat(8, axis=1)
            noisy = blocks + rng.integers(-60, 60, (64, 64, 3)) * place / 5
            name = f"{generator}_{number:03d}.jpg"
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / "images" / name)
            quality, correspondence = 4 - 0.6 * place + rng.normal() * 0.2, 2 + number / 5 + rng.normal() * 0.2
            rows.append(f"{name},{prompt},,,,{quality:.4f},0.5,{correspondence:.4f},0.5")
    (folder / "data.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def tiny(clip: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    options = ["--cache", str(tmp_path_factory.mktemp("cache")), "--device", "cpu", "--learning-rate", "0.001"]
    return ["mst_clipiqa", "--tower", f"coarse={clip}", *options]


@pytest.fixture(scope="module")
def trained(data: Path, tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], str]:
    folder = tmp_path_factory.mktemp("trained") / "mst"
    arguments = ["train", *tiny, "--data", f"agiqa3k:{data}", "--split", "group", "--seed", "1"]
    arguments += ["--epochs", "2", "--output-dir", str(folder)]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return folder, arguments, result.stdout


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def table_of(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((folder / "table.csv").read_text())))


def test_a_trained_reward_scores_as_the_command_said(data, trained):
    folder, _, stdout = trained
    first, *rest = stdout.splitlines()
    assert first == str(folder)
    table = read_agiqa3k(data)
    rows = split_rows(table, mode="group", seed=1).test
    reward = create_reward("mst_clipiqa", weights=folder)
    found = Scorer(reward).score([table.paths[row] for row in rows], [table.prompts[row] for row in rows])
    assert [line.split()[1] for line in rest] == ["quality", "correspondence"]
    for line in rest:
        aspect, srcc, plcc, count = PRINTED.fullmatch(line).groups()
        predicted, target = getattr(found, aspect).numpy(), getattr(table, aspect)[rows]
        # Features were stored as float16, which may swap neighbors.
        assert float(srcc) == pytest.approx(spearmanr(predicted, target).statistic, abs=0.03)
        assert float(plcc) == pytest.approx(pearsonr(predicted, target).statistic, abs=0.01)
        assert int(count) == len(rows)
    record = json.loads((folder / "training.json").read_text())
    assert [entry["epoch"] for entry in record["result"]["history"]] == [1, 2]


def test_a_finished_training_is_not_repeated_nor_mixed_with_another(trained):
    folder, arguments, stdout = trained
    before = contents(folder)
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (0, stdout)
    after = contents(folder)
    assert {name: data for name, (data, _) in after.items()} == {name: data for name, (data, _) in before.items()}
    checkpoint = [name for name in before if name.startswith("checkpoint")]
    assert checkpoint
    assert all(before[name] == after[name] for name in checkpoint)
    message = only_error(run(*arguments, "--set", "fusion=mean", "--weight-decay", "0.5"))
    assert re.search(r"--output-dir: .*other settings \(set: .*; weight_decay: ", message)
    (folder / "run.json").rename(folder / "elsewhere.json")
    assert "was not written by such a run" in only_error(run(*arguments))
    (folder / "elsewhere.json").rename(folder / "run.json")
    assert contents(folder) == after


@pytest.mark.slow
def test_an_interrupted_process_resumes_to_the_same_end(data, tiny, tmp_path):
    options = ["train", *tiny, "--data", f"agiqa3k:{data}", "--epochs", "12", "--batch-size", "6", "--output-dir"]
    whole = run(*options, tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    interruptible = "import signal; signal.signal(2, signal.default_int_handler); import aigiqa_reward.__main__"
    arguments = [sys.executable, "-c", interruptible, *options, str(tmp_path / "parts")]
    with subprocess.Popen(arguments, stdout=-1, stderr=-1, text=True, env=ENVIRONMENT) as process:
        while process.poll() is None and not (tmp_path / "parts" / "checkpoint" / "state.json").is_file():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stdout) == (130, "")
    done = int(re.fullmatch(r"error: interrupted after (\d+) of 12 epochs; [^\n]*\n", stderr)[1])
    assert 0 < done < 12
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    assert run(*options, tmp_path / "parts").exit_code == 0
    for name in ("model.safetensors", "training.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_unreadable_images_are_listed_and_the_rest_is_trained(data, tiny, tmp_path):
    folder = shutil.copytree(data, tmp_path / "agiqa3k")
    table = read_agiqa3k(folder)
    broken = [table.paths[row] for row in whole_split(table).train[5:17]]
    for path in broken:
        path.write_text("no image")
    out = tmp_path / "out"
    result = run("train", *tiny, "--data", f"agiqa3k:{folder}", "--epochs", "1", "--output-dir", out)
    assert (result.exit_code, result.stdout) == (1, f"{out}\n")
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert [line.split(": ")[1] for line in errors[:-1]] == [str(path) for path in broken[:10]]
    assert errors[-1].startswith("error: 12 images could not be read and were left out")
    listed = json.loads((out / "training.json").read_text())["unreadable"]
    assert [entry["path"] for entry in listed] == [str(path) for path in broken]
    assert run("score", table.paths[0], "--reward", out).exit_code == 0


def test_training_continues_from_a_saved_reward(data, tiny, trained, tmp_path):
    options = ["--init", trained[0], "--learning-rate", "1e-12", *tiny[3:7], "--epochs", "1"]
    result = run("train", "mst_clipiqa", "--data", f"agiqa3k:{data}", *options, "--output-dir", tmp_path)
    assert result.exit_code == 0, result.output
    paths = list(read_agiqa3k(data).paths[:6])
    rewards = [create_reward("mst_clipiqa", weights=folder) for folder in (trained[0], tmp_path)]
    first, second = (Scorer(reward).score(paths, PROMPTS[0]).total for reward in rewards)
    assert pearsonr(first, second).statistic > 0.9999


def test_preferences(data, tiny, tmp_path):
    file, out = tmp_path / "train.json", tmp_path / "out"
    entries = []  # in ImageReward's layout: the ranks of three images per prompt, the less noisy the better
    for number, prompt in enumerate(PROMPTS):
        images = [f"{GENERATORS[place]}_{number:03d}.jpg" for place in (4, 0, 2)]
        entries.append({"id": str(number), "prompt": prompt, "generations": images, "ranking": [3, 1, 2]})
    shutil.copytree(data / "images", tmp_path / "images")
    file.write_text(json.dumps(entries))
    options = ["--data", f"imagereward:{file}", "--split", "group", "--epochs", "1", "--output-dir", out]
    result = run("train", *tiny, *options)
    assert result.exit_code == 0, result.output
    assert re.fullmatch(rf"{out}\ntest: the preferred image scores higher in [01]\.\d+ of 6 pairs\n", result.stdout)
    choices = ["--pairs", f"imagereward:{file}", "--reward", out, "--device", "cpu"]
    (row,) = lines(run("evaluate", *choices, "--format", "jsonl").stdout)
    pairs = read_imagereward(file)
    scorer = Scorer(create_reward("mst_clipiqa", weights=out))
    better, worse = (scorer.score(list(side), list(pairs.prompts)).total for side in (pairs.better, pairs.worse))
    expected = ((better > worse) + 0.5 * (better == worse)).float().mean().item()
    assert (row["accuracy"], row["pairs"]) == (pytest.approx(expected), len(pairs))


def test_evaluate_writes_tables_and_plots_and_computes_nothing_twice(data, tiny, tmp_path):
    folder = tmp_path / "report"
    protocol = ["--data", f"agiqa3k:{data}", "--seeds", "2", "--ablation-seeds", "1", "--epochs", "1"]
    arguments = ["evaluate", *tiny, *protocol, "--output-dir", str(folder)]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout == (folder / "table.md").read_text()
    ours, published = result.stdout.split("### AGIQA-3K: as published")
    assert "gate -> mean" in ours
    assert "SC-AGIQA" in published
    assert "SC-AGIQA" not in ours
    for name in ("quality.png", "correspondence.png", "srcc.png"):
        with Image.open(folder / name) as plot:
            assert plot.width == 1280
    rows = table_of(folder)
    assert {(row["seed"], row["predictor"]) for row in rows} >= {("0", "model"), ("1", "model"), ("0", "gate -> mean")}
    assert ("1", "gate -> mean") not in {(row["seed"], row["predictor"]) for row in rows}
    images = read_agiqa3k(data)
    for seed in (0, 1):
        with np.load(folder / f"seed{seed}.npz") as first:
            test = split_rows(images, mode="group", seed=seed).test
            assert first["rows"].tolist() == test.tolist()
            (row,) = (r for r in rows if (r["seed"], r["predictor"], r["task"]) == (str(seed), "model", "quality"))
            expected = spearmanr(first["quality"], images.quality[test]).statistic
            assert float(row["srcc"]) == pytest.approx(expected, abs=1e-6)

    before = contents(folder)
    unused = [str(tmp_path / "unused") if before == "--cache" else word for before, word in pairwise(["", *arguments])]
    again = run(*unused)
    assert (again.exit_code, again.stdout) == (0, result.stdout)
    assert not (tmp_path / "unused").exists()
    assert contents(folder)["report.json"] == before["report.json"]
    assert "seeds: 2 there, 3 now" in only_error(run(*["3" if word == "2" else word for word in arguments]))
    report = ProtocolReport.load(folder / "report.json")
    replace(report, scores=[score for score in report.scores if not score.seed]).save(folder / "report.json")
    assert run(*arguments).stdout == result.stdout
    assert contents(folder)["table.csv"][0] == before["table.csv"][0]


def test_evaluate_on_one_kind_of_score_of_another_table(data, tiny, tmp_path):
    table, file, report = read_agiqa3k(data), tmp_path / "scores.csv", tmp_path / "report"
    rows = zip(table.paths, table.prompts, table.generators, table.correspondence, strict=True)
    file.write_text("path,prompt,generator,correspondence\n" + "".join("{},{},{},{}\n".format(*row) for row in rows))
    assigned = zip(read_table(file).names, ["test"] * 12 + ["val"] * 6 + ["train"] * 30, strict=True)
    (tmp_path / "split.csv").write_text("name,split\n" + "".join(f"{name},{part}\n" for name, part in assigned))
    arguments = ["evaluate", *tiny, "--data", f"csv:{file}", "--split", f"csv:{tmp_path / 'split.csv'}"]
    arguments += ["--set", "fusion=mean", "--epochs", "1", "--seeds", "1", "--ablation-seeds", "0"]
    result = run(*arguments, "--output-dir", report)
    assert result.exit_code == 0, result.output
    assert "12 test images" in result.stdout
    assert "published" not in result.stdout
    assert not (report / "quality.png").exists()
    assert (report / "correspondence.png").exists()
    assert "set: " in only_error(run(*arguments, "--set", "width=16", "--output-dir", report))


def test_evaluate_given_weights(data, trained, tmp_path):
    folder = shutil.copytree(data, tmp_path / "agiqa3k")
    header, *rows = (folder / "data.csv").read_text().splitlines()
    (folder / "data.csv").write_text("\n".join([header, *rows[:8]]) + "\n")
    table = read_agiqa3k(folder)
    table.paths[3].write_text("no image")
    common = ["--data", f"agiqa3k:{folder}", "--device", "cpu", "--output-dir", tmp_path / "report", "--weights"]
    result = run("evaluate", "mst_clipiqa", *common, trained[0])
    assert result.exit_code == 1
    assert f"error: {table.paths[3]}: " in result.stderr
    assert "trained on AGIQA-3K" not in result.stderr
    kept = [row for row in range(len(table)) if row != 3]
    scorer = Scorer(create_reward("mst_clipiqa", weights=trained[0]))
    found = scorer.score([table.paths[row] for row in kept], [table.prompts[row] for row in kept])
    measured = {row["task"]: row for row in table_of(tmp_path / "report")}
    for aspect in ("quality", "correspondence"):
        expected = spearmanr(getattr(found, aspect), getattr(table, aspect)[kept]).statistic
        assert float(measured[aspect]["srcc"]) == pytest.approx(expected, abs=1e-6)
        assert measured[aspect]["images"] == "7"
    shutil.rmtree(tmp_path / "report")
    message = only_error(run("evaluate", "mst_clipiqa", *common, trained[0], "--epochs", "3", "--seeds", "2"))
    assert re.search("--weights: nothing is trained; leave out .*--seeds.*--epochs", message)
    embedded = run("evaluate", "compact", *common, "embedded")
    assert embedded.exit_code == 1
    assert "warning: the embedded weights were trained on AGIQA-3K" in embedded.stderr


@pytest.mark.slow
def test_an_interrupted_evaluation_of_given_weights_continues(data, tmp_path):
    given = ["--data", f"agiqa3k:{data}", "--device", "cpu", "--output-dir", tmp_path / "whole"]
    whole = ["compact", *given, "--weights", "embedded"]
    for until, read, status in ((40, 40, 130), (-1, 48 - 32, 0)):  # 32 of 48 are kept
        with opening(until, signal.SIGTERM) as places:
            assert run("evaluate", *whole).exit_code == status
        assert len(places) == read
        assert (tmp_path / "whole" / "table.csv.partial").exists() == (status == 130)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train mst_clipqa DATA", "did you mean 'mst_clipiqa'"),
        ("train compact DATA", "examples/train_compact"),
        ("train mst_clipiqa --data agiqa33k:x", "did you mean 'agiqa3k'"),
        ("train mst_clipiqa --data COLUMN", "no column mos_align"),
        ("train mst_clipiqa DATA --loss mes", "--loss: expected one of mse"),
        ("train mst_clipiqa DATA --split csv", "--split: expected whole, group, random_image or csv:FILE"),
        ("train mst_clipiqa DATA --split csv:no.csv", "--split: expected a CSV file .* found none"),
        ("train TINY DATA --set widht=8", "--set: .*'widht'"),
        ("train mst_clipiqa DATA --tower clip=ViT-B-32:openai", "--tower: .*coarse.*fine.* got clip"),
        ("train mst_clipiqa DATA --tower coarse=ViT-B-32", "random weights"),
        ("train mst_clipiqa DATA --preset paper --init embedded", "init: .* neither preset nor"),
        ("train mst_clipiqa DATA --hub-model-id a/b", "--hub-model-id: .*with --push-to-hub"),
        ("train TINY DATA --output-dir DATA.CSV", "--output-dir: expected a folder"),
        ("evaluate mst_clipiqa DATA --split whole", "--split: expected group, random_image or csv:FILE"),
        ("evaluate mst_clipiqa DATA --seeds 2 --ablation-seeds 4", "got 2 and 4"),
        ("score DATA.CSV --scenario poster", "only cpa_iqa has scenarios"),
        ("score DATA.CSV --zero-shot", "zero_shot: only tsp_mgs"),
        ("scenarios --preferences no.json", "--preferences: cannot read"),
    ],
)
def test_usage_errors(data, tiny, tmp_path, arguments, message):
    misnamed, work = tmp_path / "misnamed", tmp_path / "work"
    (misnamed / "images").mkdir(parents=True)
    (misnamed / "data.csv").write_text((data / "data.csv").read_text().replace("mos_align", "align", 1))
    work.mkdir()
    stand_ins = {"DATA": ["--data", f"agiqa3k:{data}"], "COLUMN": [f"agiqa3k:{misnamed}"], "TINY": tiny}
    stand_ins["DATA.CSV"] = [str(data / "data.csv")]
    full = [part for argument in arguments.split() for part in stand_ins.get(argument, [argument])]
    assert re.search(message, only_error(run(*full, cwd=work)))
    assert not list(work.rglob("model.safetensors"))


def test_scenarios_are_listed(tmp_path):
    shipped = run("scenarios", "--format", "jsonl")
    rows = lines(shipped.stdout)
    assert "general" in [row["scenario"] for row in rows]
    assert all(row[name] == pytest.approx(0.2) for row in rows for name in row if name != "scenario")
    assert "uniform" in shipped.stderr
    own = {"print": dict.fromkeys(("global", "local", "implicit", "distortion"), 0.0) | {"low_level": np.log(4)}}
    (tmp_path / "own.json").write_text(json.dumps(own))
    listed = run("scenarios", "--preferences", tmp_path / "own.json")
    assert listed.stderr == ""
    header, _, row, *_ = listed.stdout.splitlines()
    assert header.split() == ["scenario", "global", "local", "implicit", "distortion", "low_level"]
    assert row.split() == ["print", "0.1250", "0.1250", "0.1250", "0.1250", "0.5000"]


def test_scores_for_a_scenario(data, tmp_path):
    own = {"strict": [0, 0, 0, 5, 0], "soft": [0, 0, 0, 0, 5]}
    (tmp_path / "own.json").write_text(json.dumps(own))
    images = sorted(str(path) for path in (data / "images").iterdir())[:2]
    common = ["score", *images, "--reward", "cpa_iqa", "--device", "cpu", "--prompt", PROMPTS[0], "--format", "jsonl"]
    common += ["--preferences", tmp_path / "own.json", "--scenario"]
    scores = []
    for scenario in own:
        reward = create_reward("cpa_iqa", scenario=scenario, preferences=tmp_path / "own.json")
        expected = Scorer(reward).score(images, PROMPTS[0])
        scores.append([row["quality"] for row in lines(run(*common, scenario).stdout)])
        assert scores[-1] == pytest.approx(expected.quality.tolist(), abs=1e-5)
    assert scores[0] != pytest.approx(scores[1], abs=1e-3)
    assert "none called 'poster'" in only_error(run(*common, "poster"))


def test_zero_shot(data):
    images = sorted(str(path) for path in (data / "images").iterdir())[:2]
    result = run("rank", *images, "--reward", "tsp_mgs", "--zero-shot", "--device", "cpu", "--format", "jsonl")
    rows = lines(result.stdout)
    expected = Scorer(create_reward("tsp_mgs", zero_shot=True)).score([row["path"] for row in rows])
    assert [row["total"] for row in rows] == pytest.approx(expected.total.tolist(), abs=1e-5)
    assert sorted(row["path"] for row in rows) == images
