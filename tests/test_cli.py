"""The command line, run as its users do: what it prints, writes, refuses and survives."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from commands import ENVIRONMENT, command, lines, only_error, opening, options_of, run
from PIL import Image, features

from aigiqa_reward import Reward, Scorer, __version__, create_reward, get_reward_spec, list_rewards
from aigiqa_reward.cli.commands.score import _names
from aigiqa_reward.encoders.open_clip import OpenCLIPConfig

KEYS = ["path", "prompt", "total", "quality", "correspondence", "error"]
SIZES = {"a b.png": (64, 64), "b.jpg": (48, 80), "C.PNG": (96, 64), "é.png": (64, 64), "[red].png": (64, 64)}
PROMPT = "a red apple on a table"
COMMANDS = [
    ("web",),
    ("score",),
    ("rank",),
    ("best-of-n",),
    ("pairs",),
    ("demo",),
    ("rewards",),
    ("scenarios",),
    ("train",),
]
COMMANDS += [("evaluate",), *(("finetune", name) for name in ("draft", "refl", "dpo", "ddpo", "grpo", "nft"))]


def write_image(path: Path, seed: int, size: tuple[int, int] = (64, 64)) -> Path:
    blocks = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(blocks.repeat(8, axis=0).repeat(8, axis=1)).save(path)
    return path


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("images")
    return sorted(str(write_image(folder / name, seed, size)) for seed, (name, size) in enumerate(SIZES.items()))


def assert_scores(rows: list[dict[str, Any]], reward: Reward, paths: list[str], prompts: Any) -> None:
    expected = Scorer(reward).score(paths, prompts)
    assert [row["path"] for row in rows] == paths
    for name in ("total", "quality", "correspondence"):
        scores = getattr(expected, name)
        found = [row[name] for row in rows]
        assert found == ([None] * len(rows) if scores is None else pytest.approx(scores.tolist(), abs=1e-5))


@pytest.mark.parametrize("prompt", [None, PROMPT])
def test_scores_are_those_of_scorer(paths, tiny, tiny_reward, prompt):
    given = ["--prompt", prompt] if prompt else []
    result = run("score", Path(paths[0]).parent, *tiny, "--format", "jsonl", *given)
    note = "" if prompt else "note: no prompt: only quality is judged\n"
    assert (result.exit_code, result.stderr) == (0, note), result.output
    rows = lines(result.stdout)
    assert all(list(row) == KEYS for row in rows)
    assert {row["prompt"] for row in rows} == {prompt}
    assert_scores(rows, tiny_reward, paths, prompt)
    assert len({row["total"] for row in rows}) == len(rows)


def test_the_default_reward_is_the_embedded_one(paths):
    result = run("score", *paths[:2], "--device", "cpu", "--prompt", PROMPT, "--format", "jsonl")
    assert result.exit_code == 0, result.output
    assert_scores(lines(result.stdout), create_reward("compact"), paths[:2], PROMPT)


def test_options_reach_the_reward(paths, tiny, clip, tmp_path):
    encoder, shares = OpenCLIPConfig(architecture=clip), {"quality_weight": 3.0, "correspondence_weight": 1.0}
    reward = create_reward("tsp_mgs", encoder=encoder, dtype=torch.bfloat16, **shares)
    common = ["score", *paths, *tiny, "--correspondence_weight", "1", "--dtype=bfloat16", "--prompt", PROMPT]
    result = run(*common, "--quality-weight", "3", "--batch-size", "2", "--format", "jsonl")
    rows = lines(result.stdout)
    half = Scorer(reward, batch_size=2).score(paths, PROMPT)
    assert [row["total"] for row in rows] == pytest.approx(half.total.tolist(), abs=1e-5)
    for row in rows:
        assert row["total"] == pytest.approx(0.75 * row["quality"] + 0.25 * row["correspondence"], abs=1e-5)
    (tmp_path / "a.yaml").write_text("format: jsonl\nquality-weight: 3\nbatch_size: 2\n")
    assert run(*common, "--config", tmp_path / "a.yaml").stdout == result.stdout


def test_every_format_says_the_same(paths, tiny, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"")
    common = ["score", *paths, broken, *tiny, "--prompt", PROMPT, "--format"]
    rows = lines(run(*common, "jsonl").stdout)
    from_csv = list(csv.DictReader(io.StringIO(run(*common, "csv").stdout)))
    assert list(from_csv[0]) == KEYS
    assert from_csv == [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows]
    table = run(*common, "table").stdout.splitlines()
    for row in rows:
        (line,) = (line for line in table if line.startswith(f" {row['path']} "))
        cells = line.removeprefix(f" {row['path']} ").split()
        if row["error"] is None:
            assert cells == [f"{row[name]:.4f}" for name in ("total", "quality", "correspondence")]
        else:
            assert " ".join(cells) in row["error"]


def test_output_goes_to_a_file_whole(paths, tiny, tmp_path):
    file = tmp_path / "new" / "scores.jsonl"
    given = ["score", *paths, *tiny, "--prompt", PROMPT, "--format", "jsonl"]
    printed = run(*given).stdout
    for _ in range(2):
        result = run(*given, "--output", file)
        assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
        assert file.read_text(encoding="utf-8") == printed
        assert list(file.parent.iterdir()) == [file]


def test_folders_stand_for_their_images(tiny, tmp_path):
    for seed, name in enumerate(["b.png", "a.JPG", "sub/c.webp", "sub/deep/d.bmp", ".hidden.png", ".git/e.png"]):
        write_image(tmp_path / name, seed)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty").mkdir()

    def found(*arguments: str) -> list[str]:
        result = run("score", *arguments, *tiny, "--format", "jsonl", cwd=tmp_path)
        assert result.exit_code == 0, result.output
        return [Path(row["path"]).as_posix() for row in lines(result.stdout)]

    assert found(".") == ["a.JPG", "b.png"]
    assert "left out by their ending: .txt (1: notes.txt)" in run("score", tmp_path, *tiny).stderr
    assert found(".", "--recursive") == ["a.JPG", "b.png", "sub/c.webp", "sub/deep/d.bmp"]
    assert found("sub", "b.png", "empty") == ["sub/c.webp", "b.png"]
    write_image(tmp_path / "elsewhere" / "deep" / "f.png", 6)
    (tmp_path / "set").mkdir()
    links = {"1": "..", "2": "../elsewhere/deep", "3": "../elsewhere", "4": "."}
    for link, target in links.items():
        (tmp_path / "set" / link).symlink_to(target)
    assert found("elsewhere", "--recursive") == ["elsewhere/deep/f.png"]
    names = ["a.JPG", "b.png", "elsewhere/deep/f.png", "sub/c.webp", "sub/deep/d.bmp"]
    assert found("set", "--recursive") == [f"set/1/{name}" for name in names]
    (tmp_path / "set" / "1").unlink()
    assert found("set", "--recursive") == found("set/2") == ["set/2/f.png"]


def test_a_folder_gives_what_pillow_reads_and_names_the_rest(tiny, tmp_path):
    kinds = {"jfif": "JPEG", "jpe": "JPEG", "mpo": "JPEG", "apng": "PNG", "j2k": "JPEG2000", "pgm": "PPM", "QOI": "QOI"}
    kinds |= {"avif": "AVIF"} if features.check("avif") else {}
    image = Image.open(write_image(tmp_path / "z" / "x.png", 0))
    for ending, form in kinds.items():
        image.save(tmp_path / f"a.{ending}", form)
    for name in ("b.heic", "c.HEIC", "d.jxl", "e.cr2", "f.mp4", "README"):
        (tmp_path / name).write_bytes(b"x")
    result = run("score", tmp_path, *tiny, "--format", "jsonl")
    assert result.exit_code == 0, result.output
    assert [Path(row["path"]).suffix[1:] for row in lines(result.stdout)] == sorted(kinds)
    for part in (".heic (2: b.heic, ...)", ".jxl (1: d.jxl)", ".cr2 (1: e.cr2)", "without one (1: README)"):
        assert part in result.stderr
    for ending in kinds:
        (tmp_path / f"a.{ending}").unlink()
    assert ".heic (2: b.heic, ...)" in only_error(run("score", tmp_path, *tiny))


def test_unreadable_images_are_reported_and_the_others_scored(paths, tiny, tiny_reward, tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("hello")
    write_image(tmp_path / "small.png", 0, (8, 8))
    (tmp_path / "cut.png").write_bytes(Path(paths[0]).read_bytes()[:200])
    names = ["empty.png", "text.png", "[bold]no\nsuch.png", "small.png", "cut.png", f"{'x' * 300}.png"]
    bad = [str(tmp_path / name) for name in names]
    mixed = [bad[0], paths[0], *bad[1:4], *paths[1:], *bad[4:]]
    result = run("score", *mixed, *tiny, "--prompt", PROMPT, "--format", "jsonl", "--batch-size", "3")
    assert result.exit_code == 1
    rows = lines(result.stdout)
    assert [row["path"] for row in rows] == mixed
    failed = [row for row in rows if row["error"] is not None]
    assert [row["path"] for row in failed] == bad
    assert all(row[name] is None for row in failed for name in ("total", "quality", "correspondence"))
    assert_scores([row for row in rows if row["error"] is None], tiny_reward, paths, PROMPT)
    told = result.stderr.splitlines()
    for path in bad:
        assert sum(line.startswith(f"error: {path}: ".replace("\n", r"\n")) for line in told) == 1
    assert len(told) == len(bad)


HOSTILE = ["-x.png", "--prompt", "a b.png", "[red].png", "[bold].png", ":smile:.png", "'\".png", "a,b.png"]
HOSTILE += ["new\nline.png", "é漢字.png", "\u2028.png", "\x1b[31mred.png", "=1+1.png", "a\tb.png", "back\\slash.png"]
HOSTILE += ["{x}.png", *([] if sys.platform == "darwin" else [os.fsdecode(b"not-utf8-\xff.png")])]


@pytest.mark.skipif(sys.platform == "win32", reason="such names cannot exist there")
def test_hostile_names(tiny, tmp_path):
    for seed, name in enumerate(HOSTILE):
        write_image(tmp_path / "image.png", seed).rename(tmp_path / name)

    def printed(command: str, form: str, *more: str) -> str:
        result = run(command, *tiny, "--format", form, *more, "--", *HOSTILE, cwd=tmp_path)
        assert result.exit_code == 0, result.output
        return result.stdout

    assert [row["path"] for row in lines(printed("score", "jsonl"))] == HOSTILE
    rows = list(csv.DictReader(io.StringIO(printed("score", "csv"))))
    assert [row["path"] for row in rows] == [n.encode("utf-8", "backslashreplace").decode() for n in HOSTILE]
    table = printed("score", "table")
    body = [line for line in table.splitlines() if re.search(r"\d\.\d{4}", line)]
    assert len(body) == len(HOSTILE)
    for name in ("[red].png", "[bold].png", ":smile:.png", "-x.png", "{x}.png", "é漢字.png"):
        assert sum(line.startswith(f" {name} ") for line in body) == 1, name
    assert "\x1b" not in table
    order = [row["path"] for row in lines(printed("rank", "jsonl", "--copy-to", "best"))]
    copies = {f"{place:03d}_{name}" for place, name in enumerate(order, start=1)}
    assert {file.name for file in (tmp_path / "best").iterdir()} == copies | {"ranking.jsonl"}


def prompts_for(paths: list[str]) -> list[str]:
    return [f"{count} cats, one of them red" for count in range(len(paths))]


def prompts_file(form: str, paths: list[str]) -> str:
    pairs = list(zip(paths, prompts_for(paths), strict=True))
    if form == "txt":
        return "".join(prompt + "\r\n" for _, prompt in pairs)
    if form == "jsonl":
        return "\n".join(json.dumps({"path": path, "prompt": text, "mos": 1}) for path, text in reversed(pairs))
    rows = [(1, path if form == "path" else Path(path).name, prompt) for path, prompt in pairs]
    text = io.StringIO()
    csv.writer(text).writerows([("mos", form, "prompt"), *rows])
    return "\ufeff" + text.getvalue()


@pytest.mark.parametrize("form", ["txt", "jsonl", "path", "name", None])
def test_a_prompt_per_image(form, paths, tiny, tiny_reward, tmp_path):
    given = [part for prompt in prompts_for(paths) for part in ("--prompt", prompt)]
    if form is not None:
        file = tmp_path / f"prompts.{form if form in ('txt', 'jsonl') else 'csv'}"
        file.write_bytes(prompts_file(form, paths).encode())
        given = ["--prompts", str(file)]
    result = run("score", *paths, *tiny, *given, "--format", "jsonl")
    assert result.exit_code == 0, result.output
    rows = lines(result.stdout)
    assert [row["prompt"] for row in rows] == prompts_for(paths)
    assert_scores(rows, tiny_reward, paths, prompts_for(paths))


def test_a_missing_prompt_costs_its_own_image_only(paths, tiny, tiny_reward, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(["one cat", "", "two cats", "  ", "three cats"]))
    result = run("score", *paths, *tiny, "--prompts", tmp_path / "prompts.txt", "--format", "jsonl")
    assert result.exit_code == 1
    rows = lines(result.stdout)
    assert ["prompt is empty" in (row["error"] or "") for row in rows] == [False, True, False, True, False]
    assert_scores(rows[::2], tiny_reward, paths[::2], ["one cat", "two cats", "three cats"])
    assert result.stderr.count("prompt is empty") == 2
    names = ["x/a.png", "y/a.png", "y/b.png", "c.png"]
    images = [write_image(tmp_path / name, seed) for seed, name in enumerate(names)]
    (tmp_path / "p.csv").write_text("path,prompt\nx/a.png,one\nb.png,two\nelsewhere/c.png,three\nelse/c.png,four\n")
    result = run("score", *images, *tiny, "--prompts", tmp_path / "p.csv", "--format", "jsonl")
    assert result.exit_code == 1
    rows = lines(result.stdout)
    assert [row["prompt"] for row in rows] == ["one", None, "two", None]
    assert "no prompt for it" in rows[1]["error"]
    assert "more than one prompt" in rows[3]["error"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("few.txt", b"one\ntwo\n", "one line for each of the 5 images, got 2 lines"),
        ("few.json", b'["one", "two"]', "one line for each of the 5 images, got 2"),
        ("both.csv", b"path,prompt,path\na.png,x,b.png\n", "each column once, got path several times"),
        ("near.csv", b"path,promt\na.png,x\n", "no column prompt; .*is 'promt' meant"),
        ("bad.jsonl", b'{"path": "a.png", "prompt": "x"}\n{"path"\n', "line 2: not JSON"),
        ("number.jsonl", b'{"path": "a.png", "prompt": 3}\n', "line 1: expected"),
        ("header.csv", b"file,text\na.png,x\n", "expected the columns path,prompt or name,prompt"),
        ("cells.csv", b"name,prompt\na.png,a cat, red\n", "line 2: more cells than columns"),
        ("others.csv", b"name,prompt\nother.png,a cat\n", "none of the 5 images has a prompt"),
        ("binary.txt", b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_wrong_prompts_files(paths, tiny, tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text)
    assert re.search(message, only_error(run("score", *paths, *tiny, "--prompts", tmp_path / name)))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.json", json.dumps(["a fox", "a cat", "a dog"])),
        ("sheet.tsv", 'File\tCaption\nb.png\ta cat\n./a.png\t a fox \nsub/../a.png\ta fox\nc.png\t"a" dog\n'),
        ("metadata.csv", "file_name,text\nc.png,a dog\na.png,a fox\n./b.png,a cat\n"),
    ],
)
def test_prompts_of_tables(tiny, tmp_path, name, text):
    images = [write_image(tmp_path / image, seed) for seed, image in enumerate(["a.png", "b.png", "c.png"])]
    (tmp_path / name).write_text(text)
    result = run("rank", *images, *tiny, "--prompts", tmp_path / name, "--format", "jsonl")
    assert result.exit_code == 0, result.output
    found = {Path(row["path"]).name: row["prompt"].replace('"', "") for row in lines(result.stdout)}
    assert found == {"a.png": "a fox", "b.png": "a cat", "c.png": "a dog"}


def test_the_csv_of_score_gives_its_prompts_back(paths, tiny, tmp_path):
    texts = ["a fox\ron a hill", "a\r\ncat", 'a "dog", red', "a\nhat", "a tie"]
    given = [part for text in texts for part in ("--prompt", text)]
    printed = run("score", *paths, *tiny, *given, "--format", "csv").stdout_bytes
    (tmp_path / "scores.csv").write_bytes(printed)
    assert pandas.read_csv(io.BytesIO(printed)).prompt.tolist() == texts
    again = run("score", *paths, *tiny, "--prompts", tmp_path / "scores.csv", "--format", "csv")
    assert again.stdout_bytes == printed


@pytest.mark.parametrize(
    "command",
    [
        "score PATH",
        "rank PATH",
        "best-of-n --model embedded",
        "pairs --model embedded",
        "finetune refl --model embedded",
    ],
)
def test_every_command_takes_tables(command, paths, tmp_path):
    (tmp_path / "p.csv").write_text("short,long\n,x\n")
    start = [paths[0] if word == "PATH" else word for word in command.split()]
    end = ["--prompts", tmp_path / "p.csv"]
    assert "no column prompt; " in only_error(run(*start, *end, cwd=tmp_path))
    assert "is 'long' meant" in only_error(run(*start, *end, "--prompt-column", "lon", cwd=tmp_path))
    assert "--prompt-column: names a column" in only_error(
        run(*start, "--prompt", "x", "--prompt-column", "a", cwd=tmp_path)
    )


SEVERAL = {
    "--prompt",
    "--lora",
    "--reward",
    "--pairs",
    "--holdout-reward",
    "--set",
    "--tower",
    "--target-modules",
    "--details",
    "--guidance-scales",
}
"""Options that may be repeated."""


@pytest.mark.parametrize("names", COMMANDS)
def test_only_options_with_several_values_may_be_repeated(names):
    options = options_of(*names)
    for spelling, each in options.items():
        if spelling.startswith("--") and spelling != "--help":
            assert not each.multiple or SEVERAL & set(each.opts), (names, spelling)
            twice = [spelling] if each.is_flag else [spelling, "1"]
            if not each.multiple and "_" not in spelling:
                assert "given twice" in only_error(run(*names, *twice, *twice)), (names, spelling)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score"], "IMAGES"),
        (["score", ""], "empty path"),
        (["score", ".", "TINY"], "no images in"),
        (["score", "IMAGE", "--prompt", "x", "--prompts", "y"], "expected one of them, got both"),
        (["score", "IMAGE", "--reward", "compcat"], "did you mean 'compact'"),
        (["score", "IMAGE", "--reward", "sc_agiqa", "--encoder", "ViT-B-32", "--encoder-weights", "x"], "only tsp_mgs"),
        (["score", "IMAGE", "--encoder-weights", "openai"], "--encoder-weights"),
        (["score", "IMAGE", "--reward", "tsp_mgs", "--encoder", "ViT-B-33", "--encoder-weights", "x"], "ViT-B-32"),
        (["score", "IMAGE", "--reward", "tsp_mgs", "--encoder", "ViT-B-32", "--encoder-weights", "x.pt"], "pickle"),
        (["score", "IMAGE", "--reward", "no/such/folder"], "--reward: expected a folder"),
        (["score", "IMAGE", "--device", "nowhere"], "--device: cannot compute on 'nowhere'"),
        (["score", "IMAGE", "TINY", "--quality-weight", "0"], "needs prompts here: pass --prompt"),
        (["score", "IMAGE", "--reward", "compact:0"], "--reward: expected a weight above 0"),
        (["score", "IMAGE", "--batch_size", "2", "--batch-size", "3"], "--batch-size: given twice"),
        (["score", "IMAGE", "--prompt", "x", "--prompt", "y"], "--prompt: expected one prompt for all images or one"),
        (["score", "IMAGE", "TINY", "--output", "."], "--output: expected a file"),
        (["score", "IMAGE", "TINY", "--output", os.devnull], "--output: expected a file"),
        (["score", "IMAGE", "TINY", "--output", "x" * 300], "cannot write"),
        (["rank", "IMAGE", "TINY", "--copy-to", "IMAGE"], "--copy-to: expected a folder"),
        (["scroe"], "scroe"),
    ],
)
def test_usage_errors(paths, tiny, tmp_path, arguments, message):
    stand_ins = {"IMAGE": [paths[0]], "TINY": tiny}
    full = [part for argument in arguments for part in stand_ins.get(argument, [argument])]
    assert re.search(message, only_error(run(*full, cwd=tmp_path)))
    assert not list(tmp_path.iterdir())
    assert not Path(os.devnull).is_file()


def test_version():
    assert run("--version").stdout == f"aigiqa-reward {__version__}\n"


def test_rank_orders_by_total(paths, tiny, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"")
    inputs = [str(tmp_path / "bad.png"), *paths, paths[2]]
    common = [*inputs, *tiny, "--prompt", PROMPT, "--format", "jsonl"]
    flat, ranked, best = run("score", *common), run("rank", *common), run("rank", *common, "--top-k", "2")
    assert (ranked.exit_code, best.exit_code) == (1, 1)
    rows = [row for row in lines(flat.stdout) if row["error"] is None]
    expected = sorted(rows, key=lambda row: row["total"], reverse=True)
    assert lines(ranked.stdout)[:-1] == expected
    assert lines(ranked.stdout)[-1]["path"] == inputs[0]
    assert [row["path"] for row in lines(best.stdout)] == [expected[0]["path"], expected[1]["path"], inputs[0]]


def test_rank_copies_the_best(paths, tiny, tmp_path):
    out = tmp_path / "new" / "best"
    arguments = ["rank", *paths, *tiny, "--format", "jsonl", "--copy-to", out, "--top-k"]
    result = run(*arguments, "2")
    assert result.exit_code == 0, result.output
    assert (out / "ranking.jsonl").read_text() == result.stdout
    best = [Path(row["path"]) for row in lines(result.stdout)]
    names = [f"{place:03d}_{path.name}" for place, path in enumerate(best, start=1)]
    assert {file.name for file in out.iterdir()} == {*names, "ranking.jsonl"}
    for name, path in zip(names, best, strict=True):
        assert (out / name).read_bytes() == path.read_bytes()
    (out / names[0]).write_bytes(b"mine")
    assert "--overwrite" in only_error(run(*arguments, "2"))
    (out / "007_mine.png").write_bytes(b"mine")
    assert run(*arguments, "1", "--overwrite").exit_code == 0
    assert {file.name for file in out.iterdir()} == {names[0], "ranking.jsonl", "007_mine.png"}
    assert (out / names[0]).read_bytes() == best[0].read_bytes()
    (tmp_path / "notes.txt").write_bytes(b"notes")
    (out / "ranking.jsonl").write_text('{"path": "../../notes.txt", "error": null}\nnot JSON')
    assert run(*arguments, "1", "--overwrite").exit_code == 0
    assert (tmp_path / "notes.txt").exists()
    (out / "ranking.jsonl").unlink()
    refused = run(*arguments, "1")
    assert refused.exit_code == 2
    assert refused.stdout == result.stdout.splitlines(keepends=True)[0], "the ranking itself is not lost"


def test_rank_writes_a_page_of_its_images(paths, tiny, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"")
    common = [*paths, tmp_path / "bad.png", *tiny, "--prompt", "a <red> fox", "--format", "jsonl"]
    result = run("rank", *common, "--report", tmp_path / "page.html")
    page, rows = (tmp_path / "page.html").read_text(), lines(result.stdout)
    assert page.count("<img") == len(paths) and page.count("data:image/") == len(paths)
    assert "a &lt;red&gt; fox" in page and "bad.png" in page
    places = [page.index(f"</b> {row['path']}") for row in rows if row["error"] is None]
    assert places == sorted(places)
    assert "--report: expected a file" in only_error(run("rank", *common, "--report", tmp_path))


def test_rank_never_overwrites_an_image_it_ranks(tiny, tmp_path):
    images = [write_image(tmp_path / f"{seed}.png", seed) for seed in range(3)]
    rows = lines(run("rank", *images, *tiny, "--format", "jsonl").stdout)
    names = ["a.png", "001_a.png", "b.png"]  # the copy of the best would be called as the second is
    ranked = [Path(row["path"]).rename(tmp_path / name) for row, name in zip(rows, names, strict=True)]
    before = {path.name: path.read_bytes() for path in ranked}
    result = run("rank", *ranked, *tiny, "--top-k", "1", "--copy-to", tmp_path, "--overwrite")
    assert result.exit_code == 2
    assert "is itself one of the images" in result.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_copies_of_long_names_and_many_images_sort_as_the_ranking(tiny, tmp_path):
    names = ["x" * 251 + ".png", "寿" * 80 + ".png", "寿" * 83 + "a.png", "b.png"]
    for seed, name in enumerate(names):
        write_image(tmp_path / "image.png", seed).rename(tmp_path / name)
    best = tmp_path / "best"
    result = run("rank", tmp_path, *tiny, "--format", "jsonl", "--copy-to", best)
    assert result.exit_code == 0, result.output
    ranked = [Path(row["path"]) for row in lines(result.stdout)]
    copies = sorted(best.glob("*.png"))
    assert [copy.read_bytes() for copy in copies] == [image.read_bytes() for image in ranked]
    assert [copy.name[:5] for copy in copies] == [f"00{place}_{image.name[0]}" for place, image in enumerate(ranked, 1)]
    for copy in copies:
        copy.unlink()
        copy.symlink_to(tmp_path / "mine")
    (tmp_path / "mine").write_bytes(b"mine")
    assert run("rank", tmp_path, *tiny, "--copy-to", best, "--overwrite").exit_code == 0
    assert [copy.read_bytes() for copy in copies] == [image.read_bytes() for image in ranked]
    assert (tmp_path / "mine").read_bytes() == b"mine"
    many = _names([Path(f"{place}.png") for place in range(1001)])
    assert sorted(many) == many


def test_a_tilde_is_the_home_folder_wherever_a_path_is_given(paths, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    (home / "p.txt").write_text("\n".join(prompts_for(paths)) + "\n")
    (home / "c.yaml").write_text("output: ~/scores.jsonl\nprompts: ~/p.txt\nformat: jsonl\n")
    result = run("rank", *paths, *tiny, "--copy-to=~/best", "--config=~/c.yaml", cwd=here)
    assert result.exit_code == 0, result.output
    assert {row["prompt"] for row in lines((home / "scores.jsonl").read_text())} == set(prompts_for(paths))
    assert (home / "best" / "ranking.jsonl").exists()
    assert "~/p.txt" not in only_error(run("pairs", "--model", "embedded", "--prompts=~/none.txt", cwd=here))
    assert not list(here.iterdir())


def test_several_rewards_rank_by_their_weighted_mean(paths, tiny, tiny_reward, clip, tmp_path):
    other = create_reward("tsp_mgs", encoder=OpenCLIPConfig(architecture=clip), quality_weight=0.0)
    other.save_pretrained(tmp_path / "a:b")
    given = ["tsp_mgs:3" if word == "tsp_mgs" else word for word in tiny]
    common = [*paths, "--prompt", PROMPT, *given, "--reward", tmp_path / "a:b"]
    rows = lines(run("score", *common, "--format", "jsonl").stdout)
    found = [Scorer(reward).score(paths, PROMPT) for reward in (tiny_reward, other)]
    for name, output in zip(("tsp_mgs_1", "tsp_mgs_2"), found, strict=True):
        for aspect in ("total", "quality", "correspondence"):
            column = [row[f"{name}.{aspect}"] for row in rows]
            assert column == pytest.approx(getattr(output, aspect).tolist(), abs=1e-5)
    mean = (3 * found[0].total + found[1].total) / 4
    assert [row["total"] for row in rows] == pytest.approx(mean.tolist(), abs=1e-5)
    ranked = list(csv.DictReader(io.StringIO(run("rank", *common, "--format", "csv").stdout)))
    assert [row["path"] for row in ranked] == [paths[i] for i in mean.argsort(descending=True).tolist()]
    assert "tsp_mgs_2.total" in run("score", *common).stdout.splitlines()[0].split()


def test_every_option_has_one_sentence_of_help():
    for names in COMMANDS:
        options = options_of(*names)
        for spelling, option in options.items():
            if option.param_type_name == "option":
                assert re.fullmatch(r"[^\n]+\.", option.help), (names, spelling)
                assert "_" not in spelling or spelling == "--pretrained_model_name_or_path", (names, spelling)
        assert "--config" in options or names in (("rewards",), ("scenarios",))


def test_rewards_lists_all():
    specs = [get_reward_spec(name) for name in list_rewards()]
    rows = lines(run("rewards", "--format", "jsonl").stdout)
    assert [(row["name"], row["paper"]) for row in rows] == [(spec.name, spec.paper) for spec in specs]
    table = run("rewards").stdout.splitlines()[2:]
    for spec, line in zip(specs, table, strict=True):
        assert line.split()[0] == spec.name
        assert all(text in line for text in (spec.judges, spec.accuracy, spec.license.partition(" (")[0]))
        assert spec.embedded == line.endswith("embedded")
    details = run("rewards", *(spec.name for spec in specs)).stdout
    for spec in specs:
        assert all(text in details for text in (spec.name, spec.paper, spec.license, spec.scale, spec.weights))
    assert [row["name"] for row in lines(run("rewards", "mps", "--format", "jsonl").stdout)] == ["mps"]
    assert "did you mean 'pickscore'" in only_error(run("rewards", "pikscore"))


def test_help_imports_nothing_heavy():
    heavy = "{'torch', 'numpy', 'diffusers', 'transformers', 'PIL', 'huggingface_hub', 'yaml', 'accelerate'}"
    check = (
        "import sys, aigiqa_reward.cli as cli\n"
        "for words in (['score'], ['best-of-n'], ['demo'], ['finetune'], []):\n"
        "    try: cli.app([*words, '--help'])\n"
        f"    except SystemExit: assert not {heavy} & set(sys.modules), words\n"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(text in done.stdout for text in ("--prompts", "--lora", "aigiqa-demo", "grpo", "evaluate"))


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_error(tiny, paths):
    arguments = command("score", *paths, *tiny, "--prompt", PROMPT, "--format", "jsonl")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=120) == 0


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", SIGNALS)
def test_interrupted_scoring_prints_what_it_has(paths, tiny, tiny_reward, tmp_path, number):
    common = ["score", *paths, *tiny, "--prompt", PROMPT, "--batch-size", "1", "--format", "jsonl"]
    with opening(3, number):
        result = run(*common, cwd=tmp_path)
    assert result.exit_code == 130
    assert result.stderr == "error: interrupted: the result holds 3 of 5 images\n"
    assert_scores(lines(result.stdout), tiny_reward, paths[:3], PROMPT)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("command", "name", "number"), [("score", "a.csv", 15), ("rank", "寿" * 85, signal.SIGINT)])
def test_the_same_command_continues_an_interrupted_one(paths, tiny, tmp_path, command, name, number):
    images = [write_image(tmp_path / "images" / f"{seed}.png", seed) for seed in range(5)]
    common = [command, *images, *tiny, "--prompt", PROMPT, "--format", "csv", "--batch-size", "1"]
    whole, file = run(*common).stdout, tmp_path / "new" / name

    def opened(*more: object, until: int = -1) -> int:
        with opening(until, number) as places:
            result = run(*common, "--output", file, *more)
        assert (result.exit_code, result.stdout) == (0 if until < 0 else 130, ""), result.output
        assert ([file] == list(file.parent.iterdir())) == (until < 0), "the result is there when it is whole"
        return len(places)

    assert opened(until=2) == 2
    (partial,) = file.parent.iterdir()
    partial.write_bytes(partial.read_bytes() + b'["cut')
    assert opened(until=1) == 1
    assert opened() == 2
    assert file.read_text() == whole
    for more in ("--overwrite", "--quality-weight=3", "--dtype=bfloat16", ""):
        file.unlink()
        assert opened(until=3) == 3
        if not more:
            write_image(images[0], 99)
        assert opened(*[more][: len(more)]) == (5 if more else 3)


def test_a_result_that_cannot_be_written_goes_to_stdout(paths, tiny, tmp_path, monkeypatch):
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    common = ["score", *paths, *tiny, "--format", "jsonl"]
    printed = run(*common).stdout
    monkeypatch.setattr(os, "fsync", full)
    result = run(*common, "--output", tmp_path / "scores.jsonl")
    assert (result.exit_code, result.stdout) == (1, printed)
    assert re.search("warning: cannot keep .*No space left.*\nerror: --output: cannot write", result.stderr)
    with opening(3, signal.SIGINT):
        result = run(*common, "--output", tmp_path / "scores.jsonl", "--batch-size", "1")
    assert (result.exit_code, result.stdout) == (130, "".join(printed.splitlines(keepends=True)[:3]))
    assert not list(tmp_path.iterdir())


STREAMS = """
import os, sys
from contextlib import suppress
from pathlib import Path
from aigiqa_reward.cli._console import CommandError, emit, prepare_process, progress, say
from aigiqa_reward.cli._io import check_output
if len(sys.argv) > 1:
    sys.stdin.read()  # until the terminal is gone
