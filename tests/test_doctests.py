"""Every public name has an example in its documentation, and every example gives what it says.

Examples are found in the source and not on the imported objects: jaxtyping's hook replaces functions, and doctest would
pass over those without a word.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import functools
import importlib
import inspect
import io
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1] / "aigiqa_reward"

PUBLIC = (
    "aigiqa_reward",
    "aigiqa_reward.assistants",
    "aigiqa_reward.benchmark",
    "aigiqa_reward.datasets",
    "aigiqa_reward.evaluation",
    "aigiqa_reward.finetuning",
    "aigiqa_reward.images",
    "aigiqa_reward.report",
    "aigiqa_reward.sampling",
    "aigiqa_reward.rewards.factory",
)
"""Packages that users import from: every name of their `__all__` has an example."""

NOT_PACKAGED = {
    "aigiqa_reward.toy.judge": ("load_judge",),
    "aigiqa_reward.encoders.open_clip": ("OpenCLIPConfig",),
    "aigiqa_reward.encoders.timm": ("TimmConfig", "TimmLevelsConfig"),
    "aigiqa_reward.models.cpa_iqa": ("Preferences",),
    "aigiqa_reward.rewards.scorer": ("ScoredImage", "ScoringError"),
    "aigiqa_reward.rewards.ranking": ("rank",),
    "aigiqa_reward.training.recipes": ("Recipe",),
    "aigiqa_reward.types": ("PromptError", "PromptFeatures"),
}
"""Names that users take from single modules."""

NEEDS = {
    "datasets/agiqa1k.py": "openpyxl",
    "datasets/aigciqa2023.py": "openpyxl",
    "datasets/pickapic.py": "pyarrow",
} | {"finetuning/__init__.py": "pyarrow"}
"""Files whose examples need the extra `data`."""


def examples_of(text: str, name: str) -> Iterator[doctest.DocTest]:
    """The examples of each docstring in a module's source."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            docstring = node.body[0]
            assert isinstance(docstring, ast.Expr) and isinstance(docstring.value, ast.Constant)
            place = f"{name}:{getattr(node, 'name', 'module')}"
            found = doctest.DocTestParser().get_doctest(
                str(docstring.value.value), {"__name__": "__main__"}, place, name, docstring.lineno - 1
            )
            if found.examples:
                yield found


def failures(test: doctest.DocTest) -> str:
    """What doctest says of an example that gives something else; nothing if it gives what it says."""
    report = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
    with contextlib.redirect_stderr(io.StringIO()):
        runner.run(test, out=report.write)
    return report.getvalue()


def used_in(docstring: str | None, name: str) -> bool:
    """Whether an example of a docstring uses a name."""
    sources = (example.source for example in doctest.DocTestParser().get_examples(docstring or ""))
    return any(re.search(rf"\b{re.escape(name)}\b", source) for source in sources)


def without_example(module: ModuleType, names: tuple[str, ...] | list[str]) -> list[str]:
    """Names of a module that have no example.

    Of a class or function it is in its own docstring or in its package's. What has no docstring of its own (a table, a
    number, an alias) is used in the example of one of its neighbors.
    """
    objects = {name: getattr(module, name) for name in names}
    missing = []
    for name, value in objects.items():
        own = inspect.isclass(value) or inspect.isroutine(value)
        docs = [value.__doc__ if own else None, module.__doc__]
        if not own:
            docs += [other.__doc__ for other in objects.values() if callable(other)]
        if not any(used_in(doc, name) for doc in docs):
            missing.append(f"{module.__name__}.{name}")
    return missing


def described(text: str) -> set[str]:
    """Names that a module's source assigns with a docstring behind, which the reference shows them by."""
    body = ast.parse(text).body
    return {
        target.id
        for node, behind in pairwise(body)
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(behind, ast.Expr)
        if isinstance(behind.value, ast.Constant) and isinstance(behind.value.value, str)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }


