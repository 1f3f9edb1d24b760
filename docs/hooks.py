"""Hooks of mkdocs: add linked files of the repository to the site, and list the commands.

Pages link to files outside of `docs/` by their path in the repository, so that the links work there too. Each such file
is added to the site under `repository/`: Markdown as a page whose own links are followed, anything else unchanged.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
TAKEN = "repository"
LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")
COMMANDS = "<!-- commands -->"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link to outside of the folder of pages, and what those link to in turn."""
    waiting = [*files.documentation_pages()]
    while waiting:
        file = waiting.pop()
        origin = _origin(file)
        for match in LINK.finditer(origin.read_text(encoding="utf-8")):
            target = _target(origin, match["target"])
            if target is None or _inside(target) or files.get_file_from_path(_uri(target)) is not None:
                continue
            added = File.generated(config, _uri(target), abs_src_path=str(target))
            files.append(added)
            waiting += [added] if added.is_documentation_page() else []
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at where their files lie in the site; a folder without a page becomes plain text."""
    origin, here = _origin(page.file), Path(page.file.src_uri).parent

    def replace(match: re.Match[str]) -> str:
        path = origin.parent / match["target"]
        target = _target(origin, match["target"])
        if target is None:
            return match["text"] if path.is_dir() else match[0]
        return f"[{match['text']}]({os.path.relpath(_uri(target), here)}{match['anchor'] or ''})"

    return LINK.sub(replace, markdown).replace(COMMANDS, command_reference() if COMMANDS in markdown else "")


def _origin(file: File) -> Path:
    """The file of the repository that a page is made of."""
    return Path(file.abs_src_path or "").resolve()


def _target(origin: Path, link: str) -> Path | None:
    """The file that a relative link leads to; None where it leads to none in the repository."""
    path = (origin.parent / link).resolve()
    path = path / "README.md" if path.is_dir() else path
    return path if path.is_file() and path.is_relative_to(ROOT) else None


def _inside(path: Path) -> bool:
    return path.is_relative_to(DOCS)


def _uri(path: Path) -> str:
    """Where a file of the repository lies among the sources of the site."""
    return path.relative_to(DOCS).as_posix() if _inside(path) else f"{TAKEN}/{path.relative_to(ROOT).as_posix()}"


# --------------------------------------------------------------------------------------------- the command line


def command_reference() -> str:
    """Every command with its options, from the app itself."""
    from typer.main import get_command

    from aigiqa_reward.cli import app

    return "\n\n".join(_sections(get_command(app), "aigiqa-reward"))


def _sections(command: Any, name: str) -> Iterator[str]:
    context = command.context_class(command)
    if hasattr(command, "list_commands"):
        for inner in sorted(command.list_commands(context)):
            yield from _sections(command.get_command(context, inner), f"{name} {inner}")
        return
    panels: dict[str, list[Any]] = {}
    for parameter in command.get_params(context):
        panels.setdefault(getattr(parameter, "rich_help_panel", None) or "Options", []).append(parameter)
    parts = [f"## {name}", _plain(command.help)]
    for panel, parameters in panels.items():
        rows = "\n".join(_row(parameter) for parameter in parameters if "--help" not in parameter.opts)
        parts.append(f"| {panel} | | default |\n| --- | --- | --- |\n{rows}")
    yield "\n\n".join(parts)


def _row(parameter: Any) -> str:
    names = [*parameter.opts, *parameter.secondary_opts] if parameter.param_type_name == "option" else [parameter.name]
    default = "required" if parameter.required else parameter.default
    shown = "" if default is None or default == () or callable(default) else f"{getattr(default, 'value', default)}"
    names = ", ".join(f"`{name}`" for name in names)
    return f"| {names} | {_plain(getattr(parameter, 'help', None))} | {_plain(shown)} |"


def _plain(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|").replace("<", "&lt;")
