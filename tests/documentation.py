"""Reading the documentation: its pages, links, anchors, blocks of code and commands."""

from __future__ import annotations

import ast
import builtins
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import typer
from typer.main import get_command

from aigiqa_reward.cli import finetune
from aigiqa_reward.finetuning import FinetuneConfig

ROOT = Path(__file__).resolve().parents[1]

_MARK = r"^(?:<!-- not run: (?P<reason>[^\n]*?) -->\n)?"
BLOCK = re.compile(_MARK + r"```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$", re.M | re.S)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SPAN = re.compile(r"`([^`]+)`")
SEPARATORS = re.compile(r"[;&|]+")
PLACEHOLDER = re.compile(r"\.{3}|[A-Z_]+|\$.*")
"""What stands for a value that the reader chooses."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `reason` says why it is not run, if it is not."""

    language: str
    code: str
    line: int
    reason: str | None


def pages(root: Path = ROOT) -> list[Path]:
    """Everything that users read: README and the like, the documentation, model cards and notes beside examples."""
    inner = (root / "docs", root / "aigiqa_reward" / "assets", root / "examples", root / "integrations")
    return sorted([*root.glob("*.md"), *(file for folder in inner for file in folder.rglob("*.md"))])


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    return [
        Block(m["language"], m["code"], text.count("\n", 0, m.start("code")) + 1, m["reason"])
        for m in BLOCK.finditer(text)
    ]


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return BLOCK.sub("", text)


def anchors(text: str) -> set[str]:
    """What the headings of a page may be linked by."""
    found = set()
    for heading in re.findall(r"^#+ +(.+?) *$", prose(text), re.M):
        words = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower())
        found.add(words.replace(" ", "-"))
    return found


def broken_links(page: Path) -> list[str]:
    """Links of a page to files or headings that are not there. Links to other sites are not followed."""
    found = []
    for link in LINK.findall(prose(page.read_text(encoding="utf-8"))):
        place, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (page.parent / place).resolve() if place else page
        if not target.exists():
            found.append(f"{link}: no such file")
        elif anchor and (target.suffix != ".md" or anchor not in anchors(target.read_text(encoding="utf-8"))):
            found.append(f"{link}: no such heading")
    return found


def undefined_names(text: str) -> list[str]:
    """Names in a page's blocks of Python that no block before, nor the same one, makes; run or not."""
    known, found = set(dir(builtins)), []
    for block in (block for block in blocks(text) if block.language == "python"):
        nodes = list(ast.walk(ast.parse(block.code)))
        for node in nodes:
            if isinstance(node, ast.Import | ast.ImportFrom):
                known |= {(name.asname or name.name).partition(".")[0] for name in node.names}
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                known.add(node.name)
            elif isinstance(node, ast.arg):
                known.add(node.arg)
            elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
                known.add(node.id)
        names = [node for node in nodes if isinstance(node, ast.Name) and node.id not in known]
        found += [f"{node.id}, line {block.line + node.lineno - 1}" for node in names]
    return found


# --------------------------------------------------------------------------------------------- commands


def commands(text: str) -> Iterator[list[str]]:
    """The words of each simple command in a page's blocks for a shell and in its code spans."""
    yield from block_commands(text)
    spans = [" ".join(span.split()) for span in SPAN.findall(prose(text))]
    yield from _split(span for span in spans if re.match(r"(aigiqa-reward|torchrun|accelerate launch|python) ", span))


def block_commands(text: str) -> Iterator[list[str]]:
    """Those in the blocks alone, which are whole: a reader copies them."""
    code = [block.code.replace("\\\n", " ") for block in blocks(text) if block.language == "bash"]
    yield from _split(line for several in code for line in several.splitlines())


def _split(lines: Iterable[str]) -> Iterator[list[str]]:
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split, words = True, []
        for word in lexer:
            if not SEPARATORS.fullmatch(word):
                words.append(word)
            elif words:
                yield words
                words = []
        if words:
            yield words


def lone_options(text: str) -> list[str]:
    """Options that a page's prose names without their command, as in `--top-k 5`."""
    return [match[0] for span in SPAN.findall(prose(text)) if (match := re.match(r"--[a-z][\w-]*", span))]


def app_commands() -> Mapping[str, Any]:
    """The commands of `aigiqa-reward` by name."""
    from aigiqa_reward.cli import app

    group: Any = get_command(app)
    return group.commands


def options_of(command: Any) -> set[str]:
    """Every spelling of every option of a command."""
    found = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return found | {"--help"}


def wrong_command(words: list[str], known: Mapping[str, Any], root: Path = ROOT) -> str | None:
    """What is wrong with a command of ours, or of a script of this repository; None for others and right ones."""
    if ours := call_of_ours(words):
        return _wrong_call(ours, known)
    if words[0] in ("python", "torchrun") and (script := next((w for w in words if w.endswith(".py")), None)):
        if not (root / script).is_file():
            return f"{script}: no such script"
        source = _with_what_it_imports(root / script)
        given = [word.partition("=")[0] for word in words[words.index(script) :] if word.startswith("--")]
        return next((f"{script} has no {option}" for option in given if f'"{option}"' not in source), None)
    return None


def call_of_ours(words: list[str]) -> list[str]:
    """What follows the name of our command; nothing in a command of others."""
    name = next((word for word in words if word in ("aigiqa-reward", "aigiqa_reward")), None)
    return [] if name is None else words[words.index(name) + 1 :]


def refusal(call: list[str], known: Mapping[str, Any]) -> str | None:
    """What the command line says against a call before it looks at files or loads a model; None where it takes it.

    Args:
        call: a command of ours and its words; files of options are named from the root of the checkout.
        known: of `app_commands`.
    """
    if not call or call[0] not in known:
        return None
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        known[call[0]].make_context(call[0], call[1:])
        if call[0] == "finetune":
            _check_finetuning(call[1:])
    except Exception as error:  # typer's own, a CommandError, or what a setting's class says
        return f"{type(error).__name__}: {error}"
    finally:
        os.chdir(before)
    return None


def folder_of(call: list[str]) -> str | None:
    """Where a call of ours writes its results, which another one may find there."""
    options = [place for place, word in enumerate(call) if word in ("--out", "--output_dir", "--report")]
    return call[options[0] + 1] if options else None


def _check_finetuning(words: list[str]) -> None:
    """What `finetune` checks of its options before it loads a pipeline; pairs, which are files, are left out."""
    app = typer.Typer()

    @app.command()
    @wraps(finetune.finetune)
    def check(**given: Any) -> None:
        own = finetune._own_settings(given)
        finetune._algorithm(given["algorithm"].value, {name: own[name] for name in own.keys() - {"pairs"}})
        FinetuneConfig(**finetune._loop_settings(given))

    get_command(app).main(words, standalone_mode=False)


def _with_what_it_imports(script: Path) -> str:
    """Its text, and that of modules beside it, which may read its arguments."""
    source = script.read_text(encoding="utf-8")
    beside = (script.with_name(f"{module}.py") for module in re.findall(r"^from (\w+) import", source, re.M))
    return "\n".join([source, *(file.read_text(encoding="utf-8") for file in beside if file.is_file())])


def _wrong_call(words: list[str], known: Mapping[str, Any]) -> str | None:
    name = words[0] if words else ""
    if PLACEHOLDER.fullmatch(name) or name in ("", "--help", "--version"):
        return None
    if name not in known:
        return f"aigiqa-reward has no command {name}"
    options = options_of(known[name])
    given = [word.partition("=")[0] for word in words[1:] if word.startswith("-")]
    return next((f"aigiqa-reward {name} has no {option}" for option in given if option not in options), None)
