"""The documentation is true: links lead somewhere, commands exist, and what can run offline does."""

from __future__ import annotations

import re
from pathlib import Path

import documentation
import pytest
from documentation import (
    ROOT,
    app_commands,
    block_commands,
    blocks,
    broken_links,
    call_of_ours,
    commands,
    folder_of,
    lone_options,
    options_of,
    refusal,
    undefined_names,
    wrong_command,
)
from test_layering import FACADE, HEIGHT

from aigiqa_reward import _EXPORTS

PAGES = {page.relative_to(ROOT).as_posix(): page for page in documentation.pages()}

RUN = [name for name, page in PAGES.items() if any(block.language == "python" for block in blocks(page.read_text()))]
FAST = ("docs/quickstart.md",)
"""Pages that the fast suite runs too; the others sample or train for longer."""

OF_OTHERS = {"--fp32-vae", "--bf16-vae", "--shutdown_timeout"}
"""Options of ComfyUI and torchrun that the prose names."""


@pytest.fixture(scope="module")
def known():
    return app_commands()


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    assert broken_links(PAGES[name]) == []


@pytest.mark.parametrize("name", PAGES)
def test_commands_and_their_options_exist(name: str, known) -> None:
    text = PAGES[name].read_text()
    assert [wrong for words in commands(text) if (wrong := wrong_command(words, known))] == []
    every = OF_OTHERS.union(*map(options_of, known.values()))
    assert [option for option in lone_options(text) if option not in every] == []


@pytest.mark.parametrize("name", PAGES)
def test_printed_commands_are_taken(name: str, known) -> None:
    """As far as that can be told before files are read and models loaded; and each has a folder of its own."""
    calls = [call for words in block_commands(PAGES[name].read_text()) if (call := call_of_ours(words))]
    assert [wrong for call in calls if (wrong := refusal(call, known))] == []
    folders = [folder for call in calls if (folder := folder_of(call))]
    assert sorted(folders) == sorted(set(folders))


