"""Every public name has an example in its documentation, and every example gives the output it shows."""

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
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1] / "aigiqa_reward"

PUBLIC = (
    "",
    *(f".{room}" for room in ("assistants", "datasets", "evaluation", "finetuning", "images", "report", "sampling")),
)
"""Packages that users import from: every class and function of their `__all__` has an example."""

NEEDS = {"datasets": "openpyxl", "rewards/metric.py": "torchmetrics"}
"""Files whose examples need an extra."""

LONG = ("training", "finetuning", "sampling", "encoders", "rewards/scorer.py", "rewards/metric.py")
"""Folders and files whose examples sample, train or embed for seconds: they run in the slow suite."""

FILES = [path for path in sorted(ROOT.rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]


def examples_of(text: str, name: str) -> Iterator[doctest.DocTest]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (
            doc := ast.get_docstring(node, clean=False)
        ):
            place = f"{name}:{getattr(node, 'name', 'module')}"
            found = doctest.DocTestParser().get_doctest(
                doc, {"__name__": "__main__"}, place, name, node.body[0].lineno - 1
            )
            if found.examples:
                yield found


@pytest.fixture(scope="module", autouse=True)
def _rewards_are_loaded_once() -> Iterator[None]:
    from aigiqa_reward.rewards import factory

    create, kept = factory.create_reward, {}

    @functools.wraps(create)
    def create_once(name: str, **options: Any) -> Any:
        if options:
            return create(name, **options)
        return kept[name] if name in kept else kept.setdefault(name, create(name))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factory, "create_reward", create_once)
        yield


def marked(path: Path) -> Any:
    place = path.relative_to(ROOT).as_posix()
    return pytest.param(path, marks=[pytest.mark.slow] * place.startswith(LONG), id=place)


@pytest.mark.parametrize("path", [marked(path) for path in FILES])
def test_examples_give_the_output_they_show(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = path.relative_to(ROOT).as_posix()
    for start, module in NEEDS.items():
        if place.startswith(start):
            pytest.importorskip(module)
    for number, test in enumerate(examples_of(path.read_text(encoding="utf-8"), place)):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        report = io.StringIO()
        with contextlib.redirect_stderr(io.StringIO()):
            doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False).run(test, out=report.write)
        if report.getvalue():
            pytest.fail(report.getvalue(), pytrace=False)


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_has_an_example(module: str) -> None:
    package = importlib.import_module(f"aigiqa_reward{module}")
    missing = []
    for name in package.__all__:
        if name == "RewardMetric":
            pytest.importorskip("torchmetrics")
        value = getattr(package, name)
        if inspect.isclass(value) or inspect.isroutine(value):
            sources = (
                e.source
                for doc in (value.__doc__, package.__doc__)
                for e in doctest.DocTestParser().get_examples(doc or "")
            )
            if not any(re.search(rf"\b{name}\b", source) for source in sources):
                missing.append(name)
    assert missing == []