prepare_process()
with open("result", "w") as file, progress("scoring", 2) as show:
    say("note", "x" * 10_000)
    with suppress(OSError):
        os.write(2, b"from a library")
    print("from a library", file=sys.stderr, flush=True)
    show(1)
    file.write("whole")
try:
    check_output(None)
    emit("the result")
except CommandError as error:
    Path("refused").write_text(str(error))
emit(" and a copy", saved=True)
"""


@pytest.mark.parametrize(("closed", "refused"), [((), False), ((0,), False), ((2,), False), ((0, 1, 2), True)])
def test_without_streams_messages_are_lost_and_results_are_not(tmp_path, closed, refused):
    shell = " ".join(f"{number}>&-" for number in closed)
    (tmp_path / "run.py").write_text(STREAMS)
    arguments = ["sh", "-c", f"{sys.executable} run.py {shell}"]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "result").read_text() == "whole"
    assert (tmp_path / "refused").exists() == refused
    assert refused or done.stdout == b"the result and a copy"


def test_a_terminal_that_is_gone_takes_messages_only(tmp_path):
    master, slave = pty.openpty()
    (tmp_path / "run.py").write_text(STREAMS)
    arguments = [sys.executable, "run.py", "wait"]
    with subprocess.Popen(arguments, cwd=tmp_path, stdin=-1, stdout=slave, stderr=slave, env=ENVIRONMENT) as process:
        os.close(slave)
        os.close(master)
    assert process.returncode == 0
    assert (tmp_path / "result").read_text() == "whole"
    assert "cannot write the result to stdout" in (tmp_path / "refused").read_text()