@pytest.mark.parametrize("name", RUN)
def test_python_blocks_use_what_their_page_makes(name: str) -> None:
    """Those that are not run too."""
    assert undefined_names(PAGES[name].read_text()) == []


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in FAST)) for n in RUN])
def test_python_blocks_run_in_their_order(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that holds the examples, as the reader's checkout does; marked blocks say why they are left out."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {"__name__": "documentation_page"}
    for block in blocks(PAGES[name].read_text()):
        if block.language == "python" and block.reason is None:
            exec(compile("\n" * (block.line - 1) + block.code, str(PAGES[name]), "exec"), scope)


def test_every_room_and_public_name_has_its_place_in_the_reference() -> None:
    reference = "\n".join(page.read_text() for name, page in PAGES.items() if name.startswith("docs/reference/"))
    documented = {line.split()[1] for line in reference.splitlines() if line.startswith("::: ")}
    assert "aigiqa_reward" in documented
    exported = {module.split(".")[1] for module in _EXPORTS.values()}
    for room in set(HEIGHT) - exported - {FACADE, "cli", "__main__"}:
        folder = ROOT / "aigiqa_reward" / room
        inner = {f"aigiqa_reward.{room}.{file.stem}" for file in folder.glob("[!_]*.py")}
        assert f"aigiqa_reward.{room}" in documented or (inner and inner <= documented), room


@pytest.fixture
def documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of the documentation can be imported."""
    monkeypatch.syspath_prepend(ROOT / "docs")


def test_the_picture_of_imports_is_current(documents) -> None:
    import import_graph

    picture = import_graph.PICTURE.read_text()
    graph = import_graph.import_graph()
    assert f"<dc:description>{import_graph.describe(graph)}</dc:description>" in picture, "python docs/import_graph.py"
    drawn = re.findall(r"<text [^>]*>(\w+)</text>", picture)
    assert sorted(drawn) == sorted("aigiqa_reward" if room == FACADE else room for room in graph)


def test_what_a_longer_way_implies_is_not_drawn(documents) -> None:
    import import_graph

    graph = {"a": [], "b": ["a"], "c": ["a", "b"], "d": ["c", "a"], "e": ["b"]}
    assert import_graph.direct(graph) == {("b", "a"), ("c", "b"), ("d", "c"), ("e", "b")}


def test_the_site_lists_every_option_of_every_command(known, documents) -> None:
    pytest.importorskip("mkdocs", reason='pip install ".[docs]"')
    import hooks

    assert hooks.COMMANDS in PAGES["docs/reference/command-line.md"].read_text()
    listed = {part.split("\n")[0].strip(): part for part in hooks._commands().split("## aigiqa-reward ")[1:]}
    assert set(listed) == set(known)
    for name, command in known.items():
        dashed = [option for option in options_of(command) if option != "--help" and "_" not in option]
        assert [option for option in dashed if f"`{option}`" not in listed[name]] == []


# --------------------------------------------------------------------------------------------- the checks can fail


@pytest.mark.parametrize(
    ("link", "message"),
    [
        ("missing.md", "no such file"),
        ("other.md#nowhere", "no such heading"),
        ("#nowhere", "no such heading"),
        ("folder/", "no such file"),
    ],
)
def test_a_broken_link_is_found(tmp_path: Path, link: str, message: str) -> None:
    (tmp_path / "other.md").write_text("# A `heading`, of: [words](x.md)!\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Here\n[a](#here) [b](other.md#a-heading-of-words) [c](https://example.org)\n```\n[d](no.md)\n```\n"
    )
    assert broken_links(page) == []
    page.write_text(page.read_text() + f"![picture]({link})\n")
    assert broken_links(page) == [f"{link}: {message}"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("aigiqa-reward scor PHOTOS/", "no command scor"),
        ("pip install . && aigiqa-reward demo --count 3", "demo has no --count"),
        ("aigiqa-reward rank A/ \\\n  --top 5 # --nothing", "rank has no --top"),
        ("for n in 1; do aigiqa-reward score A/ --formats=csv; done", "score has no --formats"),
        ("torchrun --nproc_per_node 2 -m -- aigiqa_reward best-of-n --modell X", "no --modell"),
        ("python examples/none.py", "no such script"),
        ("python examples/best_of_n_sd15.py PROMPT --number 4", "has no --number"),
    ],
)
def test_a_command_that_does_not_exist_is_found(line: str, message: str, known) -> None:
    [found] = [wrong for words in commands(f"```bash\n{line}\n```\n") if (wrong := wrong_command(words, known))]
    assert message in found


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("rank A/ --top-k many", "integer"),
        ("score", "Missing"),
        (
            "finetune draft --config examples/finetune_sdxl.yaml --prompts p.txt --holdout_reward compact",
            "--holdout_reward: judges images of",
        ),
        ("finetune draft --pretrained_model_name_or_path SD --prompts p.txt --beta 3", "--beta: an option of dpo"),
        ("finetune grpo --pretrained_model_name_or_path SD --prompts p.txt --clip_range 3", "clip_range"),
    ],
)
def test_a_command_that_is_refused_is_found(line: str, message: str, known) -> None:
    [call] = map(call_of_ours, block_commands(f"```bash\naccelerate launch -m aigiqa_reward {line}\n```\n"))
    assert message in (refusal(call, known) or "")


def test_the_folder_of_a_command_is_found() -> None:
    assert folder_of(["train", "compact", "--out", "mine/", "--data", "csv:x.csv"]) == "mine/"
    assert folder_of(["score", "A/", "--prompt", "a fox"]) is None


def test_a_name_that_no_block_makes_is_found() -> None:
    text = "```python\nimport a.b as c, d.e\nx = [y for y in d]\nprint(c, w)\n```\n```python\nx, z\n```\n"
    assert undefined_names(text) == ["w, line 4", "z, line 7"]


def test_commands_and_options_in_prose_are_read() -> None:
    text = "The command `aigiqa-reward rank A/\n--top 5`, its `--top-k K\\|all`, and `rank`.\n"
    assert list(commands(text)) == [["aigiqa-reward", "rank", "A/", "--top", "5"]]
    assert lone_options(text) == ["--top-k"]


def test_blocks_are_read_with_their_marks() -> None:
    text = "a\n```python\nx = 1\n```\n<!-- not run: needs a GPU -->\n```python\ny\n```\n```bash\nls\n```\n"
    assert [(b.language, b.code, b.line, b.reason) for b in blocks(text)] == [
        ("python", "x = 1\n", 3, None),
        ("python", "y\n", 7, "needs a GPU"),
        ("bash", "ls\n", 10, None),
    ]
