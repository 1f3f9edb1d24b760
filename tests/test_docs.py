"""The documentation is correct: links lead somewhere, commands and options exist, and the Python blocks run."""

from __future__ import annotations

import ast
import builtins
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.main import get_command

from aigiqa_reward.cli import app

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (ROOT / "docs", ROOT / "aigiqa_reward" / "assets", ROOT / "examples", ROOT / "integrations")
PAGES = {
    page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8")
    for page in sorted([*ROOT.glob("*.md"), *(file for folder in FOLDERS for file in folder.rglob("*.md"))])
}

BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]*?) -->\n)?```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$", re.M | re.S
)
SPAN = re.compile(r"`([^`]+)`")
FAST = ("docs/quickstart.md",)
"""Pages whose Python blocks the fast suite runs; the others sample or train for longer."""

OF_OTHERS = {"--fp32-vae", "--bf16-vae", "--shutdown-timeout", "--nproc-per-node", "--num-processes", "--cpu"}
OF_OTHERS |= {"--use-fsdp"}
"""Options of ComfyUI, torchrun and accelerate that the prose names."""


class Block(NamedTuple):
    language: str
    code: str
    line: int
    reason: str | None


def blocks(text: str, language: str) -> list[Block]:
    found = [
        Block(m["language"], m["code"], text.count("\n", 0, m.start("code")) + 1, m["reason"])
        for m in BLOCK.finditer(text)
    ]
    return [block for block in found if block.language == language]


def prose(text: str) -> str:
    return BLOCK.sub("", text)


# --------------------------------------------------------------------------------------------- links


def anchors(text: str) -> set[str]:
    headings = (
        re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in re.findall(r"^#+ +(.+?) *$", prose(text), re.M)
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    for link in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(PAGES[name])):
        place, _, anchor = link.partition("#")
        if not re.match(r"[a-z]+:", link):
            target = (ROOT / name).parent / place if place else ROOT / name
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


# --------------------------------------------------------------------------------------------- commands


def calls(lines: Iterator[str]) -> Iterator[list[str]]:
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split, words = True, [[]]
        for word in lexer:
            words.append([]) if re.fullmatch(r"[;&|]+", word) else words[-1].append(word)
        for call in words:
            if name := next((word for word in call if word in ("aigiqa-reward", "aigiqa_reward")), None):
                yield call[call.index(name) + 1 :]


def find(call: list[str]) -> tuple[Any, list[str]]:
    command: Any = get_command(app)
    words = list(call)
    while hasattr(command, "list_commands") and words and not re.fullmatch(r"-.*|\.{3}|[A-Z_]+", words[0]):
        name = words.pop(0)
        command = command.get_command(command.context_class(command), name)
        assert command is not None, f"no command {name}"
    return command, words


def options_of(command: Any) -> set[str]:
    return {n for p in command.get_params(command.context_class(command)) for n in (*p.opts, *p.secondary_opts)} | {
        "--help"
    }


def all_commands(command: Any = None, name: str = "") -> Iterator[tuple[str, Any]]:
    command = command or get_command(app)
    if hasattr(command, "list_commands"):
        context = command.context_class(command)
        for inner in command.list_commands(context):
            yield from all_commands(command.get_command(context, inner), f"{name} {inner}".strip())
    else:
        yield name, command


@pytest.mark.parametrize("name", PAGES)
def test_commands_and_their_options_exist(name: str) -> None:
    code = (line for block in blocks(PAGES[name], "bash") for line in block.code.replace("\\\n", " ").splitlines())
    spans = (" ".join(span.split()) for span in SPAN.findall(prose(PAGES[name])))
    for call in [*calls(code), *calls(span for span in spans if "aigiqa-reward " in span or "aigiqa_reward " in span)]:
        command, words = find(call)
        given = {word.partition("=")[0].replace("_", "-") for word in words if re.match(r"--?[a-z]", word)}
        if not hasattr(command, "list_commands"):
            assert given <= options_of(command), call


@pytest.mark.parametrize("name", sorted(PAGES.keys() - {"CHANGELOG.md"}))
def test_options_that_the_prose_names_exist(name: str) -> None:
    known = OF_OTHERS.union(*(options_of(command) for _, command in all_commands()))
    alone = {m[0].replace("_", "-") for s in SPAN.findall(prose(PAGES[name])) if (m := re.match(r"--[a-z][\w-]*", s))}
    assert alone <= known


def test_the_site_lists_every_option_of_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mkdocs", reason='pip install ".[docs]"')
    monkeypatch.syspath_prepend(ROOT / "docs")
    import hooks

    page = hooks.command_reference()
    for name, command in all_commands():
        section = page.partition(f"## aigiqa-reward {name}\n")[2].partition("\n## ")[0]
        assert section
        assert [option for option in options_of(command) - {"--help"} if f"`{option}`" not in section] == []


# --------------------------------------------------------------------------------------------- Python


RUN = [name for name in PAGES if blocks(PAGES[name], "python")]


@pytest.mark.parametrize("name", RUN)
def test_python_blocks_use_what_their_page_defines(name: str) -> None:
    known = set(dir(builtins))
    for block in blocks(PAGES[name], "python"):
        nodes = list(ast.walk(ast.parse(block.code)))
        for node in nodes:
            if isinstance(node, ast.Import | ast.ImportFrom):
                known |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                known.add(node.name)
            elif isinstance(node, ast.arg):
                known.add(node.arg)
            elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
                known.add(node.id)
        assert {node.id for node in nodes if isinstance(node, ast.Name)} <= known, f"block at line {block.line}"


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in FAST)) for n in RUN])
def test_python_blocks_run_in_their_order(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {"__name__": "documentation_page"}
    for block in blocks(PAGES[name], "python"):
        if block.reason is None:
            exec(compile("\n" * (block.line - 1) + block.code, name, "exec"), scope)


# --------------------------------------------------------------------------------------------- completeness


def test_every_public_module_is_in_the_reference() -> None:
    reference = "".join(text for name, text in PAGES.items() if name.startswith("docs/reference/"))
    documented = set(re.findall(r"^::: ([\w.]+)$", reference, re.M))
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts) for p in (ROOT / "aigiqa_reward").rglob("[!_]*.py")}
    packages = {module.rpartition(".")[0] for module in modules}
    assert documented <= modules | packages
    left_out = {m for m in modules if m not in documented and m.rpartition(".")[0] not in documented}
    assert {module for module in left_out if ".cli" not in module} == set()


def test_the_page_of_licenses_names_all_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    import licenses

    text = PAGES["docs/licenses.md"]
    assert [name for name in licenses.requirements() if f"| {name} |" not in text] == []
    folders = {folder.name for folder in (ROOT / "aigiqa_reward" / "assets").iterdir() if folder.is_dir()}
    assert folders == licenses.EMBEDDED.keys()
    assert [name for name in folders if f"| `{name}` |" not in text] == []