FILES = [path for path in sorted(ROOT.rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]

LONG = ("benchmark", "finetuning", "sampling", "scorer.py", "encoders")
"""Packages and files whose examples sample, train or embed for seconds: they run in the slow suite."""


@pytest.fixture(scope="module", autouse=True)
def _rewards_are_loaded_once() -> Iterator[None]:
    """Examples say `create_reward("compact")`, as a user does; here they share what it returned the first time."""
    from aigiqa_reward.rewards import factory as zoo

    create, kept = zoo.create_reward, {}

    @functools.wraps(create)
    def create_once(name: str, **options: Any) -> Any:
        if options:
            return create(name, **options)
        if name not in kept:
            kept[name] = create(name)
        return kept[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo, "create_reward", create_once)
        yield


def marked(path: Path) -> Any:
    """A file's case, slow where its examples are long."""
    place = path.relative_to(ROOT)
    return pytest.param(path, marks=[pytest.mark.slow] * (place.parts[0] in LONG), id=place.as_posix())


@pytest.mark.parametrize("path", [marked(path) for path in FILES])
def test_examples_give_what_they_say(path, tmp_path, monkeypatch):
    place = path.relative_to(ROOT).as_posix()
    if place in NEEDS:
        pytest.importorskip(NEEDS[place])
    for number, test in enumerate(examples_of(path.read_text(encoding="utf-8"), place)):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        if report := failures(test):
            pytest.fail(report, pytrace=False)


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_has_an_example(module):
    package = importlib.import_module(module)
    assert without_example(package, package.__all__) == []


@pytest.mark.parametrize("module", PUBLIC[1:])
def test_every_public_table_and_number_is_described(module):
    package = importlib.import_module(module)
    values = {name: getattr(package, name) for name in package.__all__}
    plain = {name for name, value in values.items() if not (inspect.isclass(value) or inspect.isroutine(value))}
    files = (ROOT / module.rpartition(".")[2]).glob("*.py")
    assert plain - set().union(*(described(file.read_text(encoding="utf-8")) for file in files)) == set()


@pytest.mark.parametrize("module", NOT_PACKAGED)
def test_every_name_from_a_single_module_has_an_example(module):
    assert without_example(importlib.import_module(module), NOT_PACKAGED[module]) == []


def test_every_list_of_public_names_is_looked_through():
    packages = {
        ".".join(("aigiqa_reward", *path.parent.relative_to(ROOT).parts))
        for path in ROOT.rglob("__init__.py")
        if "__all__ = " in path.read_text(encoding="utf-8")
    }
    inner = {"aigiqa_reward.cli", "aigiqa_reward.sampling.families"}  # the command line, and the adapters
    assert packages - inner == set(PUBLIC)


def test_a_name_without_an_example_and_a_wrong_example_are_found(tmp_path):
    source = tmp_path / "house.py"
    source.write_text(
        '"""A package.\n\nExample:\n    >>> listed()\n    3\n"""\n'
        "TABLE, UNUSED = {1: 2}, 3\n"
        "def listed():\n    return 3\n"
        'def shown():\n    """Shows.\n\n    Example:\n        >>> shown(), TABLE\n        (1, {})\n    """\n'
        'def silent():\n    """Says nothing of shown()."""\n'
        'class Quiet:\n    """Nor this: see silent()."""\n'
    )
    module = ModuleType("house")
    module.__doc__ = ast.get_docstring(ast.parse(source.read_text()))
    exec(compile(source.read_text(), source, "exec"), vars(module))
    names = ["TABLE", "UNUSED", "listed", "shown", "silent", "Quiet"]
    assert without_example(module, names) == ["house.UNUSED", "house.silent", "house.Quiet"]

    text = 'A = 1\n"""One."""\nB, C = 2, 3\n"""Both."""\nD: int = 4\n"""Four."""\nE = 5\nF = ""\n'
    assert described(text) == {"A", "D"}
    tests = {test.name: test for test in examples_of(source.read_text(), "house")}
    assert sorted(tests) == ["house:module", "house:shown"]
    for test in tests.values():
        test.globs.update(listed=lambda: 3, shown=lambda: 1, TABLE={1: 2})
    assert failures(tests["house:module"]) == ""
    assert "(1, {1: 2})" in failures(tests["house:shown"])
