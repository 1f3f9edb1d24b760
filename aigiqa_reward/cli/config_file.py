"""Options of a command from one YAML file, read as a command line is: a value is a text until its option has it."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from typer import BadParameter, Option

from aigiqa_reward.cli.inputs import CommandError, read_text

_NOTHING = ("", "~", "null", "Null", "NULL")
"""Plain YAML scalars that stand for no value; their options keep the default."""

_KINDS = {"scalar": "a text", "sequence": "a list", "mapping": "lines 'name: value'"}
"""YAML's nodes, in words."""


def config_option(help: str) -> Any:
    """An option `--config FILE` whose entries take the place of the command's defaults."""
    return Option("--config", metavar="FILE", help=help, is_eager=True, callback=_read)


def _read(context: Any, file: Path | None) -> Path | None:
    if file is None or context.resilient_parsing:
        return file
    options = _options(context.command)
    found: dict[str, Any] = {}
    for name, node in _entries(file):
        option = options.get(name.replace("-", "_"))
        if option is None:
            meant = difflib.get_close_matches(name.replace("-", "_"), options, n=1)
            hint = f"; did you mean {meant[0]}?" if meant else "; see --help"
            raise CommandError(f"--config: {file}: no option is named {name!r}{hint}")
        if option.name in found:
            raise CommandError(f"--config: {file}: {name} is there twice")
        found[option.name] = _value(context, file, name, option, node)
    given = {name: value for name, value in found.items() if value is not None}
    context.default_map = {**(context.default_map or {}), **given}
    return file


def _options(command: Any) -> dict[str, Any]:
    """A command's options by their spelling, without dashes before and with _ within; arguments are not among them."""
    long = [(spelt, each) for each in command.params for spelt in each.opts if spelt.startswith("--")]
    return {spelt[2:].replace("-", "_"): option for spelt, option in long if option.name != "config"}


def _entries(file: Path) -> list[tuple[str, Any]]:
    """Names and YAML nodes of a file's mapping."""
    import yaml

    try:
        root = yaml.compose(read_text(file, "--config"), Loader=yaml.BaseLoader)
    except RecursionError as error:
        raise CommandError(f"--config: {file} is nested too deep; expected lines 'option: value'") from error
    except yaml.YAMLError as error:
        raise CommandError(f"--config: {file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(root, yaml.MappingNode):
        got = "nothing" if root is None else _KINDS[root.id]
        raise CommandError(f"--config: {file}: expected lines 'option: value', got {got}")
    return [(key.value if isinstance(key, yaml.ScalarNode) else _KINDS[key.id], value) for key, value in root.value]


def _value(context: Any, file: Path, name: str, option: Any, node: Any) -> Any:
    """What an option is given: a text, texts for one that may be given several times, None for nothing."""
    listed = option.multiple and node.id == "sequence"
    parts = node.value if listed else [node]
    if not all(part.id == "scalar" for part in parts):
        expected = "a value or a list of values" if option.multiple else "one value"
        raise CommandError(f"--config: {file}: {name}: expected {expected}, got {_KINDS[node.id]}")
    texts = [part.value for part in parts]
    if not listed and node.style is None and texts[0] in _NOTHING:
        return None
    value: Any = texts if option.multiple else texts[0]
    try:
        option.process_value(context, value)
    except BadParameter as error:
        raise CommandError(f"--config: {file}: {name}: {error.message.removeprefix('Value error, ')}") from error
    return value
