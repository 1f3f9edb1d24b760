"""Tables in every form, named and found columns, and the keys by which rows are matched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest

from aigiqa_reward.cli._console import CommandError
from aigiqa_reward.cli._io import read_prompts
from aigiqa_reward.datasets import PreferencePairs, read_table, split_rows
from aigiqa_reward.utils.io import csv_text, parse_json

PROMPTS = [
    "a red apple, on a blue background",
    '"G I G" painted on a wall',
    'the words "a, b" on it\nin two lines',
    "42",
]
FLAT = [prompt.replace("\n", " ") for prompt in PROMPTS]
"""What spreadsheets write as TSV: neither quotes nor line breaks within a cell."""


def as_json(value: Any) -> str:
    return json.dumps(value, indent=1)


FORMS = {
    "drawbench.csv": csv_text([["Prompts", "Category"], *([prompt, "x, y"] for prompt in PROMPTS)]),
    "spaces.csv": '\ufeffid, prompt\r\n1, "a red apple, on a blue background"\r\n2,"42 "\r\n',
    "unix.tsv": csv_text([["caption"], *([prompt] for prompt in PROMPTS)]),
    "PartiPrompts.tsv": "".join("\t".join(cells) + "\n" for cells in [("Prompt", "Note"), *((p, "x") for p in FLAT)]),
    "hpsv2.json": as_json(PROMPTS),
    "objects.json": as_json([{"id": n, "prompt": prompt} for n, prompt in enumerate(PROMPTS)]),
    "wrapped.json": as_json({"version": 1, "prompts": PROMPTS}),
    "ids.json": as_json({f"{n}": {"category": "x", "prompt": prompt} for n, prompt in enumerate(PROMPTS)}),
    "texts.jsonl": "\r\n\r\n".join(map(json.dumps, PROMPTS)),
    "captions.ndjson": "".join(json.dumps({"text": prompt, "seed": 1}) + "\n" for prompt in PROMPTS),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_table_gives_its_prompts_and_no_header(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(FORMS[name], encoding="utf-8", newline="")
    expected = {"spaces.csv": [PROMPTS[0], "42"], "PartiPrompts.tsv": FLAT}.get(name, PROMPTS)
    assert read_prompts(tmp_path / name, "prompts") == expected


def test_parquet_and_xlsx_give_the_same(tmp_path: Path) -> None:
    frame = pandas.DataFrame({"image": [{"bytes": b"x", "path": "a"}] * 4, "raw": b"x", "prompt": PROMPTS, "seed": 1})
    frame.to_parquet(tmp_path / "p.parquet")
    frame[["seed", "prompt"]].to_excel(tmp_path / "p.XLSX", index=False, engine="openpyxl")
    for name in ("p.parquet", "p.XLSX"):
        assert read_prompts(tmp_path / name, "prompts") == PROMPTS


@pytest.mark.parametrize(
    ("name", "text", "column", "message"),
    [
        ("p.csv", "a red apple\na penguin\n", None, "no column prompt; .* got a red apple; name the column with --"),
        ("p.csv", "promt,seed\na,1\n", None, "is 'promt' meant. name the column"),
        ("p.csv", "Prompt,prompts\na,b\n", None, "expected one column prompt, got Prompt, prompts; name the column"),
        ("p.tsv", "prompt\tprompt\na\tb\n", None, "each column once, got prompt several times"),
        ("p.csv", "short,long\na,b\n", "shrt", "no column shrt; .* got short, long; is 'short' meant"),
        ("p.csv", 'prompt\n"G I G" painted\n', None, "line 2: not CSV"),
        ("p.jsonl", '{"prompt": "a"}\n{"promt": "b"}', None, "line 2: expected prompt, got promt"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b", "prompt": "c"}', None, "line 2: .*'prompt' is given twice"),
        ("p.json", '["a", 3]', None, "entry 2: expected a text or an object"),
        ("p.json", '[{"prompt": ["a"]}]', None, r"entry 1: expected a text in column prompt, got \['a'\]"),
        ("p.json", '{"a": ["1"], "b": ["2"]}', None, "no column prompt; .* got a, b"),
        ("p.json", '{"a": {"0": "x"}, "b": {"0": "y"}}', None, "no column prompt"),
        ("p.json", '"a fox, "x"', None, "p.json: not JSON"),
        ("p.parquet", "PAR1", None, "expected a whole Parquet file"),
        ("p.yaml", "- a red apple\n", None, "rename it to .txt"),
        ("p.txt", "prompt\na red apple\n", None, "line 1: expected a text, got the header .* as .csv"),
        ("63", '\ufeff"Category"\t"Prompts"\nArts\ta\n', None, "line 1: expected a text, got the header"),
        ("p.csv", "prompt\n", None, "at least one row"),
        ("none.csv", None, None, "cannot read .*none.csv: No such file"),
    ],
)  # fmt: skip
def test_a_table_without_prompts_is_refused(
    tmp_path: Path, name: str, text: str | None, column: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(CommandError, match=message):
        read_prompts(tmp_path / name, "prompts", column)


def test_another_file_need_not_have_the_named_column(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("short,prompt\na,b\n")
    (tmp_path / "p.txt").write_text("a penguin\n")
    assert [read_prompts(tmp_path / "p.csv", argument, "short") for argument in ("prompts", "validation")] == [
        ["a"]
    ] * 2
    assert read_prompts(tmp_path / "p.txt", "validation", "short") == ["a penguin"]


def scores(folder: Path, text: str | None, name: str = "scores.csv") -> Path:
    for number in range(3):
        (folder / f"{number}.png").touch()
    (folder / name).write_text(text or "")
    return folder / name


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        ("path,prompt,quality,quality", "0.png,a,1,2", "each column once, got quality several times"),
        ("path,prompt,prompt,quality", "0.png,a,b,1", "each column once, got prompt several times"),
        ("path,prompt,quality,group,group", "0.png,a,1,x,y", "each column once, got group several times"),
        ("path,prompt,quality,correspondance", "0.png,a,1,2", "no column correspondence; .*is 'correspondance' meant"),
        ("path,prompt,correspondence,Quality", "0.png,a,1,2", "is 'Quality' meant.*rename"),
        ("path,prompt,quality,genrator", "0.png,a,1,x", "no column generator; .*is 'genrator' meant"),
        ("pth,prompt,quality", "0.png,a,1", "no column path; .*is 'pth' meant"),
        ("path,prompt,quality", "0.png,a,1\n1.png,b,2\n./0.png,a ,3", "line 4: './0.png' is listed twice, .*line 2"),
        ("path,prompt,quality", "0.png,a,1\nx/../0.png,b,3", "line 3: .* is listed twice, first as '0.png' of line 2"),
        ("path,prompt,quality", "0.png,a,1\nFOLDER/0.png,b,3", "line 3: .* is listed twice, first as '0.png' of"),
    ],
)  # fmt: skip
def test_a_used_column_and_a_path_are_unique(tmp_path: Path, header: str, row: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_table(scores(tmp_path, f"{header}\n{row}\n".replace("FOLDER", str(tmp_path))))


def test_an_absolute_path_is_its_relative_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores(tmp_path, f"path,prompt,quality\n0.png,a,1\n{tmp_path}/0.png,a,3\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"line 3: .* is listed twice, first as '0\.png'"):
        read_table("scores.csv")


def test_columns_that_are_not_used_may_be_anything(tmp_path: Path) -> None:
    table = read_table(scores(tmp_path, "path,prompt,quality,note,note,,\n0.png,a,1,x,y,,\n"))
    assert table.quality.tolist() == [1]


def test_scores_come_in_every_form_of_table(tmp_path: Path) -> None:
    rows = [{"path": f"{n}.png", "Caption": f" fox {n} ", "quality": n / 3, "correspondence": n} for n in range(3)]
    frame = pandas.DataFrame(rows)
    scores(tmp_path, frame.to_csv(sep="\t", index=False), "s.tsv")
    scores(tmp_path, frame.to_json(orient="records", double_precision=15), "s.json")
    scores(tmp_path, frame.to_json(orient="records", lines=True, double_precision=15), "s.jsonl")
    frame.to_parquet(tmp_path / "s.parquet")
    for name in ("s.tsv", "s.json", "s.jsonl", "s.parquet"):
        table = read_table(tmp_path / name)
        assert table.prompts == ("fox 0", "fox 1", "fox 2"), name
        np.testing.assert_allclose(table.quality, frame.quality, rtol=1e-14)
        assert table.correspondence.tolist() == [0, 1, 2]


def test_spellings_of_a_prompt_are_one_group_and_of_a_path_one_image(tmp_path: Path) -> None:
    spelled = ["a café", " a café", "a  cafe\u0301 "]
    rows = [["path", "prompt", "quality"], *([f"{n}.png", prompt, 1] for n, prompt in enumerate(spelled))]
    table = read_table(scores(tmp_path, csv_text(rows)))
    assert set(table.groups) == {"a café"} and table.prompts[1] == "a café"
    (tmp_path / "split.csv").write_text("name,split\n./0.png,train\nx/../1.png,test\n2.png,val\n")
    assert split_rows(table, mode="csv", seed=0, file=tmp_path / "split.csv").test.tolist() == [1]
    (tmp_path / "twice.csv").write_text("name,split\n./0.png,train\n0.png,test\n")
    with pytest.raises(ValueError, match=r"line 3: '0\.png' is listed twice"):
        split_rows(table, mode="csv", seed=0, file=tmp_path / "twice.csv")
    with pytest.raises(ValueError, match="expected two images"):
        PreferencePairs(prompts=("a",), better=(Path("0.png"),), worse=(Path("x/../0.png"),))


def test_a_key_of_json_is_given_once() -> None:
    assert parse_json('{"a": {"b": 1}, "b": 2}') == {"a": {"b": 1}, "b": 2}
    with pytest.raises(ValueError, match="'b' is given twice"):
        parse_json('[{"a": {"b": 1, "c": 2, "b": 1}}]')
